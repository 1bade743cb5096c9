"""Mistakes that ``create_bridge`` finds itself: a typed error that names the argument, and nothing was taken.

None of them may wait for the handshake or for payload to show. Not here: what is no endpoint at all and
wrong options (``test_bad_input.py``), and values of other types (``tests/test_arguments.py``).
"""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import pickle
import socket
import stat
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sapper import errors, tls
from sapper.errors import ClosedError, ConfigError, ResourceError, SapperError
from sapper.pump import PumpOptions, connect
from sapper.tls import Credentials, TlsConfig, create_bridge
from support import leaks, netns
from support.certs import Certificates
from support.traffic import receive_all

KEY = b"a key that nobody may ever read!"
PSK = Credentials.psk("x", KEY)
LATEST = 25.0

pytestmark = pytest.mark.usefixtures("leak_check")


def _must_refuse(
    field: str, reason: str | None = None, kind: type[SapperError] = ConfigError, **arguments: Any
) -> SapperError:
    """Refused at once, the field named, every good argument still the caller's."""
    good, end = socket.socketpair()
    with good, end:
        arguments = {"socket": good, "sink": "null:", "credentials": PSK, **arguments}
        before = leaks.open_fds()
        with pytest.raises(kind) as caught:
            create_bridge(**arguments)
        assert caught.value.field == field, str(caught.value)
        assert reason is None or caught.value.reason == reason, caught.value.reason
        until = time.monotonic() + LATEST
        while not leaks.open_fds().items() <= before.items():  # a thread for call-backs ends with its mailbox
            assert time.monotonic() < until, leaks.open_fds()
        end.sendall(b"still ours")
        assert good.recv(10) == b"still ours"
        return caught.value


@pytest.mark.parametrize("credentials", [None, Credentials.none()], ids=["nothing", "none()"])
def test_a_server_without_credentials(credentials: Credentials | None) -> None:
    _must_refuse("credentials", credentials=credentials, server_side=True)


def test_a_sink_that_is_a_tls_server_without_credentials() -> None:
    _must_refuse("sink_credentials", sink="tls-listen://127.0.0.1:0")


def test_a_client_with_several_keys() -> None:
    _must_refuse("credentials", credentials=Credentials.psks({"a": KEY, "b": KEY}))


@pytest.mark.parametrize("name", ["", " ", "two words", "a\0b", "http://x", "a..b", "-", "*.x", "x" * 300])
def test_a_server_name_that_is_none(name: str, certs: Certificates) -> None:
    for credentials in (PSK, Credentials.none(roots=certs.ca.cert)):
        _must_refuse("server_hostname", credentials=credentials, server_hostname=name)
        _must_refuse("sink_hostname", sink="tls://h:1", sink_credentials=credentials, sink_hostname=name)


def test_a_client_that_does_not_know_whom_it_calls(certs: Certificates) -> None:
    _must_refuse("server_hostname", credentials=Credentials.none(roots=certs.ca.cert))
    # A host that is written in the endpoint is that name; a scope is none of a certificate's business.
    create_bridge(
        socket="tcp://[fe80::1%lo]:1", sink="null:", credentials=Credentials.none(roots=certs.ca.cert)
    )


def test_hostname_and_credentials_of_a_sink_that_has_no_tls() -> None:
    _must_refuse("sink_hostname", sink_hostname="x")
    _must_refuse("sink_credentials", sink_credentials=PSK)


SOCKETS = {
    "tcp": (socket.AF_INET, socket.SOCK_STREAM),
    "tcp over IPv6": (socket.AF_INET6, socket.SOCK_STREAM),
    "unix": (socket.AF_UNIX, socket.SOCK_STREAM),
    "udp": (socket.AF_INET, socket.SOCK_DGRAM),
    "unix datagram": (socket.AF_UNIX, socket.SOCK_DGRAM),
    "seqpacket": (socket.AF_UNIX, socket.SOCK_SEQPACKET),
}


@pytest.mark.parametrize("kind", SOCKETS)
@pytest.mark.parametrize("form", ["object", "int"])
def test_a_socket_without_a_peer(kind: str, form: str) -> None:
    family, how = SOCKETS[kind]
    with socket.socket(family, how) as alone:
        given = alone if form == "object" else alone.fileno()
        framing = None if how == socket.SOCK_STREAM else "u16"
        _must_refuse("sink", "not_connected", sink=given, framing=framing)
        if framing is None:
            _must_refuse("socket", "not_connected", socket=given)
        assert alone.fileno() >= 0


def _pipe(stack: ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for number in ends:
        stack.callback(os.close, number)
    return ends


def test_a_pipe_in_the_wrong_direction() -> None:
    with ExitStack() as stack:
        read, write = _pipe(stack)
        for pair in ((write, read), (read, read), (write, write)):
            _must_refuse("sink", "wrong_direction", sink=pair)
            _must_refuse("socket", "wrong_direction", socket=pair)
        error = _must_refuse("socket", "wrong_direction", socket=read, direction="decrypt-only")
        assert "both ways" in str(error)
        for half, fine in ((read, "encrypt-only"), (write, "decrypt-only")):
            for direction in ("duplex", "encrypt-only", "decrypt-only"):
                if direction == fine:
                    good, end = socket.socketpair()
                    with end:
                        create_bridge(socket=good, sink=half, credentials=PSK, direction=direction)
                else:
                    error = _must_refuse("sink", "wrong_direction", sink=half, direction=direction)
                    assert fine in str(error)


def test_a_file_that_is_opened_one_way(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x")
    error = _must_refuse("sink", "wrong_direction", sink=f"file:{tmp_path / 'in'}")
    assert "encrypt-only" in str(error)
    with (tmp_path / "in").open("rb") as file:
        _must_refuse("sink", "wrong_direction", sink=file)


@pytest.mark.parametrize(
    "given",
    [
        "tcp://a\0b:1", "tcp://a%00b:1", "tcp://a b:1", "tcp://[::1:1", "tcp://300.300.300.300:1",
        "tcp://x..y:1",
        "tcp://" + "x" * 64 + ":1", "tcp://h:0", "tcp://\udc80:1", ("a\0b", 1), ("", 1), ("h", 0),
        ("h", 70_000),
        "unix:/" + "x" * 107, "unix-listen:/" + "x" * 107, "unix:@", "unix:@" + "x" * 108,
    ],
)  # fmt: skip
def test_hosts_and_paths_that_nothing_can_be(given: Any) -> None:
    _must_refuse("socket", socket=given)
    _must_refuse("sink", sink=given)


@pytest.mark.parametrize(
    "given", ["dgram:/" + "x" * 107, "seqpacket:/" + "x" * 107, "udp://a\0b:1", "udp://h:0"]
)
def test_the_same_of_packet_endpoints(given: str) -> None:
    _must_refuse("sink", sink=given, framing="u16")


@pytest.mark.parametrize(
    "given",
    [
        "udp://127.0.0.1:9?bind=[::1]:0",
        "udp://[::1]:9?bind=127.0.0.1:0",
        "udp://[fe80::1%lo]:9?bind=127.0.0.1:0",
    ],
)
def test_two_ip_versions_of_one_socket(given: str) -> None:
    assert "IP version" in str(_must_refuse("sink", sink=given, framing="u16"))
    connect("counter:", "udp://localhost:9?bind=[::1]:0")  # a name may have both


@pytest.mark.needs("namespaces", "tun")
@pytest.mark.parametrize(
    ("flags", "header"), [(0x4000, "none"), (0x4000, "pi"), (0x4000, "utun"), (0, "vnet"), (0, "utun")]
)
def test_a_header_that_the_descriptor_contradicts(flags: int, header: str) -> None:
    no_pi, tun_set_iff = 0x1000, 0x400454CA
    with netns.two_namespaces() as (one, _):

        def refused() -> None:
            tun = os.open("/dev/net/tun", os.O_RDWR)
            try:
                fcntl.ioctl(tun, tun_set_iff, struct.pack("16sH22x", b"contradicts", 1 | no_pi | flags))
                error = _must_refuse("sink", sink=f"fd:{tun}?header={header}", framing="ip")
                assert f"header={header}" in str(error)
                if flags and header != "utun":
                    assert "vnet" in str(error)
            finally:
                os.close(tun)

        one.call(refused)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("server_side", "yes"), ("server_side", 1), ("server_side", None),
        ("server_hostname", b"x"), ("server_hostname", 5), ("server_hostname", "\udc80"),
        ("sink_hostname", 5),
        ("credentials", 5), ("credentials", KEY), ("sink_credentials", 5),
        ("initial_data", "text"), ("initial_data", 5),
        ("on_error", 5), ("on_close", "x"), ("peer_policy", "x"),
        ("direction", 5), ("framing", 5), ("framing", "nonsense"), ("sink_framing", 5),
        ("max_packet", "5"), ("max_packet", True), ("max_packet", 5.0), ("max_packet", 2**80),
        ("records_per_write", "1"), ("records_per_write", 257), ("resync", "yes"), ("resync", 1),
        ("connect_timeout", "5"), ("accept_timeout", True), ("handshake_timeout", b"5"),
        ("idle_timeout", "x"),
        ("close_timeout", float("nan")), ("policy_timeout", []),
        ("options", 5), ("options", {"framing": "raw"}),
    ],
)  # fmt: skip
def test_an_argument_of_another_type(name: str, value: object) -> None:
    arguments: dict[str, Any] = {name: value}
    error = _must_refuse(name, **arguments)
    assert KEY.decode() not in str(error)


@pytest.mark.parametrize(
    ("tap", "field"),
    [
        (5, "tap"),
        ({}, "tap.path"),
        ({"path": 5}, "tap.path"),
        ({"path": "a\0b"}, "tap.path"),
        ({"path": "x", "snap_len": 1}, "tap.snap_len"),
        ({"path": "x", "max_bytes": 2**64}, "tap.max_bytes"),
        ({"path": "x", "max_bytes": 100}, "tap.max_bytes"),
        ({"path": "x", "filter": 5}, "tap.filter"),
        ({"path": "x", "nonsense": 5}, "tap.nonsense"),
    ],
)
def test_a_tap_that_is_none(tap: Any, field: str) -> None:
    _must_refuse(field, tap=tap, framing="u16", sink="counter:")


# -- what can be opened must be, when it is named ----------------------------------------


def test_a_tap_whose_file_cannot_be_made(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, kind in (
        (tmp_path / "no such folder" / "tap", ResourceError),
        (tmp_path, ResourceError),
        (fifo, ConfigError),
    ):
        _must_refuse("tap", kind=kind, tap={"path": path}, framing="u16", sink="counter:")
        with pytest.raises(kind) as caught:
            connect("counter:", "counter:", options=PumpOptions(tap={"path": path}))  # type: ignore[arg-type]
        assert caught.value.field == "tap"
    _must_refuse("max_packet", tap={"path": tmp_path / "tap"}, framing="u16", sink="counter:", max_packet=0)
    for framing, least in [("ip", 20), ("ipv4", 20), ("ipv6", 40), ("superframe", 1280)]:
        refused = _must_refuse("max_packet", framing=framing, sink="counter:", max_packet=least - 1)
        assert f'"{framing}" have {least} bytes at least' in str(refused)
    assert not (tmp_path / "tap").exists(), "another mistake leaves no file"


@pytest.mark.parametrize("state", ["new", "ready", "running"])
async def test_the_same_of_a_tap_that_is_named_later(state: str, tmp_path: Path) -> None:
    near, far = socket.socketpair()
    ours, sink = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs, their_sink = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        client = create_bridge(socket=near, sink=sink, credentials=PSK, framing="u16")
        server = create_bridge(socket=far, sink=their_sink, credentials=PSK, framing="u16", server_side=True)
        async with client, server:
            server.start()
            if state != "new":
                await client.handshake()
            if state == "running":
                client.start()
            with pytest.raises(ResourceError) as caught:
                await client.tap(tmp_path / "no such folder" / "tap")
            assert caught.value.field == "tap"
            with pytest.raises(ConfigError) as too_small:
                await client.tap(tmp_path / "tap", max_bytes=100)
            assert (too_small.value.field, too_small.value.reason) == ("max_bytes", "out_of_range")
            assert not (tmp_path / "tap").exists()
            await client.tap(tmp_path / "tap")
            assert (tmp_path / "tap").exists(), "it is made when it is named"
            if state != "running":
                client.start()
            ours.send(b"a packet")
            assert theirs.recv(100) == b"a packet"
            await client.untap()
    assert b"a packet" in (tmp_path / "tap").read_bytes()


async def test_a_sink_that_cannot_take_the_place_is_not_taken() -> None:
    near, far = socket.socketpair()
    end, first = socket.socketpair()
    with end:
        pump = connect(near, first)
        async with pump:
            pump.start()
            await pump.open()
            datagrams, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            with far, socket.socket() as alone, datagrams, other, ExitStack() as stack:
                wrong: list[Any] = [
                    alone,
                    datagrams,
                    _pipe(stack)[0],
                    "tls://h:1",
                    "tcp://h:0",
                    "counter:",
                    object(),
                ]
                for sink in wrong:
                    with pytest.raises(ConfigError) as caught:
                        await pump.swap_sink(sink)
                    assert caught.value.field == "sink", str(caught.value)
                assert alone.fileno() >= 0
                assert datagrams.fileno() >= 0
                far.sendall(b"the old one stays")
                assert end.recv(100) == b"the old one stays"
        with pytest.raises(ClosedError):
            await pump.swap_sink("null:")


# -- secrets on their way to a disk ----------------------------------------


def _secrets(certs: Certificates) -> list[Any]:
    identity = Credentials.certificate(certs.server.cert, certs.server.key)
    return [PSK, identity, TlsConfig(credentials=PSK), TlsConfig(credentials=identity)]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_is_not_pickled(protocol: int, certs: Certificates) -> None:
    for secret in _secrets(certs):
        for what in (secret, [secret], {"options": secret}):
            with pytest.raises(TypeError, match="secrets would be written out"):
                pickle.dumps(what, protocol)


def test_what_holds_no_secret_is_pickled(certs: Certificates) -> None:
    for plain in (Credentials.none(roots=certs.ca.cert), TlsConfig(alpn=("h2",)), PumpOptions(framing="ip")):
        again = pickle.loads(pickle.dumps(plain))
        assert again == plain
        if isinstance(again, TlsConfig):
            assert again.native.engine == "rustls"


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_secret_is_copied(how: Callable[[Any], Any], certs: Certificates) -> None:
    for secret in _secrets(certs):
        again = how(secret)
        assert again == secret
        assert KEY.decode() not in repr(again)
    changed = TlsConfig(credentials=PSK).model_copy(update={"max_version": "TLSv1.2"})
    near, far = socket.socketpair()
    with far:
        create_bridge(socket=near, sink="null:", credentials=how(changed))


# -- what a caller can still do with a descriptor that was duplicated ----------------------------------------


@pytest.mark.parametrize("end", ["stop", "drain", "peer"])
@pytest.mark.parametrize("argument", ["socket", "sink"])
def test_what_is_left_of_a_connection_that_was_given_by_number(argument: str, end: str) -> None:
    """The table of docs/bridge.md: what has ended has ended for the caller's number, too."""
    ours, theirs = socket.socketpair()
    other, far = socket.socketpair()
    with ours, theirs, far:
        if argument == "socket":
            pump = connect(ours.fileno(), other)
            beyond = far
        else:
            pump = connect(other, ours.fileno())
            beyond = far
        flags = os.get_blocking(ours.fileno())
        pump.start()
        theirs.sendall(b"through")
        assert beyond.recv(7) == b"through"
        if end == "peer":
            beyond.shutdown(socket.SHUT_WR)
            assert receive_all(theirs) == b"", "the end was passed on"
            pump.stop()
        else:
            pump.stop(drain=2.0 if end == "drain" else 0.0)
        pump.wait_closed_sync(LATEST)
        # Whatever happened, the number is open, is as it was, and reads what comes.
        assert os.get_blocking(ours.fileno()) == flags
        assert stat.S_ISSOCK(os.fstat(ours.fileno()).st_mode)
        theirs.sendall(b"more")
        assert ours.recv(4) == b"more"
        if argument == "sink" and end == "stop":
            ours.sendall(b"and back")
            assert theirs.recv(8) == b"and back"
        else:
            with pytest.raises(BrokenPipeError):
                ours.sendall(b"our direction has ended")


@pytest.mark.parametrize("timeout", ["5", True, float("inf"), float("nan"), 0.0, 1e300])
def test_a_look_up_of_keys_has_a_deadline_in_seconds(timeout: Any) -> None:
    with pytest.raises(errors.ConfigError) as raised:
        Credentials.psk_lookup(lambda identity: None, timeout=timeout)
    assert raised.value.field == "timeout"


@pytest.mark.parametrize(
    ("host", "port", "field"),
    [
        (None, 1, "host"),
        (5, 1, "host"),
        ("", 1, "host"),
        ("a..b", 1, "host"),
        ("127.0.0.1", "x", "port"),
        ("127.0.0.1", True, "port"),
        ("127.0.0.1", 0, "port"),
        ("127.0.0.1", 70_000, "port"),
    ],
)
async def test_a_peer_that_is_none_is_called_by_its_argument(host: Any, port: Any, field: str) -> None:
    with pytest.raises(errors.ConfigError) as raised:
        await tls.connect(host, port)
    assert raised.value.field == field


async def test_a_peer_that_is_not_there_is_called_by_its_argument() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
    with pytest.raises(errors.ConnectError) as raised:
        await tls.connect("127.0.0.1", port)
    assert raised.value.field == "host"
    assert raised.value.errno == errno.ECONNREFUSED
