"""What a guest is given. Nothing of it is given unless it is named."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Strict, field_validator

from sapper._options import Options, config_error
from sapper.errors import SapperError
from sapper.tls import Credentials, TlsConfig
from sapper_wasi import _native

__all__ = ["Dir", "RunOptions"]

_Flag = Annotated[bool, Strict()]
_log = logging.getLogger("sapper")


class Dir(Options):
    """A folder of this machine under a name of the guest's."""

    host: Path
    """Its path here."""
    guest: Annotated[str, Field(min_length=1)]
    """Its path there, such as ``/data``."""
    writable: _Flag = False
    """Whether anything in it may be changed."""


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class RunOptions(Options):
    """What a guest is given. The default is nothing, and standard output that is kept."""

    args: Annotated[tuple[str, ...], BeforeValidator(lambda value: value)] = ()
    """Arguments behind the program's name."""
    env: Mapping[str, str] = Field(default_factory=dict)
    """Environment variables; none of this process's own."""
    stdin: bytes | Literal["inherit"] = b""
    """Bytes to read, or this process's own standard input."""
    stdout: Literal["capture", "inherit", "discard"] = "capture"
    """Whether standard output is kept, goes to this process's own, or nowhere."""
    stderr: Literal["capture", "inherit", "discard"] = "capture"
    """The same for standard error."""
    capture: Annotated[int, Strict(), Field(gt=0, le=1 << 30)] = 16 << 20
    """Bytes of each output that are kept at most; a guest that prints more is stopped."""
    dirs: tuple[Dir, ...] = ()
    """Folders. What is outside them does not exist for the guest."""
    allow_net: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Whom it may connect to: ``db.example.org:5432``, ``*.example.org:443``, ``10.0.0.0/8:*``,
    ``[::1]:8000-8010``. A name allows its look-up, and the addresses that it answered."""
    tls: Any = Field(default=None, validate_default=True)
    """TLS of its connections: a TlsConfig or Credentials for all servers, or a mapping of names
    (``db.example.org``, ``*.example.org``, ``*``) to them, of which the first that fits counts. ``None`` is
    the system's roots and no certificate."""
    handshake_timeout: Annotated[float, Strict(), Field(gt=0)] = 10.0
    """Seconds for each TLS handshake."""
    timeout: Annotated[float, Strict(), Field(gt=0)] | None = None
    """Seconds for all of it."""
    fuel: Annotated[int, Strict(), Field(gt=0, lt=1 << 63)] | None = None
    """Instructions, roughly, that it may run. Counting them makes it slower."""
    memory: Annotated[int, Strict(), Field(gt=0, lt=1 << 63)] = 256 << 20
    """Bytes of all its memories together."""

    @field_validator("tls")
    @classmethod
    def _configurations(cls, value: object) -> tuple[tuple[str, TlsConfig], ...]:
        if isinstance(value, Mapping):
            for name in value:
                if not isinstance(name, str):
                    raise config_error(None, "the names of servers are text", "wrong_type")
            given = tuple((name, TlsConfig.of(one, field=name)) for name, one in value.items())
        elif isinstance(value, tuple) and all(isinstance(one, tuple) for one in value):
            given = value  # what this made of it before
        elif value is None or isinstance(value, TlsConfig | Credentials):
            given = (("*", TlsConfig.of(value)),)
        else:
            raise config_error(
                None,
                f"must be a TlsConfig, Credentials or a mapping, not {type(value).__name__}",
                "wrong_type",
            )
        for name, one in given:
            if one.psk_answers is not None:
                raise config_error(
                    name, "a look-up of pre-shared keys is a server's: a guest is a client", "client_lookup"
                )
        return given

    @functools.cached_property
    def _native_tls(self) -> list[tuple[str, _native.TlsConfig]]:
        # Parsed once for all runs with these options: sessions are resumed from one to the next.
        return [(name, _native.TlsConfig(one.native_values())) for name, one in self.tls]

    def native_values(self, name: str) -> _native.RunDict:
        """The options as the binding takes them; files of certificates are looked at again."""
        for server, config in self._native_tls:
            try:
                config.reload()
            except SapperError as error:
                _log.warning("TLS of guests, %s: what was there stays in use: %s", server, error)
        return {
            "args": [name, *self.args],
            "env": list(self.env.items()),
            "stdin": None if self.stdin == "inherit" else bytes(self.stdin),
            "stdout": self.stdout,
            "stderr": self.stderr,
            "capture": self.capture,
            "dirs": [(one.host, one.guest, one.writable) for one in self.dirs],
            "allow_net": list(self.allow_net),
            "tls": self._native_tls,
            "handshake_timeout": self.handshake_timeout,
            "timeout": self.timeout,
            "fuel": self.fuel,
            "memory": self.memory,
        }

    @classmethod
    def of(cls, options: RunOptions | None, values: Mapping[str, Any]) -> Self | RunOptions:
        """Options from what :func:`sapper_wasi.run` takes."""
        if options is None:
            return cls(**values)
        if not isinstance(options, RunOptions):  # type: ignore[unreachable, unused-ignore]
            raise config_error("options", f"must be RunOptions, not {type(options).__name__}", "wrong_type")
        if not values:
            return options
        changed = options.model_copy(update=values)
        if "tls" not in values:
            # The same TLS: its sessions are resumed, whatever else is said for one run.
            vars(changed)["_native_tls"] = options._native_tls
        return changed

    @classmethod
    def _relative_to(cls, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        dirs = values.get("dirs")
        if isinstance(dirs, list):
            values["dirs"] = [
                {**one, "host": folder / one["host"]} if isinstance(one, dict) and "host" in one else one
                for one in dirs
            ]
        return values
