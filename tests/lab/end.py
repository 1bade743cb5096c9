"""One end of a tunnel, run inside a namespace: a bridge from the arguments of create_bridge, as JSON.

It says "running" when payload flows and prints its statistics as JSON when its standard input ends.
"""

import asyncio
import dataclasses
import json
import sys

import sapper.tls as tls


async def main() -> None:
    arguments = json.loads(sys.argv[1])
    key = bytes.fromhex(arguments.pop("key"))
    version = arguments.pop("version")
    credentials = tls.TlsConfig(
        credentials=tls.Credentials.psk(identity="lab", key=key), min_version=version, max_version=version
    )
    async with tls.create_bridge(credentials=credentials, **arguments) as bridge:
        await bridge.handshake()
        bridge.start()
        print("running", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        stats = dataclasses.asdict(
            bridge.stats(), dict_factory=lambda pairs: {name: plain(value) for name, value in pairs}
        )
    print(json.dumps(stats), flush=True)


def plain(value: object) -> object:
    return dict(value) if hasattr(value, "keys") else value  # type: ignore[call-overload]


if __name__ == "__main__":
    asyncio.run(main())
