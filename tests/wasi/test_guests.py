"""The guests of examples/wasi with real servers, and ``sapper wasi run``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sapper.tls import Credentials
from support import needs
from support.certs import Certificates
from support.postgres import run_postgres
from support.programs import free_port, run_program
from support.wasi import guest

sapper_wasi = pytest.importorskip("sapper_wasi", reason="sapper-wasi is not built: make wasi")


@pytest.fixture
def web_server(certs: Certificates) -> Any:
    """OpenSSL's own."""
    port = free_port()
    with run_program(
        needs.program("openssl"), "s_server", "-accept", f"127.0.0.1:{port}", "-www",
        "-cert", certs.server.cert_path, "-key", certs.server.key_path,
        port=port,
    ):  # fmt: skip
        yield port


@pytest.mark.parametrize("name", ["https", "https_p3"])
def test_an_https_request(name: str, certs: Certificates, web_server: int) -> None:
    done = sapper_wasi.run(
        guest(name),
        args=["localhost", str(web_server)],
        allow_net=f"localhost:{web_server}",
        tls=Credentials.none(roots=certs.ca.cert),
        timeout=30.0,
    )
    assert (done.exit_code, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"HTTP/1.0 200 ok")
    assert b"TLSv1.3" in done.stdout


@pytest.mark.needs("psql")
def test_a_database_login_with_mutual_tls(certs: Certificates) -> None:
    mine = Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
    query = "SELECT ssl, version, client_dn, NULL FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    program = sapper_wasi.Guest(guest("postgres"))
    with run_postgres(certs, tls=True) as port:
        given: dict[str, Any] = {"allow_net": f"localhost:{port}", "timeout": 30.0}

        def ask(query: str, **options: Any) -> Any:
            args = ["localhost", str(port), "client.test", "postgres", query]
            return sapper_wasi.run(program, args=args, **given, **options)

        done = ask(query, tls={"localhost": mine})
        assert (done.exit_code, done.stdout, done.stderr) == (0, b"t|TLSv1.3|/CN=client.test|NULL\n", b"")
        done = ask("SELECT repeat('x', 1000000)", tls={"localhost": mine})
        assert done.stdout == b"x" * 1_000_000 + b"\n"
        done = ask("SELECT 1", tls=Credentials.none(roots=certs.ca.cert))
        assert done.exit_code == 1
        assert b"certificate" in done.stderr


# -- the command line ----------------------------------------------------------------------------------


def command(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sapper.cli", "wasi", "run", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, input=stdin,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip


def test_an_https_request_from_the_command_line(certs: Certificates, web_server: int, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(certs.ca.cert)
    (tmp_path / "tls.toml").write_text('roots = "ca.pem"\n')
    to = ("localhost", web_server)
    allowed = ("--allow-net", f"localhost:{web_server}")
    done = command(guest("https"), *allowed, "--tls", tmp_path / "tls.toml", *to)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("HTTP/1.0 200 ok")
    done = command(guest("https"), *allowed, "--tls", f"localhost={tmp_path / 'tls.toml'}", "--json", *to)
    assert json.loads(done.stdout)["stdout"].startswith("HTTP/1.0 200 ok")
    done = command(guest("https"), "--tls", tmp_path / "tls.toml", *to)
    assert (done.returncode, done.stderr) == (1, "looking localhost up: access-denied\n")
    done = command(guest("https"), *allowed, *to)
    assert done.returncode == 1
    assert "certificate" in done.stderr


def test_what_a_guest_is_given_on_the_command_line(tmp_path: Path) -> None:
    probe = guest("probe_p2")
    (tmp_path / "file").write_text("content")
    assert command(probe, "stdin", stdin="typed").stdout == "typed"
    assert command(probe, "--env", "A=b=c", "env").stdout == "A=b=c\n"
    assert command(probe, "--dir", f"{tmp_path}::/d", "read-file", "/d/file").stdout == "content"
    assert command(probe, "--dir", f"{tmp_path}::/d", "write-file", "/d/new").stdout.startswith("error")
    assert command(probe, "--dir", f"{tmp_path}::/d:rw", "write-file", "/d/new").stdout == "written\n"
    assert command(probe, "--", "args", "--flag").stdout == "probe_p2\nargs\n--flag\n"
    assert command(guest("probe_p3"), "exit", 42).returncode == 42


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        (("--allow-net", "example.org", "args"), 2, "--allow-net"),
        (("--env", "A", "args"), 2, "--env"),
        (("--dir", "/nonexistent", "args"), 2, "--dir"),
        (("--tls", "/nonexistent.toml", "args"), 2, "--tls"),
        (("--timeout", "0.1", "sleep"), 6, None),
        (("--fuel", "1000", "args"), 4, None),
        (("panic",), 11, None),
    ],
)
def test_ends_have_codes_and_mistakes_name_what_was_typed(
    arguments: tuple[str, ...], code: int, field: str | None
) -> None:
    done = command(guest("probe_p2"), "--json", *arguments)
    assert done.returncode == code, done.stderr
    assert json.loads(done.stderr.splitlines()[-1])["error"].get("field") == field
