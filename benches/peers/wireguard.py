"""Peer: wireguard-go, configured through its own socket, so that no `wg` program is needed."""

from __future__ import annotations

import base64
import socket
from dataclasses import dataclass
from pathlib import Path

from benches.children import BenchError, Child, Children, run, wait_until
from benches.namespaces import Namespace
from benches.programs import program, wireguard

_SOCKETS = Path("/var/run/wireguard")
_KEY_BYTES = 32


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair in the hex that the configuration protocol takes."""

    private: str
    public: str


def make_keys() -> KeyPair:
    """A fresh key pair; in DER the raw key is what comes last."""
    pem = run([program("openssl"), "genpkey", "-algorithm", "X25519"])
    key = _from_pem(pem)
    public = run(["sh", "-c", 'printf %s "$1" | "$2" pkey -pubout', "sh", pem, str(program("openssl"))])
    return KeyPair(key[-_KEY_BYTES:].hex(), _from_pem(public)[-_KEY_BYTES:].hex())


def _from_pem(text: str) -> bytes:
    return base64.b64decode("".join(line for line in text.splitlines() if not line.startswith("-")))


@dataclass(frozen=True)
class Interface:
    """One end: a running wireguard-go and what it is called."""

    name: str
    child: Child

    def configure(self, keys: KeyPair, peer: KeyPair, port: int, endpoint: str, allowed: str) -> None:
        """Sets the keys and the one peer."""
        lines = (
            f"set=1\nprivate_key={keys.private}\nlisten_port={port}\n"
            f"public_key={peer.public}\nendpoint={endpoint}\nallowed_ip={allowed}\n\n"
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(5)
            control.connect(str(_SOCKETS / f"{self.name}.sock"))
            control.sendall(lines.encode())
            answer = control.recv(4096).decode()
        if "errno=0" not in answer:
            raise BenchError(f"wireguard-go refused its configuration: {answer.strip()}")


def start(children: Children, namespace: Namespace, name: str) -> Interface:
    """Starts one end. All namespaces share the directory of the sockets: the name must be unique."""
    child = children.start(
        namespace.command([wireguard(), "-f", name]),
        environment={"WG_PROCESS_FOREGROUND": "1", "LOG_LEVEL": "error"},
    )
    wait_until(lambda: (_SOCKETS / f"{name}.sock").exists() or not child.running, "wireguard-go's socket")
    if not child.running:
        raise BenchError(f"wireguard-go ended early: {child.complaint}")
    return Interface(name, child)
