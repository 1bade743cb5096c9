"""How a pump moves payload and how long it waits, as options that also read TOML.

Not here: what is moved from where to where, which is an argument of each call (:mod:`sapper.pump`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, field_validator, model_validator

from sapper import _native
from sapper._mistakes import unused
from sapper._options import Options, config_error

__all__ = ["Framing", "PumpOptions", "TapOptions", "Upgrade"]

#: How packets lie in a stream. ``"raw"``: there are none, only bytes.
Framing = Literal["raw", "ip", "ipv4", "ipv6", "u16", "u32", "superframe"]
#: What a protocol says in clear before its TLS: docs/upgrades.md.
Upgrade = Literal["postgres", "postgres-direct", "mysql", "smtp", "imap"]

# Nothing that only looks like a number or a truth value is taken for one.
_Seconds = Annotated[float, Strict()]
_Whole = Annotated[int, Strict()]
_Flag = Annotated[bool, Strict()]

#: What a file's length can say.
_LONGEST_FILE = 2**63 - 1


class TapOptions(Options):
    """Copies of the inner packets, written as pcapng by native code."""

    path: Path
    """The file; an existing one is replaced."""
    filter: str | None = None
    """Which packets (``"tcp and port 443"``; docs/bridge.md has the language); ``None`` is all."""
    max_bytes: _Whole | None = Field(default=None, gt=0, le=_LONGEST_FILE)
    """The file ends before it grows beyond this, which has room for its header and a packet."""
    snap_len: _Whole = Field(default=65_535, ge=64, le=262_144)
    """At most so many bytes of each packet."""

    @field_validator("path")
    @classmethod
    def _no_zero_byte(cls, path: Path) -> Path:
        if "\0" in str(path):
            raise ValueError("a path holds a zero byte")
        return path

    @classmethod
    def _relative_to(cls, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "path": folder / values["path"]} if isinstance(values.get("path"), str) else values


class PumpOptions(Options):
    """How a pump moves payload, and how long it waits. All times are seconds.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    direction: Literal["duplex", "encrypt-only", "decrypt-only"] = "duplex"
    """``"encrypt-only"`` moves payload from the sink to the network only, and data from the peer is an
    error; ``"decrypt-only"`` is the mirror. TLS's own messages are handled either way."""
    framing: Framing = "raw"
    """How packets lie in the network's stream. Packet endpoints need one that is not ``"raw"``, unless
    both ends carry packets. Where the network carries them already: how they lie in the sink's stream."""
    sink_framing: Framing | None = None
    """How packets lie in a sink that is a stream; ``None`` is as in ``framing``."""
    max_packet: _Whole | None = Field(default=None, ge=1, le=65_535)
    """Largest packet in bytes, either way, apart from any MTU: some peers drop more than this. ``None``
    is what one TLS record holds, 16,384; with superframes 65,535. Large values cost speed: a datagram
    socket gets this much room for each packet of a batch."""
    records_per_write: _Whole = Field(default=64, ge=1, le=256)
    """How many packets, a record each under TLS, share one write. 1 is for peers that punish more."""
    resync: _Flag = False
    """After a bad packet header look for the next packet at a record boundary, rather than end."""
    connect_timeout: _Seconds = Field(default=30.0, gt=0)
    """Making a connection, all attempts together. Where there is no TLS, a writer that is given gets as
    long, before, to send what it has not sent yet."""
    accept_timeout: _Seconds | None = Field(default=None, gt=0)
    """Waiting for the one connection of an end that listens; ``None`` waits for as long as the pump lives."""
    handshake_timeout: _Seconds = Field(default=30.0, gt=0)
    """TLS handshake, the policy's answer and the framing's hello together, and before them what a writer
    that is given has not sent yet. The hello, at the start, has what the others left of it."""
    idle_timeout: _Seconds | None = Field(default=None, gt=0)
    """No byte in either direction for this long ends the pump, also between its handshake and its start;
    ``None`` is never."""
    close_timeout: _Seconds = Field(default=2.0, ge=0)
    """What ``aclose()`` gives to deliver what waits."""
    policy_timeout: _Seconds = Field(default=5.0, gt=0)
    """No answer of a policy call-back within this means no."""
    upgrade: Upgrade | None = None
    """What the network's protocol says in clear before its TLS, on either side (docs/upgrades.md)."""
    tap: TapOptions | None = None
    """Where inner packets are copied to from the start."""

    @model_validator(mode="after")
    def _not_raw(self) -> Self:
        if self.sink_framing == "raw" and self.framing != "raw":
            raise config_error("sink_framing", "packets lie raw in no stream: say how, or leave it away")
        return self

    @functools.cached_property
    def native(self) -> _native.OptionsDict:
        """As the binding takes them."""
        return {
            "direction": self.direction,
            "framing": self.framing,
            "sink_framing": self.sink_framing,
            "max_packet": self.max_packet or _largest(self.framing),
            "records_per_write": self.records_per_write,
            "resync": self.resync,
            "connect_timeout": self.connect_timeout,
            "accept_timeout": self.accept_timeout,
            "handshake_timeout": self.handshake_timeout,
            "idle_timeout": self.idle_timeout,
            "policy_timeout": self.policy_timeout,
            "upgrade": self.upgrade,
            "tap": tap_values(self.tap),
        }

    @classmethod
    def _relative_to(cls, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        tap = values.get("tap")
        return {**values, "tap": TapOptions._relative_to(folder, tap)} if isinstance(tap, dict) else values


#: All of them left out.
_USUAL = PumpOptions()


def _largest(framing: Framing) -> int:
    """The largest packet where nobody says otherwise: one record's payload."""
    return 65_535 if framing == "superframe" else 16_384


def tap_values(tap: TapOptions | None) -> _native.TapDict | None:
    """A tap's options as the binding takes them."""
    if tap is None:
        return None
    return {"path": tap.path, "filter": tap.filter, "max_bytes": tap.max_bytes, "snap_len": tap.snap_len}


def swap_values(sink_framing: Framing | None, accept_timeout: float | None) -> _native.SwapDict:
    """What is said of a sink that is swapped in, as the binding takes it."""
    if sink_framing == "raw":
        raise config_error("sink_framing", "packets lie raw in no stream: say how, or leave it away")
    said = options_from(None, {"sink_framing": sink_framing, "accept_timeout": accept_timeout})
    return {"sink_framing": said.sink_framing, "accept_timeout": said.accept_timeout}


def check_policy(options: PumpOptions, policy: object) -> None:
    """Refuses a time for answers where nobody is asked; a default that is written down is none.

    Raises:
        ConfigError: There is one.
    """
    if policy is None and options.policy_timeout != _USUAL.policy_timeout:
        raise unused("policy_timeout", "there is no peer_policy to answer")


#: Of what is equal only where it is the same: 1 is True, too.
_WORDS = {str}


@functools.lru_cache(maxsize=64)
def _checked(given: tuple[tuple[str, Any], ...]) -> PumpOptions:
    return PumpOptions(**dict(given))


def options_from(options: PumpOptions | None, changes: dict[str, Any]) -> PumpOptions:
    """The options of a call: those given as an object, changed by those given by name."""
    given = {name: value for name, value in changes.items() if value is not None}
    if options is None:
        # Most programs make their pumps in one or two ways: these are checked once.
        if set(map(type, given.values())) <= _WORDS:
            return _checked(tuple(given.items()))
        return PumpOptions(**given)
    if not isinstance(options, PumpOptions):
        raise config_error("options", f"must be PumpOptions, not {type(options).__name__}", "wrong_type")
    kept = {name: getattr(options, name) for name in type(options).model_fields}
    return PumpOptions(**{**kept, **given})
