"""The error of a wrong option, for those who check arguments and need no models of options."""

from __future__ import annotations

from sapper.errors import ConfigError, ErrorContext

__all__ = ["config_error"]


def config_error(field: str | None, message: str, reason: str | None = None) -> ConfigError:
    """A ConfigError that names its field."""
    return ConfigError(message, ErrorContext(field=field, reason=reason))
