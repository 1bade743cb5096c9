"""Peer: one connection of asyncio's own TLS streams that receives, sends or asks for echoes.

Standard library only.
"""

from __future__ import annotations

import asyncio
import ssl

from benches.stream_work import Work, parse_work, print_work


async def work_on(work: Work) -> None:
    """Connects and works."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(work.roots)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", work.port, ssl=context, server_hostname=work.server_name, limit=256 * 1024
    )
    await print_work(work, reader, writer)
    writer.transport.abort()


asyncio.run(work_on(parse_work(__doc__)))
