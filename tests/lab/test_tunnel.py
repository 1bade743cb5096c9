"""Real TCP and UDP between two namespaces over TUN, bridge, TLS, bridge, TUN."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support import netns, traffic
from support.programs import Program, run_program

pytestmark = [pytest.mark.needs("namespaces", "tun"), pytest.mark.timeout(120)]

END = Path(__file__).parent / "end.py"
INNER = {"ipv4": ("10.88.0.1", "10.88.0.2"), "ipv6": ("fd88::1", "fd88::2")}
FRAMINGS = ["ip", "superframe"]


@dataclass
class Tunnel:
    """Both ends, and how to open sockets in each."""

    left: netns.Namespace
    right: netns.Namespace
    programs: tuple[Program, Program]

    def statistics(self) -> list[dict[str, Any]]:
        """Ends both and gives what they counted."""
        for program in self.programs:
            program.stdin.close()
        found = []
        for program in self.programs:
            assert program.wait() == 0, program.output
            found.append(json.loads(program.output.splitlines()[-1]))
        return found


@contextlib.contextmanager
def tunnel(
    framing: str, *, mtu: int = 1280, offload: bool = True, version: str = "TLSv1.3"
) -> Iterator[Tunnel]:
    with netns.two_namespaces() as (left, right):
        key = traffic.payload(32).hex()

        def end(place: netns.Namespace, number: int, network: str) -> Any:
            addresses = f"address={INNER['ipv4'][number]}/24&address={INNER['ipv6'][number]}/64"
            arguments = {
                "socket": network,
                "sink": f"tun:inner0?mtu={mtu}&offload={'on' if offload else 'off'}&{addresses}",
                "server_side": number == 0,
                "framing": framing,
                "key": key,
                "version": version,
            }
            return run_program(sys.executable, END, json.dumps(arguments), namespace=place.name)

        with end(left, 0, f"tcp-listen://{left.ipv4}:443") as one:
            left_is_up(left)
            with end(right, 1, f"tcp://{left.ipv4}:443") as two:
                for program in (one, two):
                    program.wait_for(b"running", seconds=30)
                yield Tunnel(left, right, (one, two))


def left_is_up(left: netns.Namespace) -> None:
    """The far end is started when the near one listens."""
    import time

    deadline = time.monotonic() + 20
    while not left.run("ss", "-Hltn", "sport = :443").strip():
        assert time.monotonic() < deadline, "nothing listens in the left namespace"
        time.sleep(0.02)  # between two looks at the kernel's table


def transfer(tunnel: Tunnel, family: str, size: int) -> None:
    """Different bytes both ways at once over one TCP connection, compared by SHA-256."""
    address = INNER[family][1]
    kind = socket.AF_INET6 if family == "ipv6" else socket.AF_INET
    with tunnel.right.call(lambda: socket.create_server((address, 0), family=kind)) as listener:
        near = tunnel.left.call(lambda: socket.create_connection(listener.getsockname()[:2], timeout=20))
        listener.settimeout(20)
        far, _ = listener.accept()
    up, down = traffic.payload(size, 1), traffic.payload(size, 2)
    with near, far:
        jobs = [
            traffic.Background(lambda: near.sendall(up)),
            traffic.Background(lambda: far.sendall(down)),
        ]
        got: dict[str, bytes] = {}
        jobs.append(traffic.Background(lambda: got.update(up=traffic.receive_exactly(far, size, 60))))
        got["down"] = traffic.receive_exactly(near, size, 60)
        for job in jobs:
            job.join(60)
    assert traffic.digest(got["up"]) == traffic.digest(up)
    assert traffic.digest(got["down"]) == traffic.digest(down)


def datagrams(tunnel: Tunnel, family: str, sizes: list[int]) -> None:
    """Datagrams that are answered with themselves; an answer that does not come is asked for again."""
    kind = socket.AF_INET6 if family == "ipv6" else socket.AF_INET

    def bound(address: str) -> socket.socket:
        made = socket.socket(kind, socket.SOCK_DGRAM)
        made.bind((address, 0))
        return made

    with (
        tunnel.left.call(lambda: bound(INNER[family][0])) as near,
        tunnel.right.call(lambda: bound(INNER[family][1])) as far,
    ):
        near.connect(far.getsockname()[:2])

        def echo() -> None:
            far.settimeout(20)
            while True:
                data, address = far.recvfrom(65536)
                if data == b"end":
                    return
                far.sendto(data, address)

        answering = traffic.Background(echo)
        near.settimeout(2)
        for n, size in enumerate(sizes):
            data = n.to_bytes(4, "big") + traffic.payload(size, n)
            for _ in range(10):
                near.send(data)
                with contextlib.suppress(TimeoutError):
                    while (answer := near.recv(65536))[:4] != data[:4]:
                        pass  # a late answer to an earlier one
                    break
            else:
                raise AssertionError(f"datagram {n} of {size} bytes was lost ten times")
            assert answer == data
        for _ in range(5):
            near.send(b"end")
        answering.join(20)


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_tcp_and_udp_arrive_whole(framing: str, family: str) -> None:
    with tunnel(framing) as made:
        transfer(made, family, 24_000_000)
        # Small, up to the MTU, and larger than it: fragments.
        datagrams(made, family, [1, 2, 500, 1000, 1200, 1228, 1300, 4000, 20000] * 4)
        one, two = made.statistics()
    for near, far in ((one, two), (two, one)):
        # What one end sealed the other opened; the interfaces say a few things of their own at the end.
        assert near["encapsulate"]["bytes"] >= 24_000_000
        assert far["decapsulate"]["bytes"] >= 24_000_000


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_without_offload(framing: str, version: str) -> None:
    with tunnel(framing, mtu=1420, offload=False, version=version) as made:
        transfer(made, "ipv4", 8_000_000)
        transfer(made, "ipv6", 8_000_000)
        datagrams(made, "ipv4", [100, 1392, 3000])


def test_many_connections_share_a_tunnel() -> None:
    with tunnel("superframe", mtu=1420) as made:
        jobs = [
            traffic.Background(functools.partial(transfer, made, family, 2_000_000))
            for family in ("ipv4", "ipv6") * 4
        ]
        for job in jobs:
            job.join(90)
