"""What runs until somebody ends it and is dropped ends, with a ResourceWarning. Who waits keeps it."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sapper import tls
from sapper.errors import ClosedError
from sapper.events import Closed
from sapper.metrics import MetricsServer
from sapper.testing import throwaway_certificates
from sapper.tls import Credentials, Proxy, TlsConfig, TlsListener, create_bridge, listen
from sapper.tunnel import ServerOptions, TunnelClient, TunnelServer
from support.programs import listening
from support.tunnels import CREDENTIALS, LATEST, Service, echo, server, until

PSK = Credentials.psk("x", bytes(range(32)))
LOCAL = ("127.0.0.1", 0)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def a_listener(stack: AsyncExitStack) -> tuple[Any, Callable[[], bool]]:
    one = await listen(LOCAL, credentials=PSK)
    port = one.port
    return one, lambda: listening(port)


async def a_proxy(stack: AsyncExitStack) -> tuple[Any, Callable[[], bool]]:
    one = Proxy(listen="127.0.0.1:0", to="127.0.0.1:9")
    port = port_of((await one.start())[0])
    return one, lambda: listening(port)


async def a_metrics_server(stack: AsyncExitStack) -> tuple[Any, Callable[[], bool]]:
    one = MetricsServer("127.0.0.1:0")
    await one.__aenter__()
    port = port_of(one.address)
    return one, lambda: listening(port)


async def a_tunnel_server(stack: AsyncExitStack) -> tuple[Any, Callable[[], bool]]:
    one = TunnelServer(lambda said: True, options=ServerOptions(host="127.0.0.1"))
    port = await one.start(0)
    return one, lambda: listening(port)


async def a_tunnel_client(stack: AsyncExitStack) -> tuple[Any, Callable[[], bool]]:
    service = await stack.enter_async_context(Service(echo))
    there = await stack.enter_async_context(server())
    one = TunnelClient("127.0.0.1", there.port or 0, service.port, CREDENTIALS)
    await one.connect()
    return one, lambda: bool(there.status())


KINDS = [a_listener, a_proxy, a_metrics_server, a_tunnel_server, a_tunnel_client]


def drop(owner: list[Any]) -> None:
    """Drops what is in a list, which nobody else has, and expects to be told."""
    with pytest.warns(ResourceWarning, match=f"unclosed .*{type(owner[0]).__name__}"):
        _clear(owner)


def _clear(owner: list[Any]) -> None:
    owner.clear()
    gc.collect()


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
async def test_dropped_it_ends_and_says_so(make: Any, leak_check: None) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(LATEST):
        one, runs = await make(stack)
        assert runs()
        owner = [one]
        del one
        drop(owner)
        await until(lambda: not runs(), "its end")


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
async def test_what_was_ended_is_dropped_in_silence(make: Any, leak_check: None) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(LATEST):
        one, runs = await make(stack)
        if isinstance(one, MetricsServer):
            await one.__aexit__(None, None, None)
        elif isinstance(one, TlsListener):
            one.close()
        elif isinstance(one, Proxy):
            one.stop()
        else:
            await one.stop()
        del one
        gc.collect()
        await until(lambda: not runs(), "its end")


def test_what_was_never_started_is_dropped_in_silence() -> None:
    Proxy(listen="127.0.0.1:0", to="127.0.0.1:9")
    MetricsServer("127.0.0.1:0")
    TunnelServer()
    TunnelClient("127.0.0.1", 9, 9)
    gc.collect()


@asynccontextmanager
async def stranger(port: int) -> AsyncIterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), LATEST) as one:
        one.setblocking(False)
        yield one


async def is_sent_away(one: socket.socket) -> None:
    try:
        while await asyncio.get_running_loop().sock_recv(one, 4_096):
            pass
    except ConnectionResetError:
        pass


async def test_a_listener_with_handshakes_and_connections_that_nobody_fetched(leak_check: None) -> None:
    """A handshake that goes on does not keep it, nor do its events; what it fetched goes on."""
    async with asyncio.timeout(LATEST):
        owner = [await listen(LOCAL, credentials=PSK)]
        heard = owner[0].events()
        port = owner[0].port
        async with await tls.connect("127.0.0.1", port, credentials=PSK) as fetched:
            ours = await owner[0].accept()
            async with stranger(port) as silent:
                other = await tls.connect("127.0.0.1", port, credentials=PSK)
                await until(lambda: owner[0].stats().handshakes == 2, "the other's handshake")
                await until(lambda: owner[0].stats().accepted == 3, "the stranger")
                drop(owner)
                assert [event async for event in heard] == [Closed(None)]
                with pytest.raises(Exception):  # noqa: B017, PT011 - whatever a peer that breaks off is told as
                    assert await other.read() != b""
                other.abort()
                await is_sent_away(silent)
            fetched.write(b"still there")
            assert await ours.read(100) == b"still there"
            await ours.aclose()
        await until(lambda: not listening(port), "its end")


async def test_a_proxy_with_connections_and_watches(tmp_path: Path, leak_check: None) -> None:
    made = throwaway_certificates("localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(made.server[0])
    key.write_bytes(made.server[1])
    async with asyncio.timeout(LATEST), Service(echo) as service:
        own = Credentials.certificate(chain, key)
        owner = [Proxy(listen="127.0.0.1:0", to=f"127.0.0.1:{service.port}", tls=own, watch=True)]
        port = port_of((await owner[0].start())[0])
        config = TlsConfig(roots=made.authority)
        async with await tls.connect(
            "127.0.0.1", port, credentials=config, server_hostname="localhost"
        ) as stream:
            stream.write(b"hello")
            assert await stream.read(5) == b"hello"
            drop(owner)
            await until(lambda: not listening(port), "its end")
            stream.abort()


@pytest.mark.parametrize("loop", [True, False], ids=["on a loop", "without one"])
def test_a_watch_that_is_dropped(loop: bool, tmp_path: Path, leak_check: None) -> None:
    made = throwaway_certificates("localhost")
    roots = tmp_path / "roots.pem"
    roots.write_bytes(made.authority)
    config = TlsConfig(roots=roots)

    async def on_a_loop() -> None:
        drop([config.watch(lambda error: None)])

    if loop:
        asyncio.run(on_a_loop())
    else:
        drop([config.watch(lambda error: None)])


async def test_who_waits_keeps_it(leak_check: None) -> None:
    """Tasks of which nobody knows but what they wait for."""
    async with asyncio.timeout(LATEST), Service(echo) as service:
        places: asyncio.Queue[tuple[Any, int]] = asyncio.Queue()
        served: asyncio.Queue[bytes] = asyncio.Queue()

        async def accepts() -> None:
            listener = await listen(LOCAL, credentials=PSK)
            places.put_nowait((listener.close, listener.port))
            async with await listener.accept() as stream:
                served.put_nowait(await stream.read())

        async def waits() -> None:
            proxy = Proxy(listen="127.0.0.1:0", to=f"127.0.0.1:{service.port}")
            places.put_nowait((proxy.stop, port_of((await proxy.start())[0])))
            await proxy.wait_closed()
            served.put_nowait(b"closed")

        for work in (accepts, waits):
            asyncio.ensure_future(work())  # noqa: RUF006 - that is the point
            end, port = await places.get()
            gc.collect()
            await asyncio.sleep(0)
            assert listening(port)
            if work is accepts:
                async with await tls.connect("127.0.0.1", port, credentials=PSK) as stream:
                    stream.write(b"taken")
                assert await served.get() == b"taken"
                end()
            else:
                end()
                assert await served.get() == b"closed"


async def test_a_bridge_that_rests_is_not_dropped(leak_check: None) -> None:
    """It has an end of its own, as a transport that is connected has."""
    near, far = socket.socketpair()
    ours, theirs = socket.socketpair()
    async with asyncio.timeout(LATEST):
        client = create_bridge(socket=near, sink=ours, credentials=PSK)
        other = create_bridge(socket=far, sink="null:", credentials=PSK, server_side=True)
        await asyncio.gather(client.handshake(), other.handshake())
        closed = client.events()
        del client
        gc.collect()
        other.abort()
        theirs.close()
        assert [isinstance(event, Closed) async for event in closed] == [True]
        with pytest.raises(ClosedError):
            other.start()


class Owner:
    """The commonest form of a program: it has its bridge, and the bridge calls back into it."""

    def __init__(self, calls: str) -> None:
        near, self.far = socket.socketpair()
        self.heard: list[object] = []
        call_backs: dict[str, Any] = {calls: self.hear}
        self.bridge = create_bridge(socket=near, sink="null:", credentials=PSK, **call_backs)

    def hear(self, *said: object) -> bool:
        self.heard.append(said)
        return True


CALL_BACKS = ["on_error", "on_close", "peer_policy"]


def dropped(calls: str) -> socket.socket:
    """The far end of a bridge that nobody has any more."""
    owner = Owner(calls)
    far = owner.far
    del owner
    gc.collect()
    return far


async def is_dropped(calls: str) -> None:
    with dropped(calls) as far:
        far.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(far, 1) == b""


@pytest.mark.parametrize("calls", CALL_BACKS)
async def test_a_bridge_that_was_never_used_does_not_keep_who_it_calls_back(
    calls: str, leak_check: None
) -> None:
    async with asyncio.timeout(LATEST):
        await is_dropped(calls)


@pytest.mark.parametrize("calls", CALL_BACKS)
def test_nor_does_one_without_an_event_loop(calls: str, leak_check: None) -> None:
    with dropped(calls) as far:
        far.settimeout(LATEST)
        assert far.recv(1) == b""


async def test_an_iterator_of_a_bridge_that_was_never_used_ends_with_it(leak_check: None) -> None:
    async with asyncio.timeout(LATEST):
        owner = Owner("on_close")
        events, far = owner.bridge.events(), owner.far
        del owner
        gc.collect()
        assert [event async for event in events] == [Closed(None)]
        far.close()


@pytest.mark.parametrize("end", ["stop", "abort"])
async def test_a_bridge_that_was_ended_before_its_use_tells_of_its_end(end: str, leak_check: None) -> None:
    async with asyncio.timeout(LATEST):
        owner = Owner("on_close")
        heard, far = owner.heard, owner.far
        getattr(owner.bridge, end)()
        del owner
        gc.collect()
        await until(lambda: bool(heard), "its last call-back")
        far.close()


async def test_who_shakes_hands_keeps_the_bridge(leak_check: None) -> None:
    async with asyncio.timeout(LATEST):
        owner = Owner("on_error")
        far = create_bridge(socket=owner.far, sink="null:", credentials=PSK, server_side=True)
        shaking = asyncio.ensure_future(owner.bridge.handshake())
        del owner
        await asyncio.sleep(0)
        gc.collect()
        await far.handshake()
        assert (await shaking).version == "TLSv1.3"
        await far.aclose()
