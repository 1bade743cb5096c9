"""``sapper proxy``: one command, signals, its journal, its figures, and a service manager around it."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from support import needs, pcapng, programs
from support.certs import Certificates
from support.services import Echo, echo, say

LATEST = 20.0


@pytest.fixture
def service() -> Iterator[Echo]:
    with echo() as one:
        yield one


def sapper(*arguments: str | os.PathLike[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sapper.cli", "proxy", *(os.fspath(one) for one in arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        **more,
    )


class Running:
    """A proxy in a process of its own, with the events that it has told."""

    def __init__(self, program: programs.Program) -> None:
        self.program = program
        self._taken = 0

    def event(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        while True:
            lines = self.program.output.split(b"\n")[:-1]
            while self._taken < len(lines):
                values: dict[str, Any] = json.loads(lines[self._taken])
                self._taken += 1
                if values["event"] == name:
                    return values
            self.program.wait_for(rb"(?:[^\n]*\n){%d}" % (self._taken + 1), LATEST)

    def signal(self, number: int) -> None:
        self.program.process.send_signal(number)


@contextmanager
def running(*arguments: str | os.PathLike[str], **more: Any) -> Iterator[tuple[Running, list[str]]]:
    """Starts it, and waits until it listens."""
    command = (sys.executable, "-m", "sapper.cli", "proxy", *arguments, "--json")
    with programs.run_program(*command, **more) as program:
        one = Running(program)
        yield one, one.event("listening")["listen"]


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def shake(address: str, certs: Certificates) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
    raw = socket.create_connection(("127.0.0.1", port_of(address)), timeout=LATEST)
    return context.wrap_socket(raw, server_hostname="localhost")


def own(certs: Certificates) -> tuple[str, ...]:
    return ("--cert", str(certs.server.cert_path), "--key", str(certs.server.key_path))


@pytest.mark.parametrize("as_json", [False, True], ids=["people", "json"])
def test_it_serves_on_where_nobody_reads_what_it_tells(
    certs: Certificates, service: Echo, *, as_json: bool
) -> None:
    port = programs.free_port()
    command = [sys.executable, "-m", "sapper.cli", "proxy", f"127.0.0.1:{port}", f"localhost:{service.port}"]
    command += [*own(certs), "--log-connections", *(["--json"] if as_json else [])]
    reading, writing = os.pipe()
    with ExitStack() as stack:
        proxy = subprocess.Popen(command, stdout=writing, stderr=writing)
        stack.callback(proxy.wait, LATEST)
        stack.callback(proxy.terminate)
        os.close(writing)
        told = b""
        while b"listening" not in told:
            told += os.read(reading, 4096)
        os.close(reading)
        for _ in range(3):  # the end of each is told to nobody
            with shake(f"127.0.0.1:{port}", certs) as client:
                assert client.recv(1)
        assert proxy.poll() is None


@pytest.mark.needs("curl")
def test_curl_through_one_command(certs: Certificates, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("behind TLS\n")
    server = (sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "-d", tmp_path)
    port = programs.free_port()
    with (
        programs.run_program(*server, str(port), port=port),
        running("127.0.0.1:0", f"localhost:{port}", *own(certs), "--log-connections") as (proxy, where),
    ):
        url = f"https://localhost:{port_of(where[0])}/page"
        curl = [needs.program("curl"), "-sS", "--cacert", str(certs.ca.cert_path), url, url, url]
        done = subprocess.run(curl, capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr) == ("behind TLS\n" * 3, "")
        told = proxy.event("connection")
        assert (told["outcome"], told["tls_version"], told["error"]) == ("ended", "TLSv1.3", None)
        assert told["time"].startswith("20")
        proxy.signal(signal.SIGTERM)
        assert proxy.event("closed")["ended"]["ended"] >= 1
        assert proxy.program.wait() == 0


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_s_client_through_it(certs: Certificates, service: Echo, version: str) -> None:
    arguments = ("--roots", str(certs.ca.cert_path), "--allow", "cn:client.test")
    with running("127.0.0.1:0", service.to, *own(certs), *arguments) as (_, where):
        client = programs.run_program(
            "openssl", "s_client", "-quiet", "-verify_return_error", version,
            "-CAfile", certs.ca.cert_path, "-servername", "localhost",
            "-cert", certs.client.cert_path, "-key", certs.client.key_path,
            "-connect", f"127.0.0.1:{port_of(where[0])}",
        )  # fmt: skip
        with client as program:
            program.wait_for(rb"echo\n", LATEST)
            program.send(b"from openssl\n")
            program.wait_for(rb"from openssl\n", LATEST)


@pytest.mark.needs("openssl")
def test_to_openssl_s_server(certs: Certificates) -> None:
    port = programs.free_port()
    server = programs.run_program(
        "openssl", "s_server", "-rev", "-Verify", "1", "-verify_return_error",
        "-CAfile", certs.ca.cert_path, "-cert", certs.server.cert_path, "-key", certs.server.key_path,
        "-accept", f"127.0.0.1:{port}", port=port,
    )  # fmt: skip
    arguments = (
        "--upstream-roots", str(certs.ca.cert_path),
        "--upstream-cert", str(certs.client.cert_path), "--upstream-key", str(certs.client.key_path),
        "--upstream-name", "device.test",
    )  # fmt: skip
    with server, running("127.0.0.1:0", f"tls://127.0.0.1:{port}", *arguments) as (_, where):
        one = socket.create_connection(("127.0.0.1", port_of(where[0])), timeout=LATEST)
        with one, one.makefile("rwb") as lines:
            lines.write(b"abc\n")
            lines.flush()
            assert lines.readline() == b"cba\n"


def test_routes_by_name(certs: Certificates, service: Echo) -> None:
    with echo(b"other") as other:
        arguments = ("--route", f"localhost={other.to}")
        with (
            running("127.0.0.1:0", service.to, *own(certs), *arguments) as (_, where),
            shake(where[0], certs) as one,
        ):
            assert one.recv(6) == b"other\n"


def test_an_upgrade_in_place(certs: Certificates, service: Echo) -> None:
    with running("127.0.0.1:0", service.to, *own(certs), "--upgrade", "postgres") as (_, where):
        context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
        with socket.create_connection(("127.0.0.1", port_of(where[0])), timeout=LATEST) as raw:
            raw.sendall(bytes.fromhex("00000008 04d2162f"))  # PostgreSQL's SSLRequest
            assert raw.recv(100) == b"S"
            with context.wrap_socket(raw, server_hostname="localhost") as client:
                client.sendall(b"hello\n")
                with client.makefile("rb") as answers:
                    assert (answers.readline(), answers.readline()) == (b"echo\n", b"hello\n")


def test_one_capture_of_both_sides_goes_on_over_a_reload(certs: Certificates, tmp_path: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certs.server.cert_path, certs.server.key_path)
    file = str(tmp_path / "capture.pcapng")
    captured = ("--capture", file, "--upstream-capture", file)
    with echo(context=context) as service:
        port = service.port
        to = f"tls://localhost:{port}"
        roots = ("--upstream-roots", str(certs.ca.cert_path))
        with running("127.0.0.1:0", to, *own(certs), *roots, *captured) as (proxy, where):
            for _ in range(2):
                with shake(where[0], certs) as one:
                    assert one.recv(5) == b"echo\n"
                proxy.signal(signal.SIGHUP)
                assert proxy.event("reload")["error"] is None
            proxy.signal(signal.SIGTERM)
            assert proxy.program.wait() == 0
    found = pcapng.read(Path(file))
    assert len(found.clients) == 4
    assert sum(server[1] == port for _, server in found.clients) == 2


def test_hang_up_reads_certificates_and_options_again(
    certs: Certificates, service: Echo, tmp_path: Path
) -> None:
    shutil.copy(certs.server.cert_path, tmp_path / "chain.pem")
    shutil.copy(certs.server.key_path, tmp_path / "key.pem")

    def write(to: str) -> None:
        (tmp_path / "new.toml").write_text(
            f"""
            [proxy]
            listen = "127.0.0.1:0"
            to = "{to}"
            watch = false
            [proxy.tls.credentials]
            kind = "certificate"
            chain = "chain.pem"
            key = "key.pem"
            """
        )
        (tmp_path / "new.toml").replace(tmp_path / "proxy.toml")

    write(service.to)
    with (
        echo(b"other") as other,
        running("--config", tmp_path / "proxy.toml") as (proxy, where),
        shake(where[0], certs) as kept,
    ):
        assert kept.recv(5) == b"echo\n"
        (tmp_path / "chain.pem").write_text("garbage")
        proxy.signal(signal.SIGHUP)
        assert proxy.event("reload")["error"]["kind"] == "config"
        shutil.copy(certs.rsa_server.cert_path, tmp_path / "chain.pem")
        shutil.copy(certs.rsa_server.key_path, tmp_path / "key.pem")
        write(other.to)
        proxy.signal(signal.SIGHUP)
        assert proxy.event("reload")["error"] is None
        with shake(where[0], certs) as one:
            assert one.recv(6) == b"other\n"
            assert one.getpeercert(binary_form=True) == certs.rsa_server.cert_der
        kept.sendall(b"kept")
        assert kept.recv(4) == b"kept"


def test_terminate_drains_and_a_second_one_cuts(certs: Certificates, service: Echo) -> None:
    with (
        running("127.0.0.1:0", service.to, *own(certs), "--drain", "60") as (proxy, where),
        shake(where[0], certs) as one,
    ):
        assert one.recv(5) == b"echo\n"
        proxy.signal(signal.SIGTERM)
        assert proxy.event("stopping")["open"] == 1
        one.sendall(b"still here")
        assert one.recv(10) == b"still here"
        proxy.signal(signal.SIGTERM)
        assert proxy.event("closed")["ended"] == {"cut": 1}
        assert proxy.program.wait() == 130


def test_figures_and_status(certs: Certificates, service: Echo, tmp_path: Path) -> None:
    unix = f"unix:{tmp_path / 'status'}"
    arguments = ("--metrics", "127.0.0.1:0", "--metrics", unix)
    command = (sys.executable, "-m", "sapper.cli", "proxy", "127.0.0.1:0", service.to, *own(certs))
    with programs.run_program(*command, *arguments, "--json") as program:
        proxy = Running(program)
        listening = proxy.event("listening")
        assert (tmp_path / "status").stat().st_mode & 0o777 == 0o600
        with shake(listening["listen"][0], certs) as one:
            assert one.recv(5) == b"echo\n"
            for address in listening["metrics"]:
                done = sapper("status", address, "--json")
                values = json.loads(done.stdout)["proxies"]["proxy"]
                assert (values["open"], values["handshakes"]) == (1, {"TLSv1.3": 1})
                assert values["connections"][0]["server_name"] == "localhost"
            shown = sapper("status", unix).stdout
            assert "1 open" in shown
            assert service.to in shown
            page = scrape(listening["metrics"][0], "/metrics")
            assert 'sapper_proxy_open_connections{proxy="proxy"} 1\n' in page
        assert scrape(listening["metrics"][0], "/other").startswith("there are")
        proxy.signal(signal.SIGTERM)
        assert program.wait() == 0
    assert not (tmp_path / "status").exists()
    done = sapper("status", unix)
    assert done.returncode == 5
    assert "no proxy answers" in done.stderr


#: A proxy with a certificate of its own.
OWN = (":0", "localhost:1", "--cert", "@cert", "--key", "@key")


def scrape(address: str, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=LATEST)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return text


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"\r\n\r\n", b"\xff\xfe\r\n\r\n", b"GET\r\n\r\n", b"PUT /metrics HTTP/1.1\r\n\r\n", b"G" * 70_000],
)
def test_whatever_asks_for_figures_gets_an_answer_or_an_end(service: Echo, request_bytes: bytes) -> None:
    with running("127.0.0.1:0", service.to, "--metrics", "127.0.0.1:0") as (proxy, where):
        port = port_of(json.loads(proxy.program.output.splitlines()[0])["metrics"][0])
        with socket.create_connection(("127.0.0.1", port), timeout=LATEST) as one, suppress(OSError):
            answer = say(one, request_bytes)
            assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 405"))
        assert "sapper_proxy_up" in scrape(f":{port}", "/metrics")
        with socket.create_connection(("127.0.0.1", port_of(where[0])), timeout=LATEST) as one:
            assert say(one, b"x") == b"echo\nx"


def test_a_service_manager_hands_sockets_over_and_is_told(
    certs: Certificates, service: Echo, tmp_path: Path
) -> None:
    """What systemd does: descriptors from 3 on, LISTEN_PID, NOTIFY_SOCKET."""
    with (
        socket.create_server(("127.0.0.1", 0)) as handed,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(LATEST)
        # The descriptor is 3 and LISTEN_PID is right only inside of the process: a shell sees to both.
        script = 'exec 3<&"$1"; shift; export LISTEN_PID=$$; exec "$@"'
        command = (sys.executable, "-m", "sapper.cli", "proxy", "systemd:web", service.to, *own(certs))
        env = {
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "web",
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
        }
        fd = handed.fileno()
        shell = ("bash", "-c", script, "bash", str(fd), *command, "--json")
        with programs.run_program(*shell, env=env, pass_fds=(fd,)) as program:
            assert b"READY=1" in manager.recv(4096).split(b"\n")
            with shake(f"127.0.0.1:{handed.getsockname()[1]}", certs) as one:
                assert one.recv(5) == b"echo\n"
            program.process.send_signal(signal.SIGHUP)
            reloading = manager.recv(4096)
            assert reloading.startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert b"READY=1" in manager.recv(4096)
            program.process.send_signal(signal.SIGTERM)
            assert b"STOPPING=1" in manager.recv(4096)
            assert program.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "LISTEN"),
        ((":0",), "SERVICE"),
        (("nonsense", "localhost:1"), "LISTEN"),
        ((":0", "localhost:1", "--cert", "/nowhere"), "--key"),
        ((":0", "localhost:1", "--cert", "/nowhere", "--key", "/nowhere"), "--cert"),
        ((":0", "localhost:1", "--roots", "/nowhere"), "--roots"),
        ((":0", "localhost:1", "--allow", "x:y"), "--allow"),
        ((":0", "localhost:1", "--route", "x"), "--route"),
        ((":0", "localhost:1", "--proxy-from", "x"), "--proxy-from"),
        ((":0", "localhost:1", "--metrics", "192.0.2.1:1"), "--metrics"),
        (("--config", "/nowhere"), "--config"),
        ((":0", "localhost:1", "--upstream-key", "x"), "--upstream-cert"),
        ((":0", "localhost:1", "--upgrade", "smtp"), "--upgrade"),
        ((":0", "localhost:1", "--upstream-upgrade", "imap"), "--upstream-upgrade"),
        ((":0", "localhost:1", "--upstream-roots", "@ca"), "--upstream-roots"),
        ((":0", "localhost:1", "--upstream-pin", "00" * 32), "--upstream-pin"),
        ((":0", "localhost:1", "--upstream-cert", "@cert", "--upstream-key", "@key"), "--upstream-cert"),
        ((":0", "localhost:1", "--cert", "@cert", "--key", "@key", "--pass-through"), "--pass-through"),
        ((":0", "localhost:1", "--cert", "@cert", "--key", "@key", "--allow", "cn:alice"), "--allow"),
        ((":0", "--route", "a b=localhost:1", "--pass-through"), "--route"),
        ((":0", "localhost:1", "--max-tls", "1.2"), "--cert"),
        ((":0", "localhost:1", "--more-cert", "@cert"), "--more-key"),
        ((":0", "localhost:1", "--ocsp-response", "@cert"), "--ocsp-response"),
        ((":0", "localhost:1", "--psk-identity", "x"), "--psk-file"),
        ((":0", "localhost:1", "--pkcs12", "@cert", "--psk-identity", "x"), "--pkcs12"),
        ((*OWN, "--psk-file", "@key"), "--psk-file"),
        ((*OWN, "--group", "none"), "--group"),
        ((*OWN, "--client-auth", "required"), "--roots"),
        ((*OWN, "--roots", "system"), "--roots"),
        ((*OWN, "--danger-accept-any-certificate"), "--danger-accept-any-certificate"),
        ((*OWN, "--client-auth", "off", "--pin", "00" * 32), "--pin"),
        ((*OWN, "--danger-short-psk"), "--danger-short-psk"),
        ((*OWN, "--no-resumption", "--ticket-lifetime", "60"), "--ticket-lifetime"),
        ((*OWN, "--capture", "/no/such/folder"), "--capture"),
        ((*OWN, "--max-tls", "1.2", "--pass-through"), "--pass-through"),
        # Those of the other end are none of this one's.
        ((*OWN, "--ocsp", "require"), "--ocsp"),
        ((*OWN, "--danger-ignore-server-name"), "--danger-ignore-server-name"),
        ((*OWN, "--danger-legacy-renegotiation"), "--danger-legacy-renegotiation"),
        ((":0", "tls://localhost:1", "--upstream-client-auth", "off"), "--upstream-client-auth"),
        ((":0", "tls://localhost:1", "--upstream-more-cert", "x"), "--upstream-more-cert"),
        ((":0", "tls://localhost:1", "--upstream-ticket-lifetime", "9"), "--upstream-ticket-lifetime"),
        ((":0", "localhost:1", "--upstream-max-tls", "1.2"), "--upstream-max-tls"),
        ((":0", "tls://localhost:1", "--upstream-name", "a b"), "--upstream-name"),
        ((":0", "tls://localhost:1", "--upstream-alpn", ""), "--upstream-alpn"),
        ((":0", "tls://localhost:1", "--upstream-allow", "x"), "--upstream-allow"),
        ((":0", "tls://localhost:1", "--upstream-crl", "@cert"), "--upstream-crl"),
        ((":0", "tls://localhost:1", "--upstream-psk-identity", "x"), "--upstream-psk-file"),
    ],
)
def test_mistakes_name_what_was_typed(certs: Certificates, arguments: tuple[str, ...], told: str) -> None:
    files = {"@cert": certs.server.cert_path, "@key": certs.server.key_path, "@ca": certs.ca.cert_path}
    done = sapper(*(files.get(one, one) for one in arguments))
    assert done.returncode == 2, done.stderr
    assert re.search(rf"(?m)^error: {told}: |^.* No such option: {told}\b", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ('proxy_from = "300.0.0.0/8"', "[proxy] proxy_from"),
        ('[[proxy.routes]]\nnames = "a b"\nto = "localhost:1"\npass_through = true', "[proxy] routes"),
        ('[proxy.upstream_tls]\nmin_version = "TLSv1.3"', "[proxy] upstream_tls"),
        (
            """[proxy.tls]
            peer_rules = [{cn = "alice"}]
            credentials = {kind = "certificate", chain = "server.pem", key = "server.key"}""",
            "[proxy] tls.peer_rules",
        ),
    ],
)
def test_mistakes_of_a_file_have_its_names(
    certs: Certificates, tmp_path: Path, table: str, told: str
) -> None:
    shutil.copy(certs.server.cert_path, tmp_path / "server.pem")
    shutil.copy(certs.server.key_path, tmp_path / "server.key")
    file = tmp_path / "proxy.toml"
    file.write_text(f'[proxy]\nlisten = "127.0.0.1:0"\nto = "localhost:1"\n{table}\n')
    done = sapper("--config", file)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "--config" in done.stderr


def test_an_address_that_is_not_ours_is_called_as_it_was_typed() -> None:
    done = sapper("192.0.2.1:1", "localhost:1")
    assert done.returncode == 4
    assert "error: LISTEN: " in done.stderr


def test_help_is_of_the_command_itself() -> None:
    done = sapper("--help")
    assert done.returncode == 0
    for option in ("--cert", "--route", "--proxy-from", "--metrics", "--drain"):
        assert option in done.stdout
    assert "status" in done.stdout


def test_options_stand_under_their_headings() -> None:
    lines = sapper("run", "--help").stdout.splitlines()
    under = {line.split()[0]: heading for heading, line in with_headings(lines) if line.startswith(" -")}
    assert under["--cert"] == under["--max-tls"] == under["--upgrade"] == "TLS with clients"
    assert under["--upstream-cert"] == under["--upstream-name"] == "TLS to services that are tls://"
    assert (under["--route"], under["--rate"], under["--json"]) == ("The service", "Limits", "Running")


def with_headings(lines: list[str]) -> Iterator[tuple[str, str]]:
    heading = ""
    for line in lines:
        heading = line if line and not line.startswith(" ") else heading
        yield heading, line


def test_a_full_table_of_descriptors_is_one_line_of_the_log_and_passes(service: Echo) -> None:
    """Both ports meet it: the proxy's listener, which is native, and that of the figures."""
    few = 'ulimit -n 64; exec "$@"'
    command = ("-m", "sapper.cli", "proxy", "127.0.0.1:0", service.to, "--metrics", "127.0.0.1:0", "--json")
    with programs.run_program("sh", "-c", few, "sh", sys.executable, *command) as program:
        proxy = Running(program)
        listening = proxy.event("listening")
        to, figures = port_of(listening["listen"][0]), port_of(listening["metrics"][0])
        with ExitStack() as clients:
            for _ in range(80):
                # Who finds no descriptor may see that he is closed before he sees that he is connected.
                with suppress(ConnectionResetError):
                    clients.enter_context(socket.create_connection(("127.0.0.1", to), timeout=LATEST))
            told = proxy.event("log")
            assert (told["level"], told["logger"]) == ("warning", "sapper.stream.listen")
            assert told["values"]["listener"] == listening["listen"][0]
            assert "no connection can be accepted now" in told["message"]
            with suppress(ConnectionResetError):
                clients.enter_context(socket.create_connection(("127.0.0.1", figures), timeout=LATEST))
            while (told := proxy.event("log"))["logger"] != "sapper.metrics":
                pass
            assert "no scraper can be accepted" in told["message"]
        assert "sapper_proxy_up" in scrape(f":{figures}", "/metrics")
        answer, until = b"", time.monotonic() + LATEST
        while not answer and time.monotonic() < until:
            # Those who left give their descriptors back one after the other: until then there is no service.
            with suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", to), LATEST) as one:
                answer = say(one, b"x")
        assert answer == b"echo\nx"
        program.process.send_signal(signal.SIGTERM)
        proxy.event("closed")
        lines = [json.loads(line) for line in program.output.splitlines()]
        told_by = [line["logger"] for line in lines if line["event"] == "log"]
        assert told_by.count("sapper.metrics") == 1
        # Bounded, and told at the end for what was left out.
        assert 1 <= told_by.count("sapper.stream.listen") < 20


def test_silent_clients_leave_descriptors_for_those_who_are_served(
    service: Echo, certs: Certificates
) -> None:
    """Each would take one and never need the second; whoever speaks needs it for the service."""
    few = 'ulimit -n 128; exec "$@"'
    command = ("-m", "sapper.cli", "proxy", "127.0.0.1:0", service.to, *own(certs), "--json")
    more = ("--handshake-timeout", "600")
    with (
        programs.run_program("sh", "-c", few, "sh", sys.executable, *command, *more) as program,
        ExitStack() as there,
    ):
        proxy = Running(program)
        at = proxy.event("listening")["listen"][0]
        for _ in range(300):
            with suppress(ConnectionResetError):  # as above
                there.enter_context(socket.create_connection(("127.0.0.1", port_of(at)), timeout=LATEST))
        for _ in range(10):
            with shake(at, certs) as one:
                one.sendall(b"x\n")
                assert one.makefile("rb").read(7) == b"echo\nx\n"


def test_half_requests_for_figures_give_way_to_a_newcomer(service: Echo) -> None:
    with running("127.0.0.1:0", service.to, "--metrics", "127.0.0.1:0") as (proxy, _), ExitStack() as slow:
        port = port_of(json.loads(proxy.program.output.splitlines()[0])["metrics"][0])
        halves = []
        for _ in range(17):
            halves.append(slow.enter_context(socket.create_connection(("127.0.0.1", port), timeout=LATEST)))
            halves[-1].sendall(b"GET /metrics HT")
        assert halves[0].recv(1) == b"", "the oldest gives way"
        assert "sapper_proxy_up" in scrape(f":{port}", "/metrics")
        assert halves[1].recv(1) == b""
        halves[-1].sendall(b"TP/1.1\r\n\r\n")
        assert halves[-1].recv(12) == b"HTTP/1.1 200", "a younger one is answered still"


def test_a_warning_is_a_line_for_people_too(service: Echo) -> None:
    few = 'ulimit -n 64; exec "$@"'
    port = programs.free_port()
    command = (sys.executable, "-m", "sapper.cli", "proxy", f"127.0.0.1:{port}", service.to, "--quiet")
    with (
        programs.run_program("sh", "-c", few, "sh", *command, port=port) as program,
        ExitStack() as clients,
    ):
        for _ in range(80):
            with suppress(ConnectionResetError):  # as above
                clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=LATEST))
        said = program.wait_for(rb"warning: no connection can be accepted now \([^\n]*\n", LATEST)
        assert b"Too many open files" in said[0]
        assert b"Traceback" not in program.output
