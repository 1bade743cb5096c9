"""Who may visit a tunnel, and how its service hears who does."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from sapper.errors import ConfigError, PolicyDenied, ResourceLimit
from sapper.testing import throwaway_certificates
from sapper.tunnel import ClientOptions, ServerOptions, TunnelServer, events
from support.tunnels import CREDENTIALS, LATEST, Service, client, come, echo, is_let_in, server
from support.w3ptunl import OriginalClient, OriginalServer


async def denied(heard: Any) -> events.VisitorError:
    """The next event of a visitor that was sent away."""
    async with asyncio.timeout(LATEST):
        async for event in heard:
            if isinstance(event, events.VisitorError):
                return event
    raise AssertionError("the events ended")


# -- lists of addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "inside", "outside"),
    [
        ({"allow_visitors": ("127.0.0.2",)}, "127.0.0.2", "127.0.0.3"),
        ({"allow_visitors": ("127.0.0.2/31",)}, "127.0.0.3", "127.0.0.4"),
        ({"allow_visitors": ("127.0.1.*", "10.0.0.1")}, "127.0.1.9", "127.0.0.1"),
        ({"allow_visitors": ("127.0.0.5-127.0.0.7",)}, "127.0.0.7", "127.0.0.8"),
        ({"deny_visitors": ("127.0.0.2",)}, "127.0.0.1", "127.0.0.2"),
        ({"allow_visitors": ("*",), "deny_visitors": ("127.0.0.0/30",)}, "127.0.0.4", "127.0.0.3"),
    ],
)
async def test_lists_of_addresses(
    options: dict[str, Any], inside: str, outside: str, leak_check: None
) -> None:
    async with Service(echo) as service, server(options=options) as ours:
        heard = ours.events()
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            assert not await is_let_in(public, outside)
            event = await denied(heard)
            assert event.visitor is None
            assert isinstance(event.err, PolicyDenied)
            assert outside in str(event.err)
            assert await is_let_in(public, inside)
            assert service.connections == 1, "nobody else reached the service"


@pytest.mark.parametrize(("entry", "let_in"), [("::1", True), ("::/64", True), ("fe80::/10", False)])
async def test_visitors_over_ipv6(entry: str, let_in: bool, leak_check: None) -> None:
    options = {"visitor_host": "::1", "allow_visitors": (entry,)}
    async with Service(echo) as service, server(options=options) as ours:
        async with client(ours.port or 0, service.port) as exposed:
            assert await is_let_in(exposed.assigned_port or 0, "::1") is let_in


async def test_an_empty_list_lets_nobody_in(leak_check: None) -> None:
    async with Service(echo) as service, server(options={"allow_visitors": ()}) as ours:
        async with client(ours.port or 0, service.port) as exposed:
            assert not await is_let_in(exposed.assigned_port or 0)


@pytest.mark.parametrize("name", ["allow_visitors", "deny_visitors"])
async def test_an_entry_that_is_none_is_told_with_its_option(name: str, leak_check: None) -> None:
    given: dict[str, Any] = {name: ("127.0.0.1", "300.1.1.1")}
    with pytest.raises(ConfigError, match=r"300\.1\.1\.1") as caught:
        await TunnelServer(options=ServerOptions(**given)).start(0)
    assert caught.value.field == f"{name}.1"


# -- how often -----------------------------------------------------------------------------------------


async def test_an_address_that_comes_too_often_is_sent_away(leak_check: None) -> None:
    # One visit in more than a day: no slow machine fills the bucket while it is looked at.
    options = {"visitor_rate": 1e-5, "visitor_burst": 2}
    async with Service(echo) as service, server(options=options) as ours:
        heard = ours.events()
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            assert [await is_let_in(public, "127.0.0.2") for _ in range(4)] == [True, True, False, False]
            event = await denied(heard)
            assert isinstance(event.err, ResourceLimit)
            assert event.err.reason == "visitor_rate"
            assert await is_let_in(public, "127.0.0.3"), "others are not held up"
            async with client(ours.port or 0, service.port) as second:
                assert not await is_let_in(second.assigned_port or 0, "127.0.0.2"), "tunnels share it"
            assert service.connections == 3


async def test_who_is_not_on_the_list_uses_up_nothing(leak_check: None) -> None:
    options = {"visitor_rate": 1e-5, "visitor_burst": 1, "deny_visitors": ("127.0.0.2",)}
    async with Service(echo) as service, server(options=options) as ours:
        heard = ours.events()
        async with client(ours.port or 0, service.port) as exposed:
            for _ in range(2):
                assert not await is_let_in(exposed.assigned_port or 0, "127.0.0.2")
                assert isinstance((await denied(heard)).err, PolicyDenied)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_told(value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerOptions(visitor_rate=value)
    assert caught.value.field == "visitor_rate"


# -- a program's answer --------------------------------------------------------------------------------


async def test_a_program_decides_about_each_visitor(leak_check: None) -> None:
    questions: list[tuple[events.ClientTunnel, str]] = []

    def decide(tunnel: events.ClientTunnel, visitor: str) -> bool:
        questions.append((tunnel, visitor))
        return visitor.startswith("127.0.0.2:")

    async with Service(echo) as service, server(visitor_filter=decide) as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            assert await is_let_in(public, "127.0.0.2")
            assert not await is_let_in(public, "127.0.0.3")
            tunnel, visitor = questions[1]
            assert visitor.startswith("127.0.0.3:")
            assert tunnel.authentication_credentials == CREDENTIALS
            assert tunnel.tunnel_address == events.TunnelAddress(public)
            assert tunnel.negotiated
            assert service.connections == 1


async def test_no_answer_in_time_is_a_no(leak_check: None) -> None:
    async def never(tunnel: events.ClientTunnel, visitor: str) -> bool:
        await asyncio.Event().wait()
        return True

    given: dict[str, Any] = {"visitor_filter": never, "options": {"filter_timeout": 2.0}}
    async with Service(echo) as service, server(**given) as ours:
        async with client(ours.port or 0, service.port) as exposed:
            assert not await is_let_in(exposed.assigned_port or 0)
            assert service.connections == 0


async def test_all_but_true_is_a_no(leak_check: None) -> None:
    answers: list[Any] = []

    async def later(tunnel: events.ClientTunnel, visitor: str) -> bool:
        await asyncio.sleep(0)
        return True

    def broken(tunnel: events.ClientTunnel, visitor: str) -> bool:
        raise RuntimeError("a defect of the filter")

    def yes_man(tunnel: events.ClientTunnel, visitor: str) -> Any:
        return "yes"

    def decide(tunnel: events.ClientTunnel, visitor: str) -> Any:
        return answers[-1](tunnel, visitor)

    async with Service(echo) as service, server(visitor_filter=decide) as ours:
        async with client(ours.port or 0, service.port) as exposed:
            for answer, let_in in ((broken, False), (yes_man, False), (later, True)):
                answers.append(answer)
                assert await is_let_in(exposed.assigned_port or 0) is let_in, answer.__name__
            assert service.connections == 1


async def test_an_undecided_visitor_holds_up_nobody(leak_check: None) -> None:
    first = asyncio.Event()
    decided = asyncio.Event()

    async def decide(tunnel: events.ClientTunnel, visitor: str) -> bool:
        if visitor.startswith("127.0.0.2:"):
            first.set()
            await decided.wait()
        return True

    async with Service(echo) as service, server(visitor_filter=decide) as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            waits = asyncio.create_task(is_let_in(public, "127.0.0.2"))
            await asyncio.wait_for(first.wait(), LATEST)
            assert await is_let_in(public)
            assert not waits.done()
            decided.set()
            assert await waits


async def test_a_program_decides_before_tls_is_spoken(leak_check: None) -> None:
    made = throwaway_certificates("localhost")
    async with Service(echo) as service:
        given = {"visitor_tls": made.server_credentials(), "visitor_filter": lambda tunnel, visitor: False}
        async with server(**given) as ours, client(ours.port or 0, service.port) as exposed:
            async with asyncio.timeout(LATEST):
                with suppress(ConnectionResetError):
                    reader, writer = await come(exposed.assigned_port or 0)
                    assert await reader.read() == b"", "not one byte of TLS"
                    writer.close()
            assert service.connections == 0


async def test_visitors_of_an_original_client_are_decided_about(leak_check: None) -> None:
    async with Service(echo) as service, server(options={"allow_visitors": ("127.0.0.2",)}) as ours:
        peer = OriginalClient(service.port)
        async with asyncio.timeout(LATEST):
            public = await peer.connect("127.0.0.1", ours.port or 0, CREDENTIALS)
        assert await is_let_in(public, "127.0.0.2")
        assert not await is_let_in(public)
        await peer.close()


# -- the service hears who visits ----------------------------------------------------------------------


async def test_a_header_of_version_1_says_who_visits(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port, options={"send_proxy": "v1"}) as exposed:
            public = exposed.assigned_port or 0
            async with asyncio.timeout(LATEST):
                reader, writer = await come(public, "127.0.0.2")
                port = writer.get_extra_info("sockname")[1]
                writer.write(b"payload")
                writer.write_eof()
                said = f"PROXY TCP4 127.0.0.2 127.0.0.1 {port} {public}\r\n"
                assert await reader.read() == said.encode() + b"payload"
                writer.close()


async def test_a_header_of_version_2_says_who_visits_before_anything_is_sent(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port, options={"send_proxy": "v2"}) as exposed:
            public = exposed.assigned_port or 0
            async with asyncio.timeout(LATEST):
                reader, writer = await come(public, "127.0.0.2")
                port = writer.get_extra_info("sockname")[1]
                signature = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"
                addresses = bytes([127, 0, 0, 2, 127, 0, 0, 1])
                ports = port.to_bytes(2, "big") + public.to_bytes(2, "big")
                said = signature + addresses + ports
                assert await reader.readexactly(len(said)) == said, "though the visitor says nothing"
                writer.close()


async def test_an_original_server_does_not_tell_who_visits(leak_check: None) -> None:
    peer = OriginalServer(CREDENTIALS)
    await peer.start()
    async with Service(echo) as service:
        async with client(peer.port, service.port, options={"send_proxy": "v1"}) as exposed:
            said = b"PROXY UNKNOWN\r\n"
            answer = await said_to(exposed.assigned_port or 0, len(said) + 2)
            assert answer == said + b"hi"
    await peer.close()


async def said_to(port: int, length: int) -> bytes:
    """What a visitor gets back who says hi."""
    async with asyncio.timeout(LATEST):
        reader, writer = await come(port)
        writer.write(b"hi")
        answer = await reader.readexactly(length)
        writer.close()
        return answer


def test_a_wrong_version_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        ClientOptions.from_mapping({"send_proxy": "v3"})
    assert caught.value.field == "send_proxy"
