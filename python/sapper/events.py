"""What happens to a bridge, one frozen dataclass per event.

Events come from bounded queues: a listener that is too slow hears :class:`EventsLost` with the
number of those that did not fit, and never blocks the data plane.
"""

from __future__ import annotations

from dataclasses import dataclass

from sapper.errors import SapperError

__all__ = ["Closed", "Event", "EventsLost", "HandshakeFailed", "Started"]


@dataclass(frozen=True, slots=True)
class Started:
    """Payload flows."""


@dataclass(frozen=True, slots=True)
class Closed:
    """It is over and every resource is given back. Always the last event.

    Attributes:
        error: What ended it; ``None`` is an orderly end (close_notify, end of file, ``stop``).
    """

    error: SapperError | None = None


@dataclass(frozen=True, slots=True)
class EventsLost:
    """Events that did not fit the queue.

    Attributes:
        count: How many.
    """

    count: int


@dataclass(frozen=True, slots=True)
class HandshakeFailed:
    """A connection that a listener accepted did not get through its handshake.

    Attributes:
        peer: Where it came from.
        error: Why.
    """

    peer: str
    error: SapperError


#: Any of them.
Event = Started | Closed | EventsLost | HandshakeFailed
