"""One end of a tunnel, or a service, as a process: `tunnel_end.py server|client|service JSON`.

A test can kill it, and it has descriptors of its own. It prints one line of JSON when it is ready, and one
for each line of its standard input: what it does, and what it has of the machine. It ends in order when its
standard input does.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from sapper.tunnel import ClientOptions, ServerOptions, TunnelClient, TunnelServer


def allow(credentials: dict[str, Any]) -> bool:
    return credentials.get("id") == "allowed-client"


async def main() -> None:
    role, given = sys.argv[1], json.loads(sys.argv[2])
    end: TunnelServer | TunnelClient | asyncio.Server
    if role == "service":
        end = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1_000)
        say({"port": end.sockets[0].getsockname()[1]})
    elif role == "server":
        end = TunnelServer(allow, options=ServerOptions.from_mapping(given["options"]))
        say({"port": await end.start(given["port"])})
    else:
        options = ClientOptions.from_mapping(given["options"])
        end = TunnelClient(
            given.get("host", "127.0.0.1"),
            given["port"],
            given["service"],
            given["credentials"],
            options=options,
        )
        say({"port": await end.connect()})
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while await reader.readline():
        status = () if isinstance(end, asyncio.Server) else end.status()
        tunnels = status if isinstance(status, tuple) else (status,)
        say({"tunnels": [dataclasses.asdict(one) for one in tunnels], **resources()})
    if isinstance(end, asyncio.Server):
        end.close()
    else:
        await end.stop()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what comes; a connection whose first byte is `r` is reset."""
    with contextlib.suppress(ConnectionError):
        first = True
        while data := await reader.read(65_536):
            if first and data[:1] == b"r":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
                return
            first = False
            writer.write(data)
            await writer.drain()
    writer.close()


def resources() -> dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "memory": pages * resource.getpagesize(),
    }


def say(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
