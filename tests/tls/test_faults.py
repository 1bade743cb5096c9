"""Faults of the peer, of the machine and of who keeps the files: a typed error, and the service stays up.

Here peers cut, re-order and stall, certificates are too large, the table of descriptors is full, files become
garbage and the clock is set back. Single strange messages are in ``test_bad_input.py`` and
``test_hostile_peer.py``.
"""

from __future__ import annotations

import asyncio
import datetime
import errno
import os
import resource
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sapper import tls
from sapper.errors import (
    ConfigError,
    ConnectionLost,
    HandshakeDeadline,
    ResourceLimit,
    SapperError,
    TlsError,
)
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, TlsConfig, create_bridge
from support.certs import Certificates
from support.hearing import FROM_A_PEER, LATEST, Hearing, drain, failure, role
from support.meeting import connected, works
from support.needs import ROOT
from support.traffic import Background

pytestmark = pytest.mark.usefixtures("leak_check")

VERSIONS = ["TLSv1.2", "TLSv1.3"]


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


def records(data: bytes) -> list[bytes]:
    """Cuts what an end sent into its records."""
    found = []
    while data:
        size = 5 + struct.unpack(">H", data[3:5])[0]
        found.append(data[:size])
        data = data[size:]
    return found


class Peer:
    """CPython's ``ssl`` at the other end, whose bytes pass through the test's hands."""

    def __init__(
        self, certs: Certificates, version: str, is_server: bool, chain: tuple[Path, Path] | None = None
    ) -> None:
        if is_server:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*(chain or (certs.server.cert_path, certs.server.key_path)))
        else:
            context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
            if chain is not None:
                context.load_cert_chain(*chain)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if is_server else certs.name
        self._tls = context.wrap_bio(self._in, self._out, server_side=is_server, server_hostname=name)

    def talk(self, end: socket.socket, send: Callable[[bytes], bool]) -> None:
        """Shakes hands, says something, takes its leave. It stops when ``send`` gives ``False``."""
        end.settimeout(LATEST)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                if not send(self._out.read()):
                    return
                received = end.recv(65_536)
                if not received:
                    return
                self._in.write(received)
            except ssl.SSLError:
                send(self._out.read())
                return
        if not send(self._out.read()):
            return
        self._tls.write(b"all that there is to say")
        if not send(self._out.read()):
            return
        with suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        send(self._out.read())


def attack(
    certs: Certificates,
    version: str,
    us_server: bool,
    change: Callable[[bytes, int], tuple[bytes, bool]],
    *,
    reset: bool = False,
    chain: tuple[Path, Path] | None = None,
    **options: Any,
) -> tuple[SapperError | None, bytes]:
    """One conversation, of which ``change`` makes what it likes: our error, and what was sent.

    ``change`` gets what is to be sent and how much was sent before; it gives what is sent instead, and
    whether the peer goes on afterwards.
    """
    hearing = Hearing()
    sent = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()

    def send(data: bytes) -> bool:
        changed, goes_on = change(data, len(sent))
        sent.extend(changed)
        try:
            far.sendall(changed)
        except OSError:
            return False
        return goes_on

    def peer() -> None:
        with suppress(ConnectionResetError):
            Peer(certs, version, not us_server, chain).talk(far, send)
        if reset:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()
        else:
            with suppress(OSError):
                far.shutdown(socket.SHUT_WR)
            drain(far)

    given = {**role(certs, "certificate", us_server), "close_timeout": 0.5, **options}
    bridge = create_bridge(socket=near, sink="null:", **given, **hearing.options())
    with far:
        enemy = Background(peer)
        error = failure(bridge, hearing, "start")
        enemy.join()
    return error, bytes(sent)


def still_up(certs: Certificates) -> None:
    """Whoever is honest is served."""
    client, server = (role(certs, "certificate", is_server)["credentials"] for is_server in (False, True))
    works(client, server, certs.name)


def untouched(data: bytes, _: int) -> tuple[bytes, bool]:
    return data, True


# -- a peer that closes -------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("us_server", [False, True], ids=["client", "server"])
def test_a_peer_that_closes_at_any_point(certs: Certificates, version: str, us_server: bool) -> None:
    error, whole = attack(certs, version, us_server, untouched)
    assert error is None
    ends = [0]
    for record in records(whole):
        ends.append(ends[-1] + len(record))
    # Around each record's end and in its header; in between every hundredth byte.
    points = {at + step for at in ends for step in (-1, 0, 1, 5)} | set(range(0, len(whole), 100))
    for point in sorted(point for point in points if 0 <= point < len(whole)):

        def cut(data: bytes, before: int, point: int = point) -> tuple[bytes, bool]:
            left = point - before
            return data[:left], left > len(data)

        error, sent = attack(certs, version, us_server, cut)
        # Signatures differ in length: a conversation may be over before the point.
        if error is None and point >= len(whole) - 8 and sum(map(len, records(sent))) == len(sent):
            continue
        assert type(error) is ConnectionLost, (point, error)
        assert error.reason == "truncated", (point, error)
        assert error.direction == "decapsulate"
    still_up(certs)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("us_server", [False, True], ids=["client", "server"])
def test_a_peer_that_resets_the_connection(certs: Certificates, version: str, us_server: bool) -> None:
    _, whole = attack(certs, version, us_server, untouched)
    ends = [0]
    for record in records(whole)[:-1]:
        ends.append(ends[-1] + len(record))
    for point in ends:

        def cut(data: bytes, before: int, point: int = point) -> tuple[bytes, bool]:
            left = point - before
            return data[:left], left > len(data)

        error, _ = attack(certs, version, us_server, cut, reset=True)
        assert type(error) is ConnectionLost, (point, error)


# -- records out of order -----------------------------------------------


class Reordering:
    """Swaps a record with the next one, repeats it, or leaves it out."""

    def __init__(self, how: str, place: int) -> None:
        self._how, self._place = how, place
        self._seen = 0
        self._kept: list[bytes] = []

    def __call__(self, data: bytes, _: int) -> tuple[bytes, bool]:
        out: list[bytes] = []
        for record in records(data):
            if self._seen != self._place:
                out += [record, *self._kept]
                self._kept.clear()
            elif self._how == "swapped":
                self._kept.append(record)
            elif self._how == "repeated":
                out += [record, record]
            self._seen += 1
        return b"".join(out), True


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("us_server", [False, True], ids=["client", "server"])
@pytest.mark.parametrize("how", ["swapped", "repeated", "left out"])
def test_records_that_are_not_in_their_order(
    certs: Certificates, version: str, us_server: bool, how: str
) -> None:
    _, whole = attack(certs, version, us_server, untouched)
    kinds = [record[0] for record in records(whole)]
    tried = 0
    for place, kind in enumerate(kinds):
        following = kinds[place + 1] if place + 1 < len(kinds) else None
        # A change of cipher means nothing in TLS 1.3, wherever it comes.
        if kind == 20 and version == "TLSv1.3":
            continue
        if how == "swapped" and (following is None or (following == 20 and version == "TLSv1.3")):
            continue
        if how == "repeated" and following is None:
            continue  # behind close_notify comes what is not ours
        change = Reordering(how, place)
        error, sent = attack(certs, version, us_server, change, handshake_timeout=0.3)
        if sent == whole:  # the two were in different flights, and the first waited for its answer
            continue
        tried += 1
        # What does not come is waited for; everything else is heard of at once.
        expected = (*FROM_A_PEER, HandshakeDeadline)
        assert isinstance(error, expected), (place, kinds, error)
        if kind == 23 and how == "repeated":
            assert type(error) is TlsError
            assert error.reason == "bad_record_mac"
    assert tried >= 2
    still_up(certs)


# -- slow peers ---------------------------------------------------------


async def test_many_that_stall_hold_up_nobody(any_loop: str, made: ThrowawayCertificates) -> None:
    server = TlsConfig(credentials=made.server_credentials())
    client = TlsConfig(roots=made.authority)
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    loop = asyncio.get_running_loop()
    enemies: list[socket.socket] = []

    async def stalled(sent: bytes) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        enemies.append(theirs)
        await loop.sock_sendall(theirs, sent)
        with pytest.raises(HandshakeDeadline):
            await tls.start_server(ours, credentials=server, handshake_timeout=0.5)

    async def dripping() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        enemies.append(theirs)

        async def drip() -> None:
            with suppress(OSError):
                for byte in hello + bytes(500):
                    await loop.sock_sendall(theirs, bytes([byte]))
                    await asyncio.sleep(0.02)  # that is the attack

        task = asyncio.create_task(drip())
        with pytest.raises(HandshakeDeadline):
            await tls.start_server(ours, credentials=server, handshake_timeout=0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def honest() -> None:
        ours, theirs = socket.socketpair()
        one, other = await asyncio.gather(
            tls.start_client(ours, credentials=client, server_hostname="localhost"),
            tls.start_server(theirs, credentials=server),
        )
        async with one, other:
            one.write(b"served meanwhile")
            await one.drain()
            assert await other.readexactly(16) == b"served meanwhile"

    try:
        async with asyncio.timeout(60):
            await asyncio.gather(
                *(stalled(sent) for sent in (b"", hello, hello[:3], hello + bytes(200)) * 8),
                *(dripping() for _ in range(8)),
                *(honest() for _ in range(8)),
            )
            await honest()
    finally:
        for one in enemies:
            one.close()


# -- certificates that are too large ------------------------------------


def large(certs: Certificates, names: int, folder: Path) -> tuple[Path, Path]:
    """A good certificate with very many names."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    alternatives = [x509.DNSName(certs.name), *(x509.DNSName(f"{n:020}.test") for n in range(names))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "large")]))
        .issuer_name(certs.ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(certs.ca.private_key, hashes.SHA256())
    )
    (folder / "large.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "large.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "large.pem", folder / "large.key"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("us_server", [False, True], ids=["client", "server"])
@pytest.mark.parametrize("engine", ["rustls", "openssl"])
def test_a_certificate_that_is_too_large(
    certs: Certificates, tmp_path: Path, version: str, us_server: bool, engine: str
) -> None:
    ours: Credentials = Credentials.none(roots=certs.ca.cert)
    if us_server:
        ours = Credentials.certificate(certs.server.cert, certs.server.key, roots=certs.ca.cert)
    config = TlsConfig(credentials=ours, danger_legacy_suites=engine == "openssl")
    assert config.native.engine == engine
    error, _ = attack(
        certs, version, us_server, untouched, chain=large(certs, 500, tmp_path), credentials=config
    )
    assert error is None, error
    error, sent = attack(
        certs, version, us_server, untouched, chain=large(certs, 6000, tmp_path), credentials=config
    )
    assert isinstance(error, FROM_A_PEER), error
    assert error.phase == "handshake"
    assert len(sent) > 100_000 or us_server


# -- the machine has nothing left ---------------------------------------


class FullTable:
    """While it is open, no descriptor can be had."""

    def __init__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._held: list[int] = []

    def __enter__(self) -> Self:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, self._before[1]))
        return self

    def __exit__(self, *exc: object) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self._before)
        for number in self._held:
            os.close(number)

    def meets(self, act: Callable[[], object]) -> SapperError:
        """What ``act`` raises for want of a descriptor.

        Whatever was closed elsewhere meanwhile leaves a free place, which ``act`` may get: then it is asked
        to do it again.
        """
        until = time.monotonic() + LATEST
        while time.monotonic() < until:
            with suppress(OSError):
                while True:
                    self._held.append(os.dup(0))
            try:
                act()
            except (ResourceLimit, ConfigError) as error:
                return error
            except HandshakeDeadline:
                continue  # it did connect
        raise AssertionError("it never met the limit")


def test_a_full_table_of_descriptors(made: ThrowawayCertificates, tmp_path: Path) -> None:
    (tmp_path / "chain").write_bytes(made.server[0])
    (tmp_path / "key").write_bytes(made.server[1])
    server = TlsConfig(credentials=Credentials.certificate(tmp_path / "chain", tmp_path / "key"))
    client = TlsConfig(roots=made.authority)
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        port = listener.getsockname()[1]
        one, other = (stack.enter_context(end) for end in socket.socketpair())
        running = stack.enter_context(connected(client, server))

        def take_a_number() -> None:
            # It would be duplicated.
            create_bridge(socket=one.fileno(), sink="null:", credentials=client, server_hostname="localhost")

        def connect() -> None:
            hearing = Hearing()
            bridge = create_bridge(
                socket=f"tcp://127.0.0.1:{port}",
                sink="null:",
                credentials=client,
                server_hostname="localhost",
                handshake_timeout=0.2,
                **hearing.options(),
            )
            bridge.start()
            assert hearing.closed.wait(LATEST), bridge.state
            raise hearing.errors[0]

        with FullTable() as table:
            assert isinstance(table.meets(take_a_number), ResourceLimit)
            error = table.meets(connect)
            assert isinstance(error, ResourceLimit)
            assert error.retryable
            # Files cannot be read again: what was there stays.
            unread = table.meets(server.reload)
            assert isinstance(unread, ConfigError)
            assert unread.field == "credentials.chain"
            # What runs goes on.
            running.exchange()
        # Nothing was taken.
        one.sendall(b"still ours")
        assert other.recv(10) == b"still ours"
        running.exchange()
    works(client, server)


async def test_a_watch_does_not_call_files_bad_that_it_cannot_open(
    made: ThrowawayCertificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "chain").write_bytes(made.server[0])
    (tmp_path / "key").write_bytes(made.server[1])
    server = TlsConfig(credentials=Credentials.certificate(tmp_path / "chain", tmp_path / "key"))
    heard: asyncio.Queue[SapperError | None] = asyncio.Queue()

    def warned() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name == "sapper.tls.reload"]

    async with asyncio.timeout(60):
        with server.watch(on_reload=heard.put_nowait):
            with FullTable() as table:
                until = time.monotonic() + 2.0
                while not warned() or time.monotonic() < until:  # it looks twice a second
                    assert table.meets(server.reload).context.errno == errno.EMFILE
                    await asyncio.sleep(0.01)
            assert heard.empty(), "nothing that was there was bad"
            assert len(warned()) == 1
            assert "cannot be read now and are tried again" in warned()[0]
            fresh = throwaway_certificates("localhost")
            for name, content in zip(("chain", "key"), fresh.server, strict=True):
                (tmp_path / name).write_bytes(content)
            while (error := await heard.get()) is not None:  # between the two writes
                assert error.field == "credentials.key"
    works(TlsConfig(roots=fresh.authority), server)


# -- files that become garbage ------------------------------------------


def _half(folder: Path, made: ThrowawayCertificates) -> None:
    (folder / "chain").write_bytes(made.server[0][: len(made.server[0]) // 3])


def _empty(folder: Path, made: ThrowawayCertificates) -> None:
    (folder / "key").write_bytes(b"")


def _noise(folder: Path, made: ThrowawayCertificates) -> None:
    (folder / "chain").write_bytes(os.urandom(5000))


def _gone(folder: Path, made: ThrowawayCertificates) -> None:
    (folder / "key").unlink()


def _folder(folder: Path, made: ThrowawayCertificates) -> None:
    (folder / "chain").unlink()
    (folder / "chain").mkdir()


def _mismatch(folder: Path, made: ThrowawayCertificates) -> None:
    (folder / "key").write_bytes(made.client[1])


def _huge(folder: Path, made: ThrowawayCertificates) -> None:
    with (folder / "chain").open("r+b") as file:
        file.truncate(1 << 40)


GARBAGE = {
    "half": (_half, "chain"),
    "empty": (_empty, "key"),
    "noise": (_noise, "chain"),
    "gone": (_gone, "key"),
    "a folder": (_folder, "chain"),
    "another's key": (_mismatch, "key"),
    "huge": (_huge, "chain"),
}


@pytest.mark.parametrize("case", GARBAGE)
async def test_files_that_become_garbage_change_nothing_and_are_told(
    case: str, made: ThrowawayCertificates, tmp_path: Path
) -> None:
    spoil, field = GARBAGE[case]
    (tmp_path / "chain").write_bytes(made.server[0])
    (tmp_path / "key").write_bytes(made.server[1])
    server = TlsConfig(credentials=Credentials.certificate(tmp_path / "chain", tmp_path / "key"))
    client = TlsConfig(roots=made.authority)
    heard: asyncio.Queue[SapperError | None] = asyncio.Queue()
    async with asyncio.timeout(60):
        with server.watch(on_reload=heard.put_nowait):
            with connected(client, server) as running:
                spoil(tmp_path, made)
                error = await heard.get()
                assert isinstance(error, ConfigError)
                assert error.field == f"credentials.{field}"
                await asyncio.to_thread(running.exchange)
                await asyncio.to_thread(works, client, server)
                with pytest.raises(ConfigError) as caught:
                    server.reload()
                assert caught.value.field == f"credentials.{field}"
                assert str(tmp_path) in str(caught.value)
                # Whole again, and in use: nothing has to be started anew.
                fresh = throwaway_certificates("localhost")
                if (tmp_path / "chain").is_dir():
                    (tmp_path / "chain").rmdir()
                for name, content in zip(("chain", "key"), fresh.server, strict=True):
                    (tmp_path / name).write_bytes(content)
                while await heard.get() is not None:
                    pass
                await asyncio.to_thread(running.exchange)
            await asyncio.to_thread(works, TlsConfig(roots=fresh.authority), server)


# -- the clock ----------------------------------------------------------

CLOCK = r"""
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
volatile long clock_offset = 0;
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && clock == CLOCK_REALTIME) now->tv_sec += clock_offset;
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}
"""

UNDER_A_STRANGE_CLOCK = """
import ctypes, socket, time
import pytest
from sapper.errors import CertificateError, HandshakeDeadline
from sapper.testing import throwaway_certificates
from sapper.tls import Credentials, TlsConfig, create_bridge
from support import leaks
from support.meeting import connected, works

offset = ctypes.c_long.in_dll(ctypes.CDLL(None), "clock_offset")
leaks.warm_up()
before = leaks.Snapshot.take()
real = time.time()
offset.value = -3600
assert time.time() < real - 1800, "the clock is not ours"
offset.value = 0
made = throwaway_certificates("localhost")
server = TlsConfig(credentials=made.server_credentials(), ticket_lifetime=1.0)
client = TlsConfig(roots=made.authority)
anybody = TlsConfig(danger_accept_any_certificate=True)
psk = Credentials.psk("x", bytes(range(32)))
for one in (client, anybody):
    works(one, server)
year = 365 * 86400
with connected(client, server) as running:
    for shift, reason in ((-year, "not_yet_valid"), (-40 * year, "not_yet_valid"), (year, "expired")):
        offset.value = shift
        running.exchange()
        # A full handshake looks at the dates.
        with pytest.raises(CertificateError) as caught:
            works(TlsConfig(roots=made.authority), server)
        assert caught.value.reason == reason, caught.value
        # Tickets and keys of tickets from another time: resumed or not, but connected.
        works(anybody, server)
        works(psk, psk, None)
        # Deadlines are not dates.
        near, far = socket.socketpair()
        with far:
            bridge = create_bridge(
                socket=near, sink="null:", credentials=server, server_side=True, handshake_timeout=0.2
            )
            with pytest.raises(HandshakeDeadline):
                bridge.handshake_sync()
        running.exchange()
    offset.value = 0
    running.exchange()
works(client, server)
del running
leaks.assert_nothing_left(before)
print("right")
"""


@pytest.mark.needs("cc")
def test_a_clock_that_is_set_back_and_forth(tmp_path: Path) -> None:
    (tmp_path / "clock.c").write_text(CLOCK)
    library = tmp_path / "clock.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "clock.c"], check=True, timeout=60
    )
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_STRANGE_CLOCK],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT / "tests")},
    )
    assert done.stdout.strip() == "right", done.stderr[-3000:]
