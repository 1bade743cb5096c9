"""The command line: one file per command; each parses, calls, renders, and holds no logic.

typer, because a command is then a typed function like the rest of the package, with click's parsing
and rich's tables underneath. Only the command that is called is loaded: a server keeps for months what it
loaded once. The tunnel's, of which there are many, do not even keep typer: :mod:`sapper.cli._lean`.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sapper._files import is_pipe, keep_pipes
from sapper.cli._lines import finish, have_streams, leave_unread
from sapper.errors import SapperError

if TYPE_CHECKING:
    import typer

__all__ = ["app", "main"]

#: In the order of the help: the module of each command, and the name of the function or group in it.
_COMMANDS = {
    "bridge": ("bridge", "bridge"),
    "demo": ("demo", "demo"),
    "expose": ("tunnel", "expose"),
    "version": ("version", "version"),
    "proxy": ("proxy", "app"),
    "tunnel": ("tunnel", "tunnel"),
    "tls": ("tls", "tls"),
    "wasi": ("wasi", "wasi"),
}
#: What writing an answer fails with where the disk is full.
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_WITH_EXIT_CODES = ("bridge", "demo", "expose")


def main() -> None:
    """Runs the command line; errors become a sentence on standard error and an exit code."""
    have_streams()
    try:
        read_once = _names_a_pipe(sys.argv[1:])
        if not read_once and (sys.argv[1:2] == ["expose"] or sys.argv[1:3] == ["tunnel", "serve"]):
            from sapper.cli._lean import ask

            if (work := ask(_read)) is not None:
                return work.run()
        _read()
    except SapperError as error:
        from sapper.cli._output import fail

        sys.exit(fail(error, as_json="--json" in sys.argv))
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as end:
        # So typer and rich end where who read the answer is gone: no defect, for that one has what it wanted.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        leave_unread()
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        leave_unread()
    except OSError as error:
        if error.errno not in _UNWRITTEN or error.filename is not None:
            raise
        from sapper.cli._output import unwritten

        sys.exit(unwritten(error))
    finally:
        finish()


def _names_a_pipe(arguments: list[str]) -> bool:
    """Whether an option's file is there to be read once: then one process reads it, and remembers it."""
    found = any(is_pipe(one) or is_pipe(one.partition("=")[2]) for one in arguments if one)
    if found:
        keep_pipes()
    return found


def _read() -> None:
    """Does what the command line says.

    Raises:
        ConfigError: It says what there is not; ``field`` is the option, or the argument.
    """
    called = sys.argv[1] if len(sys.argv) > 1 else ""
    made = _make([called] if called in _COMMANDS else _COMMANDS)
    from sapper.cli._usage import told

    with told():
        code = made(prog_name="sapper", standalone_mode=False)
    if code:
        sys.exit(code)


def _make(commands: Iterable[str]) -> typer.Typer:
    import typer

    from sapper.cli._help import Command
    from sapper.cli._output import EXIT_CODES

    made = typer.Typer(
        name="sapper",
        help="Bridges and tunnels with a native data plane.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    # One command alone would be the whole program.
    made.callback()(_group)
    for name in commands:
        module, attribute = _COMMANDS[name]
        command = getattr(import_module(f"sapper.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            made.add_typer(command, name=name)
        else:
            made.command(name, cls=Command, epilog=EXIT_CODES if name in _WITH_EXIT_CODES else None)(command)
    return made


def _group() -> None:
    pass


def __getattr__(name: str) -> Any:
    """``app``: all commands, for who looks at them."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = made = _make(_COMMANDS)
    return made
