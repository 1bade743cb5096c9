"""For tests of programs that use Sapper, and for its own demo: throw-away credentials, load, a measure.

- :func:`throwaway_certificates`: an authority, a server and a client that nobody else believes.
- :class:`Load`: a native thread that sends numbered and stamped units, or receives and measures them.
- :func:`live_tasks`: native tasks that are alive, for leak tests.

Nothing here is for production.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from sapper import _native
from sapper.tls import Credentials, TlsConfig

__all__ = [
    "Load",
    "LoadStats",
    "ThrowawayCertificates",
    "handshake_pair_seconds",
    "live_tasks",
    "throwaway_certificates",
]


@dataclass(frozen=True, slots=True)
class ThrowawayCertificates:
    """Certificates of one throw-away authority, in PEM.

    Attributes:
        authority: The authority's certificate: the other side's roots.
        server: Chain and key of a server.
        client: Chain and key of a client.
    """

    authority: bytes = field(repr=False)
    server: tuple[bytes, bytes] = field(repr=False)
    client: tuple[bytes, bytes] = field(repr=False)

    def server_credentials(self, *, ask_clients: bool = False) -> Credentials:
        """For the server; with ``ask_clients`` it insists on a client's certificate."""
        return Credentials.certificate(*self.server, roots=self.authority if ask_clients else None)

    def client_credentials(self) -> Credentials:
        """For a client that proves itself and believes this authority."""
        return Credentials.certificate(*self.client, roots=self.authority)


def throwaway_certificates(*names: str, valid: float = 86_400.0) -> ThrowawayCertificates:
    """Makes an authority, a server's and a client's certificate.

    Args:
        names: DNS names and addresses of the server; none is ``"localhost"``.
        valid: Seconds from now.

    Raises:
        ConfigError: A name is none.
    """
    made = _native.dev_certificates(list(names) or ["localhost"], valid)
    return ThrowawayCertificates(made["authority"], made["server"], made["client"])


@dataclass(frozen=True, slots=True)
class LoadStats:
    """What a source or a meter has counted. Times are seconds.

    Attributes:
        units: Units sent or received.
        bytes: Their bytes.
        lost: Units whose number was jumped over (meters).
        torn: Units that are not what was sent (meters).
        latency_p50: Median time under way (meters).
        latency_p99: 99 of 100 took no longer.
        latency_max: The longest.
    """

    units: int
    bytes: int
    lost: int
    torn: int
    latency_p50: float
    latency_p99: float
    latency_max: float


class Load:
    """A native thread that sends load, or measures it: packets, or blocks of a stream.

    Packets are IPv6 without a payload protocol. The descriptor is duplicated: the caller keeps its own.
    Source and meter must agree on unit and size, and share one machine's clock.
    """

    def __init__(self, native: _native.Load) -> None:
        self._native = native

    @classmethod
    def source(cls, fd: int, unit: Literal["packet", "block"], size: int, *, rate: int = 0) -> Self:
        """Sends units of ``size`` bytes, ``rate`` a second; 0 is as many as ``fd`` takes."""
        return cls(_native.Load.source(fd, unit, size, rate))

    @classmethod
    def meter(cls, fd: int, unit: Literal["packet", "block"], size: int) -> Self:
        """Receives units of ``size`` bytes and measures them."""
        return cls(_native.Load.meter(fd, unit, size))

    def stats(self) -> LoadStats:
        """Counts until now."""
        return LoadStats(**self._native.snapshot())

    def stop(self) -> None:
        """Ends the thread and waits for that; the counts stay."""
        self._native.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def live_tasks() -> int:
    """Native tasks that are alive in this process."""
    return _native.live_tasks()


def handshake_pair_seconds(client: TlsConfig, server: TlsConfig, rounds: int = 200) -> float:
    """Seconds that one TLS handshake takes between two engines in memory, without any I/O.

    The client asks for ``"localhost"``.
    """
    return _native.handshake_pair_seconds(client.native, server.native, rounds)
