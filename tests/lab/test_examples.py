"""The two programs in examples/ do what they say."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from support import netns, traffic
from support.needs import ROOT
from support.programs import run_program

EXAMPLES = ROOT / "examples"


def test_cdtunnel_without_a_right() -> None:
    with run_program(sys.executable, EXAMPLES / "cdtunnel.py") as program:
        assert program.wait(60) == 0, program.output
    assert b"the device answered 100 of 100 packets" in program.output


@pytest.mark.needs("namespaces", "tun", "ping")
def test_cdtunnel_with_a_tun() -> None:
    with (
        netns.two_namespaces() as (left, _),
        run_program(
            sys.executable, EXAMPLES / "cdtunnel.py", "--tun", "device0", namespace=left.name
        ) as program,
    ):
        program.wait_for(b"ping [0-9a-f:]+", seconds=30)
        address = program.output.split(b"ping ")[1].split()[0].decode()
        assert ", 0% packet loss" in left.run("ping", "-c3", "-i0.2", "-W5", address)


@pytest.mark.needs("namespaces", "tun")
def test_point_to_point(tmp_path: Path) -> None:
    assert len((EXAMPLES / "point_to_point.py").read_text().splitlines()) < 40
    key = tmp_path / "key"
    key.write_bytes(traffic.payload(32))
    script = EXAMPLES / "point_to_point.py"
    with (
        netns.two_namespaces() as (left, right),
        run_program(
            *(sys.executable, script, "listen", left.ipv4, "10.9.0.1/30", key), namespace=left.name
        ) as one,
    ):
        one.wait_for(b"waiting", seconds=30)
        with run_program(
            *(sys.executable, script, "connect", left.ipv4, "10.9.0.2/30", key), namespace=right.name
        ) as two:
            for program in (one, two):
                program.wait_for(b"joined", seconds=30)
            data = traffic.payload(5_000_000)
            with left.call(lambda: socket.create_server(("10.9.0.1", 0))) as listener:
                port = listener.getsockname()[1]
                near = right.call(lambda: socket.create_connection(("10.9.0.1", port), timeout=20))
                listener.settimeout(20)
                far, _ = listener.accept()
            with near, far:
                job = traffic.Background(lambda: near.sendall(data))
                assert traffic.digest(traffic.receive_exactly(far, len(data))) == traffic.digest(data)
                job.join()
