"""Ours: one `TlsStream` that receives, sends or asks for echoes (see `stream_work`)."""

from __future__ import annotations

import asyncio

from benches.stream_work import Work, parse_work, print_work
from sapper import tls


async def work_on(work: Work) -> None:
    """Connects and works."""
    stream = await tls.connect(
        "127.0.0.1",
        work.port,
        credentials=tls.Credentials.none(roots=work.roots),
        server_hostname=work.server_name,
    )
    await print_work(work, stream, stream)
    stream.abort()


def main() -> None:
    """Dispatches."""
    asyncio.run(work_on(parse_work(__doc__)))


if __name__ == "__main__":
    main()
