"""``sapper tls dev-cert``: what is made, for whom it is readable, and that foreign programs believe it."""

from __future__ import annotations

import asyncio
import datetime
import errno
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from sapper.errors import ConfigError, ResourceLimit
from sapper.tls.dev_cert import authority_folder, make_dev_certificate
from support import needs
from support.programs import listening, run_program
from support.services import echo


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sapper.cli", "tls", "dev-cert", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env={**os.environ, "XDG_DATA_HOME": str(folder / "data"), "COLUMNS": "200", "NO_COLOR": "1"},
    )


def made(folder: Path, *arguments: str) -> dict[str, Any]:
    done = run(folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def refused(folder: Path, *arguments: str) -> str:
    done = run(folder, *arguments, "--json")
    assert done.returncode == 2, (done.stdout, done.stderr)
    field: str = json.loads(done.stderr)["error"]["field"]
    return field


def names_of(path: str) -> tuple[list[str], list[str]]:
    certificate = x509.load_pem_x509_certificates(Path(path).read_bytes())[0]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    return names.get_values_for_type(x509.DNSName), [str(one) for one in addresses]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("::1", "__1"),
        ("[2001:db8::1]", "2001_db8__1"),
        ("127.0.0.1", "127.0.0.1"),
        ("*.app.test", "_wildcard.app.test"),
        ("app.test", "app.test"),
    ],
)
def test_files_are_called_after_the_first_name(tmp_path: Path, name: str, stem: str) -> None:
    told = make_dev_certificate([name, "other.test"], folder=tmp_path, ca_dir=tmp_path / "ca")
    assert (told.chain.name, told.key.name) == (f"{stem}.pem", f"{stem}.key")
    assert told.chain.is_file()


def test_files_are_for_their_owner_and_hold_every_name(tmp_path: Path) -> None:
    told = made(tmp_path, "localhost", "*.App.test", "192.0.2.7", "[2001:db8::1]", "localhost")
    assert told["authority_made"] is True
    assert told["names"] == ["localhost", "*.app.test", "192.0.2.7", "2001:db8::1", "127.0.0.1", "::1"]
    assert names_of(told["certificate"]) == (
        ["localhost", "*.app.test"],
        ["192.0.2.7", "2001:db8::1", "127.0.0.1", "::1"],
    )
    assert told["certificate"] == str(tmp_path / "localhost.pem")
    authority = Path(told["authority"])
    assert authority == tmp_path / "data/sapper/dev-ca/authority.pem"
    for path in (told["certificate"], told["key"], authority, authority.with_name("authority.key")):
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600, path
    assert stat.S_IMODE(authority.parent.stat().st_mode) == 0o700
    assert sorted(one.name for one in tmp_path.iterdir()) == ["data", "localhost.key", "localhost.pem"]
    assert sorted(one.name for one in authority.parent.iterdir()) == ["authority.key", "authority.pem"]
    end = datetime.datetime.fromisoformat(told["expires"])
    assert 396 <= (end - datetime.datetime.now(datetime.UTC)).days <= 397
    for where in ("Debian", "Fedora", "macOS", "Windows", "Firefox", "curl", "Python"):
        steps = [how for name, how in told["trust"].items() if where in name]
        assert len(steps) == 1
        assert str(authority) in steps[0]


def test_people_are_told_where_and_how(tmp_path: Path) -> None:
    done = run(tmp_path, "localhost")
    assert done.returncode == 0
    assert done.stdout == ""
    for text in ("localhost.pem", "localhost.key", "update-ca-certificates", "Firefox", "sapper proxy"):
        assert text in done.stderr


async def test_what_people_are_told_serves_more_than_once(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    told = run(tmp_path, "localhost", "--out", str(tmp_path)).stderr.strip().splitlines()[-1].split()
    assert told[:2] == ["sapper", "proxy"]
    port = free_port()
    with echo() as service:
        command = [one.replace("localhost:8443", f"localhost:{port}") for one in told[1:]]
        command = [one.replace("localhost:8080", service.to) for one in command]
        with run_program(sys.executable, "-m", "sapper.cli", *command, "--json") as program:
            await asyncio.to_thread(program.wait_for, rb'"event":"listening"', 30.0)
            context = ssl.create_default_context(cafile=str(tmp_path / "data/sapper/dev-ca/authority.pem"))
            for _ in range(2):
                raw = socket.create_connection(("localhost", port), timeout=30)
                with raw, context.wrap_socket(raw, server_hostname="localhost") as one:
                    assert one.recv(5) == b"echo\n"


@pytest.mark.parametrize("authority", ["none", "there", "new"])
@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--out", "no/such"), "--out"),
        (("--out", "file"), "--out"),
        (("--ca-dir", "file/ca"), "--ca-dir"),
        (("--ca-dir", "broken"), "--ca-dir"),
    ],
)
def test_a_folder_that_cannot_be_written_costs_nothing(
    tmp_path: Path, arguments: tuple[str, ...], field: str, authority: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "broken").symlink_to("no/such/place")
    if authority != "none":
        made(tmp_path, "other.test")
    before = {one: one.read_bytes() if one.is_file() else None for one in tmp_path.rglob("*")}
    more = ("--new-ca",) if authority == "new" else ()
    assert refused(tmp_path, "localhost", *arguments, *more) == field
    assert {one: one.read_bytes() if one.is_file() else None for one in tmp_path.rglob("*")} == before


def test_a_full_disk_is_an_error_of_its_own_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def full(path: str | Path, *more: Any, **named: Any) -> int:
        if ".localhost.pem" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(path, *more, **named)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(ResourceLimit) as caught:
        make_dev_certificate(folder=tmp_path, ca_dir=tmp_path / "new" / "ca")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_that_is_asked_for(tmp_path: Path) -> None:
    first = made(tmp_path, "localhost")
    before = Path(first["certificate"]).read_bytes()
    assert refused(tmp_path, "localhost") == "--force"
    assert Path(first["certificate"]).read_bytes() == before
    Path(first["certificate"]).unlink()
    assert refused(tmp_path, "localhost") == "--force"
    assert not Path(first["certificate"]).exists()
    again = made(tmp_path, "localhost", "--force")
    assert Path(again["certificate"]).read_bytes() != before
    # A link is replaced, not followed.
    (tmp_path / "elsewhere").write_text("precious")
    Path(first["key"]).unlink()
    Path(first["key"]).symlink_to(tmp_path / "elsewhere")
    assert refused(tmp_path, "localhost") == "--force"
    made(tmp_path, "localhost", "--force")
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_the_authority_is_made_once_and_replaced_on_request(tmp_path: Path) -> None:
    authority = Path(made(tmp_path, "localhost")["authority"])
    before = authority.read_bytes()
    second = made(tmp_path, "second.test", "--out", ".", "--days", "10")
    assert second["authority_made"] is False
    assert authority.read_bytes() == before
    third = made(tmp_path, "third.test", "--new-ca")
    assert third["authority_made"] is True
    assert authority.read_bytes() != before
    own = made(tmp_path, "fourth.test", "--ca-dir", str(tmp_path / "other"))
    assert own["authority"] == str(tmp_path / "other/authority.pem")


def test_an_authority_that_is_not_to_be_used_is_named(tmp_path: Path) -> None:
    told = made(tmp_path, "localhost")
    authority = Path(told["authority"])
    key = authority.with_name("authority.key")
    key.chmod(0o644)
    assert refused(tmp_path, "second.test") == "--ca-dir"
    key.chmod(0o600)
    made(tmp_path, "second.test")
    secret = key.read_bytes()
    for wrong in (b"garbage", Path(told["key"]).read_bytes()):
        key.write_bytes(wrong)
        assert refused(tmp_path, "third.test") == "--ca-dir"
    key.write_bytes(secret)
    # Somebody else's authority signs nothing here.
    authority.write_bytes(Path(told["certificate"]).read_bytes())
    assert refused(tmp_path, "third.test") == "--ca-dir"
    authority.unlink()
    assert refused(tmp_path, "third.test") == "--ca-dir"
    assert not (tmp_path / "third.test.pem").exists()


@pytest.mark.parametrize("name", ["", "*", "a b", "*.*.test", "a..b", "müller.test", "http://x"])
def test_what_is_no_name_is_refused_and_nothing_is_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_dev_certificate(["localhost", name], folder=tmp_path, ca_dir=tmp_path / "ca")
    assert caught.value.field == "names"
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


def test_the_user_chooses_where_data_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    assert authority_folder() == tmp_path / ".local/share/sapper/dev-ca"


@pytest.mark.needs("openssl")
def test_openssl_believes_it(tmp_path: Path) -> None:
    told = made(tmp_path, "localhost", "dev.test", "--days", "825")
    second = made(tmp_path, "second.test")
    for values, name in ((told, "localhost"), (told, "dev.test"), (second, "second.test")):
        subprocess.run(
            [
                *(needs.program("openssl"), "verify", "-x509_strict", "-purpose", "sslserver"),
                *("-CAfile", told["authority"], "-verify_hostname", name, values["certificate"]),
            ],
            check=True,
            timeout=30,
            capture_output=True,
        )
    other = made(tmp_path, "third.test", "--ca-dir", str(tmp_path / "other"))
    wrong = subprocess.run(
        [needs.program("openssl"), "verify", "-CAfile", other["authority"], told["certificate"]],
        check=False,
        timeout=30,
        capture_output=True,
    )
    assert wrong.returncode != 0


@pytest.mark.needs("openssl")
def test_s_client_and_python_shake_hands_with_a_bridge_that_shows_it(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    told = made(tmp_path, "localhost")
    for address, host in (("127.0.0.1", "127.0.0.1"), ("[::1]", "::1")):
        port = free_port()
        with subprocess.Popen(
            [
                *(sys.executable, "-m", "sapper.cli", "bridge", f"tls-listen://{address}:{port}", "stdio:"),
                *("--cert", told["certificate"], "--key", told["key"], "--json"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as server:
            try:
                assert server.stdin is not None
                assert server.stderr is not None
                assert json.loads(server.stderr.readline())["event"] == "opening"
                deadline = time.monotonic() + 20
                while not listening(port):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)  # between two looks at the kernel's table
                with run_program(
                    *("openssl", "s_client", "-connect", f"{address}:{port}", "-verify_return_error"),
                    *("-CAfile", told["authority"], "-verify_ip", host, "-quiet"),
                ) as peer:
                    assert json.loads(server.stderr.readline())["event"] == "handshake"
                    server.stdin.write(b"hello\n")
                    server.stdin.flush()
                    peer.wait_for(b"hello")
            finally:
                server.kill()
    # Python's own ssl believes the same file.
    context = ssl.create_default_context(cafile=told["authority"])
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(told["certificate"], told["key"])
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server, server_hostname="localhost")
    server_side = serving.wrap_bio(to_server, to_client, server_side=True)
    done: set[Any] = set()
    while len(done) < 2:
        for end in (client, server_side):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass


def test_folders_are_told_as_they_are_called(tmp_path: Path) -> None:
    folder = tmp_path / ":key:[bold]"
    folder.mkdir()
    done = run(tmp_path, "localhost", "--out", str(folder))
    assert str(folder / "localhost.pem") in done.stderr
