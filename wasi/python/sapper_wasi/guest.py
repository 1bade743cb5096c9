"""A compiled guest."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from sapper.errors import ConfigError, ErrorContext
from sapper_wasi import _native

__all__ = ["Guest"]


class Guest:
    """A component, compiled once for any number of runs, also at the same time.

    Args:
        source: The component's file, or its bytes.

    Raises:
        ConfigError: It cannot be read, is no component, exports no ``wasi:cli/run``, or imports what
            this host has not; ``field`` is ``guest``.
    """

    def __init__(self, source: str | PathLike[str] | bytes) -> None:
        given: object = source
        if isinstance(given, bytes):
            self.name = "guest"
            content = given
        elif isinstance(given, str | PathLike) and not isinstance(fspath(given), bytes):
            path = Path(given)
            self.name = path.stem
            try:
                content = path.read_bytes()
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or str(error)
                raise ConfigError(
                    f"cannot read {path}: {why}",
                    ErrorContext(field="guest", errno=getattr(error, "errno", None)),
                ) from error
        else:
            raise ConfigError(
                f"must be a path or bytes, not {type(given).__name__}",
                ErrorContext(field="guest", reason="wrong_type"),
            )
        self.native = _native.Guest(content)

    @property
    def wasi(self) -> str:
        """Which WASI its ``run`` is of: ``"0.2"`` or ``"0.3"``."""
        return self.native.wasi

    def __repr__(self) -> str:
        return f"<Guest {self.name!r} of WASI {self.wasi}>"
