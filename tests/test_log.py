"""What the data plane warns of: in the program's log, wherever somebody hears, and never in its way."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sapper import _log, _native, tls
from support.bridges import PSK, closing, pair, running

#: A file that can be opened, and not written.
FULL = Path("/dev/full")
KEY_LOG = "sapper.tls.key_log"

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


def full() -> tls.TlsConfig:
    return tls.TlsConfig(credentials=PSK, key_log_file=FULL)


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    _native.take_log(True)
    yield
    _native.take_log(True)


async def heard(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    async with asyncio.timeout(20):
        while not (records := [one for one in caplog.records if one.name == KEY_LOG]):
            await asyncio.sleep(0)
    return records


async def test_a_warning_of_an_io_thread_is_a_line_of_the_programs_log(
    any_loop: str, caplog: pytest.LogCaptureFixture, leak_check: None
) -> None:
    async with running(pair(credentials=full())):
        record, *_ = await heard(caplog)
        assert record.levelno == logging.WARNING
        said = record.getMessage()
        assert said.startswith(
            "sapper: the key log cannot be written (path=/dev/full, error=No space left"
        ), said
        assert record.sapper["path"] == "/dev/full"  # type: ignore[attr-defined]
        assert record.threadName is not None
        assert record.threadName.startswith("sapper-io-")
        assert record.pathname.endswith("key_log.rs")
        # What could not be written is not said here either.
        assert "RANDOM" not in said
        assert "SECRET" not in said


def test_without_a_loop_the_thread_of_the_call_backs_tells(
    caplog: pytest.LogCaptureFixture, leak_check: None
) -> None:
    with closing(pair(credentials=full())) as two:
        two.server.start()
        two.client.handshake_sync()
    assert KEY_LOG in [one.name for one in caplog.records]


async def test_repeated_warnings_are_bounded_and_what_was_left_out_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(10):
        async with running(pair(credentials=full())):
            pass
    _log.tell(last=True)
    records = [one for one in caplog.records if one.name == KEY_LOG]
    # Three in ten seconds, however slow the machine is; each handshake has several lines.
    assert 1 <= len(records) < 10
    assert "more like this were left out" in records[-1].getMessage()
    assert records[-1].sapper["left_out"] > 10  # type: ignore[attr-defined]


def test_what_was_lost_is_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "take_log", lambda last: ([], 7))
    _log.tell()
    assert [one.getMessage() for one in caplog.records] == [
        "sapper: 7 warnings were lost: there were more than anybody read"
    ]


async def test_a_level_that_is_off_costs_no_record(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL, KEY_LOG):
        async with running(pair(credentials=full())):
            pass
        _log.tell()
    assert not caplog.records


PROGRAM = """
import os, sys
sys.path.insert(0, {tests!r})
from test_log import full
from support.bridges import closing, pair
with closing(pair(credentials=full())) as two:
    two.server.start()
    two.client.handshake_sync()
{then}
print("done", flush=True)
"""


def program(then: str = "") -> subprocess.CompletedProcess[str]:
    text = PROGRAM.format(tests=str(Path(__file__).parent), then=then)
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False, env=os.environ
    )


def test_a_program_without_a_log_of_its_own_shows_it_on_standard_error() -> None:
    done = program()
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "sapper: the key log cannot be written" in done.stderr
    assert "more like this were left out" in done.stderr, "the last count is told at the end"
    assert "Traceback" not in done.stderr


def test_a_child_that_was_forked_off_neither_waits_nor_tells_it_twice() -> None:
    """What was left out is told at the end: by the parent, whose it is."""
    done = program(
        "if (child := os.fork()) == 0:\n    sys.stderr = sys.stdout\n    sys.exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "more like this were left out" in done.stderr
