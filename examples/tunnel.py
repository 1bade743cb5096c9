"""A tunnel inside a program: a server that knows its clients by name; a program that exposes its web page.

    python tunnel.py                                              # both ends and a visitor, on this machine
    python tunnel.py serve :: 9000 chain.pem key.pem              # on a machine that everybody reaches
    TOKEN=swordfish python tunnel.py expose tunnel.example 9000   # beside the web page; Ctrl-C ends either

The two ends speak TLS: without it, whoever is on the way between them reads the token and all bytes. The way
of a visitor to the server is plain, as it is of a web page without ``https``: ``visitor_tls=`` changes that.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import sys
from typing import Any

from sapper.testing import throwaway_certificates
from sapper.tls import Credentials, TlsConfig
from sapper.tunnel import ServerOptions, TunnelClient, TunnelServer, events

#: Who may expose something, and the token by which each is known. A real one reads them from somewhere else.
CLIENTS = {"alice": "swordfish", "bob": "open sesame"}


def known(credentials: dict[str, Any]) -> bool:
    """Decides about a client; it may be a coroutine function as well."""
    name, token = credentials.get("name"), credentials.get("token")
    expected = CLIENTS.get(name) if isinstance(name, str) else None
    if expected is None or not isinstance(token, str):
        return False
    # Of text it compares ASCII alone; what JSON says may even be no text.
    return hmac.compare_digest(token.encode("utf-8", "surrogatepass"), expected.encode())


def make_server(credentials: Credentials, **options: Any) -> TunnelServer:
    """A server that lets those in, and says who visits whom."""
    server = TunnelServer(known, tls=credentials, options=ServerOptions(**options))

    def created(event: events.TunnelCreated) -> None:
        name = (event.client_authentication_credentials or {})["name"]
        print(f"{name} has port {event.client_tunnel.services[0].port}", flush=True)

    def visited(event: events.VisitorDisconnected) -> None:
        name = (event.client_tunnel.authentication_credentials or {})["name"]
        print(f"somebody from {event.visitor.visitor_address} was with {name}", flush=True)

    server.on("tunnel-created", created)
    server.on("visitor-disconnected", visited)
    return server


async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The web server of the program that exposes it: one page."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n")
    await writer.drain()
    writer.close()


async def exposed(host: str, port: int, tls: TlsConfig | bool, token: str) -> TunnelClient:
    """Starts the web server and exposes it; it is reached when this returns."""
    web = await asyncio.start_server(page, "127.0.0.1", 0)
    service = web.sockets[0].getsockname()[1]
    client = TunnelClient(host, port, service, {"name": "alice", "token": token}, tls=tls)
    await client.connect()
    return client


async def serve(host: str, port: int, chain: str, key: str) -> None:
    """The server, until somebody ends it."""
    server = make_server(Credentials.certificate(chain, key), host=host)
    print(f"clients come to port {await server.start(port)}", flush=True)
    async with server:
        await server.wait_closed()


async def expose(host: str, port: int) -> None:
    """The client, until somebody ends it: when the connection breaks, visitors notice a pause."""
    async with await exposed(host, port, True, os.environ["TOKEN"]) as client:
        print(f"http://{host}:{client.assigned_port}", flush=True)
        await client.wait_closed()


async def demo() -> None:
    """Both ends and a visitor."""
    made = throwaway_certificates("localhost")
    server = make_server(made.server_credentials(), host="localhost")
    port = await server.start(0)
    tls = TlsConfig(roots=made.authority)
    async with server, await exposed("localhost", port, tls, CLIENTS["alice"]) as client:
        gone = asyncio.Event()
        server.on("visitor-disconnected", lambda _: gone.set())
        reader, writer = await asyncio.open_connection("localhost", client.assigned_port)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        print("the visitor reads:", (await reader.read()).rpartition(b"\r\n\r\n")[2].decode().strip())
        writer.close()
        await asyncio.wait_for(gone.wait(), 10)


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case []:
                asyncio.run(demo())
            case ["serve", host, port, chain, key]:
                asyncio.run(serve(host, int(port), chain, key))
            case ["expose", host, port]:
                asyncio.run(expose(host, int(port)))
            case _:
                sys.exit(__doc__)
    except KeyboardInterrupt:
        sys.exit(130)
