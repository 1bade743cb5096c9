"""Bytes that callers wrote before they gave their writers away: they go out first, and not for ever.

Not here: how they are sent, which the transport does by itself (:mod:`sapper._takeover`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sapper.errors import ConnectDeadline, ErrorContext, HandshakeDeadline, SapperError

__all__ = ["Unsent"]


@dataclass(frozen=True)
class Unsent:
    """Bytes that callers wrote before they gave their writers away: they go out before any of ours.

    Attributes:
        waits: What to await, one after the other.
        timeout: Seconds for all of them: a peer that does not read would hold the pump for ever.
        tls: Whether a handshake comes next; its deadline is the one that applies then, to both together.
    """

    waits: tuple[Callable[[], Awaitable[None]], ...]
    timeout: float
    tls: bool

    async def sent(self) -> None:
        """Waits until they are on their way, or will never be because the pump is over.

        Raises:
            ConnectionLost: The connection broke before.
            HandshakeDeadline, ConnectDeadline: The peer did not take them in time.
        """
        try:
            async with asyncio.timeout(self.timeout):
                for wait in self.waits:
                    await wait()
        except TimeoutError:
            raise self.too_late() from None

    def too_late(self) -> SapperError:
        """The deadline's error."""
        text = f"the peer did not take what was written before within {self.timeout:.1f} s"
        if self.tls:
            return HandshakeDeadline(text, ErrorContext(phase="handshake"))
        return ConnectDeadline(text, ErrorContext(phase="connect"))
