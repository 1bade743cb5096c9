"""The far end of the stream row, the same for every subject: a native bridge to load, a measure or an echo.

    stream_far receive|send|echo --listen-fd N --certificate FILE --private-key FILE

The mode is that of the subject: for `receive` this end sends.
"""

from __future__ import annotations

import argparse
import socket
import threading

from sapper import tls
from sapper.errors import SapperError
from sapper.testing import Load

_BLOCK = 16_384


def main() -> None:
    """Serves one connection and ends with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("receive", "send", "echo"))
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--private-key", required=True)
    given = parser.parse_args()
    with socket.socket(fileno=given.listen_fd) as listener:
        accepted, _ = listener.accept()
    sink, ours = socket.socketpair()
    bridge = tls.create_bridge(
        socket=accepted,
        sink=sink,
        server_side=True,
        credentials=tls.Credentials.certificate(given.certificate, given.private_key),
    )
    bridge.start()
    load: Load | None = None
    match given.mode:
        case "receive":
            load = Load.source(ours.fileno(), "block", _BLOCK)
        case "send":
            threading.Thread(target=_swallow, args=(ours,), daemon=True).start()
        case _:
            threading.Thread(target=_echo, args=(ours,), daemon=True).start()
    try:
        bridge.wait_closed_sync()
    except SapperError:
        pass  # the subject leaves without a goodbye
    finally:
        if load is not None:
            load.stop()


def _swallow(end: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    while end.recv_into(buffer):
        pass


def _echo(end: socket.socket) -> None:
    while data := end.recv(65_536):
        end.sendall(data)


if __name__ == "__main__":
    main()
