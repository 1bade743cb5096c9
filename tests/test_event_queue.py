"""The queue between what happens and an iterator: bounded, counted, the end last."""

from __future__ import annotations

import asyncio
import threading

import pytest

from sapper._life import EVENTS, EventStream
from sapper.errors import ApiMisuseError
from sapper.events import Closed, Event, EventsLost, Started


async def test_what_does_not_fit_is_counted_and_the_end_comes_last() -> None:
    stream = EventStream()
    for _ in range(EVENTS + 3):
        stream.put(Started())
    stream.put(EventsLost(4))
    stream.put(Closed(None))
    heard: list[Event] = [event async for event in stream]
    assert heard == [*[Started()] * EVENTS, EventsLost(7), Closed(None)]


async def test_a_cancelled_wait_loses_no_event() -> None:
    stream = EventStream()
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    waiting.cancel()
    stream.put(Started())
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await anext(stream) == Started()


async def test_events_come_from_any_thread() -> None:
    stream = EventStream()
    for event in (Started(), Closed(None)):
        thread = threading.Thread(target=stream.put, args=(event,))
        thread.start()
        thread.join()
    assert [event async for event in stream] == [Started(), Closed(None)]


def test_without_a_loop_there_is_nobody_to_hear() -> None:
    with pytest.raises(ApiMisuseError):
        EventStream()


async def test_two_tasks_at_one_iterator_both_end() -> None:
    stream = EventStream()
    tasks = [asyncio.ensure_future(anext(stream, None)) for _ in range(3)]
    await asyncio.sleep(0)
    stream.put(Started())
    stream.put(Closed(None))
    async with asyncio.timeout(20):
        heard = await asyncio.gather(*tasks)
    assert heard.count(Started()) == heard.count(Closed(None)) == heard.count(None) == 1
