"""The fixtures themselves: what they promise to the other tests."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from support import needs, netns, programs
from support.certs import Certificates


async def test_async_tests_run_on_the_loop_that_was_asked_for(any_loop: str) -> None:
    assert type(asyncio.get_running_loop()).__module__.split(".")[0] == any_loop


def test_certificates_are_what_they_are_called(certs: Certificates) -> None:
    def verify(which: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                needs.program("openssl"),
                "verify",
                *("-CAfile", certs.ca.cert_path),
                *("-verify_hostname", certs.name),
                getattr(certs, which).cert_path,
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    assert verify("server").returncode == 0
    assert verify("rsa_server").returncode == 0
    for which, words in {
        "expired": "certificate has expired",
        "not_yet": "certificate is not yet valid",
        "wrong_name": "hostname mismatch",
        "untrusted": "unable to get local issuer certificate",
        "self_signed": "self-signed certificate",
    }.items():
        refused = verify(which)
        assert refused.returncode != 0
        assert words in refused.stderr


@pytest.mark.needs("socat")
def test_a_program_is_waited_for_and_ended(
    free_port: Callable[..., int], run_program: Callable[..., Any]
) -> None:
    port = free_port()
    with run_program("socat", f"tcp-listen:{port},bind=127.0.0.1", "exec:cat", port=port) as program:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"once")
            assert connection.recv(4) == b"once"
        pid = program.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not programs.listening(port)


@pytest.mark.needs("namespaces", "ping")
def test_namespaces_see_each_other_and_go_away() -> None:
    with netns.two_namespaces() as (left, right):
        assert ", 0% packet loss" in left.run("ping", "-c1", "-W2", right.ipv4)
        assert ", 0% packet loss" in right.run("ping", "-c1", "-W2", left.ipv6)
        listener = right.call(lambda: socket.create_server((right.ipv4, 0)))
        with listener:
            connection = left.call(lambda: socket.create_connection(listener.getsockname(), timeout=5))
            connection.close()
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert left.name not in names
    assert right.name not in names


def test_what_is_lacking_is_a_failure_in_ci_and_a_skip_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "IN_CI", True)
    with pytest.raises(pytest.fail.Exception, match="no-such-program is not installed"):
        needs.check("no-such-program")
    with pytest.raises(pytest.skip.Exception):
        needs.check("python9.9")
    monkeypatch.setattr(needs, "IN_CI", False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not installed"):
        needs.check("no-such-program")


def test_tests_side_by_side_look_for_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = programs.own_ports() if "PYTEST_XDIST_WORKER" not in os.environ else None
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    shares = []
    for worker in ("gw0", "gw1", "gw2"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        shares.append(set(programs.own_ports()))
        assert programs.free_port() in shares[-1]
    assert all(len(share) > 1_000 for share in shares)
    assert not shares[0] & shares[1]
    assert not shares[1] & shares[2]
    assert whole is None or set().union(*shares) <= set(whole)
