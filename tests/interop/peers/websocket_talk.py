"""Talks to a WebSocket echo: numbered messages of many sizes, text and bytes, each expected back in order.

python websocket_talk.py PORT MESSAGES
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator

import aiohttp


def messages(number: int) -> Iterator[str | bytes]:
    chance = random.Random(number)
    for n in range(number):
        size = chance.choice([0, 1, 125, 126, 4_000, 65_535, 65_536])
        yield f"{n} " + "é" * (size // 2) if n % 2 else chance.randbytes(size)


async def talk(port: int, number: int) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"http://127.0.0.1:{port}/echo", heartbeat=30) as socket:

            async def say() -> None:
                for message in messages(number):
                    if isinstance(message, str):
                        await socket.send_str(message)
                    else:
                        await socket.send_bytes(message)

            saying = asyncio.create_task(say())
            for n, message in enumerate(messages(number)):
                answer = await socket.receive()
                if answer.data != message:
                    raise SystemExit(f"message {n} came back as {answer.type!r}")
            await saying
    print(f"{number} messages came back")


if __name__ == "__main__":
    asyncio.run(talk(int(sys.argv[1]), int(sys.argv[2])))
