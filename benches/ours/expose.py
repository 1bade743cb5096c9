"""Ours: the two ends of a tunnel in programs of their own, with the defaults of the API.

    python -m benches.ours.expose '{"role": "server", "port": 9000}'
    python -m benches.ours.expose '{"role": "client", "port": 9000, "service": 3000}'

The client says its public port. `visitors` is how many may come at a time, where that is not the default;
`chain`, `key` and `roots` ask for TLS between the two.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from sapper.tunnel import TunnelClient, TunnelServer


async def serve(given: dict[str, Any]) -> None:
    """Serves until it is ended. Only this machine is served, as there is no filter."""
    options: dict[str, Any] = {}
    if given.get("visitors"):
        from sapper.tunnel import ServerOptions

        options["options"] = ServerOptions(max_visitors=given["visitors"])
    if given.get("chain"):
        from sapper.tls import Credentials

        options["tls"] = Credentials.certificate(given["chain"], given["key"])
    server = TunnelServer(**options)
    await server.start(given["port"])
    await server.wait_closed()


async def expose(given: dict[str, Any]) -> None:
    """Exposes the service until it is ended."""
    tls = {"ca": given["roots"], "server_hostname": given["name"]} if given.get("roots") else {}
    client = TunnelClient("127.0.0.1", given["port"], given["service"], **tls)
    print(await client.connect(), flush=True)
    await client.wait_closed()


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    asyncio.run(serve(told) if told["role"] == "server" else expose(told))
