"""The error of a wrong option, for those who check arguments and need no models of options."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from sapper.errors import ConfigError, ErrorContext, SapperError

__all__ = ["WrongTypeError", "again", "config_error", "shown", "unused"]

#: Characters of a wrong value that a message has.
_LONGEST = 80

_E = TypeVar("_E", bound=SapperError)


class WrongTypeError(ValueError):
    """What a validator of an option raises about a value of another type."""


def config_error(field: str | None, message: str, reason: str | None = None) -> ConfigError:
    """A ConfigError that names its field."""
    return ConfigError(message, ErrorContext(field=field, reason=reason))


def unused(field: str | None, message: str) -> ConfigError:
    """A ConfigError about an option that has no use as things are: whoever said it believes that it holds."""
    return config_error(field, message, "unused")


def shown(text: str) -> str:
    """A wrong value in quotes, not longer than a line."""
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")


def again(error: _E, message: str, field: str | None) -> _E:
    """The same error in other words, with its notes."""
    made = type(error)(message, replace(error.context, field=field))
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    return made
