"""What an enemy can send and a careless caller can give: each a typed error, in time, told once.

The peers here are plain sockets that a test fills by hand, CPython's ``ssl`` with a socket of ours between it
and the bridge, or a second bridge behind a relay that cuts or changes bytes. Not here: whose descriptors they
are afterwards (``test_ownership.py``), and single parsers (the Rust tests and the fuzz targets).
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from sapper import tls
from sapper.errors import (
    AuthenticationError,
    CertificateError,
    ConfigError,
    ConnectionLost,
    CredentialsRejected,
    HandshakeDeadline,
    IncompatiblePeer,
    PolicyDenied,
    RemoteProtocolError,
    SapperError,
)
from sapper.tls import Credentials, TlsConfig, create_bridge
from support import leaks
from support.certs import Certificates, Identity
from support.hearing import FROM_A_PEER, KEY, LATEST, PSK, SOON, Hearing, drain, failure, role
from support.traffic import Background, payload

pytestmark = pytest.mark.usefixtures("leak_check")


# -- bytes that are no handshake ----------------------------------------

HTTP = b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n"
SERVER_GARBAGE: dict[str, tuple[bytes, type[SapperError], str | None, str]] = {
    "http": (HTTP, IncompatiblePeer, "not_tls", "HTTP"),
    "ssh": (b"SSH-2.0-OpenSSH_9.6\r\n", IncompatiblePeer, "not_tls", "SSH"),
    "smtp": (b"220 mail.test ESMTP ready\r\n", IncompatiblePeer, "not_tls", ""),
    "zeroes": (bytes(64), IncompatiblePeer, "not_tls", ""),
    "nothing": (b"", ConnectionLost, "truncated", ""),
    "half a header": (b"\x16\x03", ConnectionLost, "truncated", ""),
    "a truncated record": (b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76\x03\x03", ConnectionLost, "truncated", ""),
    "an absurd record": (b"\x16\x03\x03\xff\xff" + bytes(65_535), RemoteProtocolError, None, ""),
    "no handshake message": (b"\x16\x03\x03\x00\x08\xfe\x00\x00\x04abcd", IncompatiblePeer, "not_tls", ""),
    "application data": (b"\x17\x03\x03\x00\x05hello", IncompatiblePeer, "not_tls", ""),
    "an alert": (b"\x15\x03\x03\x00\x02\x02\x46", IncompatiblePeer, None, "protocol_version"),
    "a client's hello": (
        b"\x16\x03\x01\x00\x40\x01\x00\x00\x3c",
        IncompatiblePeer,
        "both_clients",
        "be the server",
    ),
    "a close_notify": (b"\x15\x03\x03\x00\x02\x01\x00", ConnectionLost, "truncated", ""),
}
CLIENT_GARBAGE: dict[str, tuple[bytes, type[SapperError], str | None, str]] = {
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", IncompatiblePeer, "not_tls", "HTTP"),
    "ssh": (b"SSH-2.0-OpenSSH_9.6\r\n", IncompatiblePeer, "not_tls", "SSH"),
    "zeroes": (bytes(64), IncompatiblePeer, "not_tls", ""),
    "a garbage hello": (
        b"\x16\x03\x01\x00\x40\x01\x00\x00\x3c" + payload(60, seed=3),
        RemoteProtocolError,
        None,
        "",
    ),
    "a hello that lies about its length": (
        b"\x16\x03\x01\x00\x08\x01\xff\xff\xff\x03\x03ab" + b"\x16\x03\x01\x40\x00" + bytes(16_384),
        RemoteProtocolError,
        None,
        "",
    ),
    "an absurd record": (b"\x16\x03\x01\xff\xff" + bytes(65_535), IncompatiblePeer, "not_tls", ""),
    "an alert": (b"\x15\x03\x03\x00\x02\x02\x28", IncompatiblePeer, "not_tls", "handshake_failure (40)"),
    "nothing": (b"", ConnectionLost, "truncated", ""),
    "half a hello": (b"\x16\x03\x01\x00\x40\x01\x00\x00\x3c\x03\x03", ConnectionLost, "truncated", ""),
    "application data": (b"\x17\x03\x03\x00\x05hello", IncompatiblePeer, "not_tls", ""),
}


def _meet_garbage(
    options: dict[str, Any], case: tuple[bytes, type[SapperError], str | None, str], way: str
) -> bytes:
    data, kind, reason, words = case
    near, far = socket.socketpair()
    hearing = Hearing()
    sent: list[bytes] = []

    def peer() -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            far.sendall(data)
            far.shutdown(socket.SHUT_WR)
        sent.append(drain(far))

    bridge = create_bridge(socket=near, sink="null:", **options, **hearing.options())
    with far:
        enemy = Background(peer)
        error = failure(bridge, hearing, way)
        enemy.join()
    assert error is not None
    assert type(error) is kind, repr(error)
    assert (error.phase, error.reason) == ("handshake", reason), (error.phase, error.reason, str(error))
    assert words in str(error)
    return sent[0]


@pytest.mark.parametrize("case", SERVER_GARBAGE)
def test_a_server_that_is_none(case: str, engine: str, way: str, certs: Certificates) -> None:
    _meet_garbage(role(certs, engine, False), SERVER_GARBAGE[case], way)


@pytest.mark.parametrize("case", CLIENT_GARBAGE)
def test_a_client_that_is_none(case: str, engine: str, way: str, certs: Certificates) -> None:
    answer = _meet_garbage(role(certs, engine, True), CLIENT_GARBAGE[case], way)
    if case == "a garbage hello":
        assert answer[:1] == b"\x15", "the peer gets an alert"


def test_a_message_without_end_is_not_collected_for_ever(engine: str, certs: Certificates) -> None:
    near, far = socket.socketpair()
    hearing = Hearing()
    sent: list[int] = []

    def peer() -> None:
        far.settimeout(LATEST)
        total = 0
        with suppress(BrokenPipeError, ConnectionResetError):
            far.sendall(b"\x16\x03\x01\x00\x04\x01\xff\xff\xff")
            while total < 64 * 1024 * 1024:
                total += far.send(b"\x16\x03\x01\x40\x00" + bytes(16_384))
        sent.append(total)

    bridge = create_bridge(socket=near, sink="null:", **role(certs, engine, True), **hearing.options())
    with far:
        enemy = Background(peer)
        error = failure(bridge, hearing, "start")
        enemy.join()
    assert isinstance(error, RemoteProtocolError), repr(error)
    assert sent[0] < 4 * 1024 * 1024


# -- peers that never finish ----------------------------------------


@pytest.mark.parametrize("is_server", [False, True], ids=["client", "server"])
@pytest.mark.parametrize("said", [0, 1, 7], ids=["silent", "byte", "record"])
def test_a_peer_that_never_finishes_its_handshake(
    said: int, is_server: bool, engine: str, way: str, certs: Certificates
) -> None:
    near, far = socket.socketpair()
    hearing = Hearing()
    with far:
        far.sendall(
            b"\x16\x03\x03\x00\x7a"[:said] + (b"\x01\x00" if is_server else b"\x02\x00")[: max(0, said - 5)]
        )
        bridge = create_bridge(
            socket=near,
            sink="null:",
            handshake_timeout=SOON,
            **role(certs, engine, is_server),
            **hearing.options(),
        )
        error = failure(bridge, hearing, way)
    assert type(error) is HandshakeDeadline, repr(error)
    assert error.phase == "handshake"


def test_a_peer_that_drips_does_not_move_the_deadline(engine: str, certs: Certificates) -> None:
    near, far = socket.socketpair()
    hearing = Hearing()

    def peer() -> None:
        far.settimeout(0.01)
        data = iter(b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03" + bytes(16_373))
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                far.sendall(bytes([next(data)]))
                with suppress(TimeoutError):
                    if not far.recv(4096):
                        return

    bridge = create_bridge(
        socket=near,
        sink="null:",
        handshake_timeout=SOON,
        **role(certs, engine, True),
        **hearing.options(),
    )
    with far:
        enemy = Background(peer)
        error = failure(bridge, hearing, "start")
        enemy.join()
    assert type(error) is HandshakeDeadline, repr(error)


# -- a handshake that is cut, or changed, at any byte ----------------------------------------


class Relay:
    """Passes bytes between two bridges; cuts or changes what flows from the honest one."""

    def __init__(self, attacked: socket.socket, honest: socket.socket) -> None:
        self.attacked, self.honest = attacked, honest
        self.passed = 0

    def run(self, *, cut: int | None = None, flip: int | None = None) -> None:
        ends = {self.attacked: self.honest, self.honest: self.attacked}
        until = time.monotonic() + LATEST
        with suppress(BrokenPipeError, ConnectionResetError):
            while ends and time.monotonic() < until:
                for source in select.select(list(ends), [], [], 1.0)[0]:
                    data = source.recv(65_536)
                    target = self.attacked if source is self.honest else self.honest
                    if not data:
                        del ends[source]
                        target.shutdown(socket.SHUT_WR)
                        continue
                    if source is self.honest:
                        data = self._changed(data, cut, flip)
                    target.sendall(data)
                    if cut is not None and self.passed >= cut:
                        return

    def _changed(self, data: bytes, cut: int | None, flip: int | None) -> bytes:
        begin, self.passed = self.passed, self.passed + len(data)
        if cut is not None and self.passed >= cut:
            data = data[: cut - begin]
            self.passed = cut
        if flip is not None and begin <= flip < self.passed:
            at = flip - begin
            data = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        return data


def _through_relay(
    certs: Certificates, engine: str, is_server: bool, **change: int
) -> tuple[SapperError | None, int, bool]:
    """One handshake through a relay: the attacked bridge's error, bytes passed, whether it was ready."""
    near, far = socket.socketpair()
    other, other_far = socket.socketpair()
    hearing = Hearing()
    bridge = create_bridge(
        socket=near,
        sink="null:",
        handshake_timeout=0.5,
        **role(certs, engine, is_server),
        **hearing.options(),
    )
    honest = create_bridge(
        socket=other, sink="null:", on_error=lambda error: None, **role(certs, engine, not is_server)
    )
    relay = Relay(far, other_far)

    def pass_on() -> None:
        with far, other_far:
            relay.run(**change)

    between = Background(pass_on)
    honest.start()
    ready, error = True, None
    try:
        bridge.handshake_sync()
    except SapperError as caught:
        ready, error = False, caught
    bridge.stop()
    honest.stop()
    for one in (bridge, honest):
        one.wait_closed_sync(LATEST)
    between.join()
    if ready:  # what breaks behind the handshake ends the bridge too, unless stop() came first
        assert [type(late) for late in hearing.errors if not isinstance(late, FROM_A_PEER)] == []
        assert len(hearing.errors) <= 1, hearing.errors
    else:
        assert hearing.errors == [], "it was raised already"
    return error, relay.passed, ready


@pytest.mark.parametrize("is_server", [False, True], ids=["client", "server"])
def test_a_peer_that_closes_at_any_point_of_the_handshake(
    engine: str, is_server: bool, certs: Certificates
) -> None:
    error, total, ready = _through_relay(certs, engine, is_server)
    assert ready, error
    points = sorted({0, 1, 4, 5, 6, *range(11, total, max(1, total // 24)), total - 1})
    for point in points:
        error, _, ready = _through_relay(certs, engine, is_server, cut=point)
        if ready:  # a server's tickets and the client's goodbye come after its handshake
            assert point > total // 3
            continue
        assert type(error) is ConnectionLost, (point, error)
        assert error.phase == "handshake", (point, total, repr(error), error.context)


@pytest.mark.parametrize("is_server", [False, True], ids=["client", "server"])
def test_a_changed_byte_anywhere_in_the_handshake(engine: str, is_server: bool, certs: Certificates) -> None:
    _, total, _ = _through_relay(certs, engine, is_server)
    refused = 0
    for point in (0, 1, 5, 9, *range(15, total, max(1, total // 14))):
        error, _, ready = _through_relay(certs, engine, is_server, flip=point)
        if not ready:
            refused += 1
            assert isinstance(error, (*FROM_A_PEER, HandshakeDeadline)), (point, error)
            assert error.phase == "handshake", (point, repr(error))
    assert refused >= 5


# -- certificates ----------------------------------------

BAD_SERVERS = {
    "expired": "expired",
    "not_yet": "not_yet_valid",
    "wrong_name": "wrong_name",
    "untrusted": "unknown_issuer",
    "self_signed": "self_signed",
}


def _meet(
    ours: dict[str, Any], theirs: dict[str, Any], way: str
) -> tuple[SapperError | None, SapperError | None]:
    """A client and a server bridge; the error of each."""
    near, far = socket.socketpair()
    hearing, other = Hearing(), Hearing()
    client = create_bridge(socket=near, sink="null:", **ours, **hearing.options())
    server = create_bridge(socket=far, sink="null:", server_side=True, **theirs, **other.options())
    server.start()
    error = failure(client, hearing, way)
    assert other.closed.wait(LATEST)
    return error, other.errors[0] if other.errors else None


@pytest.mark.parametrize("bad", BAD_SERVERS)
def test_a_certificate_that_must_be_refused(bad: str, way: str, certs: Certificates) -> None:
    identity: Identity = getattr(certs, bad)
    error, heard = _meet(
        {"credentials": Credentials.none(roots=certs.ca.cert), "server_hostname": certs.name},
        {"credentials": Credentials.certificate(identity.cert, identity.key)},
        way,
    )
    assert type(error) is CertificateError, repr(error)
    assert (error.reason, error.phase, error.direction) == (BAD_SERVERS[bad], "handshake", "decapsulate")
    assert error.alert is not None
    assert not error.context.alert_received
    assert type(heard) is CredentialsRejected, repr(heard)
    assert heard.context.alert == error.alert
    assert heard.context.alert_received


@pytest.mark.parametrize("who", ["untrusted_client", None])
def test_a_client_that_must_be_refused(who: str | None, certs: Certificates) -> None:
    identity = getattr(certs, who) if who else None
    ours = (
        Credentials.certificate(identity.cert, identity.key, roots=certs.ca.cert)
        if identity
        else Credentials.none(roots=certs.ca.cert)
    )
    # In TLS 1.3 the client is ready before the server has looked: it hears by an alert while it runs.
    near, far = socket.socketpair()
    hearing, other = Hearing(), Hearing()
    end, sink = socket.socketpair()
    client = create_bridge(
        socket=near, sink=sink, credentials=ours, server_hostname=certs.name, **hearing.options()
    )
    server = create_bridge(
        socket=far,
        sink="null:",
        server_side=True,
        credentials=Credentials.certificate(certs.server.cert, certs.server.key, roots=certs.ca.cert),
        **other.options(),
    )
    with end:
        client.start()
        server.start()
        assert other.closed.wait(LATEST)
        assert hearing.closed.wait(LATEST)
    assert [type(one) for one in other.errors] == [CertificateError]
    assert other.errors[0].reason == ("unknown_issuer" if who else "missing")
    assert [type(one) for one in hearing.errors] == [CredentialsRejected]
    assert hearing.errors[0].context.alert_received


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_wrong_key_and_an_unknown_identity(version: str, way: str) -> None:
    def config(identity: str, key: bytes) -> TlsConfig:
        return TlsConfig(credentials=Credentials.psk(identity, key), min_version=version, max_version=version)

    server = {"credentials": config("an identity", KEY)}
    for identity, key in (("an identity", bytes(32)), ("somebody else", KEY)):
        error, heard = _meet({"credentials": config(identity, key)}, server, way)
        assert type(error) is CredentialsRejected, repr(error)
        assert isinstance(heard, AuthenticationError), repr(heard)


# -- secrets ----------------------------------------


def test_secrets_are_in_no_error_no_repr_and_no_log(
    certs: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    password = b"a password that nobody may read"
    pem = certs.server.key
    said: list[str] = []

    def made(make: Callable[[], object]) -> None:
        try:
            said.append(repr(make()))
        except SapperError as error:
            said.extend(
                [str(error), repr(error), repr(error.context), repr(error.__cause__), repr(error.__context__)]
            )

    encrypted = certs.server.encrypted_key(password)
    made(lambda: TlsConfig(credentials=Credentials.psk("x", KEY)))
    made(lambda: Credentials.psk("x", KEY.decode()[:9], hash="md5"))  # type: ignore[arg-type]
    made(lambda: TlsConfig(credentials=Credentials.psk("x", KEY), min_version="SSLv3"))
    made(lambda: TlsConfig(credentials=Credentials.certificate(certs.server.cert, pem)))
    made(lambda: TlsConfig(credentials=Credentials.certificate(certs.client.cert, pem)))
    made(lambda: TlsConfig(credentials=Credentials.certificate(pem, pem)))
    made(lambda: TlsConfig(credentials=Credentials.certificate(certs.server.cert, pem[:100])))
    made(
        lambda: TlsConfig(
            credentials=Credentials.certificate(certs.server.cert, encrypted, password=password)
        )
    )
    made(
        lambda: TlsConfig(
            credentials=Credentials.certificate(certs.server.cert, encrypted, password=password[:-1])
        )
    )
    made(lambda: create_bridge(socket=KEY, sink="null:", credentials=PSK))  # type: ignore[arg-type]
    made(lambda: create_bridge(socket="tcp://localhost:1", sink="null:", credentials=KEY))  # type: ignore[arg-type]
    made(lambda: create_bridge(socket="tcp://localhost:1", sink="null:", credentials=PSK))
    error, heard = _meet(
        {"credentials": Credentials.psk("an identity", KEY[::-1])}, {"credentials": PSK}, "start"
    )
    said.extend([repr(error), str(error), repr(heard), str(heard)])
    text = "\n".join(said) + caplog.text
    body = pem.decode().splitlines()[1]
    for secret in (KEY, KEY[:9], KEY[::-1], password, password[:-1], body[:24].encode(), pem[60:100]):
        assert secret.decode() not in text
        assert secret.hex() not in text


# -- careless callers ----------------------------------------


@contextmanager
def _wrong(case: str) -> Iterator[Any]:
    """Something that is no endpoint, and closed afterwards."""
    if case == "listener without accept":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield listener
        return
    if case == "directory":
        number = os.open("/", os.O_RDONLY)
        yield number
        os.close(number)
    elif case == "closed socket":
        sock = socket.socket()
        sock.close()
        yield sock
    elif case == "closed descriptor":
        ours, theirs = socket.socketpair()
        number = ours.detach()
        os.close(number)
        yield number
        theirs.close()
    elif case == "closed file":
        file = os.fdopen(os.open("/dev/null", os.O_RDONLY), "rb")
        file.close()
        yield file
    elif case == "epoll":
        with select.epoll() as poll:
            yield poll
    else:
        yield {
            "negative": -1,
            "far too large": 2**40,
            "bool": True,
            "bytes": b"tcp://x:1",
            "text": "nowhere",
            "port": "tcp://x:99999",
            "three": (1, 2, 3),
            "object": object(),
            "none": None,
        }[case]


WRONG = (
    "directory", "closed socket", "closed descriptor", "closed file", "epoll", "negative", "far too large",
    "bool", "bytes", "text", "port", "three", "object", "none",
)  # fmt: skip


@pytest.mark.parametrize("field", ["socket", "sink"])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_endpoint_names_its_argument_and_takes_nothing(case: str, field: str) -> None:
    good, end = socket.socketpair()
    with good, end, _wrong(case) as wrong:
        before = leaks.open_fds()
        given: dict[str, Any] = {"socket": good, "sink": good, field: wrong}
        with pytest.raises(ConfigError) as caught:
            create_bridge(credentials=PSK, **given)
        assert caught.value.field == field
        assert str(caught.value).startswith(f"{field}: ")
        assert leaks.open_fds() == before
        end.sendall(b"still ours")
        assert good.recv(10) == b"still ours"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"framing": "u24"}, "framing"),
        ({"direction": "sideways"}, "direction"),
        ({"handshake_timeout": 0}, "handshake_timeout"),
        ({"handshake_timeout": float("nan")}, "handshake_timeout"),
        ({"idle_timeout": -1}, "idle_timeout"),
        ({"close_timeout": -1}, "close_timeout"),
        ({"max_packet": 0}, "max_packet"),
        ({"max_packet": 65_536}, "max_packet"),
        ({"records_per_write": 0}, "records_per_write"),
        ({"initial_data": "text"}, "initial_data"),
        ({"sink_framing": "u16"}, "sink_framing"),
        ({"credentials": "a key"}, "credentials"),
        ({"server_side": True, "server_hostname": "x"}, "server_hostname"),
        ({"peer_policy": 5}, "peer_policy"),
        ({"options": {}}, "options"),
    ],
)
def test_a_wrong_option_names_itself_and_takes_nothing(options: dict[str, Any], field: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = leaks.open_fds()
        with pytest.raises(ConfigError) as caught:
            create_bridge(**{"socket": ours, "sink": "null:", "credentials": PSK, **options})
        assert caught.value.field == field
        until = time.monotonic() + LATEST
        while leaks.open_fds() != before:  # a thread for call-backs ends with its mailbox
            assert time.monotonic() < until, leaks.open_fds()
        assert ours.fileno() >= 0


# -- the policy ----------------------------------------


@pytest.mark.parametrize("how", ["no", "late", "raises", "a word"])
def test_a_policy_that_does_not_say_yes_means_no(how: str, way: str, certs: Certificates) -> None:
    let_go = threading.Event()

    def policy(peer: tls.Peer) -> Any:
        if how == "late":
            let_go.wait(LATEST)
        if how == "raises":
            raise ValueError("in the policy")
        return {"no": False, "late": True, "a word": "yes"}.get(how)

    near, far = socket.socketpair()
    end, sink = socket.socketpair()
    hearing, other = Hearing(), Hearing()
    server = create_bridge(
        socket=near,
        sink="null:",
        server_side=True,
        credentials=PSK,
        peer_policy=policy,
        policy_timeout=SOON,
        **hearing.options(),
    )
    client = create_bridge(socket=far, sink=sink, credentials=PSK, **other.options())
    with end:
        client.start()
        threading.Timer(4 * SOON, let_go.set).start()  # it must come back
        error = failure(server, hearing, way)
        assert type(error) is PolicyDenied, repr(error)
        assert error.phase == "handshake"
        assert other.closed.wait(LATEST)
    assert [type(one) for one in other.errors] == [CredentialsRejected]
    assert other.errors[0].context.alert == 49, "access_denied"
