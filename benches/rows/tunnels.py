"""Rows: TUN - carrier - TUN between two namespaces, one TCP flow inside, measured by iperf3.

All subjects of a row stand at the same time over the same wire, each with a TUN of its own, and take turns:
an idle tunnel costs nothing, and no turn has to wait for a set-up.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benches.children import BenchError, Child, Children, wait_until
from benches.figures import OURS, Column, Round, Row, alternate
from benches.namespaces import Namespace, join
from benches.peers import wireguard
from benches.programs import compiled, program
from benches.rows import RowFunction, Settings
from benches.subjects import FORWARDER, KEY, WIREGUARD, has_sapper, our_program

COLUMNS = (
    Column("rate", "Gbit/s", 1e-9),
    Column("cpu", "CPU s/GB, both ends", 1e9),
    Column("resent", "resent segments", 1.0, 0),
)
_NEAR, _FAR = "10.200.0.1", "10.200.0.2"
_PORTS = {OURS: 4443, FORWARDER: 4444, WIREGUARD: 4445}
_SETTLE_SECONDS = 1
"""iperf3 leaves out the first second: TCP is still opening its window."""


@dataclass(frozen=True)
class Kind:
    """What the two rows differ in."""

    title: str
    mtu: int
    framing: str
    peers: tuple[str, ...]


_KINDS = {
    "tunnel-packets": Kind("TUN - TLS 1.2 - TUN, packet framing", 1280, "ipv6", (FORWARDER, WIREGUARD)),
    "tunnel-superframes": Kind("TUN - TLS 1.2 - TUN, superframes", 1420, "superframe", (WIREGUARD,)),
}


@dataclass(frozen=True)
class Tunnel:
    """A tunnel that stands: its far address and the two processes that carry it."""

    far: str
    ends: tuple[Child, Child]


def rows() -> dict[str, RowFunction]:
    """The two rows of this module."""
    return {name: functools.partial(measure, name) for name in _KINDS}


def measure(name: str, settings: Settings) -> Row:
    """One row: sets all tunnels up, then lets them take turns."""
    kind = _KINDS[name]
    row = Row(name, f"{kind.title}, inner MTU {kind.mtu:,}, one TCP flow", COLUMNS)
    names = ((OURS,) if has_sapper() else ()) + kind.peers
    with ExitStack() as stack:
        near, far = stack.enter_context(Namespace()), stack.enter_context(Namespace())
        children = stack.enter_context(Children())
        join(near, far, f"{_NEAR}/24", f"{_FAR}/24")
        children.start(far.command([program("iperf3"), "-s"]))
        subjects: dict[str, Callable[[], Round]] = {}
        for number, subject in enumerate(names):
            settings.say(f"{name}: sets up {subject}")
            tunnel = stand(subject, number, kind, near, far, children)
            subjects[subject] = functools.partial(one_round, subject, tunnel, near, settings)
        row.subjects = alternate(subjects, settings.rounds, settings.step(name))
    if name == "tunnel-packets":
        row.require("throughput against the two-thread forwarder", "rate", FORWARDER, ">=", 2.0)
        row.require("throughput against wireguard-go", "rate", WIREGUARD, ">", 1.0)
    else:
        row.require("throughput against wireguard-go", "rate", WIREGUARD, ">=", 2.0)
    return row


def stand(
    subject: str, number: int, kind: Kind, near: Namespace, far: Namespace, children: Children
) -> Tunnel:
    """Sets one tunnel up and waits until it carries a packet."""
    addresses = (f"fd5a:{number}::1", f"fd5a:{number}::2")
    if subject == WIREGUARD:
        ends = _stand_wireguard(kind, addresses, near, far, children)
    else:
        tun = f"tun{number}"
        for namespace, address in zip((near, far), addresses, strict=True):
            namespace.add_tun(tun, kind.mtu, f"{address}/64")
        ends = _stand_tls(subject, tun, kind, near, far, children)
    first = ("-n", "1K", "--connect-timeout", "10000")
    try:
        children.start(near.command([program("iperf3"), "-c", addresses[1], *first])).result(15)
    except BenchError as error:
        complaints = "; ".join(filter(None, (end.complaint for end in ends)))
        raise BenchError(f"{subject}: nothing came through the tunnel: {error} {complaints}") from None
    return Tunnel(addresses[1], ends)


def _stand_tls(
    subject: str, tun: str, kind: Kind, near: Namespace, far: Namespace, children: Children
) -> tuple[Child, Child]:
    if subject == OURS:
        command = [*our_program("tunnel"), "--framing", kind.framing]
    else:
        command = [compiled("forwarder")]
    command += ["--tun", tun, "--key", KEY, "--port", str(_PORTS[subject])]
    server = children.start(far.command([*command, "--listen", _FAR]))
    wait_until(lambda: _listens(server, _PORTS[subject]) or not server.running, f"{subject} listening")
    client = children.start(near.command([*command, "--connect", _FAR]))
    for end in (server, client):
        end.first_line(15)
    return client, server


def _listens(child: Child, port: int) -> bool:
    """Whether somebody in the child's namespace listens on the port (state 0A of the kernel's table)."""
    try:
        lines = Path(f"/proc/{child.pid}/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return False
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def _stand_wireguard(
    kind: Kind, addresses: tuple[str, str], near: Namespace, far: Namespace, children: Children
) -> tuple[Child, Child]:
    keys = (wireguard.make_keys(), wireguard.make_keys())
    ends = []
    port = _PORTS[WIREGUARD]
    for index, (namespace, endpoint) in enumerate(((near, _FAR), (far, _NEAR))):
        end = wireguard.start(children, namespace, f"sw{os.getpid() % 1_000_000}{'ab'[index]}{kind.mtu}")
        end.configure(keys[index], keys[1 - index], port, f"{endpoint}:{port}", f"{addresses[1 - index]}/128")
        namespace.ip("link", "set", end.name, "mtu", str(kind.mtu), "addrgenmode", "none")
        namespace.ip("address", "add", f"{addresses[index]}/64", "dev", end.name, "nodad")
        namespace.ip("link", "set", end.name, "up")
        ends.append(end.child)
    return ends[0], ends[1]


def one_round(subject: str, tunnel: Tunnel, near: Namespace, settings: Settings) -> Round:
    """One iperf3 run through one tunnel."""
    seconds = max(1, round(settings.seconds * 2))
    for end in tunnel.ends:
        if not end.running:
            raise BenchError(f"{subject}: {end.name} ended early: {end.complaint}")
    with Children() as children:
        client = children.start(
            near.command(
                [program("iperf3"), "-J", "-c", tunnel.far, "-t", str(seconds), "-O", str(_SETTLE_SECONDS)]
            )
        )
        before = sum(end.cpu_seconds() for end in tunnel.ends)
        report = json.loads(client.result(seconds + 20))
        used = sum(end.cpu_seconds() for end in tunnel.ends) - before
    received, sent = report["end"]["sum_received"], report["end"]["sum_sent"]
    # Processor time was taken over the first second as well, in which bytes flowed too.
    share = seconds / (seconds + _SETTLE_SECONDS)
    return {
        "rate": received["bits_per_second"],
        "cpu": used * share / received["bytes"] if received["bytes"] else 0.0,
        "resent": float(sent.get("retransmits", 0)),
    }
