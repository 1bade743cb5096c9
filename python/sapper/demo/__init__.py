"""The demonstration: real packets and a real byte stream through a TLS bridge, beside an asyncio pump.

Two processes do the work, joined by TCP over loopback with TLS on it. The **near** one is under
observation: Sapper's bridge, or the same job as well as asyncio does it. The **far** one holds the TLS
peer, sends stamped load into both ends and measures what arrives. Only the near one's processor time
counts. The pumps take turns, since two at once would share two cores with each other.

Not here: how it looks (:mod:`sapper.cli.demo`), figures that are compared (the benches).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sapper.demo import tun
from sapper.errors import DeviceError
from sapper.testing import ThrowawayCertificates, throwaway_certificates

__all__ = ["PUMPS", "SCENES", "SUITE", "PumpName", "Pumped", "Sample", "Scene", "run_scene", "scenes"]

PumpName = Literal["sapper", "asyncio"]
PUMPS: tuple[PumpName, ...] = ("sapper", "asyncio")

#: What both pumps seal and open with.
SUITE = "TLS_AES_256_GCM_SHA384"
#: Seconds between two samples.
INTERVAL = 0.2
#: Nothing that a worker does before its first sample takes this long.
PATIENCE = 20.0


@dataclass(frozen=True, slots=True)
class Scene:
    """One kind of work.

    Attributes:
        name: ``"packets"``, ``"tun"``, ``"stream"`` or ``"flood"``.
        title: For people.
        unit: What the load consists of.
        size: Bytes of a unit.
        rate: Units a second that are offered each way; 0 is as many as the pump takes.
        framing: How they lie in the TLS stream.
    """

    name: str
    title: str
    unit: Literal["packet", "block"]
    size: int
    rate: int
    framing: Literal["raw", "ip", "ipv6"]

    @property
    def tells_latency(self) -> bool:
        """Whether latency says something of the pump.

        Where as much as fits is sent, it is the age of what waits in the kernel's buffers.
        """
        return self.rate > 0 or self.name == "tun"


SCENES: dict[str, Scene] = {
    one.name: one
    for one in (
        Scene(
            "packets",
            "IPv6 packets of 1,280 bytes, 40,000/s offered each way",
            "packet",
            1280,
            40_000,
            "ipv6",
        ),
        Scene("tun", "TCP inside TUN, TLS, TUN, between two network namespaces", "block", 16_384, 0, "ip"),
        Scene("stream", "a byte stream, 131 MB/s offered each way", "block", 16_384, 8_000, "raw"),
        Scene("flood", "a byte stream, both ways, as fast as it goes", "block", 16_384, 0, "raw"),
    )
}


def scenes() -> list[Scene]:
    """What this process may show: TUN interfaces need rights that few have."""
    return [SCENES["tun" if tun.works_here() else "packets"], SCENES["stream"], SCENES["flood"]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a run stands. Numbers count both directions, from the first unit.

    Attributes:
        scene: Which work.
        pump: Who does it.
        elapsed: Seconds since the load began.
        bytes: Payload bytes that arrived.
        packets: Packets that arrived; 0 for a stream.
        records: TLS records; 0 where the pump does not tell.
        lost: Units that did not arrive.
        torn: Units that arrived as something else.
        cpu: Seconds of processor time that the pump took.
        latency_p50: Median of the seconds between a unit's sending and its arrival.
        latency_p99: 99 of 100 took no longer.
    """

    scene: str
    pump: PumpName
    elapsed: float
    bytes: int
    packets: int
    records: int
    lost: int
    torn: int
    cpu: float
    latency_p50: float
    latency_p99: float

    @property
    def cpu_per_gigabyte(self) -> float:
        """Seconds of processor time for a gigabyte; 0 before the first byte."""
        return self.cpu / (self.bytes / 1e9) if self.bytes else 0.0


@dataclass(frozen=True, slots=True)
class Pumped:
    """What the handshake of a run agreed on."""

    scene: str
    pump: PumpName
    tls: str


async def run_scene(
    scene: Scene, pump: PumpName, seconds: float | None, certificates: ThrowawayCertificates | None = None
) -> AsyncIterator[Pumped | Sample]:
    """Runs one pump in one scene and tells how it goes.

    Ends after ``seconds``, or when the iterator is closed. Nothing is left behind either way: the
    workers end with their standard input.

    Raises:
        DeviceError: A worker failed; the message is the worker's.
    """
    made = certificates or throwaway_certificates("localhost")
    near_tcp, far_tcp = await asyncio.to_thread(_tcp_pair)
    kind = socket.SOCK_DGRAM if scene.unit == "packet" else socket.SOCK_STREAM
    near_sink, near_end = socket.socketpair(socket.AF_UNIX, kind)
    far_sink, far_end = socket.socketpair(socket.AF_UNIX, kind)
    spec: dict[str, Any] = {
        "scene": scene.name,
        "unit": scene.unit,
        "size": scene.size,
        "rate": scene.rate,
        "framing": scene.framing,
        "authority": made.authority.decode(),
    }
    server = [part.decode() for part in made.server]
    async with contextlib.AsyncExitStack() as stack:
        for one in (near_tcp, far_tcp, near_sink, near_end, far_sink, far_end):
            stack.callback(one.close)
        near = await stack.enter_async_context(
            _worker("near", {**spec, "pump": pump}, {"tcp": near_tcp, "sink": near_sink})
        )
        far = await stack.enter_async_context(
            _worker(
                "far",
                {**spec, "server": server},
                {"tcp": far_tcp, "sink": far_sink, "far_end": far_end, "near_end": near_end},
            )
        )
        said = await asyncio.gather(near.line(), far.line())
        yield Pumped(scene.name, pump, said[0]["tls"])
        loop = asyncio.get_running_loop()
        started, cpu_before = loop.time(), _processor_time(near.pid)
        await far.say("go")
        while seconds is None or loop.time() - started < seconds:
            counts, told = await asyncio.gather(far.line(), near.line())
            flows = (counts["encapsulate"], counts["decapsulate"])
            packets = sum(flow["units"] for flow in flows) if scene.unit == "packet" else told["packets"]
            yield Sample(
                scene=scene.name,
                pump=pump,
                elapsed=loop.time() - started,
                bytes=sum(flow["bytes"] for flow in flows),
                packets=packets,
                records=told["records"],
                lost=sum(flow["lost"] for flow in flows),
                torn=sum(flow["torn"] for flow in flows),
                cpu=_processor_time(near.pid) - cpu_before,
                latency_p50=max(flow["latency_p50"] for flow in flows),
                latency_p99=max(flow["latency_p99"] for flow in flows),
            )


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=5)
        client.settimeout(None)
        server, _ = listener.accept()
    for one in (client, server):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, server


def _processor_time(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class _Worker:
    """A child process that speaks JSON lines."""

    def __init__(self, role: str, process: asyncio.subprocess.Process) -> None:
        self._role = role
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def say(self, line: str) -> None:
        assert self._process.stdin is not None  # noqa: S101 - made with a pipe
        self._process.stdin.write(line.encode() + b"\n")
        await self._process.stdin.drain()

    async def line(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - made with a pipe
        async with asyncio.timeout(PATIENCE):
            line = await self._process.stdout.readline()
            if line:
                values: dict[str, Any] = json.loads(line)
                return values
            assert self._process.stderr is not None  # noqa: S101 - made with a pipe
            said = (await self._process.stderr.read()).decode(errors="replace").strip()
        raise DeviceError(f"the demo's {self._role} process ended: {said or 'without a word'}")


@contextlib.asynccontextmanager
async def _worker(
    role: str, spec: dict[str, Any], sockets: dict[str, socket.socket]
) -> AsyncIterator[_Worker]:
    numbers = {name: one.fileno() for name, one in sockets.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sapper.demo.worker", role,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=tuple(numbers.values()),
        start_new_session=True,  # Ctrl-C is the parent's to hear
    )  # fmt: skip
    worker = _Worker(role, process)
    try:
        await worker.say(json.dumps({**spec, **numbers}))
        yield worker
    finally:
        assert process.stdin is not None  # noqa: S101 - made with a pipe
        process.stdin.close()
        try:
            async with asyncio.timeout(3):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
