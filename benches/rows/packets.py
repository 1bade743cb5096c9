"""Rows: 1,280-byte packets, one per TLS 1.2 record, between a TLS connection and a datagram socket.

Each round runs every subject twice: as fast as it goes (packets per second, processor time per packet) and at
a fixed offered rate (latency).
"""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches.children import BenchError, Children
from benches.figures import OURS, Column, Round, Row, alternate
from benches.programs import compiled
from benches.rows import RowFunction, Settings
from benches.subjects import BLOCKING, NATIVE, PROTOCOL, STREAM, has_sapper, packet_pump, peer_note

SIZE = 1280
OFFERED = 75_000
"""Packets per second, both directions together."""

COLUMNS = (
    Column("rate", "k packets/s", 1e-3, 0),
    Column("cpu", "CPU µs/packet", 1e6),
    Column("offered", "offered k/s carried", 1e-3, 1),
    Column("p50", "p50 µs", 1e6, 0),
    Column("p99", "p99 µs", 1e6, 0),
)
_TITLES = {
    "receive": "TLS to a datagram socket",
    "send": "a datagram socket to TLS",
    "both": "both directions at once",
}
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_QUEUE = 8 << 20


def rows() -> dict[str, RowFunction]:
    """The three rows of this module."""
    return {f"packets-{mode}": functools.partial(measure, mode) for mode in _TITLES}


def measure(mode: str, settings: Settings) -> Row:
    """One row: all subjects, alternating."""
    row = Row(f"packets-{mode}", f"{SIZE:,}-byte packets, TLS 1.2 PSK-AES256-GCM, {_TITLES[mode]}", COLUMNS)
    names = (
        (OURS, STREAM, PROTOCOL, BLOCKING, NATIVE) if has_sapper() else (STREAM, PROTOCOL, BLOCKING, NATIVE)
    )
    subjects = {name: functools.partial(one_round, name, mode, settings) for name in names}
    row.subjects = alternate(subjects, settings.rounds, settings.step(row.name))
    row.require("packets/s against the stream pump", "rate", STREAM, ">=", 2.3)
    row.require("CPU per packet against the stream pump", "cpu", STREAM, "<=", 0.42)
    row.require("packets/s against the Protocol pump", "rate", PROTOCOL, ">=", 1.2)
    row.require("CPU per packet against the Protocol pump", "cpu", PROTOCOL, "<=", 0.75)
    row.require("p99 at 75,000 packets/s against the stream pump", "p99", STREAM, "<", 1.0)
    row.require("p99 at 75,000 packets/s against the Protocol pump", "p99", PROTOCOL, "<", 1.0)
    note = peer_note()
    row.notes += [note] if note else []
    return row


def one_round(name: str, mode: str, settings: Settings) -> Round:
    """Full speed, then the offered rate."""
    fast = run_load(name, mode, settings, 0)
    slow = run_load(name, mode, settings, OFFERED // 2 if mode == "both" else OFFERED)
    return {
        "rate": fast["packets"] / fast["seconds"],
        "cpu": fast["pump_cpu_seconds"] / fast["packets"],
        "offered": slow["packets"] / slow["seconds"],
        "p50": slow["p50"],
        "p99": slow["p99"],
    }


def run_load(name: str, mode: str, settings: Settings, rate: int) -> dict[str, float]:
    """One run of one pump under the load program."""
    command, key = packet_pump(name)
    pump_tls, load_tls = connected_pair()
    pump_packets, load_packets = datagram_pair()
    with pump_tls, load_tls, pump_packets, load_packets, Children() as children:
        pump = children.start(
            [*command, "--tls-fd", str(pump_tls.fileno()), "--packet-fd", str(pump_packets.fileno()),
             "--direction", mode],
            (pump_tls.fileno(), pump_packets.fileno()),
        )  # fmt: skip
        load = children.start(
            [*load_command(mode, pump.pid, key, settings, load_tls),
             "--packet-fd", str(load_packets.fileno()), "--rate", str(rate)],
            (load_tls.fileno(), load_packets.fileno()),
        )  # fmt: skip
        # The children have theirs: an end of stream must not be held open by us.
        for ours in (pump_tls, load_tls, pump_packets, load_packets):
            ours.close()
        measured = json.loads(load.result(settings.warm + settings.seconds + 20))
    return merge(name, measured)


def load_command(
    mode: str, pump: int, key: str, settings: Settings, tls: socket.socket
) -> Sequence[str | Path]:
    """The part of the load program's command line that all modes share."""
    return [
        compiled("load"), "--mode", mode, "--pump", str(pump), "--size", str(SIZE),
        "--tls-fd", str(tls.fileno()), *(("--key", key) if key else ()),
        "--seconds", str(settings.seconds), "--warm", str(settings.warm),
    ]  # fmt: skip


def merge(name: str, measured: dict[str, Any]) -> dict[str, float]:
    """Both directions as one: packets added, the worse latency of the two."""
    flows = [measured["decapsulated"], measured["encapsulated"]]
    if any(flow["lost"] or flow["invalid"] for flow in flows):
        raise BenchError(f"{name} lost or mangled packets: {measured}")
    packets = sum(flow["packets"] for flow in flows)
    if not packets:
        raise BenchError(f"nothing came through {name}")
    return {
        "seconds": measured["seconds"],
        "pump_cpu_seconds": measured["pump_cpu_seconds"],
        "load_cpu_seconds": measured["load_cpu_seconds"],
        "packets": packets,
        "p50": max(flow["p50_ns"] for flow in flows) * 1e-9,
        "p99": max(flow["p99_ns"] for flow in flows) * 1e-9,
    }


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """A TCP connection over loopback: the pump's end and the load's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def datagram_pair() -> tuple[socket.socket, socket.socket]:
    """A datagram socket pair with deep queues, so that a full one means a slow pump."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in pair:
        for option, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                end.setsockopt(socket.SOL_SOCKET, option, _QUEUE)
            except PermissionError:  # without CAP_NET_ADMIN up to the system's limit
                end.setsockopt(socket.SOL_SOCKET, plain, _QUEUE)
    return pair
