"""Opens and closes 10,000 bridges and looks what they leave behind: descriptors, threads, memory.

Each pair shakes hands, moves a few bytes both ways and ends in one of the ways in which bridges end: orderly,
at once, in the middle of the handshake, or because the far end has gone.

    python tools/soak.py [--bridges 10000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import resource
import socket
import sys
import tempfile
import time
from pathlib import Path

import sapper.tls as tls
from sapper.errors import SapperError

KEY = bytes(range(32))
HOST = "device.test"
ENDS = ("orderly", "at once", "in the handshake", "peer gone")
# Enough at once that they meet each other, few enough for any limit on descriptors.
AT_ONCE = 16
# Allocators keep some of what is freed; what grows with the number of bridges is more than this.
MOST_GROWTH = 24 << 20


def descriptors() -> int:
    """How many descriptors this process has."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    """How many threads this process has, native ones too."""
    return len(os.listdir("/proc/self/task"))


def memory() -> int:
    """Resident bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def pair(credentials: tuple[tls.TlsConfig, tls.TlsConfig], end: str) -> None:
    """One client and one server, from the first byte to the end."""
    client_net, server_net = socket.socketpair()
    client_in, client_sink = socket.socketpair()
    server_in, server_sink = socket.socketpair()
    with client_in, server_in:
        client = tls.create_bridge(
            socket=client_net, sink=client_sink, credentials=credentials[0], server_hostname=HOST
        )
        server = tls.create_bridge(
            socket=server_net, sink=server_sink, credentials=credentials[1], server_side=True
        )
        if end == "in the handshake":
            shaking = asyncio.ensure_future(client.handshake())
            await asyncio.sleep(0)
            client.stop()
            server.stop()
            with contextlib.suppress(SapperError):
                await shaking
        else:
            await asyncio.gather(client.handshake(), server.handshake())
            client.start()
            server.start()
            loop = asyncio.get_running_loop()
            for near, far in ((client_in, server_in), (server_in, client_in)):
                near.setblocking(False)
                far.setblocking(False)
                await loop.sock_sendall(near, b"x" * 1000)
                received = 0
                while received < 1000:
                    received += len(await loop.sock_recv(far, 1000))
            if end == "orderly":
                await client.aclose()
                server_in.close()  # what a program does when it reads the end
            elif end == "at once":
                client.stop()
                server.stop()
            else:
                client_in.close()
        for bridge in (client, server):
            if end == "peer gone":
                bridge.stop(drain=0.2)
            with contextlib.suppress(SapperError):
                await bridge.wait_closed()


async def run(bridges: int) -> int:
    """The whole soak; 1 when something is left behind."""
    psk = tls.TlsConfig(credentials=tls.Credentials.psk(identity="soak", key=KEY))
    configs = [(psk, psk), certificates()]
    pairs = bridges // 2
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(n: int) -> None:
        async with gate:
            await pair(configs[n % 2], ENDS[n // 2 % len(ENDS)])

    async def batch(first: int, last: int) -> None:
        for start in range(first, last, 200):
            await asyncio.gather(*(one(n) for n in range(start, min(start + 200, last))))

    warm = min(400, pairs // 4)
    await batch(0, warm)
    before = (descriptors(), threads(), memory())
    print(f"after {2 * warm:6} bridges: {said(before)}", flush=True)
    started = time.monotonic()
    tenth = (pairs - warm + 9) // 10
    for first in range(warm, pairs, tenth):
        await batch(first, min(first + tenth, pairs))
        now = (descriptors(), threads(), memory())
        print(f"after {2 * min(first + tenth, pairs):6} bridges: {said(now)}", flush=True)
    took = time.monotonic() - started
    after = (descriptors(), threads(), memory())
    print(f"{2 * (pairs - warm) / took:.0f} bridges a second")
    problems = []
    if after[0] > before[0]:
        problems.append(f"{after[0] - before[0]} descriptors are left")
    if after[1] > before[1]:
        problems.append(f"{after[1] - before[1]} threads are left")
    if after[2] > before[2] + MOST_GROWTH:
        problems.append(f"memory grew by {(after[2] - before[2]) >> 20} MiB")
    for problem in problems:
        print(f"SOAK FAILED: {problem}", file=sys.stderr)
    if not problems:
        print("nothing is left behind")
    return 1 if problems else 0


def certificates() -> tuple[tls.TlsConfig, tls.TlsConfig]:
    """A client that believes an authority, and a server that it has signed."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.certs import Certificates

    with tempfile.TemporaryDirectory() as folder:
        made = Certificates(Path(folder))
        client = tls.TlsConfig(credentials=tls.Credentials.none(roots=made.ca.cert))
        server = tls.TlsConfig(credentials=tls.Credentials.certificate(made.server.cert, made.server.key))
        return client, server


def said(counts: tuple[int, int, int]) -> str:
    """The three figures for a person."""
    return f"{counts[0]} descriptors, {counts[1]} threads, {counts[2] / 2**20:.1f} MiB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bridges", type=int, default=10_000)
    sys.exit(asyncio.run(run(parser.parse_args().bridges)))
