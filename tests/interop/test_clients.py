"""aiohttp, redis-py and asyncpg on our TLS, each with a real server behind it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import IncompatiblePeer, SapperError
from sapper.tls import Credentials
from sapper.tls.clients import aiohttp_connector, postgres_loop, redis_connection
from support.certs import Certificates, Identity
from support.postgres import run_postgres
from support.programs import run_program

aiohttp = pytest.importorskip("aiohttp")
asyncpg = pytest.importorskip("asyncpg")
redis = pytest.importorskip("redis.asyncio")


def client_credentials(certs: Certificates) -> Any:
    return Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)


# -- aiohttp -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def web_server(identity: Identity, ca: Identity, *, mutual: bool = True) -> AsyncIterator[int]:
    """aiohttp's own server over CPython's ssl."""

    async def answer(request: Any) -> Any:
        body = await request.read()
        peer = request.transport.get_extra_info("peercert") or {}
        names = [value for _, value in peer.get("subjectAltName", ())]
        return aiohttp.web.json_response({"size": len(body), "client": names, "path": request.path})

    async def large(request: Any) -> Any:
        response = aiohttp.web.StreamResponse()
        await response.prepare(request)
        for n in range(50):
            await response.write(bytes([n]) * 100_000)
        return response

    async def socket(request: Any) -> Any:
        ws = aiohttp.web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_str(f"you said {message.data}")
        return ws

    from aiohttp import web

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ca.cert_path))
    context.load_cert_chain(identity.cert_path, identity.key_path)
    context.verify_mode = ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE
    app = web.Application(client_max_size=10**8)
    app.router.add_get("/large", large)
    app.router.add_get("/socket", socket)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    finally:
        await runner.cleanup()


async def test_aiohttp_through_its_connector(any_loop: str, certs: Certificates) -> None:
    async with web_server(certs.server, certs.ca) as port:
        connector = aiohttp_connector(client_credentials(certs))
        base = f"https://localhost:{port}"
        async with aiohttp.ClientSession(connector=connector) as session:
            for size in (0, 10, 2_000_000):
                async with session.post(f"{base}/post", data=io.BytesIO(b"x" * size)) as response:
                    told = await response.json()
            assert told == {"size": 2_000_000, "client": ["client.test"], "path": "/post"}
            async with session.get(f"{base}/large") as response:
                body = await response.read()
            assert body == b"".join(bytes([n]) * 100_000 for n in range(50))
            answers = await asyncio.gather(*(session.get(f"{base}/{n}") for n in range(10)))
            assert [(await one.json())["path"] for one in answers] == [f"/{n}" for n in range(10)]
            async with session.ws_connect(f"{base}/socket") as ws:
                await ws.send_str("hello")
                assert (await ws.receive()).data == "you said hello"


async def test_aiohttp_hears_of_bad_certificates_in_its_own_words(certs: Certificates) -> None:
    for identity, host in ((certs.untrusted, "localhost"), (certs.wrong_name, "localhost")):
        async with web_server(identity, certs.ca, mutual=False) as port:
            connector = aiohttp_connector(Credentials.none(roots=certs.ca.cert))
            async with aiohttp.ClientSession(connector=connector) as session:
                with pytest.raises(aiohttp.ClientConnectorCertificateError):
                    await session.get(f"https://{host}:{port}/")
    with pytest.raises(TypeError):
        aiohttp_connector(ssl=False)


# -- redis ---------------------------------------------------------------------------------------------


@pytest.fixture
def redis_server(certs: Certificates, tmp_path: Path, free_port: Callable[..., int]) -> Iterator[int]:
    """A Redis server that speaks only TLS and wants a client's certificate."""
    port = free_port()
    with run_program(
        "redis-server", "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--dir", tmp_path,
        "--save", "", "--appendonly", "no",
        "--tls-cert-file", certs.server.cert_path, "--tls-key-file", certs.server.key_path,
        "--tls-ca-cert-file", certs.ca.cert_path, "--tls-auth-clients", "yes",
        port=port,
    ):  # fmt: skip
        yield port


@pytest.mark.needs("redis-server")
async def test_redis_through_its_connection_class(
    any_loop: str, redis_server: int, certs: Certificates
) -> None:
    pool = redis.ConnectionPool(
        connection_class=redis_connection(client_credentials(certs)), host="localhost", port=redis_server
    )
    async with redis.Redis(connection_pool=pool) as client:
        assert await client.ping()
        payload = os.urandom(3_000_000)
        await client.set("large", payload)
        assert await client.get("large") == payload
        async with client.pipeline() as pipeline:
            for n in range(1000):
                pipeline.incr("counter", n)
            assert (await pipeline.execute())[-1] == sum(range(1000))
        async with client.pubsub() as listener:
            await listener.subscribe("news")
            assert (await listener.get_message(timeout=5))["type"] == "subscribe"
            await client.publish("news", "hello")
            assert (await listener.get_message(timeout=5))["data"] == b"hello"
        assert await asyncio.gather(*(client.echo(b"%d" % n) for n in range(20))) == [
            b"%d" % n for n in range(20)
        ]
    await pool.aclose()


@pytest.mark.needs("redis-server")
async def test_redis_without_a_certificate_is_refused(redis_server: int, certs: Certificates) -> None:
    pool = redis.ConnectionPool(
        connection_class=redis_connection(Credentials.none(roots=certs.ca.cert)),
        host="localhost",
        port=redis_server,
    )
    async with redis.Redis(connection_pool=pool) as client:
        with pytest.raises((SapperError, redis.ConnectionError)):
            await client.ping()
    await pool.aclose()


# -- PostgreSQL ----------------------------------------------------------------------------------------


@pytest.fixture
def postgres(certs: Certificates) -> Iterator[int]:
    """A PostgreSQL server that wants TLS with a client's certificate."""
    with run_postgres(certs, tls=True) as port:
        yield port


async def test_asyncpg_through_the_loop(any_loop: str, postgres: int, certs: Certificates) -> None:
    """Mutual TLS to a database: the log-in is the client's certificate."""
    loop = postgres_loop(client_credentials(certs))
    connection = await asyncpg.connect(
        host="localhost", port=postgres, user="client.test", database="postgres", ssl=False, loop=loop
    )
    try:
        row = await connection.fetchrow(
            "SELECT version, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        )
        assert row["version"] == "TLSv1.3"
        assert row["client_dn"] == "/CN=client.test"
        assert await connection.fetchval("SELECT sum(x) FROM generate_series(1, 200000) x") == 20_000_100_000
        rows = await connection.fetch("SELECT repeat('x', 1000) AS x FROM generate_series(1, 3000)")
        assert sum(len(row["x"]) for row in rows) == 3_000_000
        await connection.execute("CREATE TEMP TABLE t (n int, s text)")
        await connection.copy_records_to_table("t", records=[(n, "y" * 100) for n in range(10_000)])
        assert await connection.fetchval("SELECT count(*) FROM t") == 10_000
        # A cancelled query is cancelled through a second connection, under TLS too.
        with pytest.raises(TimeoutError):
            await connection.fetch("SELECT pg_sleep(30)", timeout=0.2)
        assert await connection.fetchval("SELECT 1") == 1
    finally:
        await connection.close()


async def test_asyncpg_with_a_stranger_is_refused(postgres: int, certs: Certificates) -> None:
    stranger = Credentials.certificate(
        certs.untrusted_client.cert, certs.untrusted_client.key, roots=certs.ca.cert
    )
    with pytest.raises((SapperError, OSError, asyncpg.PostgresError)):
        await asyncpg.connect(
            host="localhost", port=postgres, user="client.test", database="postgres", ssl=False,
            loop=postgres_loop(stranger),
        )  # fmt: skip


async def test_a_database_without_tls_is_no_database(certs: Certificates) -> None:
    async def answer_no(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(8) == b"\x00\x00\x00\x08\x04\xd2\x16\x2f"
        writer.write(b"N")
        await reader.read()
        writer.close()
        await writer.wait_closed()
        over.set()

    over = asyncio.Event()
    server = await asyncio.start_server(answer_no, "127.0.0.1", 0)
    async with server:
        with pytest.raises(IncompatiblePeer):
            await asyncpg.connect(
                host="127.0.0.1", port=server.sockets[0].getsockname()[1], user="x", database="x",
                ssl=False, loop=postgres_loop(client_credentials(certs)),
            )  # fmt: skip
        async with asyncio.timeout(10):
            await over.wait()
