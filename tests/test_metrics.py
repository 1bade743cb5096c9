"""The server of figures as a program has it: either loop, TCP and a Unix socket, clients that stall."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sapper.metrics import MetricsServer, render
from support import traffic
from support.bridges import pair, receive, running

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


async def test_latencies_are_a_histogram(leak_check: None) -> None:
    async with asyncio.timeout(LATEST), running(pair(socket.SOCK_DGRAM, framing="ipv6")) as two:
        packet = traffic.udp_packet("fd00::1", "fd00::2", b"timed")
        for _ in range(20):
            two.client_end.send(packet)
            assert await receive(two.server_end, len(packet)) == packet
        text = render(pumps={"a": two.client})
        flow = two.client.stats().encapsulate
        latency = flow.latency
        assert len(latency.counts) == len(latency.bounds) + 1
        assert latency.count == sum(latency.counts) == flow.packets == 20
        assert latency.bounds[0] == 128e-9
        assert all(later == 2 * bound for bound, later in pairwise(latency.bounds))
        assert latency.cumulative()[-1] == (math.inf, 20)
        holding = [bound for bound, count in zip(latency.bounds, latency.counts, strict=False) if count]
        assert holding[0] / 2 <= flow.latency_p50 <= flow.latency_max < holding[-1]
        assert 20 * holding[0] / 2 <= latency.sum <= 20 * flow.latency_max * 1.001
        assert two.server.stats().encapsulate.latency.count == 0, "nothing went there"

    name = "sapper_bridge_latency_seconds"
    lines = [line for line in text.splitlines() if name in line]
    assert lines[1] == f"# TYPE {name} histogram"
    way = 'bridge="a",direction="encapsulate"'
    buckets = [line for line in lines if line.startswith(f"{name}_bucket{{{way},")]
    told = [(one.split('le="')[1].split('"')[0], int(one.split()[-1])) for one in buckets]
    assert told[-1] == ("+Inf", 20)
    assert [(float(bound), count) for bound, count in told] == list(latency.cumulative())
    assert f"{name}_sum{{{way}}} {latency.sum!r}" in lines
    assert f"{name}_count{{{way}}} 20" in lines


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
