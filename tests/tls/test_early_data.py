"""Early data between our own ends: off unless asked for, told apart, sent again where asked for."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

import sapper.tls as tls
from sapper.errors import ConfigError, CredentialsRejected, SapperError
from sapper.stream import memory_pair
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, Proxy, TlsConfig, TlsStream
from sapper.tls.transport import create_connection, open_connection
from sapper.tunnel import TunnelServer

LOCAL = ("127.0.0.1", 0)


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


def server_config(made: ThrowawayCertificates, **more: Any) -> TlsConfig:
    more = {"danger_early_data": 16_384, **more}
    return TlsConfig(credentials=Credentials.certificate(*made.server), **more)


def client_config(made: ThrowawayCertificates, **more: Any) -> TlsConfig:
    return TlsConfig(**{"roots": made.authority, "danger_early_data": 65_536, **more})


async def echo(stream: TlsStream) -> None:
    """Says what it has heard, and what became of early data."""
    while data := await stream.read(65_536):
        stream.write(data)
        await stream.drain()


async def visit(port: int, config: TlsConfig, data: bytes, **options: Any) -> tuple[bytes, str | None]:
    options = {"credentials": config, "server_hostname": "localhost", **options}
    async with await tls.connect("127.0.0.1", port, **options) as stream:
        stream.write(data)
        stream.write_eof()
        return await stream.read(), stream.info.early_data


async def test_it_arrives_where_a_session_allows_it(any_loop: str, made: ThrowawayCertificates) -> None:
    client, seen = client_config(made), []

    async def handler(stream: TlsStream) -> None:
        seen.append(stream.info.early_data)
        await echo(stream)
        await stream.confirmed()

    async with asyncio.timeout(30), tls.listen(LOCAL, credentials=server_config(made)) as server:
        serving = asyncio.create_task(server.serve(handler))
        early = {"early_data": b"first, ", "resend_early_data": True}
        # No session yet: it goes behind the handshake.
        assert await visit(server.port, client, b"second", **early) == (b"first, second", None)
        for _ in range(3):
            assert await visit(server.port, client, b"second", **early) == (b"first, second", "accepted")
        # Without any to send nothing is different.
        assert await visit(server.port, client, b"second") == (b"second", None)
        assert seen == [None, "accepted", "accepted", "accepted", None]
        serving.cancel()


async def test_an_answer_comes_before_the_handshake_is_confirmed(made: ThrowawayCertificates) -> None:
    client, server = client_config(made), server_config(made)
    async with asyncio.timeout(30):
        one, other = memory_pair()
        first, second = await asyncio.gather(
            tls.start_client(one, credentials=client, server_hostname="localhost"),
            tls.start_server(other, credentials=server),
        )
        second.write(b"behind the tickets")
        assert await first.read(100) == b"behind the tickets"
        await asyncio.gather(first.aclose(), second.aclose())

        one, other = memory_pair()
        shaking = asyncio.create_task(
            tls.start_client(one, credentials=client, server_hostname="localhost", early_data=b"a question")
        )
        second = await tls.start_server(other, credentials=server)
        assert second.info.early_data == "accepted"
        assert second.info.resumed
        assert await second.read(100) == b"a question"
        second.write(b"an answer")
        await second.drain()
        first = await shaking
        assert await first.read(100) == b"an answer"
        await second.confirmed()
        assert await first.channel_binding() == await second.channel_binding()
        await first.confirmed()  # always true of a client
        await asyncio.gather(first.aclose(), second.aclose())


async def test_what_is_rejected_is_sent_again_only_where_asked_for(made: ThrowawayCertificates) -> None:
    client = client_config(made)
    async with asyncio.timeout(30):
        for resend, expected in ((True, b"first, second"), (False, b"second")):
            async with tls.listen(LOCAL, credentials=server_config(made)) as server:
                serving = asyncio.create_task(server.serve(echo))
                port = server.port
                await visit(port, client, b"x")
                serving.cancel()
            # Another one at the same address, which knows nothing of those sessions.
            async with tls.listen(("127.0.0.1", port), credentials=server_config(made)) as server:
                serving = asyncio.create_task(server.serve(echo))
                early = {"early_data": b"first, ", "resend_early_data": resend}
                assert await visit(port, client, b"second", **early) == (expected, "rejected")
                serving.cancel()


async def test_a_server_that_was_not_asked_for_it_takes_none(made: ThrowawayCertificates) -> None:
    client, plain = client_config(made), server_config(made, danger_early_data=0)
    async with asyncio.timeout(30), tls.listen(LOCAL, credentials=plain) as server:
        serving = asyncio.create_task(server.serve(echo))
        early = {"early_data": b"first, ", "resend_early_data": True}
        for _ in range(2):
            assert await visit(server.port, client, b"second", **early) == (b"first, second", None)
        serving.cancel()


async def test_mutual_tls_and_a_policy_are_asked_before_any_of_it(made: ThrowawayCertificates) -> None:
    certificate = Credentials.certificate(*made.client)
    client = client_config(made, credentials=certificate)
    config = server_config(made, roots=made.authority)
    welcome = [True, True]
    heard = []

    async def handler(stream: TlsStream) -> None:
        assert stream.info.peer_certificate is not None
        heard.append(data := await stream.read(100))
        stream.write(data)

    async with asyncio.timeout(30):
        listener = tls.listen(LOCAL, credentials=config, peer_policy=lambda peer: welcome.pop())
        async with listener as server:
            serving = asyncio.create_task(server.serve(handler))
            early = {"early_data": b"a word", "resend_early_data": True}
            assert await visit(server.port, client, b"", **early) == (b"a word", None)
            assert await visit(server.port, client, b"", **early) == (b"a word", "accepted")
            welcome.append(False)
            # Resumed, and refused all the same: nobody reads a byte of it.
            with pytest.raises(CredentialsRejected):
                await visit(server.port, client, b"", **early)
            assert heard == [b"a word", b"a word"]
            while not server.stats().failed:
                await asyncio.sleep(0.01)  # between two looks: the client hears of it first
            assert heard == [b"a word", b"a word"]
            assert server.stats().failed == 1
            serving.cancel()


async def test_the_transport_and_asyncios_own_streams_send_it_too(made: ThrowawayCertificates) -> None:
    client = client_config(made)
    async with asyncio.timeout(30), tls.listen(LOCAL, credentials=server_config(made)) as server:
        serving = asyncio.create_task(server.serve(echo))
        await visit(server.port, client, b"x")
        options: Any = {
            "credentials": client,
            "server_hostname": "localhost",
            "early_data": b"hello",
            "resend_early_data": True,
        }
        reader, writer = await open_connection("127.0.0.1", server.port, **options)
        assert writer.get_extra_info("tls_info").early_data == "accepted"
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        transport, _ = await create_connection(asyncio.Protocol, "127.0.0.1", server.port, **options)
        assert transport.stream.info.early_data == "accepted"
        transport.abort()
        serving.cancel()


def client_mistakes(made: ThrowawayCertificates) -> dict[str, tuple[str, dict[str, Any]]]:
    allowed = {"credentials": client_config(made, danger_early_data=10)}
    return {
        "not allowed": ("early_data", {"credentials": client_config(made, danger_early_data=0)}),
        "too long": ("early_data", {**allowed, "early_data": bytes(11)}),
        "no bytes": ("early_data", {**allowed, "early_data": "text"}),
        "asked too late": ("early_data", {**allowed, "peer_policy": lambda peer: True}),
        "nothing to send": ("resend_early_data", {**allowed, "early_data": b"", "resend_early_data": True}),
        "no truth": ("resend_early_data", {**allowed, "resend_early_data": 1}),
    }


@pytest.mark.parametrize("mistake", client_mistakes(throwaway_certificates("localhost")))
async def test_a_clients_mistakes_are_named(mistake: str, made: ThrowawayCertificates) -> None:
    field, options = client_mistakes(made)[mistake]
    one, other = memory_pair()
    with pytest.raises(ConfigError) as caught:
        await tls.start_client(one, **{"early_data": b"x", "server_hostname": "localhost", **options})
    assert caught.value.field == field
    # Nothing was taken.
    other.write(b"still there")
    assert await one.read(100) == b"still there"
    one.abort()
    other.abort()


@pytest.mark.parametrize(
    "values",
    [
        {"danger_early_data": 65_537},
        {"danger_early_data": -1},
        {"danger_early_data": True},
        {"max_version": "TLSv1.2"},
        {"resumption": False},
        {"credentials": Credentials.psk("x", bytes(range(32)))},
        {"danger_legacy_suites": True},
    ],
    ids=str,
)
def test_where_it_cannot_be_the_option_is_named(values: dict[str, Any], made: ThrowawayCertificates) -> None:
    with pytest.raises(ConfigError) as caught:
        server_config(made, **values) if "credentials" not in values else TlsConfig(
            danger_early_data=1, **values
        )
    assert caught.value.field == "danger_early_data"


async def test_only_streams_take_it(made: ThrowawayCertificates) -> None:
    config = server_config(made)
    one, _other = memory_pair()

    def refused(call: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            call()
        assert (caught.value.field or "").endswith("danger_early_data")

    refused(lambda: tls.create_bridge(socket=one, sink="null:", credentials=config, server_side=True))
    refused(lambda: Proxy(listen="127.0.0.1:0", to="127.0.0.1:1", tls=config))
    table = {"danger_early_data": 1, "roots": made.authority}
    refused(lambda: Proxy(listen="127.0.0.1:0", to="tls://127.0.0.1:1", upstream_tls=table))
    refused(lambda: TunnelServer(tls=config, danger_allow_anonymous=True))
    one.abort()


async def test_clients_that_leave_with_their_question_disturb_nobody(
    made: ThrowawayCertificates, leak_check: None
) -> None:
    """Sessions are taken by many at once; some of them break off, in the handshake or behind it."""
    client, seen = client_config(made), []
    # A broken connection is no news here.
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)

    async def handler(stream: TlsStream) -> None:
        with contextlib.suppress(SapperError):
            while data := await stream.read(65_536):
                seen.append(data)
                stream.write(data)
                await stream.drain()

    async with asyncio.timeout(60), tls.listen(LOCAL, credentials=server_config(made)) as server:
        serving = asyncio.create_task(server.serve(handler))
        early: Any = {"early_data": bytes(16_384), "resend_early_data": True}
        await asyncio.gather(*(visit(server.port, client, b"x") for _ in range(8)))

        async def break_off(after: float) -> None:
            options: Any = {"credentials": client, "server_hostname": "localhost", **early}
            asking = asyncio.create_task(tls.connect("127.0.0.1", server.port, **options))
            await asyncio.wait([asking], timeout=after)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError, SapperError):
                (await asking).abort()

        for turn in range(5):
            await asyncio.gather(*(break_off(n * 0.0005) for n in range(20)))
            answers = await asyncio.gather(
                *(visit(server.port, client, b"%d" % turn, **early) for _ in range(4))
            )
            assert {answer for answer, _ in answers} == {bytes(16_384) + b"%d" % turn}
            assert {outcome for _, outcome in answers} <= {"accepted", "rejected", None}
        serving.cancel()
    assert seen
