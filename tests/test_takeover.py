"""Taking over what a caller has: who closes what, what was read, which flags, and what is refused."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import socket
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from sapper.endpoint import Fd
from sapper.errors import ConfigError, SapperError
from sapper.pump import Pump, PumpOptions, connect
from sapper.stream import ByteStream
from sapper.tls import Credentials, create_bridge, start_client
from support.bridges import PSK
from support.certs import Certificates
from support.transports import InMemory


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


async def echo_through(pump: Pump, near: socket.socket, far: socket.socket) -> None:
    """What goes in at one end comes out at the other, both ways."""
    loop = asyncio.get_running_loop()
    for one, other in ((near, far), (far, near)):
        one.setblocking(False)
        other.setblocking(False)
        await loop.sock_sendall(one, b"hello")
        async with asyncio.timeout(20):
            assert await loop.sock_recv(other, 5) == b"hello"
    assert pump.state == "running"


async def test_a_socket_is_detached_and_closed_by_us(any_loop: str, leak_check: None) -> None:
    ours, near = socket.socketpair()
    theirs, far = socket.socketpair()
    numbers = ours.fileno(), theirs.fileno()
    pump = connect(ours, theirs)
    assert (ours.fileno(), theirs.fileno()) == (-1, -1)
    assert not any(map(is_open, numbers))
    pump.start()
    with near, far:
        await echo_through(pump, near, far)
        await pump.stop()
        assert near.recv(1) == b""


async def test_an_int_is_duplicated_and_keeps_its_flags(any_loop: str, leak_check: None) -> None:
    ours, near = socket.socketpair()
    theirs, far = socket.socketpair()
    before = [fcntl.fcntl(one, fcntl.F_GETFL) for one in (ours, theirs)]
    with ours, theirs, near, far:
        pump = connect(ours.fileno(), Fd(theirs.fileno()))
        pump.start()
        await echo_through(pump, near, far)
        await pump.stop()
        assert [fcntl.fcntl(one, fcntl.F_GETFL) for one in (ours, theirs)] == before
        assert is_open(ours.fileno())
        assert is_open(theirs.fileno())


async def test_a_pair_of_pipes_is_one_to_read_and_one_to_write(leak_check: None) -> None:
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    theirs, far = socket.socketpair()
    with os.fdopen(our_read, "rb") as reading, os.fdopen(our_write, "wb") as writing, far:
        flags = [fcntl.fcntl(one, fcntl.F_GETFL) for one in (reading, writing)]
        pump = connect((reading, writing), theirs)
        pump.start()
        loop = asyncio.get_running_loop()
        far.setblocking(False)
        os.write(their_write, b"in")
        async with asyncio.timeout(20):
            assert await loop.sock_recv(far, 2) == b"in"
            await loop.sock_sendall(far, b"out")
            assert await asyncio.to_thread(os.read, their_read, 3) == b"out"
        await pump.stop()
        assert [fcntl.fcntl(one, fcntl.F_GETFL) for one in (reading, writing)] == flags
    os.close(their_read)
    os.close(their_write)


async def test_files_and_null_work_though_they_cannot_be_polled(tmp_path: Path, leak_check: None) -> None:
    source = tmp_path / "in"
    source.write_bytes(bytes(range(256)) * 4096)
    options = PumpOptions(direction="decrypt-only")
    pump = connect(f"file:{source}", f"file:{tmp_path / 'out'}?mode=w", options=options)
    pump.start()
    with suppress(SapperError):
        async with asyncio.timeout(20):
            while pump.stats().decapsulate.bytes < 256 * 4096:
                await asyncio.sleep(0.01)
    await pump.stop(20.0)
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


async def test_a_listener_as_sink_accepts_one(any_loop: str, leak_check: None) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    ours, near = socket.socketpair()
    pump = connect(ours, listener)
    assert listener.fileno() == -1
    pump.start()
    far = await asyncio.to_thread(socket.create_connection, address)
    with near, far:
        await echo_through_when_running(pump, near, far)
        await pump.stop()


async def echo_through_when_running(pump: Pump, near: socket.socket, far: socket.socket) -> None:
    async with asyncio.timeout(20):
        while pump.state != "running":
            await asyncio.sleep(0.005)
    await echo_through(pump, near, far)


async def test_an_address_and_a_name_are_connected(any_loop: str, leak_check: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        for address in ((host, port), f"tcp://{host}:{port}"):
            ours, near = socket.socketpair()
            pump = connect(address, ours)
            pump.start()
            far, _ = await asyncio.to_thread(listener.accept)
            with near, far:
                await echo_through_when_running(pump, near, far)
                await pump.stop()


# -- asyncio ---------------------------------------------------------------------------------------------


async def served(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
) -> tuple[asyncio.Server, socket.socket]:
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    client = socket.create_connection(server.sockets[0].getsockname())
    return server, client


async def test_no_byte_of_a_reader_and_writer_is_lost(any_loop: str, leak_check: None) -> None:
    """Bytes that were read and not fetched come along; bytes that wait to be written go out first."""
    theirs, far = socket.socketpair()
    first = os.urandom(3_000_000)
    pumps: asyncio.Queue[Pump] = asyncio.Queue()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(5) == b"hello"
        while len(reader._buffer) < 7:  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)
        writer.write(first)  # far more than the socket takes at once
        pump = connect((reader, writer), theirs)
        assert writer.transport.is_closing() or writer.transport.get_write_buffer_size()
        pump.start()
        await pumps.put(pump)

    server, client = await served(handle)
    with client, far:
        loop = asyncio.get_running_loop()
        client.setblocking(False)
        far.setblocking(False)
        await loop.sock_sendall(client, b"hello" + b"waiting")
        pump = await pumps.get()
        await loop.sock_sendall(client, b" and later")
        await loop.sock_sendall(far, b"the end")
        async with asyncio.timeout(20):
            # First: it is more than systems keep for a socket, and what comes behind it waits for it.
            answer = b""
            while len(answer) < len(first) + 7:
                answer += await loop.sock_recv(client, 1 << 20)
            seen = b""
            while len(seen) < 17:
                seen += await loop.sock_recv(far, 100)
        assert seen == b"waiting and later"
        assert answer == first + b"the end"
        await pump.stop()
    server.close()
    await server.wait_closed()


async def test_whoever_waits_for_the_writer_goes_on(any_loop: str) -> None:
    done = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pump = connect((reader, writer), "null:")
        with suppress(ConnectionError):
            await writer.wait_closed()
        done.set()
        await pump.stop()

    server, client = await served(handle)
    with client:
        async with asyncio.timeout(20):
            await done.wait()
    server.close()


async def test_a_bare_transport_is_taken_over(any_loop: str, leak_check: None) -> None:
    ours, near = socket.socketpair()
    theirs, far = socket.socketpair()
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    pump = connect(transport, theirs)
    assert transport.is_closing()
    pump.start()
    with near, far:
        await echo_through_when_running(pump, near, far)
        await pump.stop()


async def test_a_transport_without_a_descriptor_passes_through_the_door(
    any_loop: str, leak_check: None
) -> None:
    outer, near = socket.socketpair()
    theirs, far = socket.socketpair()
    transport = InMemory(outer, asyncio.Protocol())
    pump = connect(transport, theirs)
    pump.start()
    with near, far:
        await echo_through_when_running(pump, near, far)
        data = os.urandom(1_000_000)
        loop = asyncio.get_running_loop()
        sending = asyncio.create_task(loop.sock_sendall(near, data))
        seen = b""
        async with asyncio.timeout(20):
            while len(seen) < len(data):
                seen += await loop.sock_recv(far, 1 << 20)
            await sending
        assert seen == data
        far.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(20):
            assert await loop.sock_recv(near, 1) == b""
        await pump.stop()
        async with asyncio.timeout(20):
            while not transport.is_closing():
                await asyncio.sleep(0.005)


# -- what is refused, with nothing taken -----------------------------------------------------


async def test_wrong_endpoints_name_their_argument(tmp_path: Path, leak_check: None) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    closed = socket.socket()
    closed.close()
    with open(tmp_path / "f", "wb") as file:
        pass
    unfinished = fcntl.fcntl(folder, fcntl.F_DUPFD, 900)  # far from what the next socket gets
    os.close(unfinished)
    wrong: list[tuple[Any, str | None]] = [
        (object(), "wrong_type"),
        (None, "wrong_type"),
        (True, "wrong_type"),
        (3.5, "wrong_type"),
        ((1, 2, 3), "wrong_type"),
        (unfinished, None),
        (-1, None),
        (2**40, None),
        (folder, "directory"),
        (closed, "closed"),
        (file, "closed"),
        (io.BytesIO(), "no_descriptor"),
        ("nonsense", "scheme"),
        ("file:/no/such/file", None),
        (("host", 70_000), None),
    ]
    try:
        for value, reason in wrong:
            for first in (True, False):
                ours, near = socket.socketpair()
                with ours, near:
                    ends = (value, ours) if first else (ours, value)
                    with pytest.raises(SapperError) as caught:
                        connect(*ends)
                    assert caught.value.field == ("network" if first else "sink"), (value, caught.value)
                    if reason is not None:
                        assert (type(caught.value), caught.value.reason) == (ConfigError, reason), value
                    assert is_open(ours.fileno()), "nothing was taken"
    finally:
        os.close(folder)


async def test_a_transport_under_tls_is_refused_with_the_reason(certs: Certificates) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs.server.cert_path, certs.server.key_path)
    refused: asyncio.Future[ConfigError] = asyncio.get_running_loop().create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            connect((reader, writer), "null:")
        except ConfigError as error:
            refused.set_result(error)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    client_context = ssl.create_default_context()
    client_context.check_hostname = False
    client_context.verify_mode = ssl.CERT_NONE
    host, port = server.sockets[0].getsockname()
    _, writer = await asyncio.open_connection(host, port, ssl=client_context)
    error = await asyncio.wait_for(refused, 20)
    assert (error.field, error.reason) == ("network", "ssl_transport")
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    server.close()


async def test_a_reader_that_somebody_waits_for_is_refused_and_goes_on(any_loop: str) -> None:
    checked = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting = asyncio.create_task(reader.readline())
        await asyncio.sleep(0.01)
        with pytest.raises(ConfigError) as caught:
            connect((reader, writer), "null:")
        assert caught.value.reason == "busy"
        writer.write(b"go\n")
        assert await waiting == b"line\n"
        checked.set()
        writer.close()

    server, client = await served(handle)
    with client:
        assert await asyncio.to_thread(client.recv, 3) == b"go\n"
        client.sendall(b"line\n")
        async with asyncio.timeout(20):
            await checked.wait()
    server.close()


async def test_what_a_failed_call_had_prepared_is_given_back(any_loop: str, leak_check: None) -> None:
    """The second argument is wrong after the first, a reader with bytes in it, was prepared."""
    checked = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(1) == b"x"
        with pytest.raises(ConfigError):
            connect((reader, writer), object())  # type: ignore[arg-type]
        assert await reader.readexactly(9) == b"remaining"
        checked.set()
        writer.close()

    server, client = await served(handle)
    with client:
        client.sendall(b"xremaining")
        async with asyncio.timeout(20):
            await checked.wait()
    server.close()
    await server.wait_closed()


async def test_one_descriptor_is_read_by_one_end(leak_check: None) -> None:
    ours, near = socket.socketpair()
    with ours, near:
        number = ours.fileno()
        twice: list[tuple[Any, Any]] = [
            (number, number),
            (number, ours),
            (f"fd:{number}", number),
            ((number, 1), (number, 2)),
        ]
        for both in twice:
            with pytest.raises(ConfigError, match=f"from descriptor {number}, as network is") as caught:
                connect(*both)
            assert (caught.value.field, caught.value.reason) == ("sink", "same")
        # Both may write to one: what swallows all, for example.
        with open("/dev/null", "r+b") as nowhere:
            async with connect((number, nowhere), (near.fileno(), nowhere)):
                pass


async def test_what_becomes_ours_cannot_be_given_twice(leak_check: None) -> None:
    ours, near = socket.socketpair()
    with near, pytest.raises(ConfigError) as caught:
        connect(ours, ours)
    assert (caught.value.field, caught.value.reason) == ("sink", "same")
    assert is_open(ours.fileno())
    ours.close()


@pytest.mark.parametrize("left", ["is_closing", "can_write_eof", "abort"])
async def test_a_transport_that_is_not_finished_is_refused(left: str, leak_check: None) -> None:
    class Nothing(asyncio.Transport):
        pass

    unfinished = type("Unfinished", (InMemory,), {left: getattr(asyncio.Transport, left)})
    ours, near = socket.socketpair()
    with ours, near:
        transport = unfinished(ours, asyncio.Protocol())
        for one, method in ((transport, left), (Nothing(), "is_closing")):
            with pytest.raises(ConfigError, match=rf"{method}\(\)") as caught:
                create_bridge(socket=one, sink="null:", credentials=Credentials.psk("x", "00" * 16))
            assert (caught.value.field, caught.value.reason) == ("socket", "no_method")
        transport.pause_reading()


@pytest.mark.parametrize(
    "method",
    ["get_extra_info", "is_closing", "get_protocol", "set_protocol", "pause_reading", "resume_reading"],
)
@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
async def test_a_transport_that_fails_is_refused_and_nothing_is_taken(
    method: str, error: type[Exception], leak_check: None
) -> None:
    class Broken(InMemory):
        """Like one whose class never called the one above it."""

        broken = ""

        def __getattribute__(self, name: str) -> Any:
            return fail if name == object.__getattribute__(self, "broken") else super().__getattribute__(name)

    def fail(*_: object) -> None:
        raise error(method)

    outer, near = socket.socketpair()
    ours, _other = socket.socketpair()
    with outer, near, ours, _other:
        protocol = asyncio.Protocol()
        for given in ("socket", "sink"):
            transport = Broken(outer, protocol)
            transport.broken = method
            ends: Any = {"socket": ours, "sink": ours, given: transport}
            with pytest.raises(ConfigError) as caught:
                create_bridge(**ends, credentials=Credentials.psk("x", "00" * 16))
            assert (caught.value.field, caught.value.reason) == (given, "no_method")
            assert is_open(ours.fileno())
            transport.broken = ""
            assert transport.get_protocol() is protocol
            transport.pause_reading()


async def test_what_was_never_set_up_is_refused(leak_check: None) -> None:
    class Unborn(asyncio.Transport):
        def __init__(self) -> None:
            pass

    class Stream(ByteStream):
        def __init__(self) -> None:
            pass

        def __del__(self) -> None:
            pass

    class Writer(asyncio.StreamWriter):
        def __init__(self) -> None:
            pass

        def __del__(self) -> None:
            pass

    class File:
        def fileno(self) -> int:
            raise NotImplementedError

    ours, _other = socket.socketpair()
    with ours, _other:
        for one in (Unborn(), Stream(), (asyncio.StreamReader(), Writer()), File()):
            for given in ("socket", "sink"):
                ends: Any = {"socket": ours, "sink": ours, given: one}
                with pytest.raises(ConfigError) as caught:
                    create_bridge(**ends, credentials=Credentials.psk("x", "00" * 16))
                assert (caught.value.field, caught.value.reason) == (given, "no_method"), one
                assert is_open(ours.fileno())
            with pytest.raises(ConfigError) as caught:
                await start_client(one, credentials=Credentials.psk("x", "00" * 16))
            assert (caught.value.field, caught.value.reason) == ("stream", "no_method"), one


async def test_nor_one_with_a_descriptor(leak_check: None) -> None:
    ours, near = socket.socketpair()
    with ours, near:
        transport = asyncio.Transport({"socket": ours})
        with pytest.raises(ConfigError) as caught:
            connect("null:", transport)
        assert (caught.value.field, caught.value.reason) == ("sink", "no_method")
        assert is_open(ours.fileno())


@pytest.mark.parametrize("number", [-1, 2**31, 2**32, 2**70])
def test_a_number_that_is_no_descriptor_is_named(number: int) -> None:
    with pytest.raises(ConfigError, match=f"descriptor {number} is not open"):
        connect(number, "null:")
    with pytest.raises(ConfigError, match=f"descriptor {number} is not open"):
        connect((0, number), "null:")


def test_what_is_no_endpoint_is_named_by_the_callers_number(tmp_path: Path) -> None:
    number = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(ConfigError, match=f"descriptor {number} is a directory"):
            connect(number, "null:")
    finally:
        os.close(number)


@pytest.mark.parametrize("name", ["on_error", "on_close"])
def test_a_call_back_that_cannot_be_called_is_refused_before_anything_is_taken(name: str) -> None:
    ours, near = socket.socketpair()
    with ours, near:
        with pytest.raises(ConfigError) as caught:
            connect(ours, "null:", **{name: 3})  # type: ignore[arg-type]
        assert caught.value.field == name
        assert is_open(ours.fileno())


def in_another_loop(call: Callable[[], object], loop_name: str) -> BaseException | None:
    """What it raises in a coroutine of a new loop in this thread."""

    async def attempt() -> BaseException | None:
        try:
            call()
        except BaseException as error:
            return error
        return None

    factory = asyncio.new_event_loop if loop_name == "asyncio" else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(attempt())


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("there", ["asyncio", "uvloop"])
async def test_a_connection_of_another_loop_is_refused_and_lives_on(
    any_loop: str, there: str, debug: bool, leak_check: None
) -> None:
    asyncio.get_running_loop().set_debug(debug)
    ours, near = socket.socketpair()
    near.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours)
    for given in ((reader, writer), writer.transport):
        for name, call in (
            ("socket", lambda given=given: create_bridge(socket=given, sink="null:", credentials=PSK)),
            ("sink", lambda given=given: connect("null:", given)),
        ):
            error = await asyncio.to_thread(in_another_loop, call, there)
            assert isinstance(error, ConfigError), repr(error)
            assert (error.field, error.reason) == (name, "other_loop")
    loop = asyncio.get_running_loop()
    with near:
        async with asyncio.timeout(20):
            writer.write(b"still mine")
            assert await loop.sock_recv(near, 10) == b"still mine"
            await loop.sock_sendall(near, b"and theirs")
            assert await reader.readexactly(10) == b"and theirs"
        writer.close()
        await writer.wait_closed()
