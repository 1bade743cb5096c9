"""Ours: a tunnel's server for more visitors than the command line's; the same options otherwise."""

from __future__ import annotations

import argparse
import asyncio

from sapper.tunnel import ServerOptions, TunnelServer


async def serve(given: argparse.Namespace) -> None:
    """Serves until it is ended."""
    first, _, last = given.public_ports.partition("-")
    options = ServerOptions(
        host=given.host, public_ports=(int(first), int(last)), max_visitors=given.visitors
    )
    server = TunnelServer(options=options, danger_allow_anonymous=given.danger_allow_anonymous)
    await server.start(given.port)
    async for _ in server.events():
        pass


def main() -> None:
    """The options of `sapper tunnel serve` that the bench gives, and `--visitors`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--public-ports")
    parser.add_argument("--state")
    parser.add_argument("--danger-allow-anonymous", action="store_true")
    parser.add_argument("--visitors", type=int)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
