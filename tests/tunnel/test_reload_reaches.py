"""What a reload reaches, option by option: each has its effect where a tunnel is there, from when on
docs/tunnel.md says, or is refused by its name. An option without an entry here fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sapper.errors import (
    ConfigError,
    ConnectDeadline,
    ConnectError,
    CredentialsRejected,
    HandshakeDeadline,
    PolicyDenied,
    ResourceLimit,
    SapperError,
)
from sapper.testing import throwaway_certificates
from sapper.tunnel import (
    ClientOptions,
    Limits,
    ServerOptions,
    TunnelClient,
    TunnelServer,
    VisitorLimits,
    events,
)
from sapper.tunnel import Service as Exposed
from support.tunnels import (
    CREDENTIALS,
    LATEST,
    Cutter,
    Service,
    client,
    echo,
    first_of,
    is_let_in,
    says,
    server,
    until,
    visit,
)
from support.w3ptunl import OriginalClient, OriginalServer

DOCS = Path(__file__).parents[2] / "docs" / "tunnel.md"
#: So long that a test does not see the end of it.
LONG = 600.0
OTHERS = {**CREDENTIALS, "n": 2}
FLOOD = 64 * 1024 * 1024


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes nothing and says nothing."""
    await asyncio.Event().wait()


def one(name: str, value: Any) -> Any:
    """An option that has its name from a table."""
    return {name: value}


def rows(begins: str) -> set[str]:
    """The options of a table of docs/tunnel.md, by its heading."""
    text = DOCS.read_text("utf-8").partition("## Reloading")[2].partition("\n## ")[0]
    table = re.split(r"\n\n", text[text.index(f"| {begins} |") :])[0]
    first = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {
        name for cell in first if "file" not in cell.split("`")[0] for name in re.findall(r"`(\w+)`", cell)
    }


# -- a server --------------------------------------------------------------------------------------------


class AtServer:
    """A tunnel with a stream, and a server that is told to do otherwise."""

    base: ClassVar[dict[str, Any]] = {
        "host": "127.0.0.1",
        "filter_timeout": LONG,
        "handshake_timeout": LONG,
        "grace": LONG,
    }
    base |= {"linger": LONG}

    def __init__(
        self, ours: TunnelServer, exposed: TunnelClient, local: Service, free: Callable[..., int]
    ) -> None:
        self.ours, self.exposed, self.local, self.free_port = ours, exposed, local, free

    @property
    def public(self) -> int:
        return self.exposed.assigned_port or 0

    async def reload(self, values: dict[str, Any] | None = None, **options: Any) -> None:
        await self.ours.reload(ServerOptions(**{**self.base, **options}), **(values or {}))

    def another(self, credentials: Any = CREDENTIALS, **values: Any) -> Any:
        values.setdefault("options", {"reconnect": False})
        if "services" in values:
            values["services"] = [Exposed(port=self.local.port, **one) for one in values["services"]]
        port = None if "services" in values else self.local.port
        return client(self.ours.port or 0, port, credentials=credentials, **values)  # type: ignore[arg-type]

    async def refused(self, kind: type[SapperError], reason: str, **values: Any) -> None:
        with pytest.raises(kind) as caught:
            async with self.another(**values):
                pass
        assert caught.value.reason == reason


ServerCheck = Callable[[AtServer, str], Awaitable[None]]
SERVER: dict[str, ServerCheck] = {}


def at_server(*names: str) -> Callable[[ServerCheck], ServerCheck]:
    def add(check: ServerCheck) -> ServerCheck:
        SERVER.update(dict.fromkeys(names, check))
        return check

    return add


@at_server("visitor_limits", "client_limits", "service_limits")
async def _limits(there: AtServer, name: str) -> None:
    kind: Any = VisitorLimits if name == "visitor_limits" else Limits
    await there.reload(**one(name, kind(visitors=1)))
    assert not await is_let_in(there.public), "the stream that is there has the place"
    await there.reload()
    assert await is_let_in(there.public)


@at_server("allow_visitors", "deny_visitors")
async def _lists(there: AtServer, name: str) -> None:
    await there.reload(**one(name, ("127.0.0.1",)))
    sources = {source: await is_let_in(there.public, source) for source in ("127.0.0.1", "127.0.0.2")}
    assert sources == {"127.0.0.1": name == "allow_visitors", "127.0.0.2": name == "deny_visitors"}


@at_server("visitor_rate", "visitor_burst")
async def _rate(there: AtServer, name: str) -> None:
    await there.reload(visitor_rate=0.001, visitor_burst=1)
    assert [await is_let_in(there.public) for _ in range(2)] == [True, False]
    if name == "visitor_burst":
        await there.reload(visitor_rate=0.001, visitor_burst=2)
        assert [await is_let_in(there.public) for _ in range(3)] == [True, True, False]


@at_server("visitor_filter")
async def _visitor_filter(there: AtServer, _: str) -> None:
    await there.reload({"visitor_filter": lambda *_: False})
    assert not await is_let_in(there.public)


@at_server("filter_timeout")
async def _filter_timeout(there: AtServer, _: str) -> None:
    async def never(*_: object) -> bool:
        await asyncio.Event().wait()
        return True

    await there.reload({"visitor_filter": never}, filter_timeout=0.05)
    assert not await is_let_in(there.public)


@at_server("visitor_tls")
async def _visitor_tls(there: AtServer, _: str) -> None:
    made = throwaway_certificates()
    context = ssl.create_default_context(cadata=made.authority.decode())
    await there.reload({"visitor_tls": made.server_credentials()})
    async with asyncio.timeout(LATEST):
        secure = await asyncio.open_connection(
            "127.0.0.1", there.public, ssl=context, server_hostname="localhost"
        )
        await says(secure, b"hello")
        secure[1].close()


@at_server("tls")
async def _tls(there: AtServer, _: str) -> None:
    made = throwaway_certificates()
    await there.reload({"tls": made.server_credentials()})
    async with there.another(host="localhost", ca=made.authority) as second:
        assert await is_let_in(second.assigned_port)


@at_server("connection_filter")
async def _connection_filter(there: AtServer, name: str) -> None:
    setattr(there.ours, name, lambda _: False)
    await there.refused(CredentialsRejected, "refused")


@at_server("service_filter")
async def _service_filter(there: AtServer, name: str) -> None:
    setattr(there.ours, name, lambda *_: False)
    await there.refused(PolicyDenied, "service_rejected")


@at_server("handshake_timeout")
async def _handshake_timeout(there: AtServer, _: str) -> None:
    heard = there.ours.events()
    await there.reload(handshake_timeout=0.05)
    _reader, writer = await visit(there.ours.port or 0)
    assert isinstance((await first_of(heard, events.ClientError)).err, HandshakeDeadline)
    writer.close()


@at_server("visitor_host")
async def _visitor_host(there: AtServer, name: str) -> None:
    await there.reload(**one(name, "127.0.0.2"))
    async with there.another() as second:
        stream = await asyncio.open_connection("127.0.0.2", second.assigned_port)
        await says(stream, b"hello")
        stream[1].close()


@at_server("public_ports")
async def _public_ports(there: AtServer, name: str) -> None:
    port = there.free_port()
    await there.reload(**one(name, (port, port)))
    async with there.another(OTHERS) as second:
        assert second.assigned_port == port


@at_server("asked_ports")
async def _asked_ports(there: AtServer, name: str) -> None:
    port = there.free_port()
    await there.reload(**one(name, ()))
    await there.refused(PolicyDenied, "port_not_allowed", services=[{"public_port": port}])
    await there.reload(**one(name, ((port, port),)))
    async with there.another(services=[{"public_port": port}]) as second:
        assert second.assigned_port == port


@at_server("asked_hosts")
async def _asked_hosts(there: AtServer, name: str) -> None:
    await there.reload(**one(name, ("127.0.0.2",)))
    async with there.another(services=[{"public_host": "127.0.0.2"}]) as second:
        stream = await asyncio.open_connection("127.0.0.2", second.assigned_port)
        await says(stream, b"hello")
        stream[1].close()


@at_server("max_services")
async def _max_services(there: AtServer, name: str) -> None:
    await there.reload(**one(name, 1))
    await there.refused(PolicyDenied, "too_many_services", services=[{"name": "a"}, {"name": "b"}])


@at_server("max_visitors")
async def _max_visitors(there: AtServer, name: str) -> None:
    await there.reload(**one(name, 1))
    async with there.another() as second:
        first = await visit(second.assigned_port)
        await says(first, b"first")
        waits = await visit(second.assigned_port)
        waits[1].write(b"waits")
        for _ in range(3):
            await says(first, b"first")
        assert len(second.visitors()) == 1
        first[1].close()
        assert await asyncio.wait_for(waits[0].readexactly(5), LATEST) == b"waits"
        waits[1].close()


@at_server("danger_shared_leases")
async def _danger_shared_leases(there: AtServer, name: str) -> None:
    await there.reload(**one(name, True))
    async with there.another(options={"lease": "web", "reconnect": False}) as second:
        port = second.assigned_port
        async with there.another(OTHERS, options={"lease": "web", "reconnect": False}) as third:
            assert third.assigned_port == port


@at_server("lease_time")
async def _lease_time(there: AtServer, name: str) -> None:
    async with there.another() as second:
        port = second.assigned_port
    await until(lambda: len(there.ours.status()) == 1, "its end")
    await there.refused(ConnectError, "port_taken", credentials=OTHERS, services=[{"public_port": port}])
    await there.reload(**one(name, 0.0))
    async with there.another(OTHERS, services=[{"public_port": port}]) as third:
        assert third.assigned_port == port


@at_server("grace")
async def _grace(there: AtServer, name: str) -> None:
    await there.reload(**one(name, 0.05))
    async with Cutter(there.ours.port or 0) as network:
        async with client(network.port, there.local.port):
            network.refuses = True
            network.cut()
            await until(lambda: len(there.ours.status()) == 1, "the end of its session")


@at_server("overflow")
async def _overflow(there: AtServer, name: str) -> None:
    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(FLOOD))
        await writer.drain()

    await there.reload(**one(name, "reset"))
    heard = there.ours.events()
    async with Service(flood) as much:
        peer = OriginalClient(much.port)
        public = await asyncio.wait_for(peer.connect("127.0.0.1", there.ours.port or 0, CREDENTIALS), LATEST)
        _, writer = await visit(public)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        assert isinstance((await first_of(heard, events.VisitorError)).err, ResourceLimit)
        writer.transport.abort()
        await peer.close()


@at_server("linger")
async def _linger(there: AtServer, name: str) -> None:
    await there.reload(**one(name, 0.05))
    async with Service(silent) as says_nothing:
        peer = OriginalClient(says_nothing.port)
        public = await asyncio.wait_for(peer.connect("127.0.0.1", there.ours.port or 0, CREDENTIALS), LATEST)
        reader, writer = await visit(public)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), LATEST) == b""
        writer.close()
        await peer.close()


OTHER_VALUES = {"host": "::1", "max_clients": 7, "max_handshakes": 7, "max_streams": 7, "lease_file": "x"}


@at_server(*OTHER_VALUES)
async def _refused(there: AtServer, name: str) -> None:
    with pytest.raises(ConfigError, match="while the server runs") as caught:
        await there.reload(deny_visitors=("*",), **one(name, OTHER_VALUES[name]))
    assert caught.value.field == name
    assert await is_let_in(there.public), "nothing has changed"


def test_every_option_of_a_server_is_here_and_in_the_docs() -> None:
    arguments = {"connection_filter", "visitor_filter", "service_filter", "tls", "visitor_tls"}
    assert set(SERVER) == set(ServerOptions.model_fields) | arguments
    assert rows("of a server") == set(SERVER) | {"port"}


@pytest.mark.parametrize("name", SERVER)
async def test_what_a_server_is_told(name: str, free_port: Callable[..., int], leak_check: None) -> None:
    async with Service(echo) as local, server(options=AtServer.base) as ours:
        async with client(ours.port or 0, local.port) as exposed:
            stream = await visit(exposed.assigned_port or 0)
            await says(stream, b"before")
            await SERVER[name](AtServer(ours, exposed, local, free_port), name)
            await says(stream, b"behind")
            stream[1].close()


# -- a client --------------------------------------------------------------------------------------------


class AtClient:
    """A tunnel with a stream, over a network, and its client that is told to do otherwise."""

    base: ClassVar[dict[str, Any]] = {
        "reconnect_delay": (0.05, 0.2),
        "handshake_timeout": LONG,
        "dial_timeout": LONG,
        "grace": LONG,
    }

    def __init__(self, exposed: TunnelClient, network: Cutter, local: Service, ours: TunnelServer) -> None:
        self.exposed, self.network, self.local, self.ours = exposed, network, local, ours

    @property
    def public(self) -> int:
        return self.exposed.assigned_port or 0

    async def reload(
        self, port: int | None = None, service: dict[str, Any] | None = None, **options: Any
    ) -> None:
        given = {**self.base, **options}
        if not given.get("reconnect", True):
            del given["reconnect_delay"], given["grace"]
        like = TunnelClient(
            "127.0.0.1",
            port or self.network.port,
            authentication_credentials=CREDENTIALS,
            services=[Exposed(**{"port": self.local.port, **(service or {})})],
            options=ClientOptions(**given),
        )
        await self.exposed.reload(like)

    @asynccontextmanager
    async def next_session(self, free_port: int = 0, **values: Any) -> AsyncIterator[events.ClientTunnel]:
        """It begins at another server."""
        asks = {"asked_ports": ((free_port, free_port),)} if free_port else {}
        async with server(options=asks) as other, Cutter(other.port or 0) as self.network:
            heard = other.events()
            await self.reload(**values)
            await self.ours.stop()
            yield (await first_of(heard, events.TunnelCreated)).client_tunnel


ClientCheck = Callable[[AtClient, str, int], Awaitable[None]]
CLIENT: dict[str, ClientCheck] = {}


def at_client(*names: str) -> Callable[[ClientCheck], ClientCheck]:
    def add(check: ClientCheck) -> ClientCheck:
        CLIENT.update(dict.fromkeys(names, check))
        return check

    return add


@at_client("limits")
async def _own_limits(there: AtClient, _: str, _port: int) -> None:
    least = Limits(visitors=1)
    cases: tuple[dict[str, Any], ...] = ({"limits": least}, {"service": {"limits": least}})
    for given in cases:
        await there.reload(**given)
        assert not await is_let_in(there.public), "the stream that is there has the place"
        await there.reload()
        assert await is_let_in(there.public)


@at_client("dial_timeout")
async def _dial_timeout(there: AtClient, name: str, _: int) -> None:
    with socket.socket() as busy, contextlib.ExitStack() as waiting:
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)
        for _ in range(3):  # nobody takes them, and nobody else has a place
            caller = waiting.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(busy.getsockname())
        await there.reload(service={"port": busy.getsockname()[1]}, **one(name, 0.05))
        heard = there.exposed.events()
        assert not await is_let_in(there.public)
        assert isinstance((await first_of(heard, events.ServiceError)).err, ConnectDeadline)


@at_client("send_proxy")
async def _send_proxy(there: AtClient, name: str, _: int) -> None:
    await there.reload(**one(name, "v1"))
    reader, writer = await visit(there.public)
    assert (await asyncio.wait_for(reader.readline(), LATEST)).startswith(b"PROXY TCP4 127.0.0.1 ")
    writer.close()


@at_client("reconnect")
async def _reconnect(there: AtClient, name: str, _: int) -> None:
    await there.reload(**one(name, False))
    there.network.cut()
    await asyncio.wait_for(there.exposed.wait_closed(), LATEST)


@at_client("reconnect_delay")
async def _reconnect_delay(there: AtClient, name: str, _: int) -> None:
    heard = there.exposed.events()
    await there.reload(**one(name, (LONG, LONG)))
    there.network.cut()
    assert (await first_of(heard, events.TunnelReconnectQueued)).timeout >= LONG / 2


@at_client("handshake_timeout")
async def _its_handshake_timeout(there: AtClient, name: str, _: int) -> None:
    async with Service(silent) as says_nothing:
        await there.reload(says_nothing.port, **one(name, 0.05))
        there.network.cut()
        heard = there.exposed.events()
        while not isinstance((await first_of(heard, events.TunnelError)).err, HandshakeDeadline):
            pass


@at_client("lease")
async def _lease(there: AtClient, name: str, port: int) -> None:
    wishes = {"name": "web", "public_port": port}
    async with there.next_session(port, service=wishes, **one(name, "mine")) as tunnel:
        assert tunnel.lease == "mine"
        assert tunnel.services == (events.PublicService("web", port),)


@at_client("max_streams")
async def _max_streams(there: AtClient, name: str, _: int) -> None:
    async with there.next_session(**one(name, 1)) as tunnel:
        stream = await visit(tunnel.services[0].port)
        await says(stream, b"hello")
        assert not await is_let_in(tunnel.services[0].port)
        stream[1].close()


@at_client("grace")
async def _its_grace(there: AtClient, name: str, _: int) -> None:
    async with there.next_session(**one(name, 0.05)) as tunnel:
        stream = await visit(tunnel.services[0].port)
        await says(stream, b"hello")
        there.network.refuses = True
        there.network.cut()
        await until(lambda: there.local.open == 0, "the end of the service's connection")
        stream[1].close()


@at_client("overflow")
async def _its_overflow(there: AtClient, name: str, _port: int) -> None:
    original = OriginalServer(CREDENTIALS)
    async with Service(silent) as takes_nothing:
        heard = there.exposed.events()
        await there.reload(await original.start(), {"port": takes_nothing.port}, **one(name, "reset"))
        await there.ours.stop()
        await asyncio.wait_for(original.created.wait(), LATEST)
        _, writer = await visit(original.public_port)
        writer.write(bytes(FLOOD))
        assert isinstance((await first_of(heard, events.ServiceError)).err, ResourceLimit)
        writer.transport.abort()
        await original.close()


def test_every_option_of_a_client_is_here_and_in_the_docs() -> None:
    assert set(CLIENT) == set(ClientOptions.model_fields)
    assert rows("of a client") == set(CLIENT)


@pytest.mark.parametrize("name", CLIENT)
async def test_what_a_client_is_told(name: str, free_port: Callable[..., int], leak_check: None) -> None:
    async with Service(echo) as local, server() as ours, Cutter(ours.port or 0) as network:
        async with client(network.port, local.port, options=AtClient.base) as exposed:
            stream = await visit(exposed.assigned_port or 0)
            await says(stream, b"before")
            await CLIENT[name](AtClient(exposed, network, local, ours), name, free_port())
            stream[1].close()


# -- limits, for the bytes of streams that are there ------------------------------------------------------


@pytest.mark.parametrize("scope", ["visitor_limits", "client_limits", "service_limits", "limits", "service"])
async def test_limits_reach_streams_that_are_there(scope: str, leak_check: None) -> None:
    kind = VisitorLimits if scope == "visitor_limits" else Limits
    async with Service(echo) as local, server() as ours, client(ours.port or 0, local.port) as exposed:
        there = AtClient(exposed, Cutter(0), local, ours)

        async def tell(**limits: Any) -> None:
            given = kind(**limits)
            if scope in ServerOptions.model_fields:
                return await ours.reload(ServerOptions(host="127.0.0.1", **one(scope, given)))
            values: Any = {"service": {"limits": given}} if scope == "service" else {scope: given}
            return await there.reload(ours.port, **values)

        def paused() -> int:
            end = ours.status()[0] if scope in ServerOptions.model_fields else exposed.status()
            return end.services[0].paused

        reader, writer = stream = await visit(there.public)
        await says(stream, b"before")
        await tell(bytes_per_second=1)
        much = bytes(range(256)) * 64
        writer.write(much)
        await until(paused, "its first pause")
        await tell()
        assert await asyncio.wait_for(reader.readexactly(len(much)), LATEST) == much, "nothing waits any more"
        await tell(total_bytes=10)
        await says(stream, b"12345")
        writer.write(b"6")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), LATEST)
        writer.close()
