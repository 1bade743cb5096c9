"""The TOML of docs/tls.md and docs/proxy.md, read as it stands there, does what the text around it says."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12

from sapper import tls
from sapper.errors import SapperError
from sapper.testing import throwaway_certificates
from sapper.tls import Credentials, ProxyOptions, TlsConfig, TlsStream
from support.needs import ROOT

pytestmark = pytest.mark.usefixtures("leak_check")


def tables(page: str) -> list[str]:
    return re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


ONE_KEY, SEVERAL_KEYS, SEVERAL_CERTIFICATES = tables("tls.md")
(PROXY,) = tables("proxy.md")


def read(folder: Path, table: str) -> TlsConfig:
    (folder / "tls.toml").write_text(table)
    return TlsConfig.from_toml(folder / "tls.toml", table="tls")


async def greet(stream: TlsStream) -> None:
    stream.write(b"hello")
    stream.write_eof()


async def seen(server: TlsConfig, client: TlsConfig, name: str | None = None) -> tls.HandshakeInfo:
    async with asyncio.timeout(30), tls.listen(("127.0.0.1", 0), credentials=server) as listener:
        serving = asyncio.create_task(listener.serve(greet))
        try:
            connecting = tls.connect("127.0.0.1", listener.port, credentials=client, server_hostname=name)
            async with await connecting as stream:
                assert await stream.read() == b"hello"
                return stream.info
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def test_one_pre_shared_key_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "device.key").write_text("ab" * 32)
    config = read(tmp_path, ONE_KEY)
    info = await seen(TlsConfig(credentials=Credentials.psk("device", "ab" * 32)), config)
    assert (info.version, info.cipher_suite) == ("TLSv1.2", "TLS_PSK_WITH_AES_256_GCM_SHA384")


async def test_a_server_knows_each_of_several_keys(tmp_path: Path) -> None:
    server = read(tmp_path, SEVERAL_KEYS)
    keys = {"alice": "00112233445566778899aabbccddeeff", "device 7": "ffeeddccbbaa99887766554433221100"}
    for identity, key in keys.items():
        assert (await seen(server, TlsConfig(credentials=Credentials.psk(identity, key)))).engine == "openssl"
    with pytest.raises(SapperError):
        await seen(server, TlsConfig(credentials=Credentials.psk("alice", keys["device 7"])))


async def test_a_server_has_a_certificate_for_each_name(tmp_path: Path) -> None:
    made = {name: throwaway_certificates(name) for name in ("example.org", "blog.example", "other.test")}
    for stem, name in (("chain", "example.org"), ("shop", "other.test")):
        (tmp_path / f"{stem}.pem").write_bytes(made[name].server[0])
        (tmp_path / f"{'key.pem' if stem == 'chain' else 'shop.key'}").write_bytes(made[name].server[1])
    (tmp_path / "blog.p12").write_bytes(_pkcs12(*made["blog.example"].server))
    server = read(tmp_path, SEVERAL_CERTIFICATES)
    roots = b"".join(one.authority for one in made.values())
    for asked, shown in (
        ("example.org", "example.org"),
        ("blog.example", "blog.example"),
        ("shop.example", "other.test"),
        ("a.shop.example", "other.test"),
        ("nobody.example", "example.org"),
    ):
        client = TlsConfig(roots=roots, danger_ignore_server_name=True)
        info = await seen(server, client, asked)
        assert info.peer_certificate == _der(made[shown].server[0]), asked


def _der(chain: bytes) -> bytes:
    return x509.load_pem_x509_certificate(chain).public_bytes(serialization.Encoding.DER)


def _pkcs12(chain: bytes, key: bytes) -> bytes:
    private = serialization.load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    sealed = serialization.BestAvailableEncryption(b"of the file")
    return pkcs12.serialize_key_and_certificates(
        b"blog", private, x509.load_pem_x509_certificate(chain), None, sealed
    )


def test_the_proxys(tmp_path: Path) -> None:
    made = throwaway_certificates("localhost")
    contents = {"chain.pem": made.server[0], "key.pem": made.server[1], "clients.pem": made.authority}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "proxy.toml").write_text(PROXY)
    options = ProxyOptions.from_toml(tmp_path / "proxy.toml", table="proxy")
    assert options.tls is not None
    assert options.tls.peer_rules[0].dns == ("*.workers.example",)
    assert [route.pass_through for route in options.routes] == [False, True]
