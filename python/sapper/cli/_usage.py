"""Mistakes in what was typed, told like every other mistake: as a sentence, or as JSON.

Not here: mistakes that only the commands find.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import typer

from sapper._options import config_error
from sapper.errors import ConfigError

__all__ = ["told"]

#: What the reader of the command line raises; typer shows no more of that family than this one.
_Mistake: type[Exception] = next(
    one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException"
)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raises a ConfigError for what cannot be read, with the option or the argument as its field."""
    try:
        yield
    except _Mistake as mistake:
        if type(mistake).__name__ == "NoArgsIsHelpError":
            raise SystemExit(_helped(mistake)) from None
        raise _config_error(mistake) from None
    except typer.Abort:
        raise SystemExit(130) from None


def _helped(asked: Any) -> int:
    """Where nothing was typed: the help is shown already, or is the message."""
    asked.show()
    return int(asked.exit_code)


def _config_error(mistake: Any) -> ConfigError:
    param, message, field = getattr(mistake, "param", None), mistake.format_message(), None
    if param is not None:
        is_option = param.param_type_name == "option"
        field = max(param.opts, key=len) if is_option else param.metavar or param.name.upper()
        message = mistake.message.removeprefix("Value error, ") or "is required"
    elif type(mistake).__name__ == "NoSuchOption":
        field = mistake.option_name
        others = ", ".join(sorted(mistake.possibilities or ()))
        message = f"there is no such option{f'; there is {others}' if others else ''}"
    elif (field := getattr(mistake, "option_name", None)) is not None:
        message = message.partition(f"{field!r} ")[2] or message
    error = config_error(field, message[:1].lower() + message[1:].rstrip("."))
    if mistake.ctx is not None:
        error.add_note(f"{mistake.ctx.command_path} {mistake.ctx.help_option_names[-1]}")
    else:
        error.add_note("sapper --help")
    return error
