"""Tells a service manager how we are (sd_notify(3)): one datagram to the socket that it names.

Not here: sockets that it hands over; those are ``_native.inherited_sockets``.
"""

from __future__ import annotations

import os
import socket
import time

__all__ = ["notify", "ready", "reloading", "stopping"]


def notify(*lines: str) -> bool:
    """Sends lines such as ``"READY=1"``. Whether there is a manager that heard them."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name.startswith(("/", "@")):
        return False
    address = "\0" + name[1:] if name.startswith("@") else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.setblocking(False)  # a manager that does not read must not hold the service
            to.sendto("\n".join(lines).encode(), address)
    except OSError:
        return False
    return True


def ready(text: str) -> bool:
    """The service serves."""
    return notify("READY=1", f"STATUS={text}")


def reloading() -> bool:
    """Options are being read again; :func:`ready` says when that is done."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def stopping(text: str) -> bool:
    """The service ends."""
    return notify("STOPPING=1", f"STATUS={text}")
