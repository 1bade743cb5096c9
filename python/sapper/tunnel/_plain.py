"""What a configuration says, in values that need no models: for a process that serves for months.

:mod:`sapper.tunnel.config` reads and checks; its ``plain()`` makes these. Not here: TLS, whose configuration
is a model itself.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sapper._files import read_whole
from sapper._mistakes import config_error
from sapper.tunnel._defaults import ClientDefaults, PlainLimits, PlainService, ServerDefaults
from sapper.tunnel.client import TunnelClient
from sapper.tunnel.server import TunnelServer

if TYPE_CHECKING:
    from sapper.tunnel.options import ClientOptions, ServerOptions

__all__ = ["ClientPlan", "PlainLimits", "PlainService", "ServerPlan", "allows", "said", "secret"]


@dataclass(frozen=True)
class ServerPlan:
    """A server without TLS."""

    options: ServerDefaults
    port: int
    token_file: Path | None
    clients: tuple[dict[str, Any], ...] = field(repr=False)
    danger_allow_anonymous: bool

    #: It has none.
    tls = visitor_tls = None

    def server(self) -> TunnelServer:
        """A server that does so, not started.

        Raises:
            ConfigError: The token's file cannot be read.
        """
        if self.token_file is not None:
            secret(self.token_file, "token_file")
        return TunnelServer(
            None if self.danger_allow_anonymous else self._allows,
            options=cast("ServerOptions", self.options),
            danger_allow_anonymous=self.danger_allow_anonymous,
        )

    def _allows(self, credentials: Mapping[str, Any]) -> bool:
        return allows(credentials, self.token_file, self.clients)


@dataclass(frozen=True)
class ClientPlan:
    """A client without TLS."""

    options: ClientDefaults
    server: str
    place: tuple[str, int]
    #: The service, as a client's arguments.
    where: dict[str, Any]
    token_file: Path | None
    credentials: dict[str, Any] | None = field(repr=False)

    #: It has none.
    tls = False

    @property
    def lease(self) -> str | None:
        """Whose public port it wants."""
        return self.options.lease

    def said(self) -> dict[str, Any]:
        """What it says of itself. Reads the token's file.

        Raises:
            ConfigError: That file cannot be read.
        """
        return said(self.token_file, self.credentials)

    def client(self) -> TunnelClient:
        """A client that does so, not started.

        Raises:
            ConfigError: The token's file cannot be read.
        """
        return TunnelClient(
            *self.place,
            authentication_credentials=self.said(),
            options=cast("ClientOptions", self.options),
            **self.where,
        )


def said(token_file: Path | None, credentials: dict[str, Any] | None) -> dict[str, Any]:
    """What a client says of itself. Reads the token's file.

    Raises:
        ConfigError: That file cannot be read.
    """
    if token_file is not None:
        return {"token": secret(token_file, "token_file")}
    return credentials or {}


def allows(
    credentials: Mapping[str, Any], token_file: Path | None, clients: Iterable[Mapping[str, Any]]
) -> bool:
    """Whether a client with these credentials may have a tunnel. Reads the token each time."""
    token = credentials.get("token")
    if token_file is not None and isinstance(token, str):
        known = secret(token_file, "token_file")
        # JSON can say text that is none; it is no reason to fail.
        if hmac.compare_digest(token.encode("utf-8", "surrogatepass"), known.encode()):
            return True
    text = _canonical(credentials)
    return any(hmac.compare_digest(text, _canonical(one)) for one in clients)


def secret(path: Path, name: str) -> str:
    """What a file holds, without the white space around it.

    Raises:
        ConfigError: It cannot be read, or is empty; ``field`` is ``name``.
    """
    try:
        text = read_whole(path)[0].decode().strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise config_error(name, f"cannot read {path}: {why}") from None
    if not text:
        raise config_error(name, f"{path} is empty")
    return text


def _canonical(credentials: Mapping[str, Any]) -> bytes:
    return json.dumps(credentials, sort_keys=True, default=str).encode()
