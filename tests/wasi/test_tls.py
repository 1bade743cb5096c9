"""``wasi:tls`` of both drafts, as guests see it: handshakes, payload, ends, and each error in its words."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapper.tls import Credentials, TlsConfig
from support.certs import Certificates
from support.wasi import tls_server

sapper_wasi = pytest.importorskip("sapper_wasi", reason="sapper-wasi is not built: make wasi")

Lines = Callable[..., list[str]]


@pytest.fixture
def options(certs: Certificates) -> dict[str, Any]:
    return {"allow_net": "localhost:*", "tls": TlsConfig(roots=certs.ca.cert)}


# -- draft 0.2 -----------------------------------------------------------------------------------------


def test_p2_the_future_says_nothing_then_the_streams_then_an_error(
    p2: Any, lines: Lines, certs: Certificates, options: dict[str, Any]
) -> None:
    with tls_server("echo", certs.server) as port:
        said = lines(p2, "finish-twice", "localhost", port, "localhost", **options)
    assert said == ["at first: none", "then: streams", "again: some(err)"]


@pytest.mark.parametrize("count", [1, 100_000, 5_000_000])
def test_p2_payload_without_a_flush(
    p2: Any, lines: Lines, certs: Certificates, options: dict[str, Any], count: int
) -> None:
    with tls_server("echo", certs.server) as port:
        said = lines(p2, f"echo-{count}", "localhost", port, "localhost", **options)
    assert said == ["streams", "the same"]


def test_p2_closing_the_output_leaves_the_input(
    p2: Any, lines: Lines, certs: Certificates, options: dict[str, Any]
) -> None:
    with tls_server("swallow", certs.server) as port:
        said = lines(p2, "close-output", "localhost", port, "localhost", **options)
        assert said == ["streams", "1 bytes, then the end", "closed"]
        said = lines(p2, "upload", "localhost", port, "localhost", **options)
        assert said == ["streams", "7 bytes, then the end"]


def test_p2_what_was_cut_off_is_no_end(
    p2: Any, lines: Lines, certs: Certificates, options: dict[str, Any]
) -> None:
    with tls_server("say", certs.server) as port:
        said = lines(p2, "read", "localhost", port, "localhost", **options)
        assert said == ["streams", "10 bytes, then the end"]
    with tls_server("cut", certs.server) as port:
        _, said_last = lines(p2, "read", "localhost", port, "localhost", **options)
        assert said_last.startswith("10 bytes, then ")
        assert "close_notify" in said_last
        tolerant = options | {"tls": TlsConfig(roots=certs.ca.cert, danger_ignore_truncation=True)}
        said = lines(p2, "read", "localhost", port, "localhost", **tolerant)
        assert said == ["streams", "10 bytes, then the end"]


def test_p2_dropped_halves(p2: Any, lines: Lines, certs: Certificates, options: dict[str, Any]) -> None:
    heard: list[Any] = []
    with tls_server("echo", certs.server, heard=heard) as port:
        assert lines(p2, "drop-input", "localhost", port, "localhost", **options) == ["streams", "written"]
        assert lines(p2, "drop-all", "localhost", port, "localhost", **options) == ["streams"]
        assert lines(p2, "handshake", "localhost", port, "localhost", **options) == ["streams"]


# -- draft 0.3 -----------------------------------------------------------------------------------------


def test_p3_payload(p3: Any, lines: Lines, certs: Certificates, options: dict[str, Any]) -> None:
    with tls_server("echo", certs.server) as port:
        said = lines(p3, "echo", "localhost", port, "localhost", **options)
    assert said == ["connect: ok", "the same", "send: ok", "cleartext: 0 bytes", "receive: ok"]


def test_p3_closing_the_cleartext_is_a_close_notify(
    p3: Any, lines: Lines, certs: Certificates, options: dict[str, Any]
) -> None:
    heard: list[Any] = []
    with tls_server("swallow", certs.server, heard=heard) as port:
        said = lines(p3, "upload", "localhost", port, "localhost", **options)
    assert said == ["connect: ok", "left: 0", "send: ok", "cleartext: 7 bytes", "receive: ok"]
    assert not any(isinstance(one, OSError) for one in heard), heard


def test_p3_what_was_cut_off_is_no_end(
    p3: Any, lines: Lines, certs: Certificates, options: dict[str, Any]
) -> None:
    with tls_server("say", certs.server) as port:
        said = lines(p3, "read", "localhost", port, "localhost", **options)
        assert said == ["connect: ok", "cleartext: 10 bytes", "receive: ok"]
    with tls_server("cut", certs.server) as port:
        *said, last = lines(p3, "read", "localhost", port, "localhost", **options)
        assert said == ["connect: ok", "cleartext: 10 bytes"]
        assert last.startswith("receive: ")
        assert "close_notify" in last


def test_p3_dropped_halves(p3: Any, lines: Lines, certs: Certificates, options: dict[str, Any]) -> None:
    with tls_server("echo", certs.server) as port:
        said = lines(p3, "drop-answers", "localhost", port, "localhost", **options)
        assert said == ["connect: ok", "left: 0", "send: ok", "receive: ok"]
        assert lines(p3, "handshake", "localhost", port, "localhost", **options) == ["connect: ok"]


def test_p3_configured_twice(p3: Any, lines: Lines) -> None:
    assert lines(p3, "send-twice") == ["ciphertext: 0 bytes", "send: send already configured"]
    assert lines(p3, "receive-twice") == ["cleartext: 0 bytes", "receive: receive already configured"]


def test_p3_not_configured(p3: Any, lines: Lines) -> None:
    said = lines(p3, "nothing")
    assert said == ["connect: send() must be called before connect()"]
    said = lines(p3, "send-alone")
    assert said == [
        "connect: receive() must be called before connect()",
        "ciphertext: 0 bytes",
        "send: receive() must be called before connect()",
    ]
    said = lines(p3, "receive-alone")
    assert said == ["connect: send() must be called before connect()"]


def test_p3_an_invalid_name(p3: Any, lines: Lines) -> None:
    said = lines(p3, "bad-name")
    assert said == [
        "connect: invalid server name",
        "ciphertext: 0 bytes",
        "cleartext: 0 bytes",
        "receive: invalid server name",
        "send: invalid server name",
    ]


# -- both ----------------------------------------------------------------------------------------------


def refusal(program: Any, lines: Lines, port: int, name: str, options: dict[str, Any]) -> str:
    """What a guest hears of a handshake that fails; later results must say the same."""
    first, *rest = lines(program, "handshake", "localhost", port, name, **options)
    why = first.removeprefix("error: ").removeprefix("connect: ")
    assert why != first, first
    if program.wasi == "0.3":
        assert rest == ["cleartext: 0 bytes", f"receive: {why}", f"send: {why}"]
    return why


@pytest.mark.parametrize("which", ["p2", "p3"])
def test_handshakes_that_fail(
    which: str, request: pytest.FixtureRequest, lines: Lines, certs: Certificates, options: dict[str, Any]
) -> None:
    program = request.getfixturevalue(which)
    heard: list[Any] = []
    with tls_server("echo", certs.server, heard=heard) as port:
        assert "certificate" in refusal(program, lines, port, "elsewhere.test", options)
        assert "certificate" in refusal(program, lines, port, "localhost", options | {"tls": None})
        assert refusal(program, lines, port, "a b", options) == "invalid server name"
        named = options | {"tls": {"elsewhere.test": options["tls"]}}
        assert "no TLS configuration" in refusal(program, lines, port, "localhost", named)
    assert any(isinstance(one, ssl.SSLError) and "unknown ca" in str(one) for one in heard), heard
    with tls_server("echo", certs.expired) as port:
        assert "it was valid until" in refusal(program, lines, port, "localhost", options)


@pytest.mark.parametrize(("which", "what"), [("p2", "handshake"), ("p3", "handshake-alone")])
def test_a_peer_that_says_nothing_meets_the_deadline(
    which: str, what: str, request: pytest.FixtureRequest, lines: Lines, options: dict[str, Any]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        program = request.getfixturevalue(which)
        said = lines(program, what, "localhost", port, "localhost", **options, handshake_timeout=0.2)
    assert len(said) == 1
    assert "the TLS handshake took longer than 200ms" in said[0]


@pytest.mark.parametrize("which", ["p2", "p3"])
def test_the_host_shows_the_certificate_to_whom_it_is_meant_for(
    which: str, request: pytest.FixtureRequest, lines: Lines, certs: Certificates, options: dict[str, Any]
) -> None:
    program = request.getfixturevalue(which)
    heard: list[Any] = []
    mine = TlsConfig(
        credentials=Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
    )
    by_name = {"localhost": mine, "*": TlsConfig(roots=certs.ca.cert)}
    with tls_server("say", certs.server, clients=certs, heard=heard) as port:
        lines(program, "read", "localhost", port, "localhost", **options | {"tls": by_name})
    assert heard[0]["subjectAltName"] == (("DNS", "client.test"),)
    heard.clear()
    with tls_server("say", certs.server, clients=certs, heard=heard) as port:
        said = lines(program, "read", "localhost", port, "device.test", **options | {"tls": by_name})
    assert "certificate required" in said[-1] or "certificate_required" in said[-1], said
    assert isinstance(heard[0], ssl.SSLError)


@pytest.mark.parametrize("resumption", [True, False])
def test_sessions_are_resumed_from_one_run_to_the_next(
    p2: Any, certs: Certificates, options: dict[str, Any], resumption: bool
) -> None:
    tls = TlsConfig(roots=certs.ca.cert, resumption=resumption)
    chosen = sapper_wasi.RunOptions(**options | {"tls": tls})
    resumed: list[bool] = []
    with tls_server("say", certs.server, resumed=resumed) as port:
        for _ in range(2):
            args = ["read", "localhost", str(port), "localhost"]
            assert sapper_wasi.run(p2, chosen, args=args).stdout == b"streams\n10 bytes, then the end\n"
    assert resumed == [False, resumption], "as the server saw it"


def test_files_of_certificates_are_read_again(
    p2: Any, lines: Lines, certs: Certificates, tmp_path: Any
) -> None:
    roots = tmp_path / "roots.pem"
    roots.write_bytes(certs.other_ca.cert)
    chosen = sapper_wasi.RunOptions(allow_net="localhost:*", tls=TlsConfig(roots=roots))
    with tls_server("say", certs.server) as port:
        args = ["read", "localhost", str(port), "localhost"]
        assert b"certificate" in sapper_wasi.run(p2, chosen.model_copy(update={"args": args})).stdout
        roots.write_bytes(certs.ca.cert)
        same = sapper_wasi.RunOptions(**{**dict(chosen), "args": args})
        assert sapper_wasi.run(p2, same).stdout == b"streams\n10 bytes, then the end\n"
        roots.write_bytes(b"garbage")
        assert sapper_wasi.run(p2, same).stdout == b"streams\n10 bytes, then the end\n"


# -- warnings ------------------------------------------------------------------------------------------

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == "sapper.tls.key_log"]


@pytest.fixture
def full(options: dict[str, Any], certs: Certificates) -> dict[str, Any]:
    """Options of a guest whose secrets find no room."""
    sapper_wasi._native.take_log(True)  # repeated warnings are counted only: this begins anew
    return options | {"tls": TlsConfig(roots=certs.ca.cert, key_log_file=Path("/dev/full"))}


@needs_full
def test_warnings_of_a_guests_connections_are_in_the_programs_log(
    p2: Any, lines: Lines, certs: Certificates, full: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with tls_server("echo", certs.server) as port:
        assert lines(p2, "handshake", "localhost", port, "localhost", **full) == ["streams"]
    assert warned(caplog)
    assert "the key log cannot be written (path=/dev/full" in warned(caplog)[0]


@needs_full
async def test_warnings_are_told_while_the_guest_runs(
    p2: Any, certs: Certificates, full: dict[str, Any], any_loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    with tls_server("swallow", certs.server) as port:
        words = ["read", "localhost", str(port), "localhost"]
        running = asyncio.ensure_future(sapper_wasi.run_async(p2, args=words, timeout=30.0, **full))
        async with asyncio.timeout(20):
            while not warned(caplog):
                assert not running.done()
                await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


@needs_full
def test_warnings_are_told_while_a_thread_waits_for_the_guest(
    p2: Any, certs: Certificates, full: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    heard = threading.Event()

    class Ends(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.set()
            raise KeyboardInterrupt  # as Ctrl-C at this place: it ends the guest

    handler = Ends()
    logging.getLogger("sapper.tls.key_log").addHandler(handler)
    try:
        with tls_server("swallow", certs.server) as port:
            words = ["read", "localhost", str(port), "localhost"]
            with pytest.raises(KeyboardInterrupt):
                sapper_wasi.run(p2, args=words, timeout=30.0, **full)
    finally:
        logging.getLogger("sapper.tls.key_log").removeHandler(handler)
    assert heard.is_set()
