"""The programs in examples/ do what they say."""

from __future__ import annotations

import socket
import sys
import urllib.request
from pathlib import Path

import pytest

from sapper.testing import throwaway_certificates
from support import netns, traffic
from support.needs import ROOT
from support.programs import run_program

EXAMPLES = ROOT / "examples"


def test_cdtunnel_without_a_right() -> None:
    with run_program(sys.executable, EXAMPLES / "cdtunnel.py") as program:
        assert program.wait(60) == 0, program.output
    assert b"the device answered 100 of 100 packets" in program.output


def test_a_tunnel_with_both_ends() -> None:
    with run_program(sys.executable, EXAMPLES / "tunnel.py") as program:
        assert program.wait(60) == 0, program.output
    said = program.output.decode().splitlines()
    assert [line.split(" 127.")[0] for line in said[1:]] == ["the visitor reads: hello", "somebody from"]
    assert said[0].startswith("alice has port ")


def test_a_tunnel_in_two_programs(tmp_path: Path) -> None:
    made = throwaway_certificates("localhost")
    files = {"authority": made.authority, "chain": made.server[0], "key": made.server[1]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    script = EXAMPLES / "tunnel.py"
    with run_program(
        sys.executable, script, "serve", "localhost", "0", tmp_path / "chain", tmp_path / "key"
    ) as server:
        server.wait_for(b"clients come to port [0-9]+\n", seconds=30)
        port = server.output.split()[-1].decode()
        trusted = {"SSL_CERT_FILE": str(tmp_path / "authority"), "TOKEN": "swordfish"}
        with run_program(sys.executable, script, "expose", "localhost", port, env=trusted) as client:
            client.wait_for(b"http://localhost:[0-9]+\n", seconds=30)
            with urllib.request.urlopen(client.output.decode().strip(), timeout=20) as page:
                assert page.read() == b"hello\n"
            server.wait_for(b"was with alice", seconds=30)


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
