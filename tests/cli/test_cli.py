"""The command line: what it joins, what it prints for people and programs, how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sapper import __version__
from sapper.cli import app
from sapper.endpoint import TcpListen, TlsListen, parse
from sapper.errors import ErrorKind
from sapper.testing import ThrowawayCertificates, throwaway_certificates

KEY = "00112233445566778899aabbccddeeff" * 2


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    more.setdefault("env", {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"})
    return subprocess.run(
        [sys.executable, "-m", "sapper.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **more,
    )


def run_when_it_listens(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Runs it until the other side, just started, is there."""
    for _ in range(30):
        done = run(*arguments, **more)
        if '"kind":"connect"' not in done.stdout:
            break
    return done


@contextmanager
def started(*arguments: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "sapper.cli", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_time_to_connect_has_its_use_with_seqpacket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with ExitStack() as ours:
        listening = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listening.bind(path)
        listening.listen(0)
        with suppress(BlockingIOError):
            while True:
                other = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                other.setblocking(False)
                other.connect(path)
        done = run("bridge", "counter:", f"seqpacket:{path}", "--connect-timeout", "0.1", "--json")
    assert lines(done.stdout)[-1]["error"]["kind"] == "connect_deadline", (done.stdout, done.stderr)


def test_version() -> None:
    done = run("version", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["sapper"] == __version__
    assert __version__ in run("version").stdout


def test_help_names_every_exit_code() -> None:
    for command in ((), ("bridge",), ("demo",)):
        text = re.sub(r"\s+", " ", run(*command, "--help").stdout)
        assert "Usage" in text
        for kind in ErrorKind:
            assert re.search(rf"\b{kind.exit_code}\b", text.split("Exit codes:")[1]), (command, kind)


def _commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in getattr(group, "commands", {}).items():
        if hasattr(command, "commands"):
            yield from _commands(command, *names, name)
        else:
            yield (*names, name), command


def test_help_cuts_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    runner = CliRunner()
    commands = [*_commands(typer.main.get_command(app))]
    assert ("tunnel", "serve") in [names for names, _ in commands]
    for names, command in commands:
        text = runner.invoke(app, [*names, "--help"]).stdout
        assert all(len(line) <= 80 for line in text.splitlines()), names
        for param in command.params:
            if param.param_type_name == "option":
                for option in (*param.opts, *param.secondary_opts):
                    assert re.search(rf"(?m)^ .*{option}\b", text), (names, option)


def test_two_endpoints_without_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with started("bridge", f"tcp://127.0.0.1:{port}", "stdio:", "--quiet") as process:
            far, _ = listener.accept()
            assert process.stdin is not None
            assert process.stdout is not None
            with far:
                process.stdin.write(b"to the network")
                process.stdin.flush()
                assert far.recv(14, socket.MSG_WAITALL) == b"to the network"
                far.sendall(b"and back")
                far.shutdown(socket.SHUT_WR)
                process.stdin.close()
                process.stdin = None
                assert process.stdout.read() == b"and back"
            assert process.wait(20) == 0


def test_tls_with_certificates_and_json(
    made: ThrowawayCertificates, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    for name, content in zip(("chain", "key"), made.server, strict=True):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "roots").write_bytes(made.authority)
    port = free_port()
    server = (
        "bridge", f"tls-listen://127.0.0.1:{port}", f"file:{tmp_path / 'out'}?mode=w", "--json",
        "--cert", str(tmp_path / "chain"), "--key", str(tmp_path / "key"), "--direction", "decrypt-only",
    )  # fmt: skip
    with started(*server) as listening:
        assert listening.stdout is not None
        assert json.loads(listening.stdout.readline())["event"] == "opening"
        (tmp_path / "in").write_bytes(bytes(100_000))
        client = ("bridge", f"file:{tmp_path / 'in'}", f"tls://localhost:{port}", "--json")
        done = run_when_it_listens(*client, "--roots", str(tmp_path / "roots"))
        told = lines(done.stdout)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert [one["event"] for one in told if one["event"] != "stats"] == ["opening", "handshake", "closed"]
        assert told[1]["version"] == "TLSv1.3"
        assert told[-1]["error"] is None
        moved = told[-1]["stats"]["encapsulate"]
        assert moved["bytes"] == 100_000
        assert len(moved["latency"]["counts"]) == len(moved["latency"]["bounds"]) + 1
        assert sum(moved["latency"]["counts"]) > 0
        assert listening.wait(20) == 0
    assert (tmp_path / "out").read_bytes() == bytes(100_000)


def test_a_wrong_certificate_has_its_exit_code_and_says_what_to_do(
    made: ThrowawayCertificates, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=_serve_tls, args=(listener, made))
        thread.start()
        done = run("bridge", f"tls://localhost:{port}", "null:")
        thread.join()
    assert done.returncode == ErrorKind.CERTIFICATE.exit_code, done.stderr
    assert "--roots" in done.stderr
    assert done.stdout == ""


def _serve_tls(listener: socket.socket, made: ThrowawayCertificates) -> None:
    from sapper.errors import SapperError
    from sapper.tls import create_bridge

    connection, _ = listener.accept()
    bridge = create_bridge(
        socket=connection, sink="null:", credentials=made.server_credentials(), server_side=True
    )
    with suppress(SapperError):
        bridge.handshake_sync()
    bridge.stop()
    bridge.wait_closed_sync(20)


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (["nonsense", "null:"], ErrorKind.CONFIG, "A: 'nonsense' is no endpoint"),
        (["null:", "tcp://h"], ErrorKind.CONFIG, "B: "),
        (["tun:x", "null:", "--framing", "raw"], ErrorKind.CONFIG, "framing"),
        (["null:", "null:", "--cert", "x"], ErrorKind.CONFIG, "--cert: needs a tls:"),
        (["tls-listen://:0", "null:", "--cert", "x"], ErrorKind.CONFIG, "belong together"),
        (["null:", "null:", "--server-name", "x"], ErrorKind.CONFIG, "--server-name: needs a tls:"),
        (["tls-listen://:0", "null:"], ErrorKind.CONFIG, "needs --cert"),
        (["tls://h:1", "null:", "--psk-identity", "x"], ErrorKind.CONFIG, "SAPPER_PSK"),
        (
            ["tls://h:1", "null:", "--ticket-lifetime", "60"],
            ErrorKind.CONFIG,
            "--ticket-lifetime: is for a server",
        ),
        (
            ["tls://h:1", "null:", "--client-auth", "required"],
            ErrorKind.CONFIG,
            "--client-auth: is for a server",
        ),
        (["tls-listen://:0", "null:", "--ocsp", "require"], ErrorKind.CONFIG, "--ocsp: is for a client"),
        (["null:", "null:", "--tap-filter", "tcp"], ErrorKind.CONFIG, "--tap-filter: belongs to --tap"),
        (["null:", "null:", "--config", "/no/such/file"], ErrorKind.CONFIG, "cannot read"),
        (["tcp://127.0.0.1:1", "null:"], ErrorKind.CONNECT, "try: check that the peer listens"),
        (["file:/no/such/file", "null:"], ErrorKind.DEVICE, "A: "),
    ],
)
def test_a_mistake_names_its_argument(arguments: list[str], kind: ErrorKind, says: str) -> None:
    done = run("bridge", *arguments)
    assert done.returncode == kind.exit_code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_key_names_where_it_came_from(tmp_path: Path) -> None:
    arguments = ("bridge", "tls://127.0.0.1:1", "null:", "--psk-identity", "x")
    done = run(*arguments, "--json", env={**os.environ, "SAPPER_PSK": "aabb"})
    assert done.returncode == ErrorKind.CONFIG.exit_code
    assert json.loads(done.stderr)["error"]["field"] == "SAPPER_PSK"
    (tmp_path / "short").write_text("aabb")
    (tmp_path / "odd").write_text(KEY[:-1] + "\n")
    (tmp_path / "empty").write_text("\n")
    for name, says in (
        ("short", "16"),
        ("odd", "hexadecimal digits"),
        ("empty", "holds no key"),
        ("gone", "is no file"),
    ):
        done = run(*arguments, "--psk-file", str(tmp_path / name), "--json")
        error = json.loads(done.stderr)["error"]
        assert error["field"] == "--psk-file", error
        assert says in error["message"]
    toml = tmp_path / "b.toml"
    toml.write_text('[tls.credentials]\nkind = "psk"\nidentity = "x"\nkey_file = "odd"\n')
    done = run(*arguments[:3], "--config", str(toml), "--json")
    error = json.loads(done.stderr)["error"]
    assert error["field"] == "--config", error
    assert "hexadecimal digits" in error["message"]


def test_an_empty_list_of_protocols_is_refused() -> None:
    done = run("bridge", "tls://127.0.0.1:1", "null:", "--alpn", "", "--json")
    assert done.returncode == ErrorKind.CONFIG.exit_code
    assert json.loads(done.stderr)["error"]["field"] == "--alpn"


@pytest.mark.parametrize(("closed", "says"), [("<&-", "standard input"), (">&-", "standard output")])
def test_a_standard_stream_that_is_closed(closed: str, says: str) -> None:
    command = f'exec "$0" -m sapper.cli bridge stdio: null: {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == ErrorKind.CONFIG.exit_code, done.stderr
    assert f"A: {says} is not open" in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("form", ["", "--json"])
def test_a_bridge_works_where_nobody_can_be_told(closed: str, form: str, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"payload" * 1000)
    command = f'exec "$0" -m sapper.cli bridge "file:$1?mode=r" "file:$2?mode=w" {form} {closed}'
    words = ["/bin/sh", "-c", command, sys.executable, str(source), str(copy)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == source.read_bytes()
    assert "Traceback" not in done.stderr
    # A mistake has its code all the same.
    wrong = ["/bin/sh", "-c", f'exec "$0" -m sapper.cli bridge nonsense null: {closed}', sys.executable]
    assert subprocess.run(wrong, timeout=60, check=False).returncode == ErrorKind.CONFIG.exit_code


def test_a_wrong_filter_of_a_tap_is_named(tmp_path: Path) -> None:
    words = ("counter:", "counter:", "--tap", str(tmp_path / "tap"), "--tap-filter", "foo")
    done = run("bridge", *words)
    assert done.returncode == ErrorKind.CONFIG.exit_code
    assert "error: --tap-filter: at byte 0: " in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
def test_the_port_that_the_system_chose_is_told(host: str) -> None:
    with started("bridge", "null:", f"tcp-listen://{host}:0", "--json") as process:
        assert process.stdout is not None
        end = parse(json.loads(process.stdout.readline())["b"])
        assert isinstance(end, TcpListen)
        address = "localhost" if end.host == "::" else end.host
        with socket.create_connection((address, end.port), timeout=20):
            assert json.loads(process.stdout.readline())["event"] == "open"
        assert process.wait(20) == 0
    with started("bridge", f"tcp-listen://{host}:0", "null:") as process:
        assert process.stderr is not None
        text = process.stderr.readline().decode()
        assert re.match(r"tcp-listen://.+:[1-9][0-9]* <-> null:", text), text


def test_the_chosen_port_of_a_tls_server(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    options = ("--json", "--psk-identity", "x", "--psk-file", str(tmp_path / "key"))
    with started("bridge", "tls-listen://127.0.0.1:0?alpn=h2", "null:", *options) as server:
        assert server.stdout is not None
        end = parse(json.loads(server.stdout.readline())["a"])
        assert isinstance(end, TlsListen)
        done = run("bridge", f"tls://127.0.0.1:{end.port}?alpn=h2", "file:/dev/null", *options)
        assert done.returncode == 0, done.stdout
        assert json.loads(server.stdout.readline())["alpn"] == "h2"
        assert server.wait(20) == 0


def test_figures_while_it_runs(tmp_path: Path) -> None:
    """Over TCP at the port that the system chose, and over a Unix socket of our own user's."""
    unix = tmp_path / "figures"
    asked = ("--metrics", "127.0.0.1:0", "--metrics", f"unix:{unix}")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with started("bridge", f"tcp://127.0.0.1:{port}", "null:", *asked, "--json") as process:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            assert told["event"] == "opening"
            where = int(told["metrics"][0].rsplit(":", 1)[1])
            far, _ = listener.accept()
            with far:
                far.sendall(bytes(12_345))

                def page(path: str) -> str:
                    with socket.create_connection(("127.0.0.1", where), timeout=20) as one:
                        one.sendall(
                            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
                        )
                        return b"".join(iter(lambda: one.recv(65_536), b"")).decode()

                # Counted a moment after it was sent.
                deadline = time.monotonic() + 20
                line = 'sapper_bridge_bytes_total{bridge="bridge",direction="decapsulate"} 12345\n'
                while line not in page("/metrics"):
                    assert time.monotonic() < deadline, page("/metrics")
                status = json.loads(page("/status").split("\r\n\r\n", 1)[1])
                assert status["pumps"]["bridge"]["decapsulate"]["bytes"] == 12_345
                assert unix.stat().st_mode & 0o777 == 0o600
            assert process.wait(20) == 0
    assert not unix.exists()


def test_where_figures_cannot_be_told_the_option_is_named() -> None:
    done = run("bridge", "null:", "null:", "--metrics", "0.0.0.0:0", "--json")
    assert done.returncode == ErrorKind.CONFIG.exit_code, (done.stdout, done.stderr)
    assert "--metrics" in done.stdout + done.stderr


def test_a_fifo_waits_for_its_writer_and_not_for_its_reader(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = run("bridge", "null:", f"file:{fifo}?mode=w", "--json")
    assert done.returncode == ErrorKind.DEVICE.exit_code
    error = json.loads(done.stderr)["error"]
    assert (error["field"], error["reason"]) == ("B", "no_reader")
    assert "nobody reads" in error["message"]
    with started("bridge", f"file:{fifo}", "stdio:", "--json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while json.loads(process.stderr.readline())["event"] != "open":
            pass
        # Fails where the bridge took the absence of writers for the end.
        writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"first and last")
        os.close(writer)
        assert process.stdout.read() == b"first and last"
        assert process.wait(20) == 0


def test_an_unknown_option_is_a_usage_error() -> None:
    assert run("bridge", "null:", "null:", "--nonsense").returncode == 2


def test_errors_are_json_where_asked() -> None:
    done = run("bridge", "nonsense", "null:", "--json")
    assert json.loads(done.stderr)["error"]["field"] == "A"
    done = run("bridge", "tcp://127.0.0.1:1", "null:", "--json")
    told = lines(done.stdout)[-1]
    assert (told["event"], told["error"]["kind"]) == ("closed", "connect")


@pytest.mark.parametrize("how", ["environment", "file", "toml"])
def test_a_pre_shared_key_comes_from_outside_and_never_shows(
    how: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    environment = {**os.environ, "NO_COLOR": "1"}
    options = ["--psk-identity", "x", "--max-tls", "1.2"]
    if how == "environment":
        environment["SAPPER_PSK"] = KEY
    elif how == "file":
        (tmp_path / "key").write_text(KEY)
        options += ["--psk-file", str(tmp_path / "key")]
    else:
        (tmp_path / "key").write_text(KEY)
        (tmp_path / "b.toml").write_text(
            '[tls]\nmax_version = "TLSv1.2"\n'
            '[tls.credentials]\nkind = "psk"\nidentity = "x"\nkey_file = "key"\n'
            "[bridge]\nidle_timeout = 30\n"
        )
        options = ["--config", str(tmp_path / "b.toml")]
    listening = f"tls-listen://127.0.0.1:{port}"
    with started("bridge", listening, "null:", "--json", *options, env=environment) as server:
        assert server.stdout is not None
        server.stdout.readline()
        client = ("bridge", f"tls://127.0.0.1:{port}", "file:/dev/null", "--json", *options)
        done = run_when_it_listens(*client, env=environment)
        assert done.returncode == 0, done.stderr + done.stdout
        handshake = next(one for one in lines(done.stdout) if one["event"] == "handshake")
        assert handshake["engine"] == "openssl"
        assert KEY not in done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_ends_with_success(number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with started("bridge", f"tcp://127.0.0.1:{port}", "null:", "--json") as process:
            far, _ = listener.accept()
            assert process.stdout is not None
            with far:
                while json.loads(process.stdout.readline())["event"] != "open":
                    pass
                process.send_signal(number)
                told = [json.loads(line) for line in process.stdout]
                assert [one["event"] for one in told] == ["stopping", "closed"]
                assert process.wait(20) == 0


def test_a_second_ctrl_c_ends_at_once() -> None:
    (ours, theirs), sink = socket.socketpair(), socket.socketpair()
    with ours, theirs, sink[0], sink[1]:
        sink[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        command = ("bridge", f"fd:{theirs.fileno()}", f"fd:{sink[0].fileno()}", "--json", "--drain", "60")
        with started(*command, pass_fds=(theirs.fileno(), sink[0].fileno())) as process:
            assert process.stdout is not None
            while json.loads(process.stdout.readline())["event"] != "open":
                pass
            ours.sendall(bytes(65_536))  # more than the sink takes, so that it is never flushed
            process.send_signal(signal.SIGINT)
            assert json.loads(process.stdout.readline())["event"] == "stopping"
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130


def test_the_demo_runs_and_sums_up() -> None:
    done = run("demo", "--seconds", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = lines(done.stdout)
    assert told[0]["event"] == "begin"
    summary = told[-1]
    assert summary["event"] == "summary"
    assert {(one["scene"], one["pump"]) for one in summary["runs"]} == {
        (scene, pump) for scene in told[0]["scenes"] for pump in ("sapper", "asyncio")
    }
    for one in summary["runs"]:
        assert one["bytes"] > 0
        assert one["torn"] == 0
    assert all(summary["sapper_to_asyncio"].values())


@pytest.mark.needs("setpriv")
def test_the_demo_runs_without_rights() -> None:
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    command = [
        setpriv,
        "--bounding-set",
        "-all",
        "--inh-caps",
        "-all",
        sys.executable,
        "-m",
        "sapper.cli",
        "demo",
    ]
    done = subprocess.run(
        [*command, "--seconds", "2"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "packets:" in done.stdout
    assert "of the asyncio pump" in done.stdout


def test_credentials_of_every_kind_are_taken(made: ThrowawayCertificates, tmp_path: Path) -> None:
    (tmp_path / "roots.pem").write_bytes(made.authority)
    (tmp_path / "x.p12").write_bytes(b"garbage")
    for options, field in [
        (("--pkcs12", str(tmp_path / "x.p12")), "--pkcs12"),
        (("--pkcs12", str(tmp_path / "x.p12"), "--psk-identity", "x"), "--pkcs12"),
        (("--roots", str(tmp_path / "roots.pem"), "--allow", "dns:*"), "--allow"),
        (("--roots", str(tmp_path / "roots.pem"), "--allow", "name:x"), "--allow"),
        (("--roots", str(tmp_path / "roots.pem"), "--crl", str(tmp_path / "none")), "--crl"),
        (("--crl", str(tmp_path / "roots.pem")), "--crl"),
        (("--danger-accept-any-certificate", "--ocsp", "require"), "--ocsp"),
    ]:
        done = run("bridge", "tls://localhost:1", "null:", "--json", *options)
        assert done.returncode == 2, done.stderr
        assert json.loads(done.stderr)["error"]["field"] == field


@pytest.mark.parametrize(
    ("words", "field", "said"),
    [
        (("bridge", "null:", "null:", "--ocsp", "maybe"), "--ocsp", "'maybe' is not one of 'off', 'check'"),
        (("proxy", ":0", "x:1", "--max-connections", "0"), "--max-connections", "greater than or equal to 1"),
        (("bridge", "null:", "null:", "--max-packet", "many"), "--max-packet", "a valid integer"),
        (("bridge", "null:"), "B", "is required"),
        (("bridge", "--grup", "x"), "--grup", "there is no such option; there is --group"),
        (("bridge", "--tap"), "--tap", "requires an argument"),
        (("proxy", "status"), "ADDRESS", "is required"),
        (("tunnel", "serve", "--port", "x"), "--port", "a valid integer"),
        (("expose", "3000", "--max-streams", "x"), "--max-streams", ""),
        (("brigde",), None, "no such command"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_read_is_told_like_every_other_mistake(
    words: tuple[str, ...], field: str | None, said: str
) -> None:
    for_people = run(*words)
    assert (for_people.returncode, for_people.stdout) == (2, "")
    first, second = for_people.stderr.splitlines()
    assert first.startswith(f"error: {field}: " if field else "error: ")
    assert said in first
    assert re.fullmatch(r"try: sapper.* --help", second)
    if words in (("brigde",), ("bridge", "--tap")):
        return  # there --json would be something else
    for_programs = run(*words, "--json")
    assert (for_programs.returncode, for_programs.stdout) == (2, "")
    event = json.loads(for_programs.stderr)
    assert (event["event"], event["error"]["kind"], event["error"]["field"]) == ("error", "config", field)
    assert said in event["error"]["message"]
    assert re.match(r"\d{4}-\d\d-\d\dT", event["time"])
