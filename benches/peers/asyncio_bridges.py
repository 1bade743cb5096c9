"""Peer: asyncio's TLS, idle connections and set-up and tear-down, in the two kinds of credentials.

    asyncio_bridges idle   --port PORT --count N …   connects to `hold`, prints what each one costs
    asyncio_bridges cycles --count N …               pairs, one after another, prints seconds

One line of JSON each. Standard library only.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import time

from benches.bridge_work import Work, parse_work, print_cycles, print_idle


def context(work: Work, *, server: bool) -> ssl.SSLContext:
    """One side's configuration."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    if not work.key and server:
        made.load_cert_chain(work.certificate, work.private_key)
    elif not work.key:
        made.load_verify_locations(work.roots)
    elif sys.version_info >= (3, 13):
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        made.set_ciphers("PSK-AES256-GCM-SHA384")
        if server:
            made.set_psk_server_callback(lambda identity: work.key)
        else:
            made.set_psk_client_callback(lambda hint: ("bench", work.key))
    else:
        raise SystemExit("this interpreter's ssl module has no pre-shared keys")
    return made


async def idle(work: Work) -> None:
    """Opens connections, keeps them, and reports what each one holds."""
    client = context(work, server=False)

    async def open_one() -> object:
        return await asyncio.open_connection(
            "127.0.0.1", work.port, ssl=client, server_hostname=work.server_name
        )

    await print_idle(work, open_one)


class _Quiet(asyncio.Protocol):
    """An end that only tells when it is gone."""

    def __init__(self) -> None:
        self.gone = asyncio.get_running_loop().create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is closed."""
        self.gone.set_result(None)


async def cycles(work: Work) -> None:
    """Sets up and tears down pairs."""
    loop = asyncio.get_running_loop()
    server, client = context(work, server=True), context(work, server=False)

    async def one() -> None:
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        (_, near_end), (transport, far_end) = await asyncio.gather(
            loop.connect_accepted_socket(_Quiet, near, ssl=server),
            loop.create_connection(_Quiet, sock=far, ssl=client, server_hostname=work.server_name),
        )
        transport.close()
        await asyncio.gather(near_end.gone, far_end.gone)

    await print_cycles(work, one)


def main() -> None:
    """Dispatches."""
    work = parse_work(__doc__)
    started = time.perf_counter()
    asyncio.run(idle(work) if work.mode == "idle" else cycles(work))
    print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr)


main()
