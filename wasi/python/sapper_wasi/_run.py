"""Running a guest: from a thread that waits, or on an event loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from os import PathLike
from typing import Any

from sapper.errors import ApiMisuseError, ErrorContext, ErrorKind, SapperError
from sapper_wasi import _log, _native
from sapper_wasi.guest import Guest
from sapper_wasi.options import RunOptions

__all__ = ["GuestTrapped", "Result", "run", "run_async"]

#: How much of what a guest said last goes along with an error.
_LAST_WORDS = 2000


@dataclass(frozen=True, slots=True)
class Result:
    """What a guest that ended by itself leaves.

    Attributes:
        exit_code: What it ended with.
        stdout: Its standard output, where it was kept.
        stderr: Its standard error, where it was kept.
        fuel: What it used, where that was counted.
    """

    exit_code: int
    stdout: bytes | None
    stderr: bytes | None
    fuel: int | None


class GuestTrapped(SapperError):  # noqa: N818 - one of a family whose names say what happened
    """The guest did what none must: it panicked, divided by zero, left its memory.

    Attributes:
        stdout: Its standard output until then, where it was kept.
        stderr: Its standard error until then, where it was kept.
    """

    kind = ErrorKind.REMOTE_CALL

    def __init__(
        self,
        message: str = "",
        context: ErrorContext | None = None,
        *,
        stdout: bytes | None = None,
        stderr: bytes | None = None,
    ) -> None:
        super().__init__(message, context or ErrorContext(reason="trapped"))
        self.stdout = stdout
        self.stderr = stderr

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_trapped, (self.message, self.context, self.stdout, self.stderr)


def _rebuild_trapped(
    message: str, context: ErrorContext, stdout: bytes | None, stderr: bytes | None
) -> GuestTrapped:
    return GuestTrapped(message, context, stdout=stdout, stderr=stderr)


def run(
    guest: Guest | str | PathLike[str] | bytes, options: RunOptions | None = None, /, **values: Any
) -> Result:
    """Runs a guest to its end; this thread waits, and Ctrl-C is heard.

    Args:
        guest: A compiled guest, or what :class:`Guest` takes.
        options: What it is given.
        **values: Single options, by the names of :class:`RunOptions`.

    Raises:
        ConfigError: The guest or an option is wrong; ``field`` names it.
        GuestTrapped: It did what none must.
        RpcDeadline: It did not end within ``timeout``.
        ResourceLimit: It needs more than it may have; ``reason`` is ``fuel``, ``memory`` or ``capture``.
    """
    program = guest if isinstance(guest, Guest) else Guest(guest)
    chosen = RunOptions.of(options, values)
    log = _log.LogWaits()
    under_way = _native.Run(program.native, chosen.native_values(program.name))
    try:
        while not under_way.wait(log):
            _log.tell(log)
    except BaseException:
        under_way.cancel()
        raise
    finally:
        _log.tell(log)
    return _result(under_way)


async def run_async(
    guest: Guest | str | PathLike[str] | bytes, options: RunOptions | None = None, /, **values: Any
) -> Result:
    """:func:`run` on an event loop; no thread waits. If cancelled, the guest is ended first.

    Raises:
        ConfigError: The guest or an option is wrong; ``field`` names it.
        GuestTrapped: It did what none must.
        RpcDeadline: It did not end within ``timeout``.
        ResourceLimit: It needs more than it may have; ``reason`` is ``fuel``, ``memory`` or ``capture``.
    """
    loop = asyncio.get_running_loop()
    program = guest if isinstance(guest, Guest) else await asyncio.to_thread(Guest, guest)
    chosen = RunOptions.of(options, values)
    log = _log.LogWaits()
    under_way = _native.Run(program.native, chosen.native_values(program.name))
    over = asyncio.Event()
    over_fd, log_fd = under_way.fileno(), log.fileno()
    loop.add_reader(over_fd, over.set)
    loop.add_reader(log_fd, _log.tell, log)
    cancelled = False
    try:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                # It ends at its next tick: a hundredth of a second.
                under_way.cancel()
                cancelled = True
    finally:
        loop.remove_reader(over_fd)
        loop.remove_reader(log_fd)
        _log.tell(log)
    if cancelled:
        raise asyncio.CancelledError
    return _result(under_way)


def _result(under_way: _native.Run) -> Result:
    report = under_way.report()
    if report is None:
        raise ApiMisuseError("the result of this run was taken already")
    word, code, detail, stdout, stderr, fuel = report
    if word == "exited" and code is not None:
        return Result(code, stdout, stderr, fuel)
    if word == "stopped" and isinstance(detail, SapperError):
        if stderr:
            detail.add_note(f"its standard error ends: {_text(stderr)}")
        raise detail
    raise GuestTrapped(str(detail or word), stdout=stdout, stderr=stderr)


def _text(said: bytes) -> str:
    return said[-_LAST_WORDS:].decode("utf-8", "replace").strip()
