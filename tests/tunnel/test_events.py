"""Events: the original's names, an order that ends, and payload for those alone who ask for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sapper.errors import ConfigError, CredentialsRejected
from sapper.events import EventsLost
from sapper.tunnel import TunnelClient, TunnelServer, events
from support.tunnels import LATEST, Service, asked, client, echo, server


async def collected(heard: Any, name: str, count: int) -> list[Any]:
    """Events of that name until they are about ``count`` bytes."""
    found: list[Any] = []
    async with asyncio.timeout(LATEST):
        async for event in heard:
            if event.name == name:
                found.append(event)
                if sum(one.bytes for one in found) >= count:
                    return found
    raise AssertionError("the events ended")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            TunnelServer,
            (
                "main-server-start main-server-end main-server-error client-connected "
                "client-protocol-confirmed client-disconnected client-authentication-failed client-error "
                "tunnel-error tunnel-created tunnel-destroyed visitor-connected visitor-disconnected "
                "visitor-error data-from-visitor data-to-visitor error"
            ),
        ),
        (
            lambda: TunnelClient("localhost", 9000, 3000),
            (
                "tunnel-connection-established tunnel-protocol-confirmed authentication-credentials-sent "
                "authentication-acknowledged tunnel-error tunnel-disconnected tunnel-reconnect-queued "
                "tunnel-client-end service-connected service-disconnected service-error data-to-service "
                "data-from-service error"
            ),
        ),
    ],
)
async def test_the_original_s_names(kind: Any, names: str) -> None:
    one = kind()
    for name in names.split():
        one.on(name, print)
    with pytest.raises(ConfigError):
        one.on("tunnel-made", print)


async def test_what_ends_a_client_is_its_error(leak_check: None) -> None:
    async with server() as ours:
        refused = TunnelClient("127.0.0.1", ours.port or 0, 1, {"id": "nobody"})
        heard = refused.events()
        await refused.start()
        async with asyncio.timeout(LATEST):
            told = [event async for event in heard]
        assert [event.name for event in told] == [
            "tunnel-connection-established",
            "authentication-credentials-sent",
            "tunnel-protocol-confirmed",
            "tunnel-error",
            "error",
            "tunnel-client-end",
        ]
        way = events.ClientConnection("127.0.0.1", ours.port or 0, secure=False)
        for event in told[:4]:
            assert event.client_connection == way  # type: ignore[attr-defined]
        last = told[4]
        assert isinstance(last, events.GenericError)
        assert isinstance(last.err, CredentialsRejected)


async def test_the_bytes_come_to_who_asks_for_them(leak_check: None) -> None:
    payload = bytes(range(256)) * 8
    async with Service(echo) as service, server() as ours, client(ours.port or 0, service.port) as exposed:
        at_server, at_client = ours.events(payload=True), exposed.events(payload=True)
        assert await asked(exposed.assigned_port or 0, payload) == payload
        for heard, names in [
            (at_server, ("data-from-visitor", "data-to-visitor")),
            (at_client, ("data-to-service", "data-from-service")),
        ]:
            for name in names[:1]:
                found = await collected(heard, name, len(payload))
                assert b"".join(one.payload for one in found) == payload
                assert all(one.lost == 0 and one.bytes == len(one.payload) for one in found)
                assert payload[:8].hex() not in repr(found), "it is not printed"


async def test_nobody_gets_them_unasked(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours, client(ours.port or 0, service.port) as exposed:
        bare: list[Any] = []
        full: list[Any] = []
        ours.on("data-from-visitor", bare.append)
        counts = ours.events(data=True)
        assert ours._wanted & 4 == 0, "native code is not even asked"
        ours.on("data-to-visitor", full.append, payload=True)
        assert await asked(exposed.assigned_port or 0, b"hello") == b"hello"
        (seen,) = await collected(counts, "data-from-visitor", 5)
        assert (seen.bytes, seen.payload, seen.lost) == (5, None, 0)
        assert [one.payload for one in bare] == [None]
        (back,) = await collected(counts, "data-to-visitor", 5)
        assert back.payload is None
        assert [(one.payload, one.bytes) for one in full] == [(b"hello", 5)]
        ours.off("data-to-visitor", full.append)
        assert ours._wanted & 4 == 0


async def test_what_does_not_fit_is_counted(leak_check: None) -> None:
    count = 8 * 1024 * 1024

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(bytes(count))
        await writer.drain()
        writer.write_eof()

    async with Service(pour) as service, server() as ours, client(ours.port or 0, service.port) as exposed:
        heard = ours.events(payload=True)
        answer = await asked(exposed.assigned_port or 0, b"x")
        assert len(answer) == count
        found = await collected(heard, "data-to-visitor", count)
        assert sum(one.bytes for one in found) == count
        assert all(len(one.payload) <= 64 * 1024 for one in found)
        assert all(one.lost == one.bytes - len(one.payload) for one in found)
        assert sum(one.lost for one in found) > 0
        assert found[0].payload == bytes(len(found[0].payload))


async def test_only_events_of_payload_have_one(leak_check: None) -> None:
    with pytest.raises(ConfigError) as caught:
        TunnelServer().on("tunnel-created", print, payload=True)
    assert caught.value.field == "payload"


def test_lost_events_have_one_word() -> None:
    lost = events.EventsLost(3)
    assert isinstance(lost, EventsLost)
    assert (lost.name, lost.count) == ("events-lost", 3)
