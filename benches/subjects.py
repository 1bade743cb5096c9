"""Who is measured: the command line of each pump, ours and the peers'.

Every packet pump takes the same arguments: `--tls-fd` (a connected TCP socket, on which it is the TLS
client), `--packet-fd` or `--tun`, `--key` and `--direction`. Our side is the public Python API, in
`benches/ours`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from benches.children import BenchError
from benches.figures import OURS
from benches.programs import compiled, peer_python

KEY = "5a" * 32
"""The pre-shared key of all runs, which never leave this machine."""

STREAM = "asyncio readexactly"
PROTOCOL = "asyncio Protocol"
BLOCKING = "blocking Python"
NATIVE = "C, OpenSSL and sendmmsg"
FORWARDER = "C forwarder, two threads"
WIREGUARD = "wireguard-go"

_PEER_MODULES = {
    STREAM: "benches.peers.stream_pump",
    PROTOCOL: "benches.peers.protocol_pump",
    BLOCKING: "benches.peers.blocking_pump",
}


def packet_pump(name: str) -> tuple[list[str | Path], str]:
    """The command of a packet pump and the key that it and its load use ("" for certificates)."""
    if name == OURS:
        return [*our_program("packets"), "--key", KEY], KEY
    if name == NATIVE:
        return [compiled("native_pump"), "--key", KEY], KEY
    python, has_psk = peer_python()
    key = KEY if has_psk else ""
    return [python, "-m", _PEER_MODULES[name], *(("--key", key) if key else ())], key


def peer_note() -> str | None:
    """What to say under a table whose Python peers could not use pre-shared keys."""
    python, has_psk = peer_python()
    if has_psk:
        return None
    return (
        "The Python peers ran with certificates (ECDHE-ECDSA-AES256-GCM-SHA384; a record costs the same): "
        f"{python} has no pre-shared keys, which CPython's ssl module has from 3.13 on."
    )


def our_program(name: str) -> list[str | Path]:
    """The command of one of our own programs, in the interpreter that has the package."""
    if not has_sapper():
        raise BenchError("sapper is not installed in this interpreter (make build)")
    return [sys.executable, "-m", f"benches.ours.{name}"]


def has_sapper() -> bool:
    """Whether the built package is there."""
    try:
        return importlib.util.find_spec("sapper.tls.bridge") is not None
    except ImportError:
        return False
