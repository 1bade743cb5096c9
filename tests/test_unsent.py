"""A writer that is given with bytes that it has not sent yet: they go out first, and not for ever."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

from sapper.pump import connect
from support.bridges import receive

#: Far more than a socket takes at once.
UNSENT = os.urandom(3_000_000)


class Complaints(list[dict[str, Any]]):
    """What the loop's exception handler hears from now on."""

    def __init__(self) -> None:
        super().__init__()
        asyncio.get_running_loop().set_exception_handler(lambda _, said: self.append(said))


async def unsent_writer() -> tuple[asyncio.StreamReader, asyncio.StreamWriter, socket.socket]:
    """A reader and a writer with bytes that wait, and their peer, which reads nothing by itself."""
    ours, peer = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    writer.write(UNSENT)
    assert writer.transport.get_write_buffer_size() > 0
    return reader, writer, peer


async def test_handing_over_says_nothing_to_the_loop(any_loop: str, leak_check: None) -> None:
    complaints = Complaints()
    reader, writer, peer = await unsent_writer()
    theirs, far = socket.socketpair()
    pump = connect((reader, writer), theirs)
    pump.start()
    with peer, far:
        far.sendall(b"after it")
        assert await receive(peer, len(UNSENT) + 8) == UNSENT + b"after it"
        await writer.wait_closed()
        await pump.stop()
    assert complaints == []
