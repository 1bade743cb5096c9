"""Credentials that live in files and change while the program runs.

Not here: how files are read and compared; that is native, on a thread named ``sapper-watch``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from sapper import _arguments, _native
from sapper._loop import current_loop, post_of
from sapper._owned import dropped, subscribe
from sapper.errors import ConfigError, SapperError

__all__ = ["ReloadCallback", "TlsWatch"]

logger = logging.getLogger("sapper")

#: Hears of each reload: ``None``, or the error that says why what was there stays in use.
ReloadCallback = Callable[[SapperError | None], object]


class TlsWatch:
    """Reloads a :class:`TlsConfig` when its files change. Made by :meth:`TlsConfig.watch`; close it.

    Dropped, it ends, with a ResourceWarning.
    """

    def __init__(
        self,
        config: _native.TlsConfig,
        on_reload: ReloadCallback | None,
        where_said: Callable[[ConfigError], ConfigError],
    ) -> None:
        _arguments.callback(on_reload, "on_reload")
        self._post = post_of(current_loop())
        self._on_reload = on_reload
        self._where_said = where_said
        self._native: _native.TlsWatch | None = None
        mailbox, self._key = subscribe(self._post, self._hear)
        try:
            self._native = _native.TlsWatch(config, mailbox, self._key)
        except BaseException:
            self._post.unsubscribe(self._key)
            raise

    def close(self) -> None:
        """Ends it. Nothing is reloaded or told afterwards; what was loaded stays."""
        native, self._native = self._native, None
        if native is not None:
            native.close()
            self._post.unsubscribe(self._key)

    def __del__(self) -> None:
        if getattr(self, "_native", None) is not None:
            dropped(self, self.abandon)

    def abandon(self) -> None:
        """:meth:`close` for a ``__del__``, which may come in any thread."""
        native, self._native = self._native, None
        if native is not None:
            native.close()
            self._post.unsubscribe_from_anywhere(self._key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hear(self, tag: str, value: Any) -> None:
        if tag != "reloaded":  # of events that were lost there is nothing to say: the next one tells
            return
        if isinstance(value, ConfigError):
            value = self._where_said(value)
        if self._on_reload is not None:
            self._post.run(self._on_reload, value)
        elif value is not None:
            logger.error("sapper: TLS files were not reloaded, those from before stay in use: %s", value)
