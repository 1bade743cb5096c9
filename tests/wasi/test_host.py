"""What a guest has of its host: what it is given, and nothing else; and how it ends."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import ApiMisuseError, ConfigError, ResourceLimit, RpcDeadline, SapperError
from sapper.tls import Credentials, TlsConfig
from support.wasi import guest

sapper_wasi = pytest.importorskip("sapper_wasi", reason="sapper-wasi is not built: make wasi")

Lines = Callable[..., list[str]]


# -- what it is given ----------------------------------------------------------------------------------


def test_arguments_begin_with_the_programs_name(p2: Any, lines: Lines) -> None:
    assert lines(p2, "args", "--two", "three words") == ["probe_p2", "args", "--two", "three words"]


def test_its_environment_is_only_what_is_given(
    p2: Any, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPPER_SECRET", "not for guests")
    assert lines(p2, "env") == []
    assert lines(p2, "env", env={"A": "1", "B": "ä"}) == ["A=1", "B=ä"]


def test_standard_streams(p2: Any) -> None:
    everything = bytes(range(256)) * 1000
    done = sapper_wasi.run(p2, args=["stdin"], stdin=everything, timeout=30.0)
    assert done == sapper_wasi.Result(0, everything, b"256000 bytes\n", None)
    done = sapper_wasi.run(p2, args=["stdin"], stdin=b"x", stdout="discard", stderr="discard")
    assert done == sapper_wasi.Result(0, None, None, None)


def test_standard_streams_of_this_process(p2: Any, capfd: pytest.CaptureFixture[str]) -> None:
    done = sapper_wasi.run(p2, args=["args"], stdout="inherit", stderr="inherit")
    assert (done.stdout, done.stderr) == (None, None)
    assert capfd.readouterr().out == "probe_p2\nargs\n"


def test_folders_are_there_only_when_they_are_given(p2: Any, lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_text("content")
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    assert lines(p2, "read-file", tmp_path / "inside" / "file")[0].startswith("error: ")
    read_only = {"dirs": [{"host": tmp_path / "inside", "guest": "/data"}]}
    assert lines(p2, "read-file", "/data/file", **read_only) == ["content"]
    for path in ("/data/../outside", "/data/link", str(tmp_path / "outside")):
        assert lines(p2, "read-file", path, **read_only)[0].startswith("error: "), path
    assert lines(p2, "write-file", "/data/new", **read_only)[0].startswith("error: ")
    writable = {"dirs": [sapper_wasi.Dir(host=tmp_path / "inside", guest="/data", writable=True)]}
    assert lines(p2, "write-file", "/data/new", **writable) == ["written"]
    assert (tmp_path / "inside" / "new").read_text() == "written"


# -- the network ---------------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Any:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_there_is_no_network_without_a_rule(p2: Any, p3: Any, lines: Lines, listening: int) -> None:
    assert lines(p2, "connect", f"127.0.0.1:{listening}") == ["error: PermissionDenied"]
    assert lines(p2, "lookup", "localhost") == ["error: looking localhost up: access-denied"]
    assert lines(p3, "handshake", "localhost", listening, "localhost") == ["lookup: ErrorCode::AccessDenied"]


def test_a_rule_allows_what_it_says(p2: Any, lines: Lines, listening: int) -> None:
    to = f"127.0.0.1:{listening}"
    for rule in (to, "127.0.0.0/8:*", f"127.0.0.1:{listening - 1}-{listening}"):
        assert lines(p2, "connect", to, allow_net=rule) == ["connected"], rule
    for rule in (f"127.0.0.1:{listening - 1}", "10.0.0.0/8:*", f"localhost:{listening}", "[::1]:*"):
        assert lines(p2, "connect", to, allow_net=[rule]) == ["error: PermissionDenied"], rule


def test_a_name_allows_its_addresses_on_its_ports(p2: Any, lines: Lines, listening: int) -> None:
    allowed = {"allow_net": [f"localhost:{listening}"]}
    assert lines(p2, "lookup", "localhost", **allowed) == ["addresses"]
    assert lines(p2, "lookup", "LocalHost", **allowed) == ["addresses"]
    assert lines(p2, "lookup", "example.org", **allowed) == ["error: looking example.org up: access-denied"]
    assert lines(p2, "connect", f"localhost:{listening}", **allowed) == ["connected"]
    other = lines(p2, "connect", f"localhost:{listening}", allow_net=[f"localhost:{listening + 1}"])
    assert other == ["error: PermissionDenied"]


def test_what_one_run_learned_is_not_known_to_the_next(p2: Any, lines: Lines, listening: int) -> None:
    rules = [f"localhost:{listening}"]
    assert lines(p2, "connect", f"localhost:{listening}", allow_net=rules) == ["connected"]
    assert lines(p2, "connect", f"127.0.0.1:{listening}", allow_net=rules) == ["error: PermissionDenied"]


def test_guests_neither_listen_nor_send_datagrams(p2: Any, lines: Lines) -> None:
    assert lines(p2, "listen", allow_net="127.0.0.1:*") == ["error: PermissionDenied"]
    assert lines(p2, "udp", allow_net="127.0.0.1:*")[0].startswith("error: ")


# -- how it ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_an_exit_code_is_told(p2: Any, p3: Any, code: int) -> None:
    assert sapper_wasi.run(p3, args=["exit", str(code)]).exit_code == code
    # Rust's library for WASI 0.2 says no more than whether it went well.
    assert sapper_wasi.run(p2, args=["exit", str(code)]).exit_code == min(code, 1)


def test_a_run_that_fails_has_code_1(p3: Any) -> None:
    assert sapper_wasi.run(p3, args=["fail"]).exit_code == 1


def test_a_panic_is_told_with_what_was_said(p2: Any) -> None:
    with pytest.raises(sapper_wasi.GuestTrapped) as raised:
        sapper_wasi.run(p2, args=["panic"])
    assert b"this guest panics" in raised.value.stderr
    assert raised.value.reason == "trapped"
    assert "unreachable" in str(raised.value)
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.stderr) == (str(raised.value), raised.value.stderr)


@pytest.mark.parametrize("which", ["p2", "p3"])
def test_a_guest_that_computes_for_ever_meets_its_deadline(
    which: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(RpcDeadline) as raised:
        sapper_wasi.run(request.getfixturevalue(which), args=["spin"], timeout=0.3)
    assert raised.value.reason == "timeout"


def test_a_guest_that_sleeps_meets_its_deadline(p2: Any) -> None:
    with pytest.raises(RpcDeadline):
        sapper_wasi.run(p2, args=["sleep"], timeout=0.1)


def test_many_that_compute_do_not_hold_up_another(p2: Any, lines: Lines) -> None:
    def spin() -> None:
        with pytest.raises(RpcDeadline):
            sapper_wasi.run(p2, args=["spin"], timeout=5.0)

    threads = [threading.Thread(target=spin) for _ in range(16)]
    for thread in threads:
        thread.start()
    assert lines(p2, "args") == ["probe_p2", "args"]
    assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(30)


def test_fuel_is_counted_and_runs_out(p2: Any) -> None:
    done = sapper_wasi.run(p2, args=["args"], fuel=10_000_000)
    assert 1000 < done.fuel < 10_000_000
    with pytest.raises(ResourceLimit) as raised:
        sapper_wasi.run(p2, args=["spin"], fuel=100_000)
    assert raised.value.reason == "fuel"


def test_memory_is_limited(p2: Any, lines: Lines) -> None:
    assert lines(p2, "memory", 20_000_000) == ["20000000"]
    with pytest.raises(ResourceLimit) as raised:
        sapper_wasi.run(p2, args=["memory", "20000000"], memory=10 << 20)
    assert raised.value.reason == "memory"


def test_what_is_kept_is_limited(p2: Any) -> None:
    done = sapper_wasi.run(p2, args=["print", "99999"], capture=100_000)
    assert len(done.stdout) == 99_999
    with pytest.raises(ResourceLimit) as raised:
        sapper_wasi.run(p2, args=["print", "200000"], capture=100_000)
    assert raised.value.reason == "capture"


def test_handles_are_limited(p2: Any) -> None:
    with pytest.raises(sapper_wasi.GuestTrapped):
        sapper_wasi.run(p2, args=["handles"], timeout=30.0)


# -- on an event loop ----------------------------------------------------------------------------------


async def test_many_run_on_an_event_loop(p3: Any, any_loop: str) -> None:
    done = await asyncio.gather(*(sapper_wasi.run_async(p3, args=["exit", str(n)]) for n in range(20)))
    assert [one.exit_code for one in done] == list(range(20))


@pytest.mark.parametrize("what", ["spin", "sleep"])
async def test_cancelling_ends_the_guest(p2: Any, any_loop: str, what: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    task = asyncio.ensure_future(sapper_wasi.run_async(p2, args=[what]))
    await asyncio.wait([task], timeout=0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # the runtime's own, at the first run


async def test_errors_come_from_the_await(any_loop: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        await sapper_wasi.run_async(tmp_path / "nothing.wasm")
    assert raised.value.field == "guest"


# -- mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"allow_net": ["example.org"]}, "allow_net"),
        ({"dirs": [{"host": "/nonexistent", "guest": "/x"}]}, "dirs"),
        ({"dirs": [{"host": "/tmp"}]}, "dirs.0.guest"),
        ({"memory": 0}, "memory"),
        ({"fuel": True}, "fuel"),
        ({"timeout": 0.0}, "timeout"),
        ({"stdout": "file"}, "stdout"),
        ({"tls": 5}, "tls"),
        ({"tls": {"a b": TlsConfig()}}, "tls"),
        ({"tls": {"a": 5}}, "tls.a"),
        ({"tls": Credentials.psk_lookup(lambda _: None)}, "tls.*"),
        ({"network": True}, "network"),
    ],
)
def test_a_mistake_names_its_option(p2: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        sapper_wasi.run(p2, args=["args"], **options)
    assert raised.value.field == field


def test_what_is_no_guest(tmp_path: Path) -> None:
    core = b"\0asm\x01\0\0\0"
    library = b"\0asm\x0d\0\x01\0"
    for content, words in (
        (b"", "no WebAssembly component"),
        (b"#!/bin/sh\n", "no WebAssembly component"),
        (core, "wasm32-wasip2"),
        (library, "exports no wasi:cli/run"),
        (library + b"\xff" * 20, "cannot be compiled"),
        (guest("probe_p2").read_bytes()[:-1000], "cannot be compiled"),
    ):
        with pytest.raises(ConfigError, match=words) as raised:
            sapper_wasi.Guest(content)
        assert raised.value.field == "guest"
    with pytest.raises(ConfigError, match="No such file"):
        sapper_wasi.Guest(tmp_path / "nothing")


def test_which_wasi_a_guest_is_of(p2: Any, p3: Any) -> None:
    assert (p2.wasi, p3.wasi) == ("0.2", "0.3")


def _in_a_child(path: str) -> str:
    try:
        sapper_wasi.run(path, args=["args"])
    except ApiMisuseError as error:
        return str(error.reason)
    return "it ran"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_refused_in_words(p2: Any) -> None:
    assert sapper_wasi.run(p2, args=["args"]).exit_code == 0
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_in_a_child, (str(guest("probe_p2")),)) == "forked"


def test_options_are_read_from_a_file(p2: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("from the file")
    (tmp_path / "run.toml").write_text(
        'args = ["read-file", "/data/file"]\ntimeout = 20.0\n[[dirs]]\nhost = "data"\nguest = "/data"\n'
    )
    options = sapper_wasi.RunOptions.from_toml(tmp_path / "run.toml")
    assert sapper_wasi.run(p2, options).stdout == b"from the file"
    assert sapper_wasi.run(p2, options, args=["args"]).stdout == b"probe_p2\nargs\n"


def test_nothing_is_left_behind(p2: Any) -> None:
    sapper_wasi.run(p2, args=["args"])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        sapper_wasi.run(p2, args=["args"])
    assert len(os.listdir("/proc/self/fd")) <= before


def test_errors_of_the_host_are_sappers(p2: Any) -> None:
    assert issubclass(sapper_wasi.GuestTrapped, SapperError)
    started = time.monotonic()
    with pytest.raises(SapperError):
        sapper_wasi.run(p2, args=["sleep"], timeout=0.05)
    assert time.monotonic() - started < 30
