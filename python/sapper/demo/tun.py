"""The demonstration's TUN interfaces: a network namespace for each worker, and a TCP connection inside.

Both workers enter a namespace of their own before their first native thread starts, so that Sapper's
TUN is made there. TLS between them runs over a socket that was made outside and keeps working. The
connection inside the tunnel is made by both; the near worker hands its end to the far one, which
sends and measures, so that only the pump's work counts.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = [
    "enter_new_namespace",
    "far_sink",
    "inner_connection",
    "near_sink",
    "packets",
    "send_inner_socket",
    "works_here",
]

NAME = "sapper-demo"
MTU = 1_280
NEAR, FAR = "10.213.0.2", "10.213.0.1"
PORT = 5001
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU, _SIOCGIFFLAGS, _SIOCSIFFLAGS = (
    0x8916,
    0x891C,
    0x8922,
    0x8913,
    0x8914,
)
_IFF_UP = 1


def works_here() -> bool:
    """Whether namespaces and TUN interfaces may be made here; a child tries it, and is gone again."""
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return False
    trial = "from sapper.demo import tun; tun.enter_new_namespace(); tun.open_plainly(tun.NEAR)"
    try:
        done = subprocess.run([sys.executable, "-c", trial], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def enter_new_namespace() -> None:
    """Moves this thread, and those that it starts, into a network namespace of their own.

    Raises:
        OSError: It may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"a network namespace cannot be made: {os.strerror(error)}")


def open_plainly(address: str) -> int:
    """A TUN as a Python program opens it: one packet a call, no offload. Gives its descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    name = NAME.encode()
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name, _IFF_TUN | _IFF_NO_PI))

    def with_address(text: str) -> bytes:
        return struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(text))

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFADDR, with_address(address))
        fcntl.ioctl(control, _SIOCSIFNETMASK, with_address("255.255.255.0"))
        fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si", name, MTU))
        flags = struct.unpack_from(
            "16sH", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH22x", name, 0))
        )[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))
    return fd


def _endpoint(address: str) -> str:
    return f"tun:{NAME}?mtu={MTU}&address={address}/24"


def far_sink() -> str:
    """The far bridge's TUN."""
    return _endpoint(FAR)


def near_sink(spec: dict[str, Any]) -> str | int:
    """The near pump's TUN: for Sapper its name, for asyncio its descriptor."""
    return _endpoint(NEAR) if spec["pump"] == "sapper" else open_plainly(NEAR)


def send_inner_socket(spec: dict[str, Any]) -> None:
    """Connects through the tunnel and hands the connection to the far worker."""
    deadline = time.monotonic() + 10
    while True:
        try:
            inner = socket.create_connection((FAR, PORT), timeout=5)
            break
        except OSError:  # the other TUN is not up yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    inner.settimeout(None)
    with inner, socket.socket(fileno=os.dup(spec["sink"])) as control:
        socket.send_fds(control, [b"s"], [inner.fileno()])


def inner_connection(spec: dict[str, Any]) -> tuple[int, int]:
    """Both ends of the connection through the tunnel: ours, and the near worker's.

    The listener takes any address: the TUN's comes when the bridge runs.
    """
    with socket.create_server(("0.0.0.0", PORT)) as listener:
        listener.settimeout(15)
        ours, _ = listener.accept()
    ours.settimeout(None)
    with socket.socket(fileno=os.dup(spec["near_end"])) as control:
        control.settimeout(15)
        _, fds, _, _ = socket.recv_fds(control, 1, 1)
    return ours.detach(), fds[0]


def packets() -> int:
    """Packets that have passed this namespace's TUN, both ways."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == NAME:
            fields = counts.split()
            return int(fields[1]) + int(fields[9])
    return 0
