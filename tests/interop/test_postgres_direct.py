"""TLS from the first byte with a real PostgreSQL, which knows it since version 17: on either side.

The programs are of a wheel where the system's are older ([support.postgres]).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sapper import tls
from sapper.errors import IncompatiblePeer
from sapper.tls import Credentials, Proxy
from sapper.tls.clients import postgres_loop
from sapper.tls.proxy import ProxyEvent
from support.certs import Certificates
from support.postgres import newest_postgres, postgres_program, run_postgres
from support.proxies import ends

asyncpg = pytest.importorskip("asyncpg")

WHO = "SELECT ssl, version, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


def client_credentials(certs: Certificates) -> Credentials:
    return Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)


def port_of(proxy: Proxy) -> int:
    return int(proxy.addresses[0].rsplit(":", 1)[1])


@pytest.fixture
def secure(certs: Certificates) -> Iterator[int]:
    """A server that wants TLS with a client's certificate."""
    with run_postgres(certs, tls=True, programs=newest_postgres()) as port:
        yield port


@pytest.fixture
def plain(certs: Certificates) -> Iterator[int]:
    """A server without TLS."""
    with run_postgres(certs, tls=False, programs=newest_postgres()) as port:
        yield port


async def psql(port: int, query: str, **options: object) -> subprocess.CompletedProcess[str]:
    words = {"host": "localhost", "port": port, "user": "client.test", "dbname": "postgres"} | options
    command = [
        postgres_program("psql", newest_postgres()), "--no-psqlrc", "-tA", "-c", query,
        " ".join(f"{name}={value}" for name, value in words.items()),
    ]  # fmt: skip
    environment = {**os.environ, "PGCONNECT_TIMEOUT": "20", "HOME": "/nonexistent"}
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, env=environment, check=False
    )


def files(certs: Certificates, folder: Path) -> dict[str, object]:
    """What psql needs for mutual TLS from the first byte."""
    for name, content in (
        ("root.crt", certs.ca.cert),
        ("client.crt", certs.client.cert),
        ("client.key", certs.client.key),
    ):
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    return {
        "sslnegotiation": "direct",
        "sslmode": "verify-full",
        "sslrootcert": folder / "root.crt",
        "sslcert": folder / "client.crt",
        "sslkey": folder / "client.key",
    }


async def test_psql_to_our_server(plain: int, certs: Certificates, tmp_path: Path) -> None:
    """Sapper on the server's side: both names of the upgrade take such a client."""
    direct = files(certs, tmp_path)
    identity = Credentials.certificate(certs.server.cert, certs.server.key)
    config = tls.TlsConfig(credentials=identity, roots=certs.ca.cert, client_auth="required")
    events: list[ProxyEvent] = []
    for upgrade in ("postgres", "postgres-direct"):
        async with Proxy(
            listen="127.0.0.1:0", to=f"127.0.0.1:{plain}", tls=config, upgrade=upgrade, on_event=events.append
        ) as proxy:
            done = await psql(port_of(proxy), "SELECT repeat('x', 3000000)", **direct)
            assert (len(done.stdout), done.stderr) == (3_000_001, "")
            # Asked for in the old way, which only the first one knows.
            done = await psql(port_of(proxy), "SELECT 42", **direct | {"sslnegotiation": "postgres"})
            assert (done.stdout == "42\n") is (upgrade == "postgres"), done.stderr
    assert {one.outcome for one in ends(events, "handshake")} == {"handshake"}


async def test_our_clients_to_the_server(secure: int, certs: Certificates) -> None:
    """Sapper on the client's side: a proxy before psql, and asyncpg through the loop."""
    async with Proxy(
        listen="127.0.0.1:0",
        to=f"tls://localhost:{secure}",
        upstream_tls=client_credentials(certs),
        upstream_upgrade="postgres-direct",
    ) as proxy:
        done = await psql(port_of(proxy), WHO, sslmode="disable", gssencmode="disable")
        assert (done.stdout, done.stderr) == ("t|TLSv1.3|/CN=client.test\n", "")
    connection = await asyncpg.connect(
        host="localhost", port=secure, user="client.test", database="postgres", ssl=False,
        loop=postgres_loop(client_credentials(certs), direct=True),
    )  # fmt: skip
    try:
        assert tuple(await connection.fetchrow(WHO)) == (True, "TLSv1.3", "/CN=client.test")
        assert len(await connection.fetchval("SELECT repeat('x', 3000000)")) == 3_000_000
    finally:
        await connection.close()


async def test_a_stream_to_the_server_agrees_on_its_protocol(secure: int, certs: Certificates) -> None:
    async with asyncio.timeout(30):
        stream = await tls.connect(
            "localhost", secure, credentials=client_credentials(certs), upgrade="postgres-direct"
        )
        assert stream.info.alpn == b"postgresql"
        await stream.aclose()


async def test_an_older_server_does_not_answer(certs: Certificates) -> None:
    """What knows nothing of it takes the hello for a wrong packet: there is no way on in clear."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"EFATAL:  unsupported frontend protocol\0")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, asyncio.timeout(30):
        with pytest.raises(IncompatiblePeer):
            await tls.connect(
                "127.0.0.1",
                server.sockets[0].getsockname()[1],
                credentials=Credentials.none(roots=certs.ca.cert),
                upgrade="postgres-direct",
            )
