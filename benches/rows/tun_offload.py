"""Row: the same packets into a TUN, with one TCP flow inside that a pump may coalesce.

The load program is the sending half of a TCP connection whose receiving half is a real socket behind the TUN,
in a namespace of its own. The peers write each packet to a TUN without a header, as a pump in Python does;
ours opens the TUN with offload.
"""

from __future__ import annotations

import functools
import json

from benches.children import BenchError, Children
from benches.figures import OURS, Column, Round, Row, alternate
from benches.namespaces import Namespace
from benches.programs import compiled
from benches.rows import RowFunction, Settings
from benches.rows.packets import SIZE, connected_pair, load_command
from benches.subjects import PROTOCOL, STREAM, has_sapper, packet_pump, peer_note

COLUMNS = (
    Column("rate", "k packets/s", 1e-3, 0),
    Column("cpu", "CPU µs/packet", 1e6),
    Column("joined", "packets per TUN write", 1.0, 1),
)
_TUN = "inner"
_PORT = 5001


def rows() -> dict[str, RowFunction]:
    """The row of this module."""
    return {"tun-offload": measure}


def measure(settings: Settings) -> Row:
    """The row: all subjects, alternating."""
    row = Row("tun-offload", f"{SIZE:,}-byte packets, TLS 1.2 PSK, into a TUN, TCP inside", COLUMNS)
    names = (OURS, STREAM, PROTOCOL) if has_sapper() else (STREAM, PROTOCOL)
    subjects = {name: functools.partial(one_round, name, settings) for name in names}
    row.subjects = alternate(subjects, settings.rounds, settings.step(row.name))
    row.require("CPU per packet against the Protocol pump", "cpu", PROTOCOL, "<=", 0.45)
    note = peer_note()
    row.notes += [note] if note else []
    return row


def one_round(name: str, settings: Settings) -> Round:
    """One pump, one namespace, one TCP flow as fast as it goes."""
    command, key = packet_pump(name)
    pump_tls, load_tls = connected_pair()
    with pump_tls, load_tls, Namespace() as namespace, Children() as children:
        namespace.add_tun(_TUN, SIZE, "fd5a::1/64")
        receiver = children.start(
            namespace.command([compiled("load"), "--mode", "discard", "--port", str(_PORT)])
        )
        receiver.first_line(5)
        pump = children.start(
            namespace.command([*command, "--tls-fd", str(pump_tls.fileno()), "--tun", _TUN]),
            (pump_tls.fileno(),),
        )
        load = children.start(load_command("tcp", pump.pid, key, settings, load_tls), (load_tls.fileno(),))
        pump_tls.close()
        load_tls.close()
        measured = json.loads(load.result(settings.warm + settings.seconds + 20))
        link = json.loads(namespace.ip("-j", "-s", "link", "show", _TUN))[0]
    packets = measured["decapsulated"]["packets"]
    if not packets:
        raise BenchError(f"no TCP came through {name}: {measured}")
    # The device's own counters span the whole run; so does the sum of what was acknowledged.
    writes = link["stats64"]["rx"]["packets"]
    return {
        "rate": packets / measured["seconds"],
        "cpu": measured["pump_cpu_seconds"] / packets,
        "joined": measured["packets_in_all"] / writes if writes else 0.0,
    }
