"""Figures for Prometheus, and the small HTTP server that gives them away.

::

    async with MetricsServer("127.0.0.1:9100", proxies={"web": proxy}, pumps={"tunnel": bridge}):
        ...

``GET /metrics`` is Prometheus' text format, ``GET /status`` JSON: all counters, the open connections of
proxies, the clients and visitors of tunnels. The server listens on loopback addresses and Unix sockets only:
it has no TLS and asks nobody who he is.

Not here: counting. That is native and goes on whether somebody asks or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import socket
import stat
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from math import inf
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sapper import _arguments
from sapper._options import config_error
from sapper._owned import dropped
from sapper.endpoint import split_address
from sapper.errors import BindError, ErrorContext
from sapper.pump import Pump
from sapper.tls.proxy import Proxy

if TYPE_CHECKING:
    from sapper.tunnel import ServiceStatus, TunnelClient, TunnelServer, VisitorStatus

__all__ = ["MetricsServer", "render"]

logger = logging.getLogger("sapper.metrics")

#: A request is one line and some headers: more is no scraper.
_MAX_REQUEST = 8192
#: Seconds for one request and its answer.
_DEADLINE = 5.0
#: Scrapers at a time. For a further one the oldest that has not sent its whole request gives way; where all
#: are being answered, it is closed.
_MAX_CLIENTS = 16
#: Seconds until the next try where the system has no room for a connection, and between two lines about it.
_PAUSE = 0.25
_QUIET = 60.0
#: Connections that a status lists, oldest first: a list of all would be megabytes.
_MAX_LISTED = 1000


class _Asking(Enum):
    """Whether a scraper's request is whole."""

    STILL = 0
    DONE = 1


@dataclass(frozen=True, slots=True)
class _Sample:
    name: str
    kind: str
    help: str
    labels: Mapping[str, str]
    value: float
    #: Of the one name in the text, where a family has several (a histogram).
    suffix: str = ""


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _proxy_samples(name: str, proxy: Proxy) -> Iterable[_Sample]:
    stats = proxy.stats()

    def counter(what: str, help: str, value: float, **labels: str) -> _Sample:
        return _Sample(f"sapper_proxy_{what}_total", "counter", help, {"proxy": name, **labels}, value)

    def gauge(what: str, help: str, value: float, **labels: str) -> _Sample:
        return _Sample(f"sapper_proxy_{what}", "gauge", help, {"proxy": name, **labels}, value)

    yield gauge("up", "Whether it accepts connections.", int(stats.state == "running"))
    yield counter("accepted", "Connections accepted.", stats.accepted)
    yield gauge("open_connections", "Connections that are open.", stats.open)
    yield gauge("handshaking", "Handshakes of clients that are under way.", stats.handshaking)
    for version, count in sorted(stats.handshakes.items()):
        yield counter("handshakes", "Handshakes of clients that were done.", count, version=version)
    yield counter("resumed", "Handshakes that resumed a session.", stats.resumed)
    for outcome, count in sorted(stats.ended.items()):
        yield counter("ended", "Connections that are over.", count, outcome=outcome)
    for kind, count in sorted(stats.errors.items()):
        yield counter("errors", "Errors that ended connections.", count, kind=kind)
    for service, count in sorted(stats.upstream_failures.items()):
        yield counter("upstream_failures", "Tries to reach a service that failed.", count, upstream=service)
    yield counter("bytes", "Payload moved.", stats.to_upstream, direction="to_upstream")
    yield counter("bytes", "Payload moved.", stats.to_client, direction="to_client")
    for quantile, seconds in (("0.5", stats.handshake_p50), ("0.99", stats.handshake_p99)):
        yield gauge(
            "handshake_seconds", "From the first byte to the handshake's end.", seconds, quantile=quantile
        )
    for quantile, seconds in (("0.5", stats.connect_p50), ("0.99", stats.connect_p99)):
        yield gauge("connect_seconds", "Until a service was reached.", seconds, quantile=quantile)
    pauses = {"limit": stats.limit_pauses, "exhausted": stats.exhausted_pauses}
    for reason, count in pauses.items():
        yield counter("accept_pauses", "Times that accepting waited.", count, reason=reason)


def _pump_samples(name: str, pump: Pump) -> Iterable[_Sample]:
    stats = pump.stats()

    def sample(what: str, kind: str, help: str, value: float, **labels: str) -> _Sample:
        return _Sample(f"sapper_bridge_{what}", kind, help, {"bridge": name, **labels}, value)

    yield sample("running_seconds", "gauge", "Seconds since payload began to flow.", stats.running)
    ways = (("encapsulate", stats.encapsulate), ("decapsulate", stats.decapsulate))
    for way, flow in ways:
        yield sample("bytes_total", "counter", "Payload delivered.", flow.bytes, direction=way)
    for way, flow in ways:
        yield sample("packets_total", "counter", "Packets delivered.", flow.packets, direction=way)
    for way, flow in ways:
        text = "Seconds in which the destination took nothing while something waited."
        yield sample("backpressure_seconds_total", "counter", text, flow.backpressure, direction=way)
    for way, flow in ways:
        for quantile, seconds in (("0.5", flow.latency_p50), ("0.99", flow.latency_p99)):
            text = "What so many did not take longer than, since payload began to flow."
            yield sample("latency_quantile_seconds", "gauge", text, seconds, direction=way, quantile=quantile)
    for way, flow in ways:
        labels = {"bridge": name, "direction": way}
        text = "Between the receive and the send of the same packet, or of bytes read at once."
        latency = partial(_Sample, "sapper_bridge_latency_seconds", "histogram", text)
        for bound, count in flow.latency.cumulative():
            yield latency({**labels, "le": "+Inf" if bound == inf else repr(bound)}, count, "_bucket")
        yield latency(labels, flow.latency.sum, "_sum")
        yield latency(labels, flow.latency.count, "_count")
    for way, flow in ways:
        for reason, count in sorted(flow.drops.items()):
            text = "Packets that never reached their destination."
            yield sample("drops_total", "counter", text, count, direction=way, reason=reason)
    for end, one in (("transport", stats.transport), ("sink", stats.sink)):
        values = {"received": one.bytes_received, "sent": one.bytes_sent}
        for way, count in values.items():
            yield sample(
                "endpoint_bytes_total", "counter", "Bytes at an endpoint.", count, end=end, direction=way
            )


def _tunnel_samples(name: str, server: TunnelServer) -> Iterable[_Sample]:
    """A tunnel's label is its public port, which stays its client's when that connects again."""
    tunnels = server.status()

    def sample(what: str, kind: str, help: str, value: float, **labels: str) -> _Sample:
        return _Sample(f"sapper_tunnel_{what}", kind, help, {"server": name, **labels}, value)

    yield sample("up", "gauge", "Whether it takes clients.", int(server.running))
    yield sample("clients", "gauge", "Clients that have a public port.", len(tunnels))
    shaking = server.handshakes()
    yield sample("handshakes", "gauge", "Clients that are not let in yet.", shaking.under_way)
    text = "Clients that were not let in yet and gave way to others."
    yield sample("handshakes_gave_way_total", "counter", text, shaking.gave_way)
    for one in tunnels:
        port = str(one.port)
        yield sample("connected", "gauge", "Whether the client is there.", int(one.connected), port=port)
        yield sample("visitors", "gauge", "Visitors now.", one.streams, port=port)
        yield sample("visits_total", "counter", "Visitors since it began.", one.opened, port=port)
        text = "Payload between the server and the client."
        yield sample("bytes_total", "counter", text, one.sent, port=port, direction="to_client")
        yield sample("bytes_total", "counter", text, one.received, port=port, direction="from_client")
        yield sample("held_bytes", "gauge", "Payload in memory.", one.held, port=port)
        text = "How often its session went on over a new connection."
        yield sample("resumes_total", "counter", text, one.resumes, port=port)
        if one.rtt is not None:
            yield sample("rtt_seconds", "gauge", "A round trip to the client.", one.rtt, port=port)
        for service in one.services:
            which = {"port": port, "service": service.name, "service_port": str(service.port)}
            for what, kind, help, value in _service_figures(service, "to_client", "from_client"):
                yield sample(f"service_{what[0]}", kind, help, value, **which, **what[1])


def _service_figures(
    service: ServiceStatus, sent: str, received: str
) -> Iterable[tuple[tuple[str, dict[str, str]], str, str, int]]:
    """Name and further labels, kind, help and value of each."""
    text = "Payload of the service's visitors."
    yield ("visitors", {}), "gauge", "Visitors of the service now.", service.visitors
    yield ("visits_total", {}), "counter", "Visitors of the service.", service.visits
    yield ("bytes_total", {"direction": sent}), "counter", text, service.sent
    yield ("bytes_total", {"direction": received}), "counter", text, service.received
    yield ("refused_total", {}), "counter", "Visitors that were sent away.", service.refused
    yield ("paused_total", {}), "counter", "Times that bytes waited for a limit.", service.paused
    yield ("cut_total", {}), "counter", "Visitors whose bytes in all were used up.", service.cut


def _tunnel_client_samples(name: str, client: TunnelClient) -> Iterable[_Sample]:
    one = client.status()

    def sample(what: str, kind: str, help: str, value: float, **labels: str) -> _Sample:
        return _Sample(f"sapper_tunnel_client_{what}", kind, help, {"client": name, **labels}, value)

    yield sample("exposed", "gauge", "Whether it has a public port.", int(one.port is not None))
    yield sample("visitors", "gauge", "Visitors now.", one.streams)
    yield sample("visits_total", "counter", "Visitors since its session began.", one.opened)
    text = "Payload between the client and the server."
    yield sample("bytes_total", "counter", text, one.sent, direction="to_server")
    yield sample("bytes_total", "counter", text, one.received, direction="from_server")
    yield sample("held_bytes", "gauge", "Payload in memory.", one.held)
    text = "How often its session went on over a new connection."
    yield sample("resumes_total", "counter", text, one.resumes)
    if one.rtt is not None:
        yield sample("rtt_seconds", "gauge", "A round trip to the server.", one.rtt)
    for service in one.services:
        for what, kind, help, value in _service_figures(service, "to_server", "from_server"):
            yield sample(f"service_{what[0]}", kind, help, value, service=service.name, **what[1])


def render(
    *,
    proxies: Mapping[str, Proxy] | None = None,
    pumps: Mapping[str, Pump] | None = None,
    tunnels: Mapping[str, TunnelServer] | None = None,
    tunnel_clients: Mapping[str, TunnelClient] | None = None,
) -> str:
    """All figures in Prometheus' text format.

    Args:
        proxies: Proxies by the name that they get there.
        pumps: Bridges and other pumps, the same way.
        tunnels: Servers of tunnels, the same way.
        tunnel_clients: Clients of tunnels, the same way.
    """
    families: dict[str, list[_Sample]] = {}
    for name, proxy in (proxies or {}).items():
        for one in _proxy_samples(name, proxy):
            families.setdefault(one.name, []).append(one)
    for name, pump in (pumps or {}).items():
        for one in _pump_samples(name, pump):
            families.setdefault(one.name, []).append(one)
    for name, server in (tunnels or {}).items():
        for one in _tunnel_samples(name, server):
            families.setdefault(one.name, []).append(one)
    for name, client in (tunnel_clients or {}).items():
        for one in _tunnel_client_samples(name, client):
            families.setdefault(one.name, []).append(one)
    lines = []
    for name, samples in families.items():
        lines += [f"# HELP {name} {samples[0].help}", f"# TYPE {name} {samples[0].kind}"]
        for one in samples:
            labels = ",".join(f'{label}="{_escape(text)}"' for label, text in one.labels.items())
            lines.append(f"{name}{one.suffix}{{{labels}}} {one.value!r}")
    return "\n".join(lines) + "\n"


def _status(
    proxies: Mapping[str, Proxy],
    pumps: Mapping[str, Pump],
    tunnels: Mapping[str, TunnelServer],
    tunnel_clients: Mapping[str, TunnelClient],
) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "proxies": {
            name: {
                "listen": list(proxy.addresses),
                **asdict(proxy.stats()),
                "connections": [
                    {
                        **asdict(one),
                        "alpn": one.alpn.decode("utf-8", "backslashreplace") if one.alpn else None,
                    }
                    for one in proxy.connections()[:_MAX_LISTED]
                ],
            }
            for name, proxy in proxies.items()
        },
        "pumps": {name: {**asdict(pump.stats()), "state": pump.state} for name, pump in pumps.items()},
        "tunnels": {
            name: {
                "listen": list(server.addresses),
                "handshakes": asdict(server.handshakes()),
                "clients": _tunnel_clients(server),
            }
            for name, server in tunnels.items()
        },
        "tunnel_clients": {
            name: {
                "server": client.server,
                **asdict(client.status()),
                "visitors": [_visitor(one) for one in client.visitors(most=_MAX_LISTED)],
            }
            for name, client in tunnel_clients.items()
        },
    }


def _tunnel_clients(server: TunnelServer) -> list[dict[str, Any]]:
    """Every client of a server with its visitors, of which so many are listed in all."""
    visitors: dict[int, list[dict[str, Any]]] = {}
    for one in server.visitors(most=_MAX_LISTED):
        visitors.setdefault(one.tunnel, []).append(_visitor(one))
    return [{**asdict(one), "visitors": visitors.get(one.id, [])} for one in server.status()]


def _visitor(one: VisitorStatus) -> dict[str, Any]:
    return {name: value for name, value in asdict(one).items() if name != "tunnel"}


class MetricsServer:
    """Answers ``GET /metrics`` and ``GET /status``. ``async with`` opens and closes it.

    One that is dropped closes, with a ResourceWarning.
    """

    def __init__(
        self,
        address: str,
        *,
        proxies: Mapping[str, Proxy] | None = None,
        pumps: Mapping[str, Pump] | None = None,
        tunnels: Mapping[str, TunnelServer] | None = None,
        tunnel_clients: Mapping[str, TunnelClient] | None = None,
    ) -> None:
        """Checks the address; nothing is opened yet.

        Args:
            address: ``"127.0.0.1:9100"``, ``"[::1]:9100"``, ``":9100"`` (127.0.0.1), or
                ``"unix:/path"``, which only our own user may open.
            proxies: Proxies by the name that they get there.
            pumps: Bridges and other pumps, the same way.
            tunnels: Servers of tunnels, the same way.
            tunnel_clients: Clients of tunnels, the same way. One may come and go.

        Raises:
            ConfigError: The address is none, or not a loopback address.
        """
        self._path, self._host, self._port = _place(_arguments.text(address, "address"))
        self._proxies = dict(proxies or {})
        self._pumps = dict(pumps or {})
        self._tunnels = dict(tunnels or {})
        # An empty one too is kept: it may fill.
        self._tunnel_clients = {} if tunnel_clients is None else tunnel_clients
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        #: Oldest first. One that gives way is no longer here.
        self._clients: dict[asyncio.Task[Any], _Asking] = {}

    @property
    def address(self) -> str:
        """Where it listens: ``"127.0.0.1:9100"`` or ``"unix:/path"``."""
        if self._path is not None:
            return f"unix:{self._path}"
        port = self._socket.getsockname()[1] if self._socket is not None else self._port
        return f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"

    async def __aenter__(self) -> Self:
        try:
            self._socket = _unix_socket(self._path) if self._path is not None else self._tcp_socket()
        except OSError as error:
            context = ErrorContext(field="address", errno=error.errno)
            raise BindError(f"listen at {self.address}: {error.strerror or error}", context) from error
        accepting = _accept(weakref.ref(self), self._socket, self.address)
        self._accepting = asyncio.create_task(accepting, name="sapper-metrics")
        return self

    def _tcp_socket(self) -> socket.socket:
        one = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((self._host, self._port))
            one.listen(_MAX_CLIENTS)
            one.setblocking(False)
        except BaseException:
            one.close()
            raise
        return one

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket is None or self._accepting is None:
            return
        tasks = [self._accepting, *self._clients]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._socket = self._accepting = None

    def __del__(self) -> None:
        if getattr(self, "_accepting", None) is not None:
            dropped(self, self._let_go)

    def _let_go(self) -> None:
        accepting, listening = self._accepting, self._socket
        assert accepting is not None and listening is not None  # noqa: S101, PT018 - it is open

        def end() -> None:
            # The loop watches it until then.
            accepting.add_done_callback(lambda _: listening.close())
            accepting.cancel()

        try:
            accepting.get_loop().call_soon_threadsafe(end)
        except RuntimeError:  # its loop is closed
            listening.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _take(self, client: socket.socket) -> None:
        if len(self._clients) < _MAX_CLIENTS or self._make_room():
            task = asyncio.get_running_loop().create_task(self._client(client))
            self._clients[task] = _Asking.STILL
            task.add_done_callback(partial(self._over, client))
        else:
            client.close()

    def _make_room(self) -> bool:
        """The oldest that has not sent its whole request gives way."""
        for task, asking in self._clients.items():
            if asking is _Asking.STILL:
                del self._clients[task]
                task.cancel()
                return True
        return False

    def _over(self, client: socket.socket, task: asyncio.Task[None]) -> None:
        self._clients.pop(task, None)
        client.close()

    async def _client(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_DEADLINE):
                request = await _request(loop, client)
                task = asyncio.current_task()
                if task not in self._clients:  # it gave way at this very moment
                    return
                self._clients[task] = _Asking.DONE
                await loop.sock_sendall(client, self._answer(request))

    def _answer(self, request: bytes | None) -> bytes:
        words = request.split(b"\r\n", 1)[0].split(b" ") if request is not None else []
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", "text/plain", "this is no HTTP request\n")
        if words[0] not in (b"GET", b"HEAD"):
            return _response(
                "405 Method Not Allowed", "text/plain", "there is GET only\n", "Allow: GET, HEAD"
            )
        if request is not None and self._path is None and not _is_for_us(request):
            return _response(
                "421 Misdirected Request",
                "text/plain",
                "there are figures for who asks for localhost or a loopback address, not for other hosts\n",
            )
        path = words[1].split(b"?", 1)[0]
        if path == b"/metrics":
            text = render(
                proxies=self._proxies,
                pumps=self._pumps,
                tunnels=self._tunnels,
                tunnel_clients=self._tunnel_clients,
            )
            answer = _response("200 OK", "text/plain; version=0.0.4; charset=utf-8", text)
        elif path == b"/status":
            status = _status(self._proxies, self._pumps, self._tunnels, self._tunnel_clients)
            text = json.dumps(status, default=str) + "\n"
            answer = _response("200 OK", "application/json", text)
        else:
            answer = _response("404 Not Found", "text/plain", "there are /metrics and /status\n")
        return answer if words[0] == b"GET" else answer.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n"


async def _accept(of: weakref.ref[MetricsServer], listening: socket.socket, address: str) -> None:
    """Takes scrapers. asyncio's server tells a hundred times, with tracebacks, when it cannot."""
    loop = asyncio.get_running_loop()
    told = -_QUIET
    while True:
        try:
            client, _ = await loop.sock_accept(listening)
        except ConnectionError:  # gone before it was accepted
            continue
        except OSError as error:
            if of() is None:  # dropped
                return
            if loop.time() - told >= _QUIET:
                told = loop.time()
                text = "sapper: no scraper can be accepted at %s now: %s"
                logger.warning(text, address, error.strerror or error)
            await asyncio.sleep(_PAUSE)
            continue
        if (server := of()) is None:
            client.close()
            return
        server._take(client)
        del server  # nobody is kept for who may come
        await asyncio.sleep(0)  # many at once do not hold up the loop


async def _request(loop: asyncio.AbstractEventLoop, client: socket.socket) -> bytes | None:
    """A request's head, or ``None`` for what is none."""
    head = b""
    while b"\r\n\r\n" not in head:
        if len(head) > _MAX_REQUEST:
            return None
        more = await loop.sock_recv(client, _MAX_REQUEST)
        if not more:
            return None
        head += more
    return head


def _is_for_us(request: bytes) -> bool:
    """Whether the hosts that a request names are this machine's loopback, as we listen nowhere else.

    A web page that has its own name resolved to us (DNS rebinding) would read the figures otherwise: its
    browser says that name. Who says none (HTTP/1.0) is no browser.
    """
    lines = request.split(b"\r\n\r\n", 1)[0].split(b"\r\n")[1:]
    hosts = [value for name, _, value in (line.partition(b":") for line in lines) if name.lower() == b"host"]
    return all(_is_loopback(host.strip().decode("ascii", "replace")) for host in hosts)


def _is_loopback(host: str) -> bool:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*))(?::[0-9]*)?", host)
    if found is None:
        return False
    name = (found[1] or found[2]).lower().removesuffix(".")
    # Names under localhost are the loopback's too (RFC 6761, 6.3).
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _response(status: str, kind: str, text: str, *headers: str) -> bytes:
    body = text.encode()
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "Connection: close", "", ""]).encode() + body


def _place(address: str) -> tuple[Path | None, str, int]:
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        if not path:
            raise config_error("address", "unix: names a path")
        return Path(path), "", 0
    try:
        host, port = split_address(f":{address}" if address.isdecimal() else address, "127.0.0.1")
    except ValueError as error:
        raise config_error("address", str(error)) from None
    if host == "localhost":
        host = "127.0.0.1"
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        text = f"{host} is no loopback address: figures have neither TLS nor a password"
        raise config_error("address", text, "not_loopback")
    return None, host, port


def _unix_socket(path: Path) -> socket.socket:
    """A listening socket that only our own user may open, in place of one that nobody listens on."""
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(one.fileno(), 0o600)  # the path gets it, so there is no moment with other rights
        try:
            one.bind(os.fspath(path))
        except OSError:
            if not _is_stale(path):
                raise
            path.unlink()
            one.bind(os.fspath(path))
        one.listen(_MAX_CLIENTS)
        one.setblocking(False)
    except BaseException:
        one.close()
        raise
    return one


def _is_stale(path: Path) -> bool:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)
            probe.connect(os.fspath(path))
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
