"""The server of figures as a program has it: either loop, TCP and a Unix socket, clients that stall."""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path
from typing import Any

import pytest

from sapper.metrics import MetricsServer

LATEST = 30.0


async def reach(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, port = address.rsplit(":", 1)
    return await asyncio.open_connection(host.strip("[]"), int(port))


async def scrape(address: str) -> bytes:
    reader, writer = await reach(address)
    writer.write(b"GET /status HTTP/1.1\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0", "unix:"])
async def test_the_oldest_half_request_gives_way(
    any_loop: str, leak_check: None, where: str, tmp_path: Path
) -> None:
    async with asyncio.timeout(LATEST), MetricsServer(where.replace("unix:", f"unix:{tmp_path}/s")) as server:
        assert (await scrape(server.address)).startswith(b"HTTP/1.1 200 OK")
        halves = []
        for _ in range(17):
            halves.append(await reach(server.address))
            halves[-1][1].write(b"GET /status HTTP/1.1\r\n")
        assert await halves[0][0].read() == b""
        assert (await scrape(server.address)).startswith(b"HTTP/1.1 200 OK")
        halves[-1][1].write(b"\r\n")
        assert (await halves[-1][0].read()).startswith(b"HTTP/1.1 200 OK")
    # Its end is theirs, whatever they still wanted to say.
    for reader, writer in halves:
        assert await reader.read() == b""
        writer.close()


async def test_where_nothing_can_be_accepted_one_line_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, leak_check: None
) -> None:
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, 3

    async def accepting(listening: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return await accept(listening)

    monkeypatch.setattr(loop, "sock_accept", accepting)
    monkeypatch.setattr("sapper.metrics._PAUSE", 0.0)
    async with asyncio.timeout(LATEST), MetricsServer("127.0.0.1:0") as server:
        assert (await scrape(server.address)).startswith(b"HTTP/1.1 200 OK")
        said = [(one.levelno, one.getMessage()) for one in caplog.records if one.name == "sapper.metrics"]
        text = f"sapper: no scraper can be accepted at {server.address} now: Too many open files"
        assert said == [(logging.WARNING, text)]
    assert failures == 0


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Host: localhost", 200),
        ("Host: LOCALHOST:9100", 200),
        ("Host: figures.localhost.", 200),
        ("host:127.0.0.1:9100", 200),
        ("Host: 127.9.9.9", 200),
        ("Host: [::1]:9100", 200),
        ("Host:", 200),
        ("X: y", 200),
        ("Host: rebind.evil.example", 421),
        ("Host: localhost.evil.example:9100", 421),
        ("Host: evil.example@localhost", 421),
        ("Host: 192.0.2.1", 421),
        ("Host: [2001:db8::1]:9100", 421),
        ("Host: localhost\r\nHost: evil.example", 421),
        ("Host: \xff", 421),
    ],
)
async def test_a_page_of_another_host_reads_nothing(said: str, status: int, tmp_path: Path) -> None:
    """DNS rebinding: the browser comes to loopback, and says the page's own name."""

    async def ask(address: str, path: str) -> bytes:
        reader, writer = await reach(address)
        writer.write(f"GET {path} HTTP/1.1\r\n{said}\r\n\r\n".encode("latin-1"))
        answer = await reader.read()
        writer.close()
        return answer

    async with asyncio.timeout(LATEST), MetricsServer("127.0.0.1:0") as server:
        for path in ("/metrics", "/status"):
            answer = await ask(server.address, path)
            assert answer.startswith(f"HTTP/1.1 {status} ".encode())
            assert status == 200 or b"localhost" in answer
    # No page comes to a Unix socket, and a proxy in front says what it likes.
    async with asyncio.timeout(LATEST), MetricsServer(f"unix:{tmp_path}/s") as server:
        assert (await ask(server.address, "/status")).startswith(b"HTTP/1.1 200 ")
