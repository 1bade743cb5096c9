"""The TLS proxy: TLS in front of any service, to any service, or both, with no byte in Python.

::

    own = Credentials.certificate("chain.pem", "key.pem")
    async with Proxy(listen=":8443", to="localhost:8080", tls=own) as proxy:
        await proxy.wait_closed()

Connections are accepted, looked at, shaken hands with and pumped natively. Python says where they go, hears
what happened (:class:`ConnectionEvent`, :class:`ReloadEvent`) and asks for figures.

Not here: the options (:mod:`sapper.tls.proxy_options`), the command (``sapper proxy``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from sapper import _arguments, _native
from sapper._loop import LoopPost, running_post
from sapper._mistakes import again
from sapper._options import config_error
from sapper._own_thread import in_own_thread
from sapper._owned import dropped, subscribe
from sapper.errors import ApiMisuseError, ClosedError, ConfigError, SapperError
from sapper.events import EventsLost
from sapper.tls.proxy_options import ProxyOptions, listen_values, systemd_name
from sapper.tls.reload import TlsWatch

__all__ = [
    "ConnectionEvent",
    "Proxy",
    "ProxyConnection",
    "ProxyEvent",
    "ProxyStats",
    "ReloadEvent",
]

logger = logging.getLogger("sapper")


@dataclass(frozen=True, slots=True)
class ProxyConnection:
    """One connection of a proxy at one moment.

    Attributes:
        id: Its number since the start.
        client: Who connected; behind a trusted proxy, the client that it named.
        local: To which of our addresses.
        upstream: The service, once one is chosen.
        server_name: The name that the client asked for.
        version: Of the client's TLS, where it ends here.
        cipher_suite: Its cipher suite.
        alpn: Its application protocol.
        resumed: Whether it resumed a session.
        client_cn: The common name of the client's certificate.
        age: Seconds since it was accepted.
        to_upstream: Payload to the service.
        to_client: Payload to the client.
    """

    id: int
    client: str
    local: str
    upstream: str | None
    server_name: str | None
    version: str | None
    cipher_suite: str | None
    alpn: bytes | None
    resumed: bool
    client_cn: str | None
    age: float
    to_upstream: int
    to_client: int


@dataclass(frozen=True, slots=True)
class ProxyStats:
    """Counters of a proxy at one moment.

    Attributes:
        state: ``"new"``, ``"running"``, ``"draining"``, ``"closed"``.
        accepted: Connections accepted.
        open: Connections that are open.
        handshaking: Handshakes of clients that are under way.
        handshakes: Handshakes of clients that were done, by version.
        resumed: How many of them resumed a session.
        ended: Connections that are over, by outcome (:attr:`ConnectionEvent.outcome`).
        errors: Errors that ended connections, by kind.
        upstream_failures: Tries to reach a service that failed, by service.
        to_upstream: Payload to services.
        to_client: Payload to clients.
        handshake_p50: Median of the seconds from a client's first byte to the end of its handshake.
        handshake_p99: 99 of 100 took no longer.
        connect_p50: Median of the seconds until a service was reached, its handshake included.
        connect_p99: 99 of 100 took no longer.
        limit_pauses: Times that accepting waited for the limit of connections.
        exhausted_pauses: Times that accepting waited for descriptors or memory.
        rate_addresses: Addresses that the rate limit remembers.
    """

    state: Literal["new", "running", "draining", "closed"]
    accepted: int
    open: int
    handshaking: int
    handshakes: Mapping[str, int]
    resumed: int
    ended: Mapping[str, int]
    errors: Mapping[str, int]
    upstream_failures: Mapping[str, int]
    to_upstream: int
    to_client: int
    handshake_p50: float
    handshake_p99: float
    connect_p50: float
    connect_p99: float
    limit_pauses: int
    exhausted_pauses: int
    rate_addresses: int


@dataclass(frozen=True, slots=True)
class ConnectionEvent:
    """A connection went wrong; with ``log_connections`` also each that ended well.

    Attributes:
        connection: What was known of it.
        outcome: ``"ended"``, ``"failed"`` (while payload flowed), ``"idle"``, ``"cut"`` (the proxy stopped),
            ``"silent"`` (it never said a word); where it was refused: ``"rate"``, ``"proxy_header"``,
            ``"hello"``, ``"route"``, ``"handshake"``, ``"upstream"``. ``"retry"``: a service did not
            answer, and another one is tried.
        error: Why, where it was not an orderly end.
    """

    connection: ProxyConnection
    outcome: str
    error: SapperError | None


@dataclass(frozen=True, slots=True)
class ReloadEvent:
    """Certificates or options were read again.

    Attributes:
        error: Why what was there stays in use; ``None``: the new ones are.
    """

    error: SapperError | None


#: Any of them.
ProxyEvent = ConnectionEvent | ReloadEvent | EventsLost
EventCallback = Callable[[ProxyEvent], object]

_NEW = ProxyStats("new", 0, 0, 0, {}, 0, {}, {}, {}, 0, 0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0)


class Proxy:
    """Accepts connections and takes each to its service. Belongs to the event loop that starts it.

    ``async with`` starts it, and ends it with :meth:`aclose`. Dropped, it ends, with a ResourceWarning.
    """

    def __init__(
        self, options: ProxyOptions | None = None, *, on_event: EventCallback | None = None, **given: Any
    ) -> None:
        """Checks the options; nothing is opened yet.

        Args:
            options: All of them.
            on_event: Hears what happens, on the event loop. Without it the log ``sapper`` hears it.
            given: The same by name; they come first.

        Raises:
            ConfigError: An option is wrong; ``field`` names it.
        """
        _arguments.callback(on_event, "on_event")
        if options is not None and not isinstance(options, ProxyOptions):
            raise _arguments.wrong_type("options", "ProxyOptions", options)
        base = {} if options is None else {name: getattr(options, name) for name in options.model_fields_set}
        self._options = ProxyOptions(**{**base, **given})
        self._on_event = on_event if on_event is not None else _log
        self._native: _native.Proxy | None = None
        self._post: LoopPost | None = None
        self._key = 0
        self._watches: list[TlsWatch] = []
        self._addresses: tuple[str, ...] = ()
        self._error: SapperError | None = None
        self._closed: asyncio.Event | None = None
        self._reloading = asyncio.Lock()
        #: Whether it was stopped, or has ended by itself.
        self._ending = False

    @property
    def options(self) -> ProxyOptions:
        """What it does now."""
        return self._options

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens, once started: ``"127.0.0.1:8443"``, a path."""
        return self._addresses

    @property
    def state(self) -> Literal["new", "running", "draining", "closed"]:
        """Where its life is."""
        return "new" if self._native is None else self._native.state()

    async def start(self) -> tuple[str, ...]:
        """Listens and accepts from now on.

        Returns:
            Where.

        Raises:
            BindError, PermissionRequired: It cannot listen there.
            ConfigError: An option is wrong.
            ApiMisuseError: It was started already.
            ClosedError: It was closed since.
        """
        if self._native is not None:
            if self._ending:
                raise ClosedError("the proxy is closed")
            raise ApiMisuseError("the proxy was started already")
        post = running_post()
        inherited: list[int] = []
        self._closed = asyncio.Event()
        try:
            listen = _listen(self._options, inherited)
            mailbox, self._key = subscribe(post, self._hear)
            try:
                native = _native.Proxy(
                    listen,
                    self._options.native_listener(),
                    self._options.native_service(),
                    mailbox,
                    self._key,
                )
            except BaseException as error:
                post.unsubscribe(self._key)
                if isinstance(error, ConfigError):
                    raise self._options.where_said(error) from None
                raise
        finally:
            for fd in inherited:  # the proxy has duplicates
                os.close(fd)
        self._native, self._post = native, post
        try:
            self._addresses = tuple(await post.call(native.start))
            self._watch()
        except BaseException:
            self._ending = True
            native.stop(0.0)
            raise
        return self._addresses

    async def reload(self, options: ProxyOptions | None = None) -> bool:
        """Reads certificates again, or serves new connections by other options; open ones go on.

        Of several at once the later ones wait: what the last one says holds.

        Args:
            options: What to do from now on. ``listen``, and how it listens, stay: they need a restart
                (``max_connections``, ``keepalive``, ``backlog``, ``reuse_port``, ``unix_mode``,
                ``replace_stale``, ``transparent``).

        Returns:
            Whether anything has changed.

        Raises:
            ConfigError: What is there now cannot be used; what was there stays in use. Others of several
                configurations are read all the same.
            ClosedError: The proxy is closed.
        """
        native = self._native
        if native is None or native.state() == "closed":
            raise ClosedError("the proxy does not run")
        if not isinstance(options, ProxyOptions | None):
            raise _arguments.wrong_type("options", "ProxyOptions", options)
        # One that still reads does not come behind a later one.
        async with self._reloading:
            if options is not None:
                self._exchange(native, options)
                return True
            changed, failed = False, None
            for place, config in self._options.configurations():
                try:
                    changed = await in_own_thread(config.reload) or changed
                except ConfigError as error:  # the others are read all the same
                    failed = failed or _at(place, error)
            if failed is not None:
                raise failed
            return changed

    def _exchange(self, native: _native.Proxy, options: ProxyOptions) -> None:
        if native.state() == "closed":
            raise ClosedError("the proxy does not run")
        for name in ("listen", *options.native_listener()):
            if getattr(options, name) != getattr(self._options, name):
                raise config_error(name, "where and how a proxy listens is changed by a restart")
        try:
            native.reload(options.native_service())
        except ConfigError as error:
            raise options.where_said(error) from None
        self._options = options
        self._watch()

    def stop(self, drain: float = 0.0) -> None:
        """Accepts no more; open connections have ``drain`` seconds to end by themselves, then they are cut.

        Repeated calls may only shorten it.
        """
        drain = min(_arguments.seconds(drain, "drain"), 365 * 86_400.0)
        if self._native is not None:
            self._ending = True
            self._native.stop(drain)

    async def wait_closed(self) -> None:
        """Waits until everything is closed and given back.

        If cancelled, the proxy goes on.

        Raises:
            SapperError: What ended it, where it was not a stop.
        """
        if self._closed is None:
            return
        with contextlib.nullcontext() if self._post is None else self._post.keep(self):
            await self._closed.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def aclose(self) -> None:
        """Stops with ``drain_timeout`` and waits for the end. If cancelled, everything ends at once."""
        self.stop(self._options.drain_timeout)
        if self._native is not None:
            try:
                await self.wait_closed()
            except asyncio.CancelledError:
                self.stop()
                raise

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # somebody waits for this exception
            self.stop()
            with contextlib.suppress(SapperError):
                await self.wait_closed()
        else:
            await self.aclose()

    def __del__(self) -> None:
        if getattr(self, "_native", None) is not None and not self._ending:
            dropped(self, self._let_go)

    def _let_go(self) -> None:
        for watch in self._watches:
            watch.abandon()
        assert self._native is not None  # noqa: S101 - it runs
        self._native.stop(0.0)

    def stats(self) -> ProxyStats:
        """Counters now."""
        return _NEW if self._native is None else ProxyStats(**self._native.stats())

    def connections(self) -> list[ProxyConnection]:
        """The open connections, oldest first."""
        return [] if self._native is None else [ProxyConnection(**one) for one in self._native.connections()]

    def _watch(self) -> None:
        """Watches the files of the configurations that are in use now."""
        before, self._watches = self._watches, []
        if self._options.watch:
            for place, config in self._options.configurations():
                with contextlib.suppress(ConfigError):  # nothing of it came from a file
                    self._watches.append(config.watch(partial(_reloaded, weakref.ref(self), place)))
        for watch in before:
            watch.close()

    def _hear(self, tag: str, value: Any) -> None:
        if tag == "proxy":
            connection = ProxyConnection(**value["connection"])
            self._tell(ConnectionEvent(connection, value["outcome"], value["error"]))
        elif tag == "lost":
            self._tell(EventsLost(value))
        elif tag == "closed":
            self._ending, self._error = True, value
            if self._post is not None:
                self._post.unsubscribe(self._key)
            for watch in self._watches:
                watch.close()
            self._watches = []
            if self._closed is not None:
                self._closed.set()

    def _tell(self, event: ProxyEvent) -> None:
        if self._post is not None:
            self._post.run(self._on_event, event)


def _reloaded(of: weakref.ref[Proxy], place: str, error: SapperError | None) -> None:
    if (proxy := of()) is not None:
        proxy._tell(ReloadEvent(_at(place, error) if isinstance(error, ConfigError) else error))


def _at(place: str, error: ConfigError) -> ConfigError:
    """The error of the configuration at that place in the options."""
    return again(error, error.message, f"{place}.{error.field}" if error.field else place)


def _listen(options: ProxyOptions, inherited: list[int]) -> list[_native.ProxyListenDict]:
    """Where to listen. Descriptors that the service manager handed over are put into ``inherited``."""
    listen = []
    handed: list[tuple[int, str]] | None = None
    for text in options.listen:
        wanted = systemd_name(text)
        if wanted is None:
            listen.append(listen_values(text))
            continue
        if handed is None:
            handed = _native.inherited_sockets()
            inherited += [fd for fd, _ in handed]
        fds = [fd for fd, name in handed if wanted in ("", name)]
        if not fds:
            raise config_error("listen", f"{text}: the service manager handed over no such socket")
        listen += [listen_values(f"fd:{fd}") for fd in fds]
    return listen


def _log(event: ProxyEvent) -> None:
    """Where nobody listens, the log says what went wrong."""
    if isinstance(event, ConnectionEvent):
        if event.error is not None:
            client, outcome = event.connection.client, event.outcome
            logger.warning("sapper proxy: %s: %s: %s", client, outcome, event.error)
    elif isinstance(event, ReloadEvent):
        if event.error is not None:
            logger.error("sapper proxy: what was loaded before stays in use: %s", event.error)
        else:
            logger.info("sapper proxy: certificates were read again")
    else:
        logger.warning("sapper proxy: %d events were lost", event.count)
