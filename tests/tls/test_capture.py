"""The capture of ciphertext with its secrets: read by a parser of our own, and by tshark."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sapper import tls
from sapper.errors import ConfigError, SapperError
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, TlsConfig
from support import needs, pcapng, traffic
from support.traffic import Background

pytestmark = pytest.mark.usefixtures("leak_check")

KEY = bytes(range(32))
UP, DOWN = b"what only the client may say " * 4000, b"and what the server answers " * 4000


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


def talk(
    ends: tuple[socket.socket, socket.socket], client: TlsConfig, server: TlsConfig
) -> tuple[tls.HandshakeInfo, bytes]:
    """A handshake, bytes both ways, an orderly end. What the client's end read comes back."""
    name = None if client.credentials.kind == "psk" else "localhost"
    near_sink, near_end = socket.socketpair()
    far_sink, far_end = socket.socketpair()
    ours = tls.create_bridge(socket=ends[0], sink=near_sink, credentials=client, server_hostname=name)
    theirs = tls.create_bridge(socket=ends[1], sink=far_sink, credentials=server, server_side=True)
    with near_end, far_end:
        background = Background(theirs.handshake_sync)
        info = ours.handshake_sync()
        background.join()
        ours.start()
        theirs.start()
        sending = [Background(lambda: near_end.sendall(UP)), Background(lambda: far_end.sendall(DOWN))]
        got = traffic.receive_exactly(far_end, len(UP)), traffic.receive_exactly(near_end, len(DOWN))
        for one in sending:
            one.join()
        assert got == (UP, DOWN)
        for bridge in (ours, theirs):
            bridge.stop(drain=2.0)
        for bridge in (ours, theirs):
            with suppress(SapperError):
                bridge.wait_closed_sync(20)
    return info, got[1]


def configs(made: ThrowawayCertificates, kind: str, **options: Any) -> tuple[TlsConfig, TlsConfig]:
    """Client and server; the options are the client's."""
    if kind == "psk":
        psk = Credentials.psk("x", KEY)
        return TlsConfig(credentials=psk, **options), TlsConfig(credentials=psk)
    return TlsConfig(roots=made.authority, **options), TlsConfig(credentials=made.server_credentials())


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("kind", ["certificate", "psk"])
def test_a_stranger_with_the_file_alone_reads_what_was_said(
    made: ThrowawayCertificates, tmp_path: Path, kind: str, side: str
) -> None:
    path = tmp_path / "capture.pcapng"
    client, server = configs(made, kind)
    path.write_bytes(b"what was there, for everybody")
    path.chmod(0o644)
    # Values of a configuration that exists already are taken as they are: only the file is added.
    both = {
        "client": client,
        "server": server,
        side: TlsConfig(
            credentials=(client if side == "client" else server).credentials,
            roots=client.roots if side == "client" else None,
            capture_file=path,
        ),
    }
    del client, server
    info, _ = talk(socket.socketpair(), both["client"], both["server"])
    del both  # the file is whole when nobody can write to it
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    captured = pcapng.read(path)
    ((client_end, server_end),) = captured.clients
    assert server_end[1] == 443
    for flow, label, said in (
        ((client_end, server_end), "CLIENT_TRAFFIC_SECRET_0", UP),
        ((server_end, client_end), "SERVER_TRAFFIC_SECRET_0", DOWN),
    ):
        stream = captured.streams[flow]
        assert said not in stream
        assert pcapng.decrypt13(stream, captured.secrets[label], info.cipher_suite) == said
    assert captured.ended == 1


def test_secrets_come_before_what_they_open(made: ThrowawayCertificates, tmp_path: Path) -> None:
    path = tmp_path / "capture.pcapng"
    client, server = configs(made, "certificate", capture_file=path)
    talk(socket.socketpair(), client, server)
    del client, server
    order = []
    for kind, body in pcapng.blocks(path.read_bytes()):
        if kind == pcapng.SECRETS:
            order += [word for word in ("SERVER_HANDSHAKE", "SERVER_TRAFFIC") if word.encode() in body]
        elif kind == pcapng.PACKET and body[60:63] == b"\x16\x03\x03" and body[65] == 2:
            order.append("hello")  # the server's first record, in clear, with sealed ones behind it
    assert order.index("SERVER_HANDSHAKE") < order.index("hello")
    assert order.index("SERVER_TRAFFIC") < order.index("hello")


def test_an_older_file_is_replaced_at_the_first_connection(
    made: ThrowawayCertificates, tmp_path: Path
) -> None:
    path = tmp_path / "capture.pcapng"
    path.write_bytes(b"from before" * 100_000)
    client, server = configs(made, "certificate", capture_file=path)
    assert path.read_bytes().startswith(b"from before")
    for _ in range(2):
        talk(socket.socketpair(), client, server)
    del client, server
    captured = pcapng.read(path)
    assert len(captured.clients) == len(set(captured.clients)) == 2
    assert captured.ended == 2


def test_a_file_that_cannot_be_used_is_named(made: ThrowawayCertificates, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "queue")
    for path in (tmp_path, tmp_path / "no" / "such", tmp_path / "queue"):
        with pytest.raises(ConfigError) as caught:
            configs(made, "certificate", capture_file=path)
        assert caught.value.field == "capture_file"


def test_a_disk_that_is_full_ends_no_connection(made: ThrowawayCertificates) -> None:
    client, server = configs(made, "certificate", capture_file="/dev/full")
    for _ in range(2):
        talk(socket.socketpair(), client, server)


@pytest.mark.needs("tshark")
@pytest.mark.parametrize("kind", ["certificate", "psk"])
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", None])
def test_tshark_decrypts_it(
    made: ThrowawayCertificates, tmp_path: Path, kind: str, version: str, host: str | None
) -> None:
    path = tmp_path / "capture.pcapng"
    client, server = configs(made, kind, max_version=version, capture_file=path)
    port = 443
    if host is None:
        ends = socket.socketpair()
    else:
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as it:
            port = it.getsockname()[1]
            near = socket.create_connection((host, port), timeout=10)
            ends = near, it.accept()[0]
    info, _ = talk(ends, client, server)
    assert info.version == version
    del client, server
    done = subprocess.run(
        [
            *(needs.program("tshark"), "-n", "-r", str(path), "-d", f"tcp.port=={port},tls"),
            *("-o", "tcp.check_checksum:TRUE", "-q", "-z", "follow,tls,ascii,0", "-z", "expert,error"),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    # It breaks lines where records end.
    said = done.stdout.replace(b"\n", b"").replace(b"\t", b"")
    assert UP[:1000] in said
    assert DOWN[:1000] in said
    assert b"Bad checksum" not in done.stdout
    if host is not None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        ((_, server_end),) = pcapng.read(path).clients
        assert server_end == (socket.inet_pton(family, host), port)
