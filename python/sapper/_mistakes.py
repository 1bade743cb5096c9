"""The error of a wrong option, for those who check arguments and need no models of options."""

from __future__ import annotations

from sapper.errors import ConfigError, ErrorContext

__all__ = ["config_error", "shown"]

#: Characters of a wrong value that a message has.
_LONGEST = 80


def config_error(field: str | None, message: str, reason: str | None = None) -> ConfigError:
    """A ConfigError that names its field."""
    return ConfigError(message, ErrorContext(field=field, reason=reason))


def shown(text: str) -> str:
    """A wrong value in quotes, not longer than a line."""
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")
