"""Peer: the pump that most people write first, on asyncio streams with `readexactly`."""

from __future__ import annotations

import asyncio
import os

from benches.peers.common import IPV6_HEADER, Job, parse_job

BURST = 64
"""Packets in a row before the other direction has its turn: a drain that need not wait does not yield."""


async def receive(job: Job, reader: asyncio.StreamReader) -> None:
    """TLS to packets: header, then payload, then one send."""
    send = job.packets.send
    while True:
        header = await reader.readexactly(IPV6_HEADER)
        payload = await reader.readexactly(header[4] << 8 | header[5])
        try:
            send(header + payload)
        except BlockingIOError:
            await writable(job.packets.fd)
            send(header + payload)


async def send(job: Job, writer: asyncio.StreamWriter) -> None:
    """Packets to TLS: one receive, one write, one record."""
    receive_packet = job.packets.receive
    while not writer.is_closing():
        try:
            for _ in range(BURST):
                writer.write(receive_packet())
                await writer.drain()
        except BlockingIOError:
            await readable(job.packets.fd)
        else:
            await asyncio.sleep(0)


async def readable(fd: int) -> None:
    """Returns when the fd has something to read."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def writable(fd: int) -> None:
    """Returns when the fd takes something again."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(fd)


async def main() -> None:
    """Runs until the other end closes."""
    job = parse_job(__doc__)
    job.tls.setblocking(False)
    os.set_blocking(job.packets.fd, False)
    reader, writer = await asyncio.open_connection(sock=job.tls, ssl=job.context, server_hostname="bench")
    tasks = []
    if job.send:
        tasks.append(asyncio.create_task(send(job, writer)))
    try:
        if job.receive:
            await receive(job, reader)
        else:
            await reader.read()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        for task in tasks:
            task.cancel()


asyncio.run(main())
