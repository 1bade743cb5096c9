"""Counters of one moment, as plain frozen dataclasses. Bytes are bytes, times are seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sapper import _native

__all__ = ["EndpointStats", "FlowStats", "LatencyHistogram", "PumpStats"]


@dataclass(frozen=True, slots=True)
class LatencyHistogram:
    """How long payload was under way, from its receive to its send: of packets each, of bytes each read.

    Two of one pump can be subtracted bucket by bucket: the bounds are always the same.

    Attributes:
        bounds: Where each bucket ends, in seconds, but for the last one, which has no end: 128 ns, and twice
            as much each time, to 34 s.
        counts: How many lie in each bucket: below its bound, and not below the one before it. One more than
            bounds.
        sum: All of them added up, in seconds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    def cumulative(self) -> tuple[tuple[float, int], ...]:
        """Each bound with how many lie below it, as Prometheus has it; the last is infinity, with all."""
        return tuple(zip((*self.bounds, inf), accumulate(self.counts), strict=True))


@dataclass(frozen=True, slots=True)
class FlowStats:
    """One direction of a pump.

    Attributes:
        bytes: Payload delivered.
        packets: Packets delivered; a large one that the destination takes whole counts as one.
        backpressure: Seconds in which the destination took nothing while something waited.
        latency_p50: Median of the seconds between the receive and the send of the same byte or packet.
        latency_p99: 99 of 100 took no longer.
        latency_max: The longest.
        latency: All of them, in buckets.
        drops: Packets dropped, by reason; reasons without a drop are left out.
    """

    bytes: int
    packets: int
    backpressure: float
    latency_p50: float
    latency_p99: float
    latency_max: float
    latency: LatencyHistogram
    drops: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class EndpointStats:
    """One endpoint of a pump.

    Attributes:
        description: What it is, for people: ``tcp 127.0.0.1:5000 -> 127.0.0.1:443``.
        bytes_received: Bytes received from it (ciphertext where it is under TLS).
        bytes_sent: Bytes sent to it.
        packets_received: Packets received from it, counted as they would lie on a wire.
        packets_sent: Packets sent to it, counted the same way.
        records_received: TLS records opened.
        records_sent: TLS records sealed.
        receive_calls: Receiving system calls.
        send_calls: Sending system calls.
    """

    description: str
    bytes_received: int
    bytes_sent: int
    packets_received: int
    packets_sent: int
    records_received: int
    records_sent: int
    receive_calls: int
    send_calls: int


@dataclass(frozen=True, slots=True)
class PumpStats:
    """A pump: both directions, both endpoints, and facts.

    Attributes:
        running: Seconds since payload began to flow; 0 before.
        encapsulate: To the network.
        decapsulate: From the network.
        transport: The network's endpoint.
        sink: The other endpoint.
        facts: What does not change: ``transport.tls.engine``, ``.version``, ``.cipher_suite``, and each
            ``offload.…``, ``"on"`` or ``"off: "`` and why. And ``tap``: what became of its packets.
    """

    running: float
    encapsulate: FlowStats
    decapsulate: FlowStats
    transport: EndpointStats
    sink: EndpointStats
    facts: Mapping[str, str]

    @classmethod
    def from_native(cls, values: _native.StatsDict) -> PumpStats:
        """From what the binding gives."""
        bounds = tuple(values["latency_bounds"])
        return cls(
            running=values["running"],
            encapsulate=_flow(values["encapsulate"], bounds),
            decapsulate=_flow(values["decapsulate"], bounds),
            transport=EndpointStats(**values["transport"]),
            sink=EndpointStats(**values["sink"]),
            facts=dict(values["facts"]),
        )


def _flow(values: _native.FlowDict, bounds: tuple[float, ...]) -> FlowStats:
    return FlowStats(
        bytes=values["bytes"],
        packets=values["packets"],
        backpressure=values["backpressure"],
        latency_p50=values["latency_p50"],
        latency_p99=values["latency_p99"],
        latency_max=values["latency_max"],
        latency=LatencyHistogram(bounds, tuple(values["latency_counts"]), values["latency_sum"]),
        drops=dict(values["drops"]),
    )
