"""The original's own description, example by example: what its programs do there, these do here."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import CertificateError, SapperError
from sapper.tunnel import ClientOptions, ServerOptions, TunnelClient, TunnelServer, events
from support import needs
from support.tunnels import LATEST, Service, asked, echo, until, visit
from support.w3ptunl import CLOSE, DATA, MAGIC, frame, message, read_frame, read_message

SECRET = {"id": "allowed-client", "plan": {"name": "large", "ports": [1, 2]}}


def listening_to(end: TunnelServer | TunnelClient, *names: str) -> list[Any]:
    """Call-backs by name, as the examples have them; what they were given, in its order."""
    seen: list[Any] = []
    for name in names:
        end.on(name, seen.append)
    return seen


async def test_the_server_s_first_example(leak_check: None) -> None:
    """No TLS, no authentication; four call-backs; a client that comes and goes."""
    server = TunnelServer()
    seen = listening_to(server, "main-server-start", "tunnel-created", "client-disconnected", "error")
    port = await server.start(0)
    async with Service(echo) as service:
        client = TunnelClient("127.0.0.1", port, service.port, SECRET)
        async with client:
            assert await asked(client.assigned_port or 0, b"through") == b"through"
            public = client.assigned_port
        await until(lambda: len(seen) == 3, "three events")
    await server.stop()
    start, created, gone = seen
    assert (start.name, start.port, start.secure) == ("main-server-start", port, False)
    assert isinstance(created, events.TunnelCreated)
    assert (created.client_authentication_credentials, created.secure) == (SECRET, False)
    assert created.client_tunnel.tunnel_address == events.TunnelAddress(public or 0)
    assert isinstance(gone, events.ClientDisconnected)
    assert gone.client_tunnel.authentication_credentials == SECRET


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
async def test_the_server_s_filter(later: bool, leak_check: None) -> None:
    """It is given the credentials as they were said, and decides at once or later."""
    given: list[dict[str, Any]] = []

    def decide(credentials: dict[str, Any]) -> bool:
        given.append(credentials)
        return credentials.get("id") == "allowed-client"

    async def decide_later(credentials: dict[str, Any]) -> bool:
        await asyncio.sleep(0)
        return decide(credentials)

    options = ServerOptions(host="127.0.0.1")
    server = TunnelServer(decide_later if later else decide, options=options)
    port = await server.start(0)
    async with server:
        async with Service(echo) as service:
            async with TunnelClient("127.0.0.1", port, service.port, SECRET) as client:
                assert await asked(client.assigned_port or 0, b"in") == b"in"
            stranger = TunnelClient("127.0.0.1", port, service.port, {"id": "another"})
            with pytest.raises(SapperError, match="rejected"):
                await asyncio.wait_for(stranger.connect(), LATEST)
    assert given == [SECRET, {"id": "another"}]


async def test_the_client_s_example(leak_check: None) -> None:
    """Its call-backs, with a server that goes away and comes back, and a service that is not there."""
    server = TunnelServer()
    port = await server.start(0)
    async with Service(echo) as service:
        options = ClientOptions(reconnect_delay=(0.02, 0.1))
        client = TunnelClient(
            tunnel_server_host="127.0.0.1",
            tunnel_server_port=port,
            local_service_port=service.port,
            authentication_credentials=SECRET,
            options=options,
        )
        seen = listening_to(
            client,
            "tunnel-connection-established",
            "authentication-credentials-sent",
            "authentication-acknowledged",
            "tunnel-disconnected",
            "tunnel-error",
        )
        failed = listening_to(client, "service-error")

        def acknowledged() -> list[Any]:
            return [one for one in seen if isinstance(one, events.AuthenticationAcknowledged)]

        await client.start()
        await until(lambda: len(seen) == 3, "the handshake")
        assert seen[1].authentication_credentials == SECRET
        assert seen[2].assigned_port == client.assigned_port
        await server.stop()
        await until(lambda: any(isinstance(one, events.TunnelError) for one in seen), "a failure to connect")
        names = [one.name for one in seen]
        assert "tunnel-disconnected" in names[3:]
        assert seen[names.index("tunnel-disconnected")].had_error is False, "the server said goodbye"
    again = TunnelServer()
    await again.start(port)
    await until(lambda: len(acknowledged()) == 2, "the client, which comes back by itself")
    assert client.assigned_port == acknowledged()[1].assigned_port
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asked(client.assigned_port or 0, b"?", end=False)
    await until(lambda: failed, "service-error")
    assert failed[0].err.kind == "connect"
    await client.stop()
    await again.stop()


@pytest.mark.needs("openssl")
async def test_hop_by_hop_tls_with_a_certificate_of_openssls(tmp_path: Path, leak_check: None) -> None:
    """Made by the description's commands; it is the main port's and the public ports' as well."""
    key, request, cert, name = (tmp_path / file for file in ("key.pem", "csr.pem", "cert.pem", "extensions"))
    name.write_text("subjectAltName=DNS:localhost\n")  # what clients of today look at
    commands: list[list[str | Path]] = [
        ["genpkey", "-algorithm", "RSA", "-out", key, "-pkeyopt", "rsa_keygen_bits:2048"],
        ["req", "-new", "-key", key, "-out", request, "-subj", "/CN=localhost"],
        ["x509", "-req", "-days", "365", "-in", request, "-signkey", key, "-out", cert, "-extfile", name],
    ]
    for arguments in commands:
        subprocess.run([needs.program("openssl"), *arguments], check=True, capture_output=True)

    from sapper.tls import Credentials

    own = Credentials.certificate(cert, key)
    server = TunnelServer(tls=own, visitor_tls=own)
    seen = listening_to(server, "main-server-start", "tunnel-created")
    port = await server.start(0)
    async with Service(echo) as service:
        where = ("localhost", port, service.port, SECRET)
        async with TunnelClient(*where, ca=cert) as client:
            assert (seen[0].secure, seen[1].secure) == (True, True)
            context = ssl.create_default_context(cafile=str(cert))
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", client.assigned_port, ssl=context, server_hostname="localhost"
            )
            writer.write(b"hop by hop")
            assert await asyncio.wait_for(reader.readexactly(10), LATEST) == b"hop by hop"
            writer.close()
            await writer.wait_closed()
        with pytest.raises(CertificateError):
            await asyncio.wait_for(
                TunnelClient(*where, tls=True, options=ClientOptions(reconnect=False)).connect(), LATEST
            )
        async with TunnelClient(*where, danger_accept_any_certificate=True) as careless:
            assert careless.assigned_port is not None
    await server.stop()


# -- the protocol --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opening", [b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", MAGIC[:6] + b"X", b"\0" * 7]
)
async def test_who_does_not_begin_with_the_magic_is_dropped_at_once(opening: bytes, leak_check: None) -> None:
    options = ServerOptions(host="127.0.0.1", handshake_timeout=3_600.0)
    server = TunnelServer(lambda credentials: True, options=options)
    errors = listening_to(server, "client-error")
    port = await server.start(0)
    async with server:
        reader, writer = await visit(port)
        writer.write(opening)
        with suppress(ConnectionResetError):  # with something of it unread
            assert await asyncio.wait_for(reader.read(), LATEST) == b""
        writer.close()
        await until(lambda: errors, "the event")
        assert errors[0].err.message.startswith("Invalid magic bytes")
        assert errors[0].err.kind == "incompatible_peer"


@pytest.mark.parametrize("piece", [1, 3, 11, 4_096])
async def test_a_message_in_pieces_and_many_in_one(piece: int, leak_check: None) -> None:
    server = TunnelServer()
    port = await server.start(0)
    async with server:
        reader, writer = await visit(port)

        async def say(said: bytes) -> None:
            for at in range(0, len(said), piece):
                writer.write(said[at : at + piece])
                await writer.drain()
                await asyncio.sleep(0)

        await say(message(SECRET))
        answer = await asyncio.wait_for(read_message(reader), LATEST)
        public = answer["port"]
        await until(lambda: server.status(), "its tunnel")
        assert public == server.status()[0].port
        visitors = [await visit(public) for _ in range(3)]
        ids = [(await asyncio.wait_for(read_frame(reader), LATEST))[0] for _ in visitors]
        assert len(set(ids)) == 3, "each visitor has an id of its own"
        # Three answers, interleaved, in pieces or all in one.
        words = [b"one", b"two", b"three"]
        both = list(zip(ids, words, strict=True))
        await say(b"".join(frame(n, DATA, word[:2]) for n, word in both))
        await say(b"".join(frame(n, DATA, word[2:]) + frame(n, CLOSE) for n, word in both))
        heard = [await asyncio.wait_for(one.read(), LATEST) for one, _ in visitors]
        assert heard == words
        for _, one in visitors:
            one.close()
        writer.transport.abort()
