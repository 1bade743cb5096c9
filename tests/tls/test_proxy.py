"""The proxy from Python: what it does with TLS, where it leads, what it refuses, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sapper import errors
from sapper.errors import ApiMisuseError, BindError, ClosedError, ConfigError
from sapper.metrics import render
from sapper.tls import Credentials, PeerRules, Proxy, ProxyOptions, Route, TlsConfig
from sapper.tls.proxy import ProxyEvent, ReloadEvent
from support.certs import Certificates, Identity
from support.proxies import LATEST, connect, ends, own, trusting, until
from support.services import Echo, echo, read_all, say

KEY = bytes(range(32))
PSK = Credentials.psk("x", KEY)


@pytest.fixture
def service() -> Iterator[Echo]:
    with echo() as one:
        yield one


def served(certs: Certificates, identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.cert_path, identity.key_path)
    return context


def talk(address: str, context: ssl.SSLContext, name: str = "localhost", data: bytes = b"hello") -> bytes:
    """What a TLS client gets that says something and waits for it to come back."""
    with connect(address) as raw, context.wrap_socket(raw, server_hostname=name) as one:
        one.sendall(data)
        got = b""
        while not got.endswith(data):
            chunk = one.recv(65536)
            if not chunk:
                break
            got += chunk
        with contextlib.suppress(OSError):
            one.unwrap().close()
        return got


def refused(address: str, context: ssl.SSLContext, name: str = "localhost") -> str:
    """The alert, or what else a TLS client gets that is not welcome."""
    try:
        got = talk(address, context, name)
    except (ssl.SSLError, OSError) as error:
        return str(error)
    raise AssertionError(f"it was served {got!r}")


async def test_it_terminates(certs: Certificates, service: Echo, leak_check: None, any_loop: str) -> None:
    events: list[ProxyEvent] = []
    options = ProxyOptions(
        listen=("127.0.0.1:0",), to=(service.to,), tls=own(certs.server), log_connections=True
    )
    async with Proxy(options, on_event=events.append) as proxy:
        assert proxy.state == "running"
        data = os.urandom(300_000)
        got = await asyncio.to_thread(talk, proxy.addresses[0], trusting(certs), "localhost", data)
        assert got == b"echo\n" + data
        await until(lambda: ends(events, "ended"), "the end is told")
        one = ends(events, "ended")[0].connection
        assert (one.server_name, one.version, one.upstream) == ("localhost", "TLSv1.3", service.to)
        assert one.to_upstream == len(data)
        assert one.to_client == len(data) + 5
        await until(lambda: proxy.stats().ended == {"ended": 1}, "it is counted")
        await until(lambda: proxy.stats().open == 0, "its place is free")
        stats = proxy.stats()
        assert (stats.accepted, stats.handshakes) == (1, {"TLSv1.3": 1})
    assert proxy.stats().state == "closed"
    assert proxy.connections() == []


async def test_it_originates(certs: Certificates, leak_check: None) -> None:
    trusted = TlsConfig(roots=certs.ca.cert)
    with echo(context=served(certs, certs.server)) as behind:
        to = f"tls://localhost:{behind.port}"
        async with Proxy(listen="127.0.0.1:0", to=to, upstream_tls=trusted) as proxy:
            with connect(proxy.addresses[0]) as one:
                assert await asyncio.to_thread(say, one, b"hello") == b"echo\nhello"
        # A name that is not in the certificate: nobody is served, and it is told why.
        events: list[ProxyEvent] = []
        with_name: dict[str, Any] = {
            "upstream_tls": trusted,
            "upstream_name": "elsewhere.test",
            "on_event": events.append,
        }
        async with Proxy(listen="127.0.0.1:0", to=to, **with_name) as proxy:
            # The reset may come before connect() has returned.
            with pytest.raises(ConnectionResetError), connect(proxy.addresses[0]) as one:
                await asyncio.to_thread(read_all, one)
            await until(lambda: ends(events, "upstream"), "the failure is told")
    error = ends(events, "upstream")[0].error
    assert isinstance(error, errors.CertificateError)
    assert error.reason == "wrong_name"


async def test_it_re_encrypts_and_tells_alpn_apart(certs: Certificates) -> None:
    with echo(b"inner", context=served(certs, certs.server)) as behind:
        proxy = Proxy(
            listen="127.0.0.1:0",
            to=f"tls://127.0.0.1:{behind.port}",
            tls=own(certs.server, alpn=("http/1.1",)),
            upstream_tls=TlsConfig(roots=certs.ca.cert),
        )
        async with proxy:
            context = trusting(certs)
            context.set_alpn_protocols(["h2", "http/1.1"])
            assert await asyncio.to_thread(talk, proxy.addresses[0], context) == b"inner\nhello"


async def test_without_tls_it_is_a_plain_one(tmp_path: Path) -> None:
    with echo(b"unix", path=tmp_path / "service") as behind:
        async with Proxy(listen=f"unix:{tmp_path / 'own'}", to=behind.to, unix_mode=0o600) as proxy:
            assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600
            with connect(str(tmp_path / "own")) as one:
                assert await asyncio.to_thread(say, one, b"x" * 100_000) == b"unix\n" + b"x" * 100_000
        assert not (tmp_path / "own").exists()
    assert proxy.addresses == (str(tmp_path / "own"),)


async def test_it_listens_at_a_descriptor_and_at_an_abstract_name(service: Echo) -> None:
    name = f"sapper-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options: Any = {"listen": (f"fd:{listener.fileno()}", f"unix:@{name}"), "to": service.to}
        async with Proxy(**options) as proxy:
            assert len(proxy.addresses) == 2
            with connect(proxy.addresses[0]) as one:
                assert await asyncio.to_thread(say, one, b"by number") == b"echo\nby number"
            with socket.socket(socket.AF_UNIX) as one:
                one.settimeout(LATEST)
                one.connect(f"\0{name}")
                assert await asyncio.to_thread(say, one, b"by name") == b"echo\nby name"
        # The descriptor was duplicated: the caller's own listens on.
        with socket.create_connection(listener.getsockname(), timeout=LATEST):
            listener.settimeout(LATEST)
            listener.accept()[0].close()


async def test_over_ipv6(certs: Certificates) -> None:
    with echo(host="::1") as behind:
        async with Proxy(listen="[::1]:0", to=behind.to, tls=own(certs.server)) as proxy:
            assert proxy.addresses[0].startswith("[::1]:")
            assert await asyncio.to_thread(talk, proxy.addresses[0], trusting(certs)) == b"echo\nhello"


async def test_names_choose_the_way(certs: Certificates) -> None:
    """Exact before wildcard before the rest; what is passed on is not decrypted; strangers get an alert."""
    events: list[ProxyEvent] = []
    with contextlib.ExitStack() as stack:
        one, two, three = (stack.enter_context(echo(name)) for name in (b"one", b"two", b"three"))
        inner = stack.enter_context(echo(b"inner", context=served(certs, certs.wrong_name)))
        routes = (
            Route(names=("device.test",), to=(one.to,)),
            Route(names=("*.test",), to=(two.to,)),
            Route(names=("elsewhere.test",), to=(inner.to,), pass_through=True),
            Route(names=("localhost",), to=(three.to,), tls=own(certs.rsa_server)),
        )
        proxy = Proxy(listen="127.0.0.1:0", routes=routes, tls=own(certs.server), on_event=events.append)
        async with proxy:
            anyone = trusting(certs)
            anyone.check_hostname = False

            async def ask(name: str) -> bytes:
                return await asyncio.to_thread(talk, proxy.addresses[0], anyone, name)

            assert await ask("device.test") == b"one\nhello"
            assert await ask("DEVICE.test") == b"one\nhello"
            assert await ask("other.test") == b"two\nhello"
            assert await ask("localhost") == b"three\nhello"
            # The service's own certificate, which the proxy does not have.
            assert (
                await asyncio.to_thread(talk, proxy.addresses[0], trusting(certs), "elsewhere.test")
                == b"inner\nhello"
            )
            said = await asyncio.to_thread(refused, proxy.addresses[0], anyone, "nobody.example")
            assert "unrecognized" in said.lower()
            await until(lambda: ends(events, "route"), "the stranger is told of")
    assert ends(events, "route")[0].connection.server_name == "nobody.example"


async def test_pass_through_without_a_name_has_a_default(certs: Certificates) -> None:
    with echo(b"inner", context=served(certs, certs.server)) as inner:
        async with Proxy(listen="127.0.0.1:0", to=inner.to, pass_through=True) as proxy:
            nameless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            nameless.load_verify_locations(certs.ca.cert_path)
            # The address of the service's certificate; an address is no name, so none is sent.
            got = await asyncio.to_thread(talk, proxy.addresses[0], nameless, "127.0.0.1")
            assert got == b"inner\nhello"


async def test_rules_on_the_clients_certificate(certs: Certificates, service: Echo) -> None:
    events: list[ProxyEvent] = []
    tls = own(certs.server, roots=certs.ca.cert, peer_rules=(PeerRules(cn=("client.test",)),))
    options: dict[str, Any] = {"tls": tls, "on_event": events.append, "log_connections": True}
    async with Proxy(listen="127.0.0.1:0", to=service.to, **options) as proxy:
        where = proxy.addresses[0]
        assert await asyncio.to_thread(talk, where, trusting(certs, certs.client)) == b"echo\nhello"
        await asyncio.to_thread(refused, where, trusting(certs, certs.wrong_name))
        await asyncio.to_thread(refused, where, trusting(certs))
        await until(lambda: len(ends(events, "handshake")) == 2 and ends(events, "ended"), "all are told")
    assert ends(events, "ended")[0].connection.client_cn == "client.test"
    kinds = [one.error.kind for one in ends(events, "handshake") if one.error is not None]
    assert kinds[0] == errors.ErrorKind.POLICY_DENIED


async def test_nothing_is_asked_of_the_service_before_the_clients_handshake(certs: Certificates) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    events: list[ProxyEvent] = []
    with listener:
        to = f"127.0.0.1:{listener.getsockname()[1]}"
        async with Proxy(listen="127.0.0.1:0", to=to, tls=own(certs.server), on_event=events.append) as proxy:
            with connect(proxy.addresses[0]) as one:
                one.sendall(b"GET / HTTP/1.1\r\n\r\n")
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(read_all, one)
            await until(lambda: ends(events, "handshake"), "it is no TLS")
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_the_next_service_is_tried_and_the_failed_one_last(certs: Certificates, service: Echo) -> None:
    events: list[ProxyEvent] = []
    dead = "127.0.0.1:1"
    options: dict[str, Any] = {"tls": own(certs.server), "on_event": events.append}
    async with Proxy(listen="127.0.0.1:0", to=(dead, service.to), **options) as proxy:
        for _ in range(3):
            assert await asyncio.to_thread(talk, proxy.addresses[0], trusting(certs)) == b"echo\nhello"
        await until(lambda: ends(events, "retry"), "the failure is told")
        # On a machine that takes seconds for a connection it may have been tried again.
        assert 1 <= proxy.stats().upstream_failures[dead] < 3
    retry = ends(events, "retry")[0]
    assert retry.connection.upstream == dead
    assert isinstance(retry.error, errors.ConnectError)


async def test_no_service_is_an_alert_and_counted(certs: Certificates) -> None:
    events: list[ProxyEvent] = []
    options: dict[str, Any] = {"tls": own(certs.server), "on_event": events.append}
    async with Proxy(listen="127.0.0.1:0", to=("127.0.0.1:1", "unix:/nowhere/x"), **options) as proxy:
        said = await asyncio.to_thread(refused, proxy.addresses[0], trusting(certs))
        assert "internal error" in said.lower() or "reset" in said.lower()
        await until(lambda: ends(events, "upstream"), "the failure is told")
        await until(lambda: proxy.stats().ended == {"upstream": 1}, "it is counted")
        assert proxy.stats().errors == {"connect": 1}
        assert set(proxy.stats().upstream_failures) == {"127.0.0.1:1", "unix:/nowhere/x"}


async def test_slow_handshakes_meet_their_deadline_and_leave_room(certs: Certificates, service: Echo) -> None:
    """Who sends half a hello holds one of two places, until the deadline."""
    events: list[ProxyEvent] = []
    options: dict[str, Any] = {"tls": own(certs.server), "on_event": events.append, "max_handshakes": 1}
    async with Proxy(listen="127.0.0.1:0", to=service.to, handshake_timeout=2.0, **options) as proxy:
        with connect(proxy.addresses[0]) as slow:
            slow.sendall(b"\x16\x03\x01\x01\x00")
            await until(lambda: proxy.stats().handshaking == 1, "it holds the place")
            with connect(proxy.addresses[0]):  # says nothing at all, and so takes no place
                await until(lambda: ends(events, "handshake"), "the slow one is told off")
                assert await asyncio.to_thread(talk, proxy.addresses[0], trusting(certs)) == b"echo\nhello"
            with contextlib.suppress(OSError):
                await asyncio.to_thread(read_all, slow)
    assert isinstance(ends(events, "handshake")[0].error, errors.HandshakeDeadline)


async def test_handshakes_that_stall_give_way(certs: Certificates, service: Echo) -> None:
    """However many begin one and leave it there, whoever goes on is served, long before their deadline."""
    events: list[ProxyEvent] = []
    options: dict[str, Any] = {"tls": own(certs.server), "on_event": events.append, "max_handshakes": 4}
    async with Proxy(listen="127.0.0.1:0", to=service.to, handshake_timeout=600.0, **options) as proxy:
        with contextlib.ExitStack() as stalled:
            for _ in range(40):
                stalled.enter_context(connect(proxy.addresses[0])).sendall(b"\x16")
            await until(lambda: len(ends(events, "handshake")) == 36, "all but four gave way")
            assert await asyncio.to_thread(talk, proxy.addresses[0], trusting(certs)) == b"echo\nhello"
            assert proxy.stats().handshaking <= 4
    error = ends(events, "handshake")[0].error
    assert isinstance(error, errors.ResourceError)
    assert error.reason == "too_many_handshakes"


@pytest.mark.parametrize("said", [b"", b"\x16"], ids=["silent", "half a hello"])
async def test_who_is_not_served_yet_gives_way_where_all_connections_are_taken(
    certs: Certificates, service: Echo, said: bytes
) -> None:
    """Long before their deadline; whoever is served keeps its place."""
    events: list[ProxyEvent] = []
    options: dict[str, Any] = {"tls": own(certs.server), "on_event": events.append, "max_connections": 6}
    async with Proxy(listen="127.0.0.1:0", to=service.to, handshake_timeout=600.0, **options) as proxy:
        host, port = proxy.addresses[0].rsplit(":", 1)
        served = await asyncio.open_connection(
            host, int(port), ssl=trusting(certs), server_hostname="localhost"
        )
        assert await served[0].readline() == b"echo\n"
        with contextlib.ExitStack() as stalled:
            for n in range(40):
                stalled.enter_context(connect(proxy.addresses[0])).sendall(said)
                if n == 4 and said:
                    await until(lambda: proxy.stats().handshaking == 5, "the first ones")
            for _ in range(3):
                assert await asyncio.to_thread(talk, proxy.addresses[0], trusting(certs)) == b"echo\nhello"
            assert proxy.stats().open <= 6
            assert proxy.stats().limit_pauses > 0
            # Who gives way before its byte was read has been silent.
            counted = ("silent", "handshake")
            await until(
                lambda: sum(proxy.stats().ended.get(one, 0) for one in counted) >= 30, "they gave way"
            )
            if said:
                error = ends(events, "handshake")[0].error
                assert isinstance(error, errors.ResourceLimit)
                assert error.reason == "too_many_connections"
            served[1].write(b"still there")
            assert await served[0].readexactly(11) == b"still there"
        served[1].close()
        with contextlib.suppress(OSError):
            await served[1].wait_closed()


async def test_where_everybody_is_served_a_newcomer_waits(certs: Certificates, service: Echo) -> None:
    options: dict[str, Any] = {"tls": own(certs.server), "max_connections": 1, "handshake_timeout": 600.0}
    async with Proxy(listen="127.0.0.1:0", to=service.to, **options) as proxy:
        host, port = proxy.addresses[0].rsplit(":", 1)
        served = await asyncio.open_connection(
            host, int(port), ssl=trusting(certs), server_hostname="localhost"
        )
        assert await served[0].readline() == b"echo\n"
        waiting = asyncio.create_task(asyncio.to_thread(talk, proxy.addresses[0], trusting(certs)))
        for _ in range(20):
            served[1].write(b"x")
            assert await served[0].readexactly(1) == b"x"
        assert not waiting.done()
        assert proxy.stats().accepted == 1
        served[1].close()
        with contextlib.suppress(OSError):
            await served[1].wait_closed()
        assert await waiting == b"echo\nhello"


async def test_the_rate_of_one_address_is_limited(service: Echo) -> None:
    events: list[ProxyEvent] = []
    options: dict[str, Any] = {"rate": 0.001, "burst": 2, "on_event": events.append}
    async with Proxy(listen="127.0.0.1:0", to=service.to, **options) as proxy:
        served_ones = 0
        for _ in range(4):
            with connect(proxy.addresses[0]) as one, contextlib.suppress(OSError):
                served_ones += await asyncio.to_thread(say, one, b"x") == b"echo\nx"
        assert served_ones == 2
        await until(lambda: len(ends(events, "rate")) == 2, "the others are told of")
    assert isinstance(ends(events, "rate")[0].error, errors.ResourceLimit)


async def test_at_the_limit_of_connections_the_next_one_waits(service: Echo) -> None:
    async with Proxy(listen="127.0.0.1:0", to=service.to, max_connections=1) as proxy:
        with connect(proxy.addresses[0]) as first, connect(proxy.addresses[0]) as second:
            assert await asyncio.to_thread(first.recv, 5) == b"echo\n"
            await until(lambda: proxy.stats().limit_pauses == 1, "accepting waits")
            assert proxy.stats().open == 1
            first.shutdown(socket.SHUT_WR)
            assert await asyncio.to_thread(read_all, first) == b""
            assert await asyncio.to_thread(say, second, b"x") == b"echo\nx"


async def test_silence_ends_a_connection(service: Echo) -> None:
    events: list[ProxyEvent] = []
    options: dict[str, Any] = {"idle_timeout": 1.5, "log_connections": True, "on_event": events.append}
    async with Proxy(listen="127.0.0.1:0", to=service.to, **options) as proxy:
        with connect(proxy.addresses[0]) as one:
            assert await asyncio.to_thread(read_all, one) == b"echo\n"
        await until(lambda: ends(events, "idle"), "it is told")


async def test_a_drain_lets_open_connections_end(
    certs: Certificates, service: Echo, leak_check: None
) -> None:
    async with Proxy(listen="127.0.0.1:0", to=service.to, tls=own(certs.server)) as proxy:
        where = proxy.addresses[0]
        with connect(where) as raw:
            one = await asyncio.to_thread(trusting(certs).wrap_socket, raw, server_hostname="localhost")
            with one:
                assert await asyncio.to_thread(one.recv, 5) == b"echo\n"
                proxy.stop(drain=LATEST)
                await until(lambda: proxy.state == "draining", "it drains")
                with pytest.raises(ConnectionRefusedError):
                    connect(where)
                one.sendall(b"still here")
                assert await asyncio.to_thread(one.recv, 10) == b"still here"
                one.unwrap()
        await proxy.wait_closed()
        assert proxy.stats().ended == {"ended": 1}


async def test_a_cancelled_close_ends_everything_at_once(service: Echo, leak_check: None) -> None:
    proxy = Proxy(listen="127.0.0.1:0", to=service.to, drain_timeout=600)
    await proxy.start()
    with connect(proxy.addresses[0]) as one:
        assert await asyncio.to_thread(one.recv, 5) == b"echo\n"
        closing = asyncio.create_task(proxy.aclose())
        await until(lambda: proxy.state == "draining", "it drains")
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        async with asyncio.timeout(LATEST):
            await proxy.wait_closed()
    assert proxy.stats().ended == {"cut": 1}


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"], ids=["silent", "begun"])
async def test_a_drain_does_not_wait_for_who_leaves_a_handshake_unfinished(
    said: bytes, certs: Certificates, service: Echo, leak_check: None
) -> None:
    proxy = Proxy(listen="127.0.0.1:0", to=service.to, tls=own(certs.server), handshake_timeout=600)
    await proxy.start()
    with connect(proxy.addresses[0]) as stranger:
        stranger.sendall(said)
        await until(lambda: proxy.stats().open == 1, "it is there")
        proxy.stop(drain=600)
        async with asyncio.timeout(LATEST):
            await proxy.wait_closed()
    assert proxy.stats().ended == {"cut": 1}


async def test_a_handshake_that_is_under_way_when_a_drain_begins_is_still_served(
    certs: Certificates, service: Echo, leak_check: None
) -> None:
    async with Proxy(listen="127.0.0.1:0", to=service.to, tls=own(certs.server)) as proxy:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting(certs).wrap_bio(incoming, outgoing, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        with connect(proxy.addresses[0]) as raw:
            raw.sendall(outgoing.read())
            incoming.write(await asyncio.to_thread(raw.recv, 65536))
            proxy.stop(drain=LATEST)
            await until(lambda: proxy.state == "draining", "it drains")

            def finish() -> bytes:
                while True:
                    try:
                        client.do_handshake()
                        raw.sendall(outgoing.read())
                        return client.read(5)
                    except ssl.SSLWantReadError:
                        raw.sendall(outgoing.read())
                        incoming.write(raw.recv(65536))

            assert await asyncio.to_thread(finish) == b"echo\n"


async def test_what_is_open_at_the_end_of_a_drain_is_cut(certs: Certificates, service: Echo) -> None:
    proxy = Proxy(listen="127.0.0.1:0", to=service.to, tls=own(certs.server), drain_timeout=0.2)
    await proxy.start()
    with connect(proxy.addresses[0]) as raw:
        one = await asyncio.to_thread(
            trusting(certs).wrap_socket, raw, server_hostname="localhost", suppress_ragged_eofs=False
        )
        with one:
            assert await asyncio.to_thread(one.recv, 5) == b"echo\n"
            await proxy.aclose()
            # Without a goodbye: nobody takes it for an orderly end.
            with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
                await asyncio.to_thread(one.recv, 5)
    assert proxy.stats().ended == {"cut": 1}


async def test_certificates_are_read_again(certs: Certificates, service: Echo, tmp_path: Path) -> None:
    """On change and on call; garbage leaves what was there in use, and says why."""
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    shutil.copy(certs.server.cert_path, chain)
    shutil.copy(certs.server.key_path, key)
    events: list[ProxyEvent] = []

    def reloads() -> list[ReloadEvent]:
        return [one for one in events if isinstance(one, ReloadEvent)]

    def shown(where: str) -> bytes:
        with connect(where) as raw, trusting(certs).wrap_socket(raw, server_hostname="localhost") as one:
            return one.getpeercert(binary_form=True) or b""

    tls = TlsConfig(credentials=Credentials.certificate(chain, key))
    async with Proxy(listen="127.0.0.1:0", to=service.to, tls=tls, on_event=events.append) as proxy:
        where = proxy.addresses[0]
        with connect(where) as raw:
            kept = await asyncio.to_thread(trusting(certs).wrap_socket, raw, server_hostname="localhost")
            with kept:
                assert await asyncio.to_thread(kept.recv, 5) == b"echo\n"
                chain.write_bytes(b"garbage")
                await until(reloads, "the garbage is told of")
                assert isinstance(reloads()[0].error, ConfigError)
                assert await asyncio.to_thread(shown, where) == certs.server.cert_der
                events.clear()
                shutil.copy(certs.rsa_server.key_path, key)
                shutil.copy(certs.rsa_server.cert_path, chain)
                await until(lambda: any(one.error is None for one in reloads()), "the new one is read")
                assert await asyncio.to_thread(shown, where) == certs.rsa_server.cert_der
                kept.sendall(b"kept")
                assert await asyncio.to_thread(kept.recv, 4) == b"kept"
        assert not await proxy.reload()


async def test_a_bad_configuration_keeps_no_other_from_being_read(
    certs: Certificates, service: Echo, tmp_path: Path
) -> None:
    """And the error says which one it is, on call and on change."""

    def copied(name: str, identity: Identity) -> TlsConfig:
        chain, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        shutil.copy(identity.cert_path, chain)
        shutil.copy(identity.key_path, key)
        return TlsConfig(credentials=Credentials.certificate(chain, key))

    def shown(where: str) -> bytes:
        with connect(where) as raw, trusting(certs).wrap_socket(raw, server_hostname="localhost") as one:
            return one.getpeercert(binary_form=True) or b""

    events: list[ProxyEvent] = []
    options = ProxyOptions(
        listen=("127.0.0.1:0",),
        to=(service.to,),
        tls=copied("rest", certs.server),
        routes=(Route(names=("a.test",), to=(service.to,), tls=copied("a", certs.server)),),
        watch=False,
    )
    async with Proxy(options, on_event=events.append) as proxy:
        (tmp_path / "a.pem").write_bytes(b"garbage")
        copied("rest", certs.rsa_server)
        with pytest.raises(ConfigError) as caught:
            await proxy.reload()
        assert caught.value.field == "routes.0.tls.credentials.chain"
        assert await asyncio.to_thread(shown, proxy.addresses[0]) == certs.rsa_server.cert_der
        (tmp_path / "rest.pem").write_bytes(b"garbage too")
        (tmp_path / "a.pem").write_bytes(certs.server.cert_path.read_bytes())
        with pytest.raises(ConfigError) as caught:
            await proxy.reload()
        assert caught.value.field == "tls.credentials.chain"
        copied("rest", certs.server)
        await proxy.reload(options.model_copy(update={"watch": True}))
        (tmp_path / "a.pem").write_bytes(b"garbage")

        def told() -> list[str | None]:
            return [one.error.context.field for one in events if isinstance(one, ReloadEvent) and one.error]

        await until(told, "the watch tells")
        assert told() == ["routes.0.tls.credentials.chain"]


async def test_other_options_serve_new_connections(service: Echo) -> None:
    with echo(b"other") as other:
        options = ProxyOptions(listen=("127.0.0.1:0",), to=(service.to,))
        async with Proxy(options) as proxy:
            with connect(proxy.addresses[0]) as before:
                assert await asyncio.to_thread(before.recv, 5) == b"echo\n"
                assert await proxy.reload(options.model_copy(update={"to": (other.to,)}))
                with connect(proxy.addresses[0]) as after:
                    assert await asyncio.to_thread(say, after, b"x") == b"other\nx"
                assert await asyncio.to_thread(say, before, b"y") == b"y"
            with pytest.raises(ConfigError) as caught:
                await proxy.reload(options.model_copy(update={"listen": (":1",)}))
            assert caught.value.field == "listen"
    with pytest.raises(ClosedError):
        await proxy.reload()
    with pytest.raises(ClosedError):
        await proxy.start()


async def test_a_connection_that_breaks_does_not_look_like_an_orderly_end(service: Echo) -> None:
    """A reset of one side is a reset of the other: bytes may be missing."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        to = f"127.0.0.1:{listener.getsockname()[1]}"
        async with Proxy(listen="127.0.0.1:0", to=to) as proxy:
            with connect(proxy.addresses[0]) as one:
                behind, _ = listener.accept()
                behind.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                behind.close()
                with pytest.raises(ConnectionResetError):
                    await asyncio.to_thread(read_all, one)


async def test_many_at_once(certs: Certificates, service: Echo, leak_check: None) -> None:
    async with Proxy(listen="127.0.0.1:0", to=service.to, tls=own(certs.server)) as proxy:
        where, context = proxy.addresses[0], trusting(certs)
        results: list[bool] = []

        def several(number: int) -> None:
            for turn in range(5):
                data = f"{number}.{turn}".encode() * 1000
                results.append(talk(where, context, "localhost", data) == b"echo\n" + data)

        threads = [threading.Thread(target=several, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert results == [True] * 60
        await until(lambda: proxy.stats().open == 0, "all have ended")
        assert sum(proxy.stats().ended.values()) == 60


async def test_an_address_that_is_taken_is_told(service: Echo, leak_check: None) -> None:
    proxy = Proxy(listen=service.to, to="localhost:1")
    with pytest.raises(BindError):
        await proxy.start()
    with pytest.raises(ApiMisuseError):
        await proxy.start()
    await proxy.wait_closed()
    assert proxy.state == "closed"


async def test_one_that_never_started_leaves_nothing(leak_check: None) -> None:
    proxy = Proxy(listen=":0", to="localhost:1")
    assert (proxy.state, proxy.stats().accepted, proxy.addresses) == ("new", 0, ())
    proxy.stop()
    await proxy.aclose()


async def test_figures_for_prometheus(certs: Certificates, service: Echo) -> None:
    async with Proxy(listen="127.0.0.1:0", to=service.to, tls=own(certs.server)) as proxy:
        await asyncio.to_thread(talk, proxy.addresses[0], trusting(certs))
        await until(lambda: proxy.stats().ended, "it has ended")
        text = render(proxies={'a "name"': proxy})
    assert 'sapper_proxy_handshakes_total{proxy="a \\"name\\"",version="TLSv1.3"} 1\n' in text
    assert 'sapper_proxy_bytes_total{proxy="a \\"name\\"",direction="to_upstream"} 5\n' in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)), "every family is told once"
