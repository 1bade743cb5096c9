"""Commands that serve for months, without what reads their options.

typer, rich and the models that check options are needed for a moment, and would be two fifths of an idle
process. So a child that is forked before anything runs reads the command line, and says in plain values what
there is to do. What cannot be said so (TLS) is read here, as it is where a configuration is read again.

Not here: what is done, which is :mod:`sapper.cli._tunnel`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sapper._mistakes import config_error
from sapper.cli._names import Words
from sapper.cli._tunnel import Told, run_clients, run_server

__all__ = ["Work", "ask", "launch"]

#: Takes the work, where somebody has asked what there is to do: it is not done here then.
_takers: list[Callable[[Work], None]] = []


@dataclass
class Work:
    """What a command line asks for.

    Attributes:
        config: Of a server, or of clients by name; as models or plain.
        again: Reads that anew, for SIGHUP and where a file has changed.
        files: The files that it comes from.
        told: Arguments of :class:`~sapper.cli._tunnel.Told`.
        metrics: Where figures are asked for.
        drain: Seconds that the end gives to open streams.
        token: What a client has to say, for the command that is shown.
        words: Those in which mistakes are told.
    """

    config: Any = field(repr=False)
    again: Callable[[], Any]
    files: Callable[[], Iterable[Path | None]]
    told: dict[str, Any]
    metrics: tuple[str, ...]
    drain: float
    words: Words
    token: str | None = field(default=None, repr=False)

    def run(self) -> None:
        """Does it, to its end."""
        told = Told(**self.told)
        if isinstance(self.config, Mapping):
            work = run_clients(
                self.config, self.again, self.files, metrics=self.metrics, drain=self.drain, told=told
            )
        else:
            work = run_server(
                self.config,
                self.again,
                self.files,
                token=self.token,
                metrics=self.metrics,
                drain=self.drain,
                told=told,
            )
        with self.words:
            cut = asyncio.run(work)
        if cut:
            sys.exit(130)

    def plain(self) -> tuple[Work, tuple[Path | None, ...]] | None:
        """The same in plain values, and its files; ``None`` where it cannot be said so."""
        if isinstance(self.config, Mapping):
            config: Any = {name: one.plain() for name, one in self.config.items()}
            whole = None not in config.values()
        else:
            config = self.config.plain()
            whole = config is not None
        work = replace(self, config=config, again=_nothing, files=_nothing)
        return (work, tuple(self.files())) if whole else None


def _nothing() -> Any:
    """In the place of what does not cross."""


def launch(work: Work) -> None:
    """Does it, or tells who has asked."""
    if _takers:
        _takers[-1](work)
    else:
        work.run()


def ask(read: Callable[[], None]) -> Work | None:
    """What the command line asks for, read by a child; ``None`` where it is to be read here.

    It returns in the child too, with ``None``: what :func:`launch` is called with there, the parent has as
    its answer. Where the child ends without that (help, a mistake) this process ends like it.

    Args:
        read: Reads the command line and calls :func:`launch`.
    """
    reading, writing = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # once, not by both
    child = os.fork()
    if child == 0:
        os.close(reading)
        _takers.append(lambda work: _hand_over(work, writing))
        return None
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        heard = answer.read()
    _, status = os.waitpid(child, 0)
    if not heard:
        code = os.waitstatus_to_exitcode(status)
        sys.exit(code if code >= 0 else 128 - code)
    found: tuple[Work, tuple[Path | None, ...]] | None = pickle.loads(heard)  # noqa: S301 - our own child
    if found is None:
        return None
    work, files = found
    again = _Again(read, files, work.words)
    return replace(work, again=again.config, files=again.files)


class _Again:
    """Reads the command line anew, with all that it takes, once somebody wants that.

    Args:
        read: As for :func:`ask`.
        files: Where it comes from, as far as that is known.
        words: Hear what the files say now.
    """

    def __init__(self, read: Callable[[], None], files: Iterable[Path | None], words: Words) -> None:
        self._read = read
        self._files = tuple(files)
        self._words = words
        self._work: Work | None = None

    def files(self) -> Iterable[Path | None]:
        return self._files if self._work is None else self._work.files()

    def config(self) -> Any:
        config = self._first() if self._work is None else self._work.again()
        if self._work is not None:
            self._words.follow(self._work.words)
        return config

    def _first(self) -> Any:
        found: list[Work] = []

        def take(work: Work) -> None:
            found.append(work)
            sys.exit(0)

        _takers.append(take)
        try:
            self._read()
        except SystemExit:
            if not found:
                raise config_error(None, "the command line is not valid any more") from None
        finally:
            _takers.pop()
        (self._work,) = found
        return self._work.config


def _hand_over(work: Work, writing: int) -> None:
    # Who has asked may have been ended meanwhile.
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as answer:
        answer.write(pickle.dumps(work.plain()))
    sys.exit(0)
