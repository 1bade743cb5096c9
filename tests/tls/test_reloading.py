"""Files that change while they are in use: a reload, a watch, revocation lists."""

from __future__ import annotations

import asyncio
import datetime
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from sapper.errors import CertificateError, ConfigError, SapperError
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, TlsConfig
from support.certs import Certificates, Identity
from support.handshakes import meet

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


class Files:
    """A server's files, which tests replace."""

    def __init__(self, folder: Path, made: ThrowawayCertificates) -> None:
        self.folder = folder
        self.write(*made.server)
        self.config = TlsConfig(credentials=Credentials.certificate(folder / "chain.pem", folder / "key.pem"))

    def write(self, chain: bytes, key: bytes) -> None:
        (self.folder / "chain.pem").write_bytes(chain)
        (self.folder / "key.pem").write_bytes(key)


def test_a_reload_changes_new_connections_and_garbage_changes_nothing(
    tmp_path: Path, made: ThrowawayCertificates
) -> None:
    files, second = Files(tmp_path, made), throwaway_certificates("localhost")
    assert files.config.reload() is False
    meet(Credentials.none(roots=made.authority), files.config)
    files.write(b"garbage", b"garbage")
    with pytest.raises(ConfigError) as caught:
        files.config.reload()
    assert caught.value.field == "credentials.chain"
    assert str(tmp_path / "chain.pem") in str(caught.value)
    meet(Credentials.none(roots=made.authority), files.config)
    files.write(*second.server)
    assert files.config.reload() is True
    meet(Credentials.none(roots=second.authority), files.config)
    with pytest.raises(CertificateError):
        meet(Credentials.none(roots=made.authority), files.config)


@pytest.mark.parametrize("broken", ["chain.pem", "key.pem", "both.p12", "roots.pem", "list.pem"])
def test_what_is_wrong_with_a_file_names_the_file(
    tmp_path: Path, made: ThrowawayCertificates, broken: str
) -> None:
    Files(tmp_path, made)
    (tmp_path / "roots.pem").write_bytes(made.authority)
    (tmp_path / broken).write_bytes(b"garbage")
    roots = tmp_path / "roots.pem"
    pair = Credentials.certificate(tmp_path / "chain.pem", tmp_path / "key.pem", roots=roots)
    options: dict[str, Any] = {"credentials": pair}
    if broken == "both.p12":
        options = {"credentials": Credentials.pkcs12(tmp_path / "both.p12", "password")}
    elif broken == "list.pem":
        options = {"credentials": Credentials.none(roots=roots), "crls": [tmp_path / "list.pem"]}
    with pytest.raises(ConfigError) as caught:
        TlsConfig(**options)
    assert str(tmp_path / broken) in str(caught.value)


def test_a_pipe_is_read_once_and_in_place_of_a_file_it_keeps_nobody(
    tmp_path: Path, made: ThrowawayCertificates
) -> None:
    """As a shell's ``--cert <(...)``; and a reload neither waits at a pipe nor reads a device without end."""
    reading, writing = os.pipe()
    os.write(writing, made.server[0])
    os.close(writing)
    (tmp_path / "key.pem").write_bytes(made.server[1])
    piped = TlsConfig(credentials=Credentials.certificate(f"/dev/fd/{reading}", tmp_path / "key.pem"))
    os.close(reading)
    assert piped.reload() is False
    meet(Credentials.none(roots=made.authority), piped)

    files = Files(tmp_path, made)
    for replaced in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")):
        (tmp_path / "chain.pem").unlink()
        replaced(tmp_path / "chain.pem")
        with pytest.raises(ConfigError, match="no regular file"):
            files.config.reload()
    meet(Credentials.none(roots=made.authority), files.config)


async def test_a_watch_reads_the_file_of_a_pre_shared_key_again(tmp_path: Path) -> None:
    (tmp_path / "tls.toml").write_text('[credentials]\nkind = "psk"\nidentity = "x"\nkey_file = "the.key"\n')
    (tmp_path / "the.key").write_text("00" * 32)
    config = TlsConfig.from_toml(tmp_path / "tls.toml")
    heard: asyncio.Queue[SapperError | None] = asyncio.Queue()
    async with asyncio.timeout(30):
        with config.watch(on_reload=heard.put_nowait):
            (tmp_path / "the.key").write_text("0011")
            error = await heard.get()
            assert isinstance(error, ConfigError)
            assert error.field == "credentials.key_file"
            assert str(tmp_path / "the.key") in str(error)
            await asyncio.to_thread(meet, Credentials.psk("x", "00" * 32), config)
            (tmp_path / "the.key").write_text("11" * 32 + "\n")
            assert await heard.get() is None
            await asyncio.to_thread(meet, Credentials.psk("x", "11" * 32), config)


@pytest.mark.parametrize("read", [lambda path: Credentials.certificate(path, path), TlsConfig.from_toml])
def test_a_device_without_end_is_no_file(read: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match="File too large"):
        read("/dev/zero")


async def test_a_watch_tells_the_event_loop_of_good_and_bad_files(
    any_loop: str, tmp_path: Path, made: ThrowawayCertificates
) -> None:
    files, second = Files(tmp_path, made), throwaway_certificates("localhost")
    heard: asyncio.Queue[SapperError | None] = asyncio.Queue()
    async with asyncio.timeout(30):
        with files.config.watch(on_reload=heard.put_nowait):
            files.write(b"garbage", made.server[1])
            error = await heard.get()
            assert isinstance(error, ConfigError)
            assert error.field == "credentials.chain"
            await asyncio.to_thread(meet, Credentials.none(roots=made.authority), files.config)
            files.write(*second.server)
            assert await heard.get() is None
            await asyncio.to_thread(meet, Credentials.none(roots=second.authority), files.config)


def test_a_watch_works_without_an_event_loop(
    tmp_path: Path, made: ThrowawayCertificates, caplog: pytest.LogCaptureFixture
) -> None:
    files, second = Files(tmp_path, made), throwaway_certificates("localhost")
    heard = threading.Event()
    with files.config.watch(on_reload=lambda error: heard.set() if error is None else None) as watch:
        files.write(*second.server)
        assert heard.wait(30)
    watch.close()  # again, which does nothing
    meet(Credentials.none(roots=second.authority), files.config)


def test_only_files_can_be_watched(made: ThrowawayCertificates) -> None:
    with pytest.raises(ConfigError, match="no file"):
        TlsConfig(credentials=made.server_credentials()).watch()


def a_list(authority: Identity, *revoked: Identity) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - datetime.timedelta(hours=1))
        .next_update(now + datetime.timedelta(days=1))
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    for one in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(one.certificate.serial_number)
            .revocation_date(now - datetime.timedelta(hours=1))
            .build()
        )
    signed = builder.sign(authority.private_key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def test_a_list_that_changes_takes_effect_at_the_reload(certs: Certificates, tmp_path: Path) -> None:
    (tmp_path / "list.pem").write_bytes(a_list(certs.ca))
    (tmp_path / "tls.toml").write_text(
        f'crls = ["list.pem"]\nroots = "{certs.ca.cert_path}"\n[credentials]\nkind = "certificate"\n'
        f'chain = "{certs.server.cert_path}"\nkey = "{certs.server.key_path}"\n'
    )
    server = TlsConfig.from_toml(tmp_path / "tls.toml")
    client = TlsConfig(
        credentials=Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
    )
    meet(client, server, certs.name)
    assert meet(client, server, certs.name)[1].resumed
    (tmp_path / "list.pem").write_bytes(a_list(certs.ca, certs.client))
    assert server.reload()
    # A ticket from before lets nobody in.
    with pytest.raises(CertificateError) as caught:
        meet(client, server, certs.name)
    assert caught.value.reason == "revoked"
    (tmp_path / "list.pem").write_bytes(a_list(certs.other_ca))
    assert server.reload()
    with pytest.raises(CertificateError) as caught:
        meet(client, server, certs.name)
    assert caught.value.reason == "revocation_unknown"
