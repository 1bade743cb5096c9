"""TLS of ``sapper tunnel serve`` and ``sapper expose``: at the main port, and for visitors."""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sapper.cli import app
from sapper.cli._lean import Work
from sapper.errors import ErrorKind
from support import programs
from support.certs import Certificates, Identity
from support.programs import Program
from support.services import Echo, echo

SAPPER = (sys.executable, "-m", "sapper.cli")
ACKNOWLEDGED = rb'"authentication-acknowledged".*?"assigned_port":(\d+)'


@pytest.fixture
def service() -> Iterator[Echo]:
    with echo() as one:
        yield one


def serving(state: Path, *more: str | Path) -> Any:
    local = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", state, "--json")
    return programs.run_program(*SAPPER, *local, *more)


def main_port(server: Program) -> int:
    return int(server.wait_for(rb'"main-server-start","port":(\d+)')[1])


def exposing(state: Path, service: Echo, to: str, *more: str | Path) -> Any:
    token = (state / "tunnel-token").read_text().strip()
    command = (*SAPPER, "expose", service.to, "--to", to, "--json", "--no-reconnect", *more)
    return programs.run_program(*command, env={"SAPPER_TUNNEL_TOKEN": token})


def shown(identity: Identity, prefix: str = "") -> tuple[str | Path, ...]:
    return f"--{prefix}cert", identity.cert_path, f"--{prefix}key", identity.key_path


def test_mutual_tls_with_rules_and_another_tls_for_visitors(
    service: Echo, tmp_path: Path, certs: Certificates
) -> None:
    ca, log = certs.ca.cert_path, tmp_path / "keys"
    own = (*shown(certs.server), "--roots", ca, "--allow-client", "cn:client.test")
    visitors = (*shown(certs.server, "visitor-"), "--visitor-max-tls", "1.2")
    with serving(tmp_path, *own, *visitors, "--key-log", log) as server:
        to = f"localhost:{main_port(server)}"
        for own, alert in ((), b"certificate_required"), (shown(certs.server), b"access_denied"):
            with exposing(tmp_path, service, to, "--ca", ca, *own) as client:
                assert client.wait() == ErrorKind.CREDENTIALS_REJECTED.exit_code, client.output
                assert alert in client.output
                assert b"authentication-acknowledged" not in client.output
        with exposing(tmp_path, service, to, "--ca", ca, *shown(certs.client)) as client:
            public = int(client.wait_for(ACKNOWLEDGED)[1])
            context = ssl.create_default_context(cafile=str(ca))
            with (
                socket.create_connection(("127.0.0.1", public), timeout=20) as raw,
                context.wrap_socket(raw, server_hostname="localhost") as visitor,
            ):
                assert visitor.recv(5) == b"echo\n"
                assert visitor.version() == "TLSv1.2"
    assert "CLIENT_TRAFFIC_SECRET_0" in log.read_text()  # of the main port; a visitor's has other labels
    assert "CLIENT_RANDOM" not in log.read_text()


def test_tls_with_a_pre_shared_key(service: Echo, tmp_path: Path) -> None:
    for name, content in (("key", "00" * 32), ("other", "11" * 32)):
        (tmp_path / name).write_text(content)
    identity = ("--psk-identity", "x", "--psk-file")
    with serving(tmp_path, *identity, tmp_path / "key") as server:
        to = f"127.0.0.1:{main_port(server)}"
        with exposing(tmp_path, service, to, *identity, tmp_path / "key") as client:
            client.wait_for(ACKNOWLEDGED)
        with exposing(tmp_path, service, to, *identity, tmp_path / "other") as client:
            assert client.wait() != 0
            assert b"authentication-acknowledged" not in client.output


def test_options_beside_a_file_take_the_place_of_its_own(
    tmp_path: Path, certs: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Work] = []
    monkeypatch.setattr("sapper.cli._lean.launch", made.append)
    (tmp_path / "t.toml").write_text(
        f"""
        [tunnel]
        lease_file = "leases"
        [tunnel.tls]
        max_version = "TLSv1.2"
        alpn = ["x"]
        [tunnel.tls.credentials]
        kind = "certificate"
        chain = "{certs.server.cert_path}"
        key = "{certs.server.key_path}"
        [expose]
        server = "h:1"
        service = 1
        [expose.tls]
        max_version = "TLSv1.2"
        alpn = ["x"]
        """
    )
    for command in (("tunnel", "serve", "--state", str(tmp_path)), ("expose",)):
        words = [*command, "--config", str(tmp_path / "t.toml"), "--max-tls", "1.3"]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        config = made.pop().config
        tls = config[""].tls if command[0] == "expose" else config.tls
        assert (tls.max_version, tls.alpn) == ("TLSv1.3", (b"x",))
