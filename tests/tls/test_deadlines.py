"""Ends that come too late: of a listener whose queue stays full."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from sapper.errors import ConnectDeadline
from sapper.pump import PumpOptions, connect


@pytest.mark.parametrize("accepts", [True, False])
async def test_a_seqpacket_listener_with_a_full_queue_is_waited_for(
    tmp_path: Path, leak_check: None, *, accepts: bool
) -> None:
    with ExitStack() as ours:
        listening = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listening.bind(str(tmp_path / "s"))
        listening.listen(0)
        with suppress(BlockingIOError):
            while True:
                other = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                other.setblocking(False)
                other.connect(str(tmp_path / "s"))
        options = PumpOptions(connect_timeout=20.0 if accepts else 0.2)
        pump = connect("counter:", f"seqpacket:{tmp_path / 's'}", options=options)
        opening = asyncio.create_task(pump.open())
        if accepts:
            await asyncio.wait([opening], timeout=0.05)
            assert not opening.done()
            ours.enter_context(listening.accept()[0])
            await opening
        else:
            with pytest.raises(ConnectDeadline, match="its queue is full") as caught:
                await opening
            assert caught.value.field == "sink"
        await pump.stop()
