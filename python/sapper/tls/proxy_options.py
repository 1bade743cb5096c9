"""What a :class:`~sapper.tls.Proxy` is told: where it listens, whom it serves, and where it leads.

Addresses are text: ``":8443"``, ``"127.0.0.1:8443"``, ``"[::1]:8443"``, ``"unix:/run/x.sock"``; a service
that speaks TLS is ``"tls://db.example:5432"``. :meth:`ProxyOptions.from_toml` reads the same names.

Not here: what happens to connections; that is native.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, Strict, model_validator

from sapper import _native
from sapper._mistakes import again, unused
from sapper._options import Options, config_error
from sapper.endpoint import secure_url, split_address
from sapper.errors import ConfigError
from sapper.pump import Upgrade
from sapper.tls.bridge import with_protocol
from sapper.tls.config import TlsConfig

__all__ = ["ProxyOptions", "Route"]

_Flag = Annotated[bool, Strict()]
_Whole = Annotated[int, Strict()]
#: Less than a nanosecond is none.
_Seconds = Annotated[float, Strict(), Field(ge=1e-9, allow_inf_nan=False)]
#: A longest time, so that every deadline is a moment that the clock knows.
_YEAR = 365 * 86_400.0


def _as_list(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise config_error(None, f"must be text, or several texts, not {type(value).__name__}", "wrong_type")
    return value


def _as_tls(value: object) -> object:
    return value if value is None or isinstance(value, dict) else TlsConfig.of(value, field="")


def _for_services(value: TlsConfig | None) -> TlsConfig | None:
    return value if value is None else value.without_early_data()


_Texts = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
_Tls = Annotated[TlsConfig | None, BeforeValidator(_as_tls), AfterValidator(_for_services)]


class Route(Options):
    """One way through a proxy: which clients take it, and where it leads."""

    names: _Texts = ()
    """Server names (SNI) that take this way, ``*.`` in front for any one label; empty is all others."""
    to: _Texts
    """The service: ``"host:port"``, ``"unix:/path"``, ``"tls://host:port"`` (TLS to it), ``"original"``
    (where the client wanted to go before the system's rules led it here). Several are tried in this order."""
    tls: _Tls = None
    """What we prove to clients. ``None`` is the proxy's ``tls``."""
    pass_through: _Flag = False
    """Clients' TLS goes to the service as it is: nothing is decrypted."""
    upstream_tls: _Tls = None
    """TLS to the service. ``tls://`` alone checks it against the system's roots."""
    upstream_name: str | None = None
    """The name to check in the service's certificate; ``None`` is its host."""
    upstream_upgrade: Upgrade | None = None
    """What is said to the service in clear before TLS: ``"postgres"``, ``"postgres-direct"``, ``"mysql"``,
    ``"smtp"``, ``"imap"``."""
    send_proxy: Literal["v1", "v2"] | None = None
    """Tell the service by a PROXY header who connected."""
    keep_source: _Flag = False
    """Connect to the service with the client's own address. A right (CAP_NET_ADMIN), and its answers must
    come back through this machine."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for number, text in enumerate(self.to):
            _upstream(text, _entry("to", number, self.to))
        if not self.to:
            raise config_error("to", "a way leads to a service")
        speaks_tls = {text.startswith("tls:") for text in self.to}
        if len(speaks_tls) > 1:
            raise config_error("to", "either all services of one way speak TLS, or none")
        if self.upstream_name is not None and not (True in speaks_tls or self.upstream_tls is not None):
            raise unused("upstream_name", "is for services that speak TLS: tls://host:port")
        if self.upstream_upgrade is not None and not (True in speaks_tls or self.upstream_tls is not None):
            raise unused("upstream_upgrade", "is for services that speak TLS: tls://host:port")
        if self.pass_through and self.tls is not None:
            raise unused("pass_through", "nothing is decrypted: tls has no use here")
        return self

    def configurations(
        self, tls: TlsConfig | None, upstream_tls: TlsConfig | None
    ) -> tuple[TlsConfig | None, TlsConfig | None]:
        """TLS with clients and with services, with what the proxy says for all ways."""
        own = None if self.pass_through else self.tls or tls
        upstream = self.upstream_tls
        if upstream is None and self.to[0].startswith("tls:"):
            upstream = upstream_tls or TlsConfig()
        return own, upstream

    def native_values(
        self, own: TlsConfig | None, upstream: TlsConfig | None, place: str
    ) -> _native.RouteDict:
        """As the binding takes it, with these configurations; ``place`` stands before the names in errors."""
        service_tls = None
        if upstream is not None:  # one that both ends share has what is for servers by right
            service_tls = upstream.native if upstream is own else upstream.for_client(f"{place}upstream_tls.")
        return {
            "names": list(self.names),
            "pass_through": self.pass_through,
            "tls": own.for_server(f"{place}tls.") if own is not None else None,
            "upstreams": [_upstream(text) for text in self.to],
            "keep_source": self.keep_source,
            "upstream_tls": (service_tls, self.upstream_name) if service_tls is not None else None,
            "upstream_upgrade": self.upstream_upgrade,
            "send_proxy": self.send_proxy,
        }


class ProxyOptions(Options):
    """All options of a proxy. One service is told by ``to`` and what belongs to it; several by ``routes``."""

    listen: _Texts
    """Where clients connect: ``":port"`` (every address), ``"host:port"``, ``"unix:/path"``, ``"fd:3"``,
    ``"systemd"`` (all sockets that the service manager handed over) or ``"systemd:name"``."""
    routes: tuple[Route, ...] = ()
    """Ways by server name."""
    to: _Texts = ()
    """The service of clients that no route wants; see :attr:`Route.to`, and so for the next five."""
    pass_through: _Flag = False
    """As in a route."""
    upstream_name: str | None = None
    """As in a route."""
    upstream_upgrade: Upgrade | None = None
    """As in a route."""
    send_proxy: Literal["v1", "v2"] | None = None
    """As in a route."""
    keep_source: _Flag = False
    """As in a route."""
    tls: _Tls = None
    """What we prove to clients, and whom we let in. ``None``: they speak no TLS."""
    upgrade: Upgrade | None = None
    """What clients of every way say in clear before their TLS: ``"postgres"``, ``"postgres-direct"``,
    ``"mysql"``, ``"smtp"``, ``"imap"``. They do before they name a server; with ``"mysql"`` the service is
    connected before their TLS."""
    upstream_tls: _Tls = None
    """TLS to services that are ``tls://``. ``None`` checks them against the system's roots."""
    proxy_from: _Texts = ()
    """Who is believed about the client behind it: networks, or ``"unix"`` for clients of Unix sockets. Their
    connections must begin with a PROXY header."""
    max_connections: _Whole = Field(default=10_000, ge=1, le=2**31)
    """Open connections. At the limit one whose handshake is not done gives way to a newcomer: of the sender
    that has most of them the one that said least, of those the oldest. So it is where the process has too
    few descriptors for them all (two each: ``resource.setrlimit``). Where all are served, accepting waits."""
    max_handshakes: _Whole = Field(default=256, ge=1, le=2**31)
    """Clients' handshakes under way, from their first byte. Beyond it, of the sender that has most of them
    the oldest gives way to a newcomer."""
    rate: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] | None = None
    """New connections of one address (IPv6: of one /64) a second; ``None`` is no limit."""
    burst: _Whole = Field(default=20, ge=1, le=2**31)
    """How many of them may come at once after a pause."""
    handshake_timeout: _Seconds = Field(default=10.0, le=_YEAR)
    """Seconds from the accepted connection to the end of the client's handshake, PROXY header included."""
    connect_timeout: _Seconds = Field(default=10.0, le=_YEAR)
    """Seconds for the way to the service, its handshake included; several services share it."""
    idle_timeout: Annotated[float, Strict(), Field(ge=1e-9, le=_YEAR, allow_inf_nan=False)] | None = None
    """Seconds without a byte after which a connection ends."""
    drain_timeout: Annotated[float, Strict(), Field(ge=0, le=_YEAR, allow_inf_nan=False)] = 30.0
    """Seconds that :meth:`Proxy.aclose` gives open connections to end by themselves."""
    keepalive: Annotated[float, Strict(), Field(ge=1, le=32_767, allow_inf_nan=False)] | None = 120.0
    """Seconds of silence after which the system asks a client whether it is still there."""
    backlog: _Whole = Field(default=4096, ge=1, le=65_535)
    """Connections that the system keeps until they are accepted."""
    reuse_port: _Flag = False
    """Share the port with other processes that say the same."""
    unix_mode: _Whole | None = Field(default=None, ge=0, le=0o777)
    """Permissions of our Unix sockets; ``None`` leaves them to the umask."""
    replace_stale: _Flag = True
    """Replace the path of a Unix socket on which nobody listens any more."""
    transparent: _Flag = False
    """Take connections to any address that the system's rules lead here (TPROXY). A right (CAP_NET_ADMIN)."""
    watch: _Flag = True
    """Read certificates again when their files change."""
    log_connections: _Flag = False
    """Tell of every connection's end, not only of those that went wrong."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if "" in self.proxy_from:
            name = _entry("proxy_from", self.proxy_from.index(""), self.proxy_from)
            raise config_error(name, "an empty text is no network")
        if not self.listen:
            raise config_error("listen", "a proxy needs an address to listen at")
        for number, text in enumerate(self.listen):
            if not _is_systemd(text):
                listen_values(text, _entry("listen", number, self.listen))
        if not self.routes and not self.to:
            raise config_error("to", "a proxy needs a service to go to, or routes")
        if not self.to:
            for name in ("pass_through", "upstream_name", "upstream_upgrade", "send_proxy", "keep_source"):
                if getattr(self, name):
                    raise unused(name, "belongs to a service: give it in the routes")
        default = self._default_route()
        ways = [*self.routes, default] if default is not None else self.routes
        self._nothing_unused(ways)
        self._fits_addresses(ways)
        if self.upgrade is not None and not all(way.configurations(self.tls, None)[0] for way in ways):
            raise unused("upgrade", "is for clients whose TLS ends here: it needs tls")
        if self.upgrade == "mysql" and any(way.names for way in ways):
            raise config_error(
                "upgrade",
                "the service speaks before a client can name one: there is one way, without names",
                "two_sided",
            )
        self._leads_elsewhere(ways)
        return self

    def _nothing_unused(self, ways: Sequence[Route]) -> None:
        """TLS that no way has a use for would be believed to be there."""
        if self.tls is not None and all(way.pass_through or way.tls is not None for way in ways):
            if self.pass_through:
                raise unused("pass_through", "nothing is decrypted: tls has no use here")
            raise unused("tls", "no way has a use for it: each passes TLS through, or has its own")
        if self.upstream_tls is not None and not any(
            way.to[0].startswith("tls:") and way.upstream_tls is None for way in ways
        ):
            raise unused("upstream_tls", "is for services that speak TLS: tls://host:port")

        looks = any(way.pass_through or way.configurations(self.tls, None)[0] is not None for way in ways)
        if not (looks or self.proxy_from or any(way.upstream_upgrade == "mysql" for way in ways)):
            for name in ("handshake_timeout", "max_handshakes"):
                self._needs(name, "clients say nothing before payload: neither TLS nor a PROXY header")
        if self.rate is None:
            self._needs("burst", "belongs to rate, which is not given")

    def _fits_addresses(self, ways: Sequence[Route]) -> None:
        """What is said of sockets, or of clients' addresses, that are not there."""
        kinds = {_kind(text) for text in self.listen}
        if "path" not in kinds:
            self._needs("unix_mode", "is for a path at which this proxy listens: unix:/path")
        if "tcp" not in kinds:
            for name in ("reuse_port", "transparent"):
                self._needs(name, "is for a TCP port at which this proxy listens")
        if kinds == {"inherited"}:
            self._needs("backlog", "is for sockets that this proxy makes: those that it is given have theirs")
        if kinds <= {"path", "abstract"}:
            if self.keepalive is not None:
                self._needs("keepalive", "is for TCP: who leaves a Unix socket is never silent")
            if not self.proxy_from:
                self._needs("rate", "clients of Unix sockets have no addresses")
        for number, way in enumerate(ways):
            if way.keep_source and (
                all(text.removeprefix("tls:").startswith("unix:") for text in way.to)
                or (kinds <= {"path", "abstract"} and not self.proxy_from)
            ):
                name = f"routes.{number}.keep_source" if number < len(self.routes) else "keep_source"
                raise unused(name, "there are no addresses on a Unix socket")
        for number, network in enumerate(self.proxy_from):
            name = _entry("proxy_from", number, self.proxy_from)
            if network == "unix" and kinds == {"tcp"}:
                raise unused(name, "is for clients of Unix sockets: this proxy has none")
            if network != "unix" and kinds <= {"path", "abstract"}:
                raise unused(name, "clients of Unix sockets are in no network: say unix")

    def _leads_elsewhere(self, ways: Sequence[Route]) -> None:
        """A service that is this proxy's own address has it connect to itself, until nothing is left."""
        if self.reuse_port:  # another process may have a part of it
            return
        own = {one for text in self.listen if not _is_systemd(text) for one in _places(listen_values(text))}
        for number, way in enumerate(ways):
            for at, text in enumerate(way.to):
                if own.intersection(_places(_upstream(text))):
                    name = _entry("to", at, way.to)
                    name = f"routes.{number}.{name}" if number < len(self.routes) else name
                    raise config_error(
                        name, f"{text!r} is where this proxy listens: it would connect to itself"
                    )

    def _default_route(self) -> Route | None:
        if not self.to:
            return None
        return Route(
            to=self.to,
            pass_through=self.pass_through,
            upstream_name=self.upstream_name,
            upstream_upgrade=self.upstream_upgrade,
            send_proxy=self.send_proxy,
            keep_source=self.keep_source,
        )

    def configurations(self) -> list[tuple[str, TlsConfig]]:
        """Every TLS configuration that is used, each once, behind its place in the options."""
        found: dict[int, tuple[str, TlsConfig]] = {}
        for number, (_, *both) in enumerate(self._ways):
            for name, config in zip(("tls", "upstream_tls"), both, strict=True):
                own = number < len(self.routes) and getattr(self.routes[number], name) is not None
                if config is not None:
                    found.setdefault(id(config), (f"routes.{number}.{name}" if own else name, config))
        return list(found.values())

    @functools.cached_property
    def _ways(self) -> list[tuple[Route, TlsConfig | None, TlsConfig | None]]:
        """Every way with its configurations, which have the application protocols of upgrades.

        Kept: what is read again must be what is used.
        """
        default = self._default_route()
        made: dict[tuple[int, str | None], tuple[TlsConfig, TlsConfig]] = {}

        def upgraded(config: TlsConfig | None, upgrade: Upgrade | None) -> TlsConfig | None:
            if config is None:
                return None
            key = (id(config), upgrade)
            if key not in made:
                made[key] = (config, with_protocol(config, upgrade))
            return made[key][1]

        ways = []
        for way in [*self.routes, default] if default is not None else self.routes:
            own, upstream = way.configurations(self.tls, self.upstream_tls)
            ways.append((way, upgraded(own, self.upgrade), upgraded(upstream, way.upstream_upgrade)))
        return ways

    def native_service(self) -> _native.ServiceDict:
        """What connections are served by, as the binding takes it.

        Raises:
            ConfigError: A configuration of TLS says what its place has no use for.
        """
        try:
            routes = [
                way.native_values(own, upstream, f"routes.{number}.")
                for number, (way, own, upstream) in enumerate(self._ways)
            ]
        except ConfigError as error:
            raise self.where_said(error) from None
        return {
            "routes": routes,
            "upgrade": self.upgrade,
            "proxy_from": [one for one in self.proxy_from if one != "unix"],
            "proxy_from_unix": "unix" in self.proxy_from,
            "max_handshakes": self.max_handshakes,
            "rate": self.rate,
            "burst": self.burst,
            "handshake_timeout": self.handshake_timeout,
            "connect_timeout": self.connect_timeout,
            "idle_timeout": self.idle_timeout,
            "tell_connections": self.log_connections,
        }

    def where_said(self, error: ConfigError) -> ConfigError:
        """The error of native code, which numbers all ways, with the path as it was given."""
        if found := re.fullmatch(r"proxy_from\.(\d+)", error.field or ""):
            # That of Unix sockets' clients is told apart from networks.
            networks = [at for at, one in enumerate(self.proxy_from) if one != "unix"]
            name = _entry("proxy_from", networks[int(found[1])], self.proxy_from)
            return again(error, error.message, name)
        found = re.match(r"routes\.(\d+)\.((\w+).*)", error.field or "")
        if found is None:
            return error
        number, field, table = int(found[1]), found[2], found[3]
        own = number < len(self.routes)
        if field == "upstream_name" and self._ways[number][0].upstream_name is None:
            field = "to"  # the name was taken from the service's address
            return again(error, error.message, f"routes.{number}.to" if own else field)
        if own and not (table in ("tls", "upstream_tls") and getattr(self.routes[number], table) is None):
            return error
        return again(error, error.message, field)

    def native_listener(self) -> _native.ProxyListenerDict:
        """How to listen, as the binding takes it."""
        return {
            "backlog": self.backlog,
            "max_connections": self.max_connections,
            "reuse_port": self.reuse_port,
            "unix_mode": self.unix_mode,
            "replace_stale": self.replace_stale,
            "transparent": self.transparent,
            "keepalive": self.keepalive,
        }

    @classmethod
    def _relative_to(cls, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        def nested(table: dict[str, Any]) -> dict[str, Any]:
            return {
                name: TlsConfig._relative_to(folder, value)
                if name in ("tls", "upstream_tls") and isinstance(value, dict)
                else value
                for name, value in table.items()
            }

        values = nested(values)
        if isinstance(values.get("routes"), list):
            values["routes"] = [nested(one) if isinstance(one, dict) else one for one in values["routes"]]
        return values


def _kind(text: str) -> str:
    """What is listened at: ``"tcp"``, ``"path"``, ``"abstract"``, or ``"inherited"``."""
    if _is_systemd(text) or text.startswith("fd:"):
        return "inherited"
    path = _path(text)
    return "tcp" if path is None else "abstract" if path.startswith("@") else "path"


def _is_systemd(text: str) -> bool:
    return text == "systemd" or text.startswith("systemd:")


def systemd_name(text: str) -> str | None:
    """The name of the inherited sockets that are meant; ``""`` is all of them, ``None``: none are."""
    return text.partition(":")[2] if _is_systemd(text) else None


def listen_values(text: str, field: str = "listen") -> _native.ProxyListenDict:
    """An address to listen at, as the binding takes it.

    Raises:
        ConfigError: It is none.
    """
    values: _native.ProxyListenDict = {"host": None, "port": 0, "path": None, "fd": None}
    if (path := _path(text)) is not None:
        return {**values, "path": path}
    if text.startswith("fd:"):
        if not re.fullmatch(r"[0-9]{1,9}", text[3:]):
            raise config_error(field, f"{text!r} is not fd: and a number")
        return {**values, "fd": int(text[3:])}
    host, port = _address(text, field, "*")
    return {**values, "host": None if host == "*" else host, "port": port}


#: What of this machine is surely reached at every address, or every one of a version.
_OWN: Mapping[str | None, tuple[str, ...]] = {
    None: ("localhost", "127.0.0.1", "0.0.0.0", "::1", "::"),
    "0.0.0.0": ("127.0.0.1", "0.0.0.0"),
    "::": ("::1", "::"),
}


def _places(values: Mapping[str, Any]) -> set[tuple[str, int]]:
    """What is surely reached there, or heard: a path, or addresses with their port."""
    host, port, path = values["host"], values["port"], values["path"]
    if path is not None:
        return {(path, -1)}
    if port == 0 or values.get("fd") is not None:
        return set()
    return {(one, port) for one in _OWN.get(host, (host,))}


def _entry(name: str, number: int, several: Sequence[object]) -> str:
    """What one of a list is called; the only one may have been given without a list."""
    return name if len(several) == 1 else f"{name}.{number}"


def _upstream(text: str, field: str = "to") -> _native.UpstreamDict:
    if text == "original":
        return {"host": None, "port": 0, "path": None}
    bare = text.removeprefix("tls:")
    if (path := _path(bare)) is not None:
        return {"host": None, "port": 0, "path": path}
    if (secure := secure_url(text)) is not None:
        # host:port alone would send it in clear what was meant for TLS.
        raise config_error(field, f"{text!r} is a URL of a service that speaks TLS: write tls://{secure}")
    host, port = _address(text.removeprefix("tls://"), field, "localhost")
    if port == 0:
        raise config_error(field, f"{text!r}: nobody can be reached at port 0")
    return {"host": host, "port": port, "path": None}


def _path(text: str) -> str | None:
    """The path of ``unix:/path``; ``unix:@name`` is one in the abstract space."""
    if not text.startswith("unix:"):
        return None
    return text[5:].removeprefix("//")


def _address(text: str, field: str, default_host: str) -> tuple[str, int]:
    bare = text.removeprefix("tcp://")
    if field == "listen" and (secure := secure_url(text)) is not None:
        raise config_error(
            field, f"{text!r} is a URL: write {secure}; that clients speak TLS is said by a certificate"
        )
    try:
        if re.fullmatch(r"[0-9]{1,5}", bare):
            bare = f":{bare}"
        return split_address(bare, default_host)
    except ValueError as error:
        raise config_error(field, str(error)) from None
