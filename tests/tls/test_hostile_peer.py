"""A peer that passed the TLS handshake and then attacks: typed errors, in time, nothing left behind."""

from __future__ import annotations

import fcntl
import re
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from sapper.errors import (
    CloseDeadline,
    ConnectionLost,
    HandshakeDeadline,
    IdleDeadline,
    IncompatiblePeer,
    RemoteProtocolError,
    SapperError,
    TlsError,
)
from sapper.tls import Credentials, TlsConfig, create_bridge
from support.certs import Certificates
from support.enemies import Enemy
from support.hearing import LATEST, SOON, Hearing, drain, failure
from support.traffic import Background

pytestmark = pytest.mark.usefixtures("leak_check")


def _attack(
    certs: Certificates,
    attack: Callable[[Enemy, socket.socket], None],
    *,
    kind: int = socket.SOCK_STREAM,
    **options: Any,
) -> tuple[SapperError | None, bytes]:
    """A client bridge whose server attacks after the handshake: its error, and what reached the sink."""
    near, far = socket.socketpair()
    sink, end = socket.socketpair(socket.AF_UNIX, kind)
    hearing = Hearing()

    def peer() -> None:
        enemy = Enemy(certs, far)
        enemy.handshake()
        with suppress(BrokenPipeError, ConnectionResetError):
            attack(enemy, far)
        drain(far)

    bridge = create_bridge(
        socket=near,
        sink=sink,
        credentials=Credentials.none(roots=certs.ca.cert),
        server_hostname=certs.name,
        **{"close_timeout": SOON, **options},
        **hearing.options(),
    )
    with far, end:
        enemy = Background(peer)
        error = failure(bridge, hearing, "handshake")
        enemy.join()
        end.setblocking(False)
        arrived = b""
        with suppress(BlockingIOError, ConnectionResetError):
            while chunk := end.recv(65_536):
                arrived += chunk
    return error, arrived


def _ipv6(size: int, next_header: int = 17) -> bytes:
    return struct.pack(">IHBB", 0x60000000, size, next_header, 64) + bytes(15) + b"\x01" + bytes(15) + b"\x02"


HELLO = b"SAPPERSF" + struct.pack(">BBHI", 1, 1, 7, 65_535)


def _superframe(virtio: bytes, packet: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", length if length is not None else len(virtio) + len(packet)) + virtio + packet


def _virtio(
    flags: int = 0, gso: int = 0, header: int = 0, size: int = 0, start: int = 0, offset: int = 0
) -> bytes:
    return struct.pack("<BBHHHH", flags, gso, header, size, start, offset)


TCP6 = _ipv6(20 + 3000, 6) + struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 9, 0, 0) + bytes(3000)

LYING_PACKETS: dict[str, tuple[str, bytes]] = {
    "u16 of nothing": ("u16", b"\x00\x00"),
    "u16 too long": ("u16", b"\xff\xff" + bytes(100)),
    "u32 absurd": ("u32", b"\xff\xff\xff\xff" + bytes(100)),
    "u32 negative": ("u32", b"\x80\x00\x00\x00"),
    "u32 of nothing": ("u32", bytes(4)),
    "ip of no version": ("ip", bytes(40)),
    "ipv4 where ipv6 is": ("ipv6", b"\x45\x00\x00\x14" + bytes(16)),
    "ipv6 where ipv4 is": ("ipv4", _ipv6(0)),
    "ipv4 shorter than its header": ("ipv4", b"\x45\x00\x00\x13" + bytes(16)),
    "ipv4 with a short header": ("ipv4", b"\x44\x00\x00\x14" + bytes(16)),
    "ipv6 too long": ("ipv6", _ipv6(65_535) + bytes(100)),
    "superframe shorter than its header": ("superframe", HELLO + _superframe(b"", bytes(40), 9)),
    "superframe absurd": ("superframe", HELLO + _superframe(_virtio(), bytes(40), 0xFFFFFFFF)),
    "superframe of no packet": ("superframe", HELLO + _superframe(_virtio(), b"")),
    "superframe with unknown flags": ("superframe", HELLO + _superframe(_virtio(flags=0x80), _ipv6(0, 59))),
    "superframe with an unknown type": ("superframe", HELLO + _superframe(_virtio(gso=0x7F, size=1), TCP6)),
    "tcp over ipv4 in ipv6": ("superframe", HELLO + _superframe(_virtio(1, 1, 60, 1400, 40, 16), TCP6)),
    "segments of no bytes": ("superframe", HELLO + _superframe(_virtio(1, 4, 60, 0, 40, 16), TCP6)),
    "headers beyond the packet": (
        "superframe",
        HELLO + _superframe(_virtio(1, 4, 65_535, 1400, 40, 16), TCP6),
    ),
    "a checksum beyond the packet": (
        "superframe",
        HELLO + _superframe(_virtio(1, 4, 60, 1400, 65_535, 65_535), TCP6),
    ),
    "a checksum in the payload": ("superframe", HELLO + _superframe(_virtio(1, 4, 60, 1400, 40, 500), TCP6)),
    "udp segments of tcp": ("superframe", HELLO + _superframe(_virtio(1, 5, 60, 1400, 40, 16), TCP6)),
    "an ip length that differs": ("superframe", HELLO + _superframe(_virtio(), _ipv6(1000, 59) + bytes(10))),
}


@pytest.mark.parametrize("case", LYING_PACKETS)
def test_a_packet_that_lies_ends_the_bridge_and_reaches_nobody(case: str, certs: Certificates) -> None:
    framing, data = LYING_PACKETS[case]
    error, arrived = _attack(
        certs,
        lambda enemy, far: far.sendall(enemy.records(data)),
        kind=socket.SOCK_DGRAM,
        framing=framing,
        max_packet=1500 if framing != "superframe" else None,
    )
    assert type(error) is RemoteProtocolError, repr(error)
    assert (error.phase, error.direction) == ("transfer", "decapsulate"), repr(error.context)
    assert arrived == b""


@pytest.mark.parametrize(
    "hello",
    [
        b"GET / HTTP/1.1\r\n",
        b"SAPPERSF" + struct.pack(">BBHI", 9, 8, 7, 65_535),
        b"SAPPERSF" + struct.pack(">BBHI", 1, 2, 7, 65_535),
        b"SAPPERSF" + struct.pack(">BBHI", 1, 1, 7, 0),
        b"SAPPERSF" + struct.pack(">BBHI", 1, 1, 2, 65_535),
    ],
    ids=["http", "newer", "upside down", "takes nothing", "no checksums"],
)
def test_a_superframe_hello_that_is_none(hello: bytes, certs: Certificates) -> None:
    error, _ = _attack(
        certs,
        lambda enemy, far: far.sendall(enemy.records(hello)),
        kind=socket.SOCK_DGRAM,
        framing="superframe",
    )
    assert type(error) is IncompatiblePeer, repr(error)
    assert error.phase == "handshake"


def test_a_superframe_hello_that_never_comes(certs: Certificates) -> None:
    error, _ = _attack(
        certs,
        lambda enemy, far: None,
        kind=socket.SOCK_DGRAM,
        framing="superframe",
        handshake_timeout=0.5,
    )
    assert type(error) is HandshakeDeadline, repr(error)


def _changed_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_records_that_were_changed_cut_or_never_encrypted(certs: Certificates) -> None:
    def ends_in_the_middle(enemy: Enemy, far: socket.socket) -> None:
        far.sendall(enemy.records(b"whole") + enemy.records(b"never whole")[:-3])
        far.shutdown(socket.SHUT_WR)

    def ends_without_goodbye(enemy: Enemy, far: socket.socket) -> None:
        far.sendall(enemy.records(b"whole"))
        far.shutdown(socket.SHUT_WR)

    cases: list[tuple[Callable[[Enemy, socket.socket], None], type[SapperError], str | None, bytes]] = [
        (
            lambda e, far: far.sendall(e.records(b"whole") + _changed_last(e.records(b"x"))),
            TlsError,
            "bad_record_mac",
            b"whole",
        ),
        (ends_in_the_middle, ConnectionLost, "truncated", b"whole"),
        (ends_without_goodbye, ConnectionLost, "truncated", b"whole"),
        (lambda e, far: far.sendall(b"\x17\x03\x03\xff\xff" + bytes(70_000)), RemoteProtocolError, None, b""),
        (lambda e, far: far.sendall(b"HTTP/1.1 200 OK\r\n\r\n"), RemoteProtocolError, None, b""),
        (lambda e, far: far.sendall(b"\x16\x03\x03\x00\x04\x01\x00\x00\x00"), RemoteProtocolError, None, b""),
    ]
    for number, (attack, kind, reason, whole) in enumerate(cases):
        error, arrived = _attack(certs, attack)
        assert type(error) is kind, (number, repr(error))
        assert (error.phase, error.direction, error.reason) == ("transfer", "decapsulate", reason), (
            number,
            error.context,
        )
        assert arrived in (whole, b""), number


def test_a_packet_that_ends_in_the_middle(certs: Certificates) -> None:
    def attack(enemy: Enemy, far: socket.socket) -> None:
        far.sendall(enemy.records(b"\x00\x64" + bytes(10)) + enemy.goodbye())
        far.shutdown(socket.SHUT_WR)

    error, arrived = _attack(certs, attack, kind=socket.SOCK_DGRAM, framing="u16")
    assert isinstance(error, (RemoteProtocolError, ConnectionLost)), repr(error)
    assert (error.phase, error.direction, error.reason) == ("transfer", "decapsulate", "truncated")
    assert arrived == b""


def test_data_where_only_ours_may_flow(certs: Certificates) -> None:
    error, arrived = _attack(
        certs, lambda enemy, far: far.sendall(enemy.records(b"no")), direction="encrypt-only"
    )
    assert type(error) is RemoteProtocolError, repr(error)
    assert error.phase == "transfer"
    assert arrived == b""


def test_an_orderly_end_is_no_error(certs: Certificates) -> None:
    def leave(enemy: Enemy, far: socket.socket) -> None:
        far.sendall(enemy.records(b"all of it") + enemy.goodbye())
        far.shutdown(socket.SHUT_WR)

    error, arrived = _attack(certs, leave, direction="decrypt-only")
    assert error is None, repr(error)
    assert arrived == b"all of it"


def test_a_peer_that_says_nothing_more_meets_the_idle_deadline(certs: Certificates) -> None:
    error, _ = _attack(certs, lambda enemy, far: None, idle_timeout=SOON)
    assert type(error) is IdleDeadline, repr(error)
    assert error.phase == "transfer"


@pytest.mark.parametrize("drain", [0.0, SOON])
def test_a_peer_that_never_reads_holds_nobody(drain: float, certs: Certificates) -> None:
    near, far = socket.socketpair()
    sink, end = socket.socketpair()
    hearing = Hearing()
    with far, end:
        enemy = Enemy(certs, far)
        shaking = Background(enemy.handshake)
        bridge = create_bridge(
            socket=near,
            sink=sink,
            credentials=Credentials.none(roots=certs.ca.cert),
            server_hostname=certs.name,
            **hearing.options(),
        )
        bridge.handshake_sync()
        shaking.join()
        bridge.start()
        end.settimeout(0.01)
        until = time.monotonic() + LATEST
        while not bridge.stats().encapsulate.backpressure:
            assert time.monotonic() < until
            with suppress(TimeoutError):
                end.send(bytes(65_536))
        bridge.stop(drain=drain)
        assert hearing.closed.wait(LATEST)
    if not drain:
        assert hearing.errors == [], "whoever stops at once wants nothing delivered"
        return
    (error,) = hearing.errors
    assert type(error) is CloseDeadline, repr(error)
    assert error.phase == "close"
    assert re.search(r"at least \d+ bytes are lost", str(error))
    assert bridge.error is error


def test_a_client_that_says_all_at_once_and_goes_is_heard(certs: Certificates) -> None:
    """It reads no more, so the tickets that follow a handshake of TLS 1.3 cannot leave: no loss, no error."""
    near, far = socket.socketpair()
    sink, end = socket.socketpair()
    hearing = Hearing()
    server = Credentials.certificate(certs.server.cert, certs.server.key)
    with (
        far,
        end,
        create_bridge(
            socket=near, sink=sink, credentials=server, server_side=True, **hearing.options()
        ) as bridge,
    ):
        bridge.start()
        context = ssl.create_default_context(cadata=certs.ca.cert.decode())
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(incoming, outgoing, server_hostname=certs.name)
        far.settimeout(LATEST)
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
        far.sendall(outgoing.read())
        while True:
            incoming.write(far.recv(65_536))
            with suppress(ssl.SSLWantReadError):
                client.do_handshake()
                break
        far.shutdown(socket.SHUT_RD)
        client.write(b"all that there is")
        with suppress(ssl.SSLWantReadError):
            client.unwrap()
        far.sendall(outgoing.read())
        far.close()
        assert drain(end) == b"all that there is"
        end.close()
        bridge.wait_closed_sync(LATEST)
    assert not hearing.errors


def test_goodbyes_that_cross_are_no_error(certs: Certificates) -> None:
    """The peer has said its goodbye and closed, unheard yet, when we say ours: nothing is lost."""
    hearing = Hearing()
    sink, end = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, end:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        far.settimeout(LATEST)
        with (
            far,
            create_bridge(
                socket=near,
                sink=sink,
                credentials=Credentials.none(roots=certs.ca.cert),
                server_hostname=certs.name,
                **hearing.options(),
            ) as bridge,
        ):
            enemy = Enemy(certs, far)
            shaking = Background(enemy.handshake)
            bridge.handshake_sync()
            shaking.join()
            bridge.start()
            bridge.pause("decapsulate")
            far.sendall(enemy.records(b"last words") + enemy.goodbye())
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()
            calls = bridge.stats().transport.send_calls
            end.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + LATEST
            while bridge.stats().transport.send_calls == calls:
                assert time.monotonic() < deadline, "it says no goodbye"
                time.sleep(0.01)
            bridge.resume("decapsulate")
            assert drain(end) == b"last words"
            bridge.wait_closed_sync(LATEST)
    assert not hearing.errors


def test_why_a_peer_went_is_heard_by_who_only_writes(certs: Certificates) -> None:
    """The refusal has come, unheard, when a write finds the connection closed: the refusal is the error."""
    near, far = socket.socketpair()
    sink, end = socket.socketpair()
    refused, hearing, paused = Hearing(), Hearing(), threading.Event()
    trusting = Credentials.none(roots=certs.ca.cert)
    server = Credentials.certificate(certs.server.cert, certs.server.key)
    with (
        end,
        create_bridge(
            socket=near, sink=sink, credentials=trusting, server_hostname=certs.name, **hearing.options()
        ) as bridge,
        create_bridge(
            socket=far,
            sink="null:",
            credentials=server,
            server_side=True,
            peer_policy=lambda peer: not paused.wait(LATEST),
            **refused.options(),
        ) as door,
    ):
        door.start()
        bridge.handshake_sync()
        bridge.start()
        bridge.pause("decapsulate")
        paused.set()
        assert refused.closed.wait(LATEST)
        end.sendall(b"who hears me?")
        assert hearing.closed.wait(LATEST)
    [error] = hearing.errors
    assert (error.kind, error.context.alert) == ("credentials_rejected", 49)


def test_a_refusal_is_heard_though_our_flight_cannot_leave(certs: Certificates) -> None:
    """The client reads no more and refuses: its alert is the error, not the write that nobody takes."""
    near, far = socket.socketpair()
    sink, end = socket.socketpair()
    hearing = Hearing()
    server = TlsConfig(
        credentials=Credentials.certificate(certs.server.cert, certs.server.key), max_version="TLSv1.2"
    )
    with (
        far,
        end,
        create_bridge(
            socket=near, sink=sink, credentials=server, server_side=True, **hearing.options()
        ) as bridge,
    ):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=certs.name)
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
        far.shutdown(socket.SHUT_RD)
        far.sendall(outgoing.read())
        bridge.start()
        deadline = time.monotonic() + LATEST
        while struct.unpack("i", fcntl.ioctl(far, termios.TIOCOUTQ, bytes(4)))[0]:
            assert time.monotonic() < deadline, "it does not read our hello"
            time.sleep(0.001)
        far.sendall(bytes.fromhex("15 0303 0002 02 30"))  # fatal: unknown_ca
        assert hearing.closed.wait(LATEST)
    [error] = hearing.errors
    assert error.context.alert == 48
