"""The transparent proxy between client and service: TPROXY, REDIRECT, the client's own address."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from support import needs
from support.netns import Namespace
from support.programs import Program, run_program

LATEST = 20.0
#: Where the service is, for the client; documentation addresses, which no machine here has.
SERVICE = {4: "198.51.100.1", 6: "2001:db8::1"}
PORT = 8080
PROXY_PORT = 15001


@dataclass(frozen=True)
class Path:
    """Client, router (where the proxy runs), service."""

    client: Namespace
    router: Namespace
    service: Namespace


@pytest.fixture
def path(two_namespaces: tuple[Namespace, Namespace]) -> Iterator[Path]:
    client, router = two_namespaces
    service = Namespace(f"sapper{os.getpid()}xs", "second", "10.88.0.2", "fd88::2")
    ip = needs.program("ip")
    subprocess.run([ip, "netns", "add", service.name], check=True)
    try:
        router.ip(f"link add second type veth peer name second netns {service.name}")
        for side, host in ((router, 1), (service, 2)):
            side.ip("link set lo up")
            side.ip(f"address add 10.88.0.{host}/24 dev second")
            side.ip(f"address add fd88::{host}/64 dev second nodad")
            side.ip("link set second up")
        for version, mask in ((4, 32), (6, 128)):
            family = f"-{version}"
            service.ip(f"{family} address add {SERVICE[version]}/{mask} dev lo")
            gateways = (router.ipv4, service.ipv4, "10.88.0.1")
            if version == 6:
                gateways = (router.ipv6, service.ipv6, "fd88::1")
            client.ip(f"{family} route add default via {gateways[0]}")
            router.ip(f"{family} route add {SERVICE[version]} via {gateways[1]}")
            service.ip(f"{family} route add default via {gateways[2]}")
        router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        yield Path(client, router, service)
    finally:
        subprocess.run([ip, "netns", "delete", service.name], capture_output=True, check=False)


def rules(router: Namespace, text: str) -> None:
    done = subprocess.run(
        [needs.program("ip"), "netns", "exec", router.name, needs.program("nft"), "-f", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        needs.lacking(f"the system has no such rule: {done.stderr.strip().splitlines()[0]}")


def tproxy(router: Namespace) -> None:
    """What the kernel's documentation (networking/tproxy.rst) says."""
    for family in ("-4", "-6"):
        router.ip(f"{family} rule add fwmark 1 lookup 100")
        router.ip(f"{family} route add local default dev lo table 100")
    rules(
        router,
        f"""
        table inet lab {{
            chain pre {{
                type filter hook prerouting priority mangle;
                socket transparent 1 meta mark set 1 accept
                iifname "cable" tcp dport {PORT} tproxy to :{PROXY_PORT} meta mark set 1 accept
            }}
        }}
        """,
    )


def redirect(router: Namespace) -> None:
    rules(
        router,
        f"""
        table inet lab {{
            chain pre {{
                type nat hook prerouting priority dstnat;
                iifname "cable" tcp dport {PORT} redirect to :{PROXY_PORT}
            }}
        }}
        """,
    )


@contextlib.contextmanager
def proxy(router: Namespace, *arguments: str) -> Iterator[Program]:
    command = (
        sys.executable,
        "-m",
        "sapper.cli",
        "proxy",
        f":{PROXY_PORT}",
        "original",
        "--json",
        *arguments,
    )
    with run_program(*command, namespace=router.name) as program:
        program.wait_for(rb'"event":"listening"', LATEST)
        yield program


def exchange(path: Path, version: int) -> tuple[str, str]:
    """A client's request at the service's address: who the service sees, and who the client is."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6

    def listen() -> socket.socket:
        return socket.create_server((SERVICE[version], PORT), family=family)

    def connect() -> socket.socket:
        return socket.create_connection((SERVICE[version], PORT), timeout=LATEST)

    with path.service.call(listen) as service, path.client.call(connect) as client:
        service.settimeout(LATEST)
        client.sendall(b"ping")
        behind, seen = service.accept()
        with behind:
            behind.settimeout(LATEST)
            assert behind.recv(4) == b"ping"
            behind.sendall(b"pong")
            assert client.recv(4) == b"pong"
        assert client.recv(1) == b""
        return str(seen[0]), str(client.getsockname()[0])


@pytest.mark.needs("namespaces", "nft")
@pytest.mark.parametrize("version", [4, 6])
def test_tproxy_with_the_clients_own_address(path: Path, version: int) -> None:
    tproxy(path.router)
    with proxy(path.router, "--transparent", "--keep-source") as program:
        seen, client = exchange(path, version)
        assert seen == client
        program.process.terminate()
        assert program.wait() == 0


@pytest.mark.needs("namespaces", "nft")
@pytest.mark.parametrize("version", [4, 6])
def test_tproxy_with_the_routers_address(path: Path, version: int) -> None:
    tproxy(path.router)
    with proxy(path.router, "--transparent"):
        seen, _ = exchange(path, version)
        assert seen == ("10.88.0.1" if version == 4 else "fd88::1")


@pytest.mark.needs("namespaces", "nft")
@pytest.mark.parametrize("version", [4, 6])
def test_redirect(path: Path, version: int) -> None:
    redirect(path.router)
    with proxy(path.router):
        seen, _ = exchange(path, version)
        assert seen == ("10.88.0.1" if version == 4 else "fd88::1")


@pytest.mark.needs("namespaces", "nft")
def test_who_connects_to_the_proxy_itself_is_refused(path: Path) -> None:
    """Otherwise it would connect to itself, and again, until nothing is left."""
    with proxy(path.router) as program:

        def connect() -> None:
            # The reset may be there before connecting has returned.
            with socket.create_connection((path.router.ipv4, PROXY_PORT), timeout=LATEST) as client:
                client.recv(1)

        with pytest.raises(ConnectionResetError):
            path.client.call(connect)
        found = program.wait_for(rb'(\{[^\n]*"outcome":"upstream"[^\n]*\})\n', LATEST)
        told = json.loads(found[1])
        assert told["error"]["kind"] == "not_found"
        program.process.terminate()
        assert (
            json.loads(program.wait_for(rb'(\{[^\n]*"event":"closed"[^\n]*\})\n', LATEST)[1])["accepted"] == 1
        )
