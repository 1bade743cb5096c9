"""Pre-shared keys that a server's program is asked for."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from sapper import tls
from sapper.errors import ApiMisuseError, ConfigError, UnknownPeer
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, TlsConfig
from support.handshakes import meet

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


KEY = bytes(range(32))


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("key", [KEY, KEY.hex(), bytearray(KEY)], ids=["bytes", "text", "bytearray"])
def test_a_server_asks_for_the_key(version: str, key: Any) -> None:
    asked = []

    def finder(identity: bytes) -> Any:
        asked.append(identity)
        assert threading.current_thread().name == "sapper-callbacks"
        return key

    server = TlsConfig(credentials=Credentials.psk_lookup(finder))
    client = TlsConfig(credentials=Credentials.psk("device 7", KEY), max_version=version)
    _, theirs = meet(client, server, None)
    assert theirs.psk_identity == "device 7"
    assert theirs.version == version
    assert asked == [b"device 7"]


def _fails(identity: bytes) -> bytes:
    raise OSError("the database is away")


@pytest.mark.parametrize(
    "finder",
    [lambda _: None, lambda _: "no hex", lambda _: 7, lambda _: b"short", _fails],
    ids=["nobody", "no hex", "no key", "short", "failure"],
)
def test_whoever_is_not_found_is_not_let_in(finder: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = Credentials.psk_lookup(finder)
    with pytest.raises(UnknownPeer):
        meet(Credentials.psk("x", KEY), server, None)


async def test_an_async_look_up_runs_on_the_event_loop_of_its_configuration(any_loop: str) -> None:
    async def finder(identity: bytes) -> bytes | None:
        await asyncio.sleep(0)
        assert asyncio.get_running_loop() is loop
        return KEY if identity == b"x" else None

    async def never(identity: bytes) -> bytes | None:
        await asyncio.Event().wait()
        return KEY

    loop = asyncio.get_running_loop()
    server = TlsConfig(credentials=Credentials.psk_lookup(finder))
    await asyncio.to_thread(meet, Credentials.psk("x", KEY), server, None)
    with pytest.raises(UnknownPeer):
        await asyncio.to_thread(meet, Credentials.psk("y", KEY), server, None)
    server = TlsConfig(credentials=Credentials.psk_lookup(never, timeout=0.1))
    with pytest.raises(UnknownPeer):
        await asyncio.to_thread(meet, Credentials.psk("x", KEY), server, None)


async def test_the_thread_that_must_answer_cannot_block() -> None:
    near, far = socket.socketpair()
    sink, end = socket.socketpair()
    with near, end:
        bridge = tls.create_bridge(
            socket=far, sink=sink, credentials=Credentials.psk_lookup(lambda _: KEY), server_side=True
        )
        with pytest.raises(ApiMisuseError) as caught:
            bridge.handshake_sync()
        assert caught.value.reason == "would_deadlock"
        await bridge.stop()


def test_a_look_up_is_a_servers(made: ThrowawayCertificates) -> None:
    with pytest.raises(ConfigError):
        Credentials.psk_lookup("no function")  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        Credentials.psk_lookup(lambda _: KEY, timeout=0)
    client = TlsConfig(credentials=Credentials.psk_lookup(lambda _: KEY))
    near, far = socket.socketpair()
    with near, far:
        with pytest.raises(ConfigError) as caught:
            tls.create_bridge(socket=near, sink=far, credentials=client)
        assert caught.value.field == "credentials"
