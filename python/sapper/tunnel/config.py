"""Configuration files of a tunnel's two ends: TOML, and the JSON of W3PTUNL's original watcher.

::

    [tunnel]                        # the server's: sapper tunnel serve --config
    port = 9000
    public_ports = [20000, 20999]
    [tunnel.tls]
    credentials = { kind = "certificate", chain = "chain.pem", key = "key.pem" }

    [expose]                        # the client's: sapper expose --config
    server = "tunnel.example:9000"
    service = 3000
    credentials = { token = "…" }

Options have the names that they have in Python, and a mistake is told with the field's name. Not here: who
reads a file again and when; :mod:`sapper.tunnel.fleet` runs what a client's file says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, Strict, model_validator

from sapper._arguments import host_name, socket_path, whole
from sapper._files import read_whole
from sapper._mistakes import again
from sapper._options import Options, config_error
from sapper.endpoint import split_address
from sapper.errors import ConfigError, ErrorContext
from sapper.tls.config import TlsConfig
from sapper.tunnel._defaults import ClientDefaults, CommonDefaults, ServerDefaults, credentials_text
from sapper.tunnel._plain import (
    ClientPlan,
    PlainLimits,
    PlainService,
    ServerPlan,
    allows,
    said,
    secret,
)
from sapper.tunnel.client import TunnelClient
from sapper.tunnel.options import ClientOptions, ServerOptions, Service, _Host
from sapper.tunnel.server import TunnelServer

__all__ = ["WATCHED_NAMES", "ClientConfig", "ServerConfig", "is_watched", "read_clients", "secret"]

_Flag = Annotated[bool, Strict()]
_Port = Annotated[int, Strict(), Field(ge=1, le=65_535)]


def _as_tls(value: object) -> object:
    if isinstance(value, dict):
        return TlsConfig.from_mapping(value)
    return value if value is None or isinstance(value, bool) else TlsConfig.of(value, field="")


def _as_service(value: object) -> object:
    if value is None:
        return value
    if value == "unix:":
        raise config_error(None, "unix: needs a path")
    if isinstance(value, str) and value.startswith("unix:"):
        socket_path(value.removeprefix("unix:"), "")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise config_error(None, 'must be a port, "host:3000" or "unix:/path"', "wrong_type")
    if isinstance(value, int) and not 1 <= value <= 65_535:
        raise config_error(None, f"{value} is no port")
    return value


def _as_exposed(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return Service.parse(str(value))
    return value


_Tls = Annotated[TlsConfig | None, BeforeValidator(_as_tls)]


class ServerConfig(ServerOptions):
    """What a server is told by a file: where it listens, whom it lets in, and all options.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    port: Annotated[int, Strict(), Field(ge=0, le=65_535)] = 9000
    """The main port; 0 takes a free one."""
    tls: _Tls = None
    """TLS at the main port."""
    visitor_tls: _Tls = None
    """TLS at public ports."""
    token_file: Path | None = None
    """File with the token that clients say."""
    clients: tuple[dict[str, Any], ...] = Field(default=(), repr=False)
    """Who is let in besides: each is a client's credentials, whole."""
    danger_allow_anonymous: _Flag = False
    """Everybody may have a tunnel."""

    @model_validator(mode="after")
    def _someone(self) -> Self:
        if self.danger_allow_anonymous and (self.clients or self.token_file is not None):
            name = "clients" if self.clients else "token_file"
            raise config_error(name, "danger_allow_anonymous lets everybody in")
        return self

    def options(self) -> ServerOptions:
        """Those of a server in Python."""
        return ServerOptions(**{name: getattr(self, name) for name in ServerOptions.model_fields})

    def allows(self, credentials: Mapping[str, Any]) -> bool:
        """Whether a client with these credentials may have a tunnel. Reads the token each time."""
        return allows(credentials, self.token_file, self.clients)

    def _check_token(self) -> None:
        """Finds out now whether anybody can be let in, not when the first one comes."""
        if self.token_file is not None:
            secret(self.token_file, "token_file")

    def server(self) -> TunnelServer:
        """A server that does so, not started.

        Raises:
            ConfigError: The token's file cannot be read.
        """
        self._check_token()
        return TunnelServer(
            None if self.danger_allow_anonymous else self.allows,
            tls=self.tls,
            visitor_tls=self.visitor_tls,
            options=self.options(),
            danger_allow_anonymous=self.danger_allow_anonymous,
        )

    def plain(self) -> ServerPlan | None:
        """The same without models; ``None`` where TLS needs them."""
        if self.tls is not None or self.visitor_tls is not None:
            return None
        options = ServerDefaults(**_plain(self, ServerDefaults))
        return ServerPlan(options, self.port, self.token_file, self.clients, self.danger_allow_anonymous)

    async def reload(self, server: TunnelServer) -> None:
        """Has a server that runs do so from now on.

        Raises:
            ConfigError: That cannot be; what was there stays in use.
        """
        if self.port not in (0, server.port):
            raise config_error("port", "cannot be changed while the server runs")
        self._check_token()
        before = server.connection_filter
        try:
            server.connection_filter = None if self.danger_allow_anonymous else self.allows
        except ConfigError as error:
            raise again(error, error.message, "danger_allow_anonymous") from None
        try:
            await server.reload(self.options(), tls=self.tls, visitor_tls=self.visitor_tls)
        except BaseException:
            server.connection_filter = before
            raise

    @classmethod
    def _relative_to(cls, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        values = _nested(folder, values, "tls", "visitor_tls")
        return _beside(folder, values, "token_file", "lease_file")


class ClientConfig(ClientOptions):
    """What a client is told by a file: its server, its service, who it is, and all options.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    server: str
    """``"tunnel.example:9000"``."""
    service: Annotated[int | str | None, BeforeValidator(_as_service)] = None
    """A port of this machine, ``"host:3000"``, or ``"unix:/path"``."""
    services: tuple[Annotated[Service, BeforeValidator(_as_exposed)], ...] = ()
    """Several instead: each as ``service``, with a name and a public port (``"db=5432@8432"``), or a
    table."""
    credentials: dict[str, Any] | None = Field(default=None, repr=False)
    """What the client says of itself."""
    token_file: Path | None = None
    """File with the server's token, which is said instead."""
    tls: Annotated[TlsConfig | bool, BeforeValidator(_as_tls)] = False
    """TLS to the server: ``true``, or a table."""
    server_hostname: str | None = None
    """Name to check, where it is not the server's host."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.credentials is not None and self.token_file is not None:
            raise config_error("credentials", "and token_file do not go together")
        credentials_text(self.credentials or {}, "credentials")
        self.place()
        if (self.service is None) == (not self.services):
            raise config_error("service", "one is needed, or several services, and one of the two alone")
        self.where()
        return self

    def place(self) -> tuple[str, int]:
        """The server's host and port."""
        return _address(self.server, "server")

    def where(self) -> dict[str, Any]:
        """The service, as a client's arguments."""
        if self.service is None:
            return {"services": self.services}
        if isinstance(self.service, int):
            return {"local_service_port": self.service}
        if self.service.startswith("unix:"):
            return {"local_service_path": self.service.removeprefix("unix:")}
        if self.service.isascii() and self.service.isdigit():
            return {"local_service_port": whole(int(self.service), "service", 1, 65_535)}
        host, port = _address(self.service, "service")
        return {"local_service_host": host, "local_service_port": port}

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
            *self.place(),
            authentication_credentials=self.said(),
            tls=self.tls,
            server_hostname=self.server_hostname,
            options=ClientOptions(**{name: getattr(self, name) for name in ClientOptions.model_fields}),
            **self.where(),
        )

    def plain(self) -> ClientPlan | None:
        """The same without models; ``None`` where TLS needs them."""
        if self.tls is not False or self.server_hostname is not None:
            return None
        where = self.where()
        if self.services:
            plain = (PlainService(one._native(first=at == 0)) for at, one in enumerate(self.services))
            where = {"services": tuple(plain)}
        options = ClientDefaults(**_plain(self, ClientDefaults))
        return ClientPlan(options, self.server, self.place(), where, self.token_file, self.credentials)

    @classmethod
    def _relative_to(cls, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        tunnels = values.get("tunnels")
        if isinstance(tunnels, dict):
            own = {
                name: cls._relative_to(folder, one) for name, one in tunnels.items() if isinstance(one, dict)
            }
            values = {**values, "tunnels": {**tunnels, **own}}
        services = values.get("services")
        if isinstance(services, list):
            tables = (_beside(folder, one, "path") if isinstance(one, dict) else one for one in services)
            values = {**values, "services": [*tables]}
        return _beside(folder, _nested(folder, values, "tls"), "token_file")


class _Clients(Options):
    """A table of one client, or of several that share what is said above them."""

    tunnels: dict[str, ClientConfig]

    @model_validator(mode="before")
    @classmethod
    def _shared(cls, values: Any) -> Any:
        common = dict(values)
        tunnels = common.pop("tunnels", None)
        if tunnels is None:
            return {"tunnels": {"": ClientConfig(**common)}}
        if not isinstance(tunnels, dict) or not all(isinstance(one, dict) for one in tunnels.values()):
            raise config_error("tunnels", "must be tables: [expose.tunnels.NAME]", "wrong_type")
        return {"tunnels": {name: {**common, **one} for name, one in tunnels.items()}}

    @classmethod
    def _relative_to(cls, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        return ClientConfig._relative_to(folder, values)


#: What the original's watcher calls the fields of a :class:`ClientConfig`.
WATCHED_NAMES = {
    "server": "serverHost",
    "service": "localServicePort",
    "credentials": "authenticationCredentials",
}


class _WatchedTls(Options):
    """TLS as the original's watcher has it."""

    enabled: _Flag
    ca: str | None = None
    rejectUnauthorized: _Flag = True  # noqa: N815 - the file's word, which an error names


class _WatchedTunnel(Options):
    """One tunnel of the original's watcher."""

    enabled: _Flag = True
    name: str
    serverHost: _Host | None = None  # noqa: N815
    serverPort: _Port | None = None  # noqa: N815
    localServicePort: _Port  # noqa: N815
    authenticationCredentials: dict[str, Any] = Field(default={}, repr=False)  # noqa: N815
    tls: _WatchedTls = _WatchedTls(enabled=False)

    def config(self, host: str | None, port: int | None) -> ClientConfig:
        """The same in our words."""
        tls: TlsConfig | bool = self.tls.enabled
        if self.tls.enabled and (self.tls.ca is not None or not self.tls.rejectUnauthorized):
            # Who is believed whatever he shows needs nobody to vouch for him.
            ca = self.tls.ca.encode() if self.tls.ca is not None and self.tls.rejectUnauthorized else None
            try:
                tls = TlsConfig(roots=ca, danger_accept_any_certificate=not self.tls.rejectUnauthorized)
            except ConfigError as error:
                raise _inside(error, "tls.ca") from None
        host, port = self.serverHost or host, self.serverPort or port
        if host is None or port is None:
            raise config_error("serverHost" if host is None else "serverPort", "is required")
        try:
            return ClientConfig(
                server=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                service=self.localServicePort,
                credentials=self.authenticationCredentials,
                tls=tls,
            )
        except ConfigError as error:
            raise again(error, error.message, WATCHED_NAMES.get(error.field or "", error.field)) from None


class _Watched(Options):
    """The whole file: the server, and tunnels; or tunnels alone, each with its server."""

    serverHost: _Host | None = None  # noqa: N815
    serverPort: _Port | None = None  # noqa: N815
    tunnels: tuple[_WatchedTunnel, ...]

    def configs(self) -> dict[str, ClientConfig]:
        """Those that are enabled, by name."""
        found: dict[str, ClientConfig] = {}
        for number, one in enumerate(self.tunnels):
            if not one.enabled:
                continue
            if one.name in found:
                raise config_error(f"tunnels.{number}.name", f"{one.name!r} is another tunnel's too")
            try:
                found[one.name] = one.config(self.serverHost, self.serverPort)
            except ConfigError as error:
                raise _inside(error, f"tunnels.{number}") from None
        return found


def is_watched(path: Path) -> bool:
    """Whether a file is the original's watcher's, and a mistake in it is told in that one's names."""
    try:
        text = read_whole(path)[0].decode()
    except (OSError, ValueError):  # told by who reads it
        text = ""
    return _is_watched(path, text)


def _is_watched(path: Path, text: str) -> bool:
    return path.suffix == ".json" or text.lstrip().startswith("{")


def read_clients(path: Path, *, table: str = "expose") -> dict[str, ClientConfig]:
    """Reads the clients of a file, by name; one that has none is called ``""``.

    Args:
        path: TOML, or the JSON of the original's watcher. Paths in it are relative to its folder.
        table: The table of a TOML file.

    Raises:
        ConfigError: The file cannot be read, or a value is wrong; ``field`` is its dotted path.
    """
    try:
        text = read_whole(path)[0].decode()
    except OSError as error:
        context = ErrorContext(field=None, errno=error.errno)
        raise ConfigError(f"cannot read {path}: {error.strerror}", context) from error
    except ValueError as error:
        raise config_error(None, f"{path} is no text: {error}") from error
    if not _is_watched(path, text):
        return _Clients.from_toml(path, table=table).tunnels
    try:
        said = json.loads(text)
    except RecursionError:
        raise config_error(None, f"{path} is nested too deep") from None
    except ValueError as error:
        raise config_error(None, f"{path} is not JSON: {error}") from error
    if isinstance(said, list):
        said = {"tunnels": said}
    if not isinstance(said, dict):
        raise config_error(None, f"{path} holds neither an object nor a list of tunnels", "wrong_type")
    return _Watched.from_mapping(said).configs()


def _plain(config: Options, kind: type[CommonDefaults]) -> dict[str, Any]:
    """What a configuration says of the fields of a class without models."""
    values = {one.name: getattr(config, one.name) for one in fields(kind)}
    limits = (name for name in values if name.endswith("limits"))
    return {**values, **{name: PlainLimits(values[name]._native()) for name in limits}}


def _address(text: str, name: str) -> tuple[str, int]:
    try:
        host, port = split_address(text)
    except ValueError as error:
        raise config_error(name, str(error)) from None
    return host_name(host, name), whole(port, name, 1, 65_535)


def _inside(error: ConfigError, field: str) -> ConfigError:
    """The same error with the way to its field."""
    inner = error.field if error.field and not field.endswith(".ca") else None
    context = ErrorContext(field=f"{field}.{inner}" if inner else field, reason=error.reason)
    return ConfigError(error.message, context)


def _nested(folder: Path, values: dict[str, Any], *names: str) -> dict[str, Any]:
    inside = {name: values[name] for name in names if isinstance(values.get(name), dict)}
    return {**values, **{name: TlsConfig._relative_to(folder, one) for name, one in inside.items()}}


def _beside(folder: Path, values: dict[str, Any], *names: str) -> dict[str, Any]:
    paths = {name: values[name] for name in names if isinstance(values.get(name), str)}
    return {**values, **{name: folder / one for name, one in paths.items()}}
