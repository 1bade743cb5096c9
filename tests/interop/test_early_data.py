"""Early data with OpenSSL's programs, as client and as server."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import sapper.tls as tls
from support.certs import Certificates
from support.programs import Program, free_port, run_program

pytestmark = pytest.mark.needs("openssl")


def s_client(certs: Certificates, port: int, *flags: Any) -> AbstractContextManager[Program]:
    return run_program(
        *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3"),
        *("-CAfile", certs.ca.cert_path, "-servername", certs.name, *flags),
    )


async def heard(program: Program, text: bytes) -> None:
    """Waits for what a program says, while the loop goes on."""
    await asyncio.to_thread(program.wait_for, text)


async def test_s_server_takes_what_our_client_says_early(certs: Certificates) -> None:
    config = tls.TlsConfig(roots=certs.ca.cert, danger_early_data=16_384)
    port = free_port()
    theirs = ("-cert", certs.server.cert_path, "-key", certs.server.key_path)
    options: Any = {"credentials": config, "server_hostname": certs.name, "early_data": b"before it\n"}
    with run_program(
        "openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-early_data", *theirs, port=port
    ) as peer:
        async with asyncio.timeout(60):
            for turn in range(3):
                async with await tls.connect("127.0.0.1", port, **options) as stream:
                    assert stream.info.early_data == ("accepted" if turn else None)
                    stream.write(b"after it %d\n" % turn)
                    await heard(peer, b"after it %d" % turn)
                    # What it says comes behind its tickets.
                    peer.send(b"an answer\n")
                    assert await stream.readline() == b"an answer\n"
                # It prints the data and the words around them by two ways, in either order.
                for said in (b"Early data received:", b"before it"):
                    assert (said in peer.output) is bool(turn)
                peer.output = b""


@pytest.mark.parametrize("resend", [True, False])
async def test_s_server_rejects_it(certs: Certificates, resend: bool) -> None:
    config = tls.TlsConfig(roots=certs.ca.cert, danger_early_data=16_384)
    port = free_port()
    theirs = ("-cert", certs.server.cert_path, "-key", certs.server.key_path)
    server = ("openssl", "s_server", "-accept", f"127.0.0.1:{port}", *theirs)
    options: Any = {"credentials": config, "server_hostname": certs.name}
    async with asyncio.timeout(60):
        with run_program(*server, "-early_data", port=port) as peer:
            async with await tls.connect("127.0.0.1", port, **options) as stream:
                peer.send(b"behind the tickets\n")
                assert await stream.readline() == b"behind the tickets\n"
        # One that knows nothing of that session, and takes no early data.
        with run_program(*server, port=port) as peer:
            early: Any = {"early_data": b"before it\n", "resend_early_data": resend}
            async with await tls.connect("127.0.0.1", port, **options, **early) as stream:
                assert stream.info.early_data == "rejected"
                stream.write(b"after it\n")
                await heard(peer, b"after it")
                assert (b"before it\nafter it" in peer.output) is resend


async def test_our_server_takes_what_s_client_says_early(certs: Certificates, tmp_path: Path) -> None:
    (tmp_path / "early").write_bytes(b"before it\n")
    session = tmp_path / "session.pem"
    config = tls.TlsConfig(
        credentials=tls.Credentials.certificate(certs.server.cert, certs.server.key), danger_early_data=4_096
    )
    async with asyncio.timeout(60), tls.listen(("127.0.0.1", 0), credentials=config) as server:
        with s_client(certs, server.port, "-sess_out", session) as peer:
            async with await server.accept() as stream:
                stream.write(b"behind the tickets\n")
                await heard(peer, b"behind the tickets")
                peer.send(b"Q\n")
                await asyncio.to_thread(peer.wait)
                assert b"Max Early Data: 4096" in peer.output
        with s_client(certs, server.port, "-sess_in", session, "-early_data", tmp_path / "early") as peer:
            async with await server.accept() as stream:
                assert stream.info.early_data == "accepted"
                assert await stream.readline() == b"before it\n"
                await stream.confirmed()
                stream.write(b"an answer\n")
                await heard(peer, b"an answer")
                assert b"Early data was accepted" in peer.output
                peer.send(b"after it\n")
                assert await stream.readline() == b"after it\n"
        # The same session once more: it was good for one time.
        with s_client(certs, server.port, "-sess_in", session, "-early_data", tmp_path / "early") as peer:
            async with await server.accept() as stream:
                assert (stream.info.early_data, stream.info.resumed) == (None, False)
                stream.write(b"only after the handshake\n")
                await heard(peer, b"only after the handshake")
                assert b"Early data was rejected" in peer.output
