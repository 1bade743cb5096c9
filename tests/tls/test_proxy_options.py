"""The options of a proxy: which are refused, by which name, and how a file says them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sapper import errors
from sapper.errors import ConfigError
from sapper.tls import Credentials, Proxy, ProxyOptions, Route, TlsConfig
from support.certs import Certificates

KEY = bytes(range(32))
PSK = Credentials.psk("x", KEY)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "listen"),
        ({"listen": ":1"}, "to"),
        ({"listen": "nonsense", "to": "localhost:1"}, "listen"),
        ({"listen": ":1", "to": "localhost"}, "to"),
        ({"listen": ":1", "to": "localhost:0"}, "to"),
        ({"listen": ":1", "to": ("localhost:1", "tls://localhost:2")}, "to"),
        ({"listen": ":1", "to": "localhost:1", "upstream_name": "x"}, "upstream_name"),
        ({"listen": ":1", "to": "localhost:1", "rate": 0}, "rate"),
        ({"listen": ":1", "to": "localhost:1", "max_connections": 0}, "max_connections"),
        ({"listen": ":1", "to": "localhost:1", "handshake_timeout": float("inf")}, "handshake_timeout"),
        ({"listen": ":1", "to": "localhost:1", "nonsense": 1}, "nonsense"),
        ({"listen": ":1", "to": "localhost:1", "send_proxy": "v3"}, "send_proxy"),
        ({"listen": ":1", "routes": ({"names": "a.test", "to": "localhost:1", "x": 1},)}, "routes.0.x"),
        ({"listen": ":1", "routes": ({"to": "localhost:1"},), "pass_through": True}, "pass_through"),
        ({"listen": ":1", "to": "localhost:1", "tls": 5}, "tls"),
        ({"listen": ":1", "to": "tls://localhost:1", "upstream_tls": 5}, "upstream_tls"),
        # TLS that nobody would get, though it was asked for.
        ({"listen": ":1", "to": "localhost:1", "upstream_tls": TlsConfig()}, "upstream_tls"),
        (
            {
                "listen": ":1",
                "to": "localhost:1",
                "routes": ({"names": "a.test", "to": "tls://localhost:1", "upstream_tls": TlsConfig()},),
                "upstream_tls": TlsConfig(),
            },
            "upstream_tls",
        ),
        ({"listen": ":1", "to": "localhost:1", "pass_through": True, "tls": PSK}, "pass_through"),
        (
            {
                "listen": ":1",
                "routes": ({"names": "a.test", "to": "localhost:1", "pass_through": True},),
                "tls": PSK,
            },
            "tls",
        ),
        ({"listen": ":1", "to": "localhost:1", "upgrade": "gopher"}, "upgrade"),
        ({"listen": ":1", "to": "localhost:1", "upgrade": "mysql"}, "upgrade"),
        (
            {
                "listen": ":1",
                "routes": ({"names": "a.test", "to": "localhost:1"},),
                "tls": Credentials.psk("x", KEY),
                "upgrade": "mysql",
            },
            "upgrade",
        ),
        ({"listen": ":1", "to": "localhost:1", "upgrade": "smtp"}, "upgrade"),
        ({"listen": ":1", "to": "localhost:1", "upgrade": "smtp", "pass_through": True}, "upgrade"),
        ({"listen": ":1", "to": "localhost:1", "upstream_upgrade": "mysql"}, "upstream_upgrade"),
        ({"listen": ":1", "to": "localhost:1", "upstream_upgrade": "smtp"}, "upstream_upgrade"),
        # Itself, as its service.
        ({"listen": "127.7.7.1:1", "to": "127.7.7.1:1"}, "to"),
        ({"listen": ":1", "to": ("localhost:2", "localhost:1")}, "to.1"),
        ({"listen": "[::]:1", "to": "[::1]:1"}, "to"),
        ({"listen": "unix:/x", "to": "unix:///x"}, "to"),
        ({"listen": ":1", "routes": ({"names": "a.test", "to": "127.0.0.1:1"},)}, "routes.0.to"),
        # Less than a nanosecond is no time.
        ({"listen": ":1", "to": "localhost:2", "handshake_timeout": 1e-300}, "handshake_timeout"),
        ({"listen": ":1", "to": "localhost:2", "connect_timeout": 1e-10}, "connect_timeout"),
        ({"listen": ":1", "to": "localhost:2", "idle_timeout": 1e-300}, "idle_timeout"),
    ],
)
def test_mistakes_name_their_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Proxy(**options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"to": "localhost:1", "tls": TlsConfig()}, "tls.credentials"),
        ({"to": "tls://localhost:1", "upstream_name": "a b"}, "upstream_name"),
        (
            {"to": "tls://localhost:1", "upstream_tls": Credentials.psks({"a": KEY, "b": KEY})},
            "upstream_tls.credentials",
        ),
        ({"to": "localhost:1", "proxy_from": "not-a-network"}, "proxy_from"),
        ({"to": "tls://user@localhost:1"}, "to"),
        ({"routes": (Route(names=("a.test",), to=("tls://user@localhost:1",)),)}, "routes.0.to"),
        ({"routes": (Route(names=("10.0.0.1",), to=("x:1",), pass_through=True),)}, "routes.0.names"),
        ({"routes": (Route(names=("a b",), to=("localhost:1",), pass_through=True),)}, "routes.0.names"),
        ({"routes": (Route(names=("a.test",), to=("localhost:1",)),)}, "routes.0.names"),
        ({"routes": (Route(names=("a.test",), to=("x:1",), tls=TlsConfig()),)}, "routes.0.tls.credentials"),
        ({"routes": (Route(names=("a.test",), to=("x:1",)),), "tls": TlsConfig()}, "tls.credentials"),
        (
            {
                "routes": (Route(names=("a.test",), to=("x:1",)),),
                "to": "tls://localhost:1",
                "tls": Credentials.psk("somebody", bytes(range(32))),
                "upstream_name": "a b",
            },
            "upstream_name",
        ),
        (
            {
                "to": "localhost:1",
                "tls": TlsConfig(
                    credentials=Credentials.psk("somebody", bytes(range(32))),
                    danger_legacy_renegotiation=True,
                ),
            },
            "tls.danger_legacy_renegotiation",
        ),
        (
            {
                "to": "tls://localhost:1",
                "tls": Credentials.psk("somebody", bytes(range(32))),
                "upgrade": "smtp",
                "upstream_upgrade": "imap",
            },
            "upstream_upgrade",
        ),
    ],
)
async def test_mistakes_that_only_native_code_sees(
    options: dict[str, Any], field: str, leak_check: None
) -> None:
    proxy = Proxy(listen="127.0.0.1:0", **options)
    with pytest.raises(ConfigError) as caught:
        await proxy.start()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("listen", "to"),
    [
        ("0.0.0.0:1", "[::1]:1"),
        ("0.0.0.0:1", "127.0.0.1:2"),
        ("127.0.0.2:1", "127.0.0.1:1"),
        ("127.0.0.1:0", "original"),
        ("systemd", "127.0.0.1:1"),
        ("fd:1", "127.0.0.1:1"),
        ("unix:/x", "unix:/y"),
    ],
)
def test_what_may_be_somebody_else_is_no_loop(listen: str, to: str) -> None:
    Proxy(listen=listen, to=to)
    Proxy(listen=":1", to="127.0.0.1:1", reuse_port=True)


def test_options_are_read_from_a_file(certs: Certificates, tmp_path: Path) -> None:
    shutil.copy(certs.server.cert_path, tmp_path / "chain.pem")
    shutil.copy(certs.server.key_path, tmp_path / "key.pem")
    file = tmp_path / "proxy.toml"
    file.write_text(
        """
        [proxy]
        listen = ["127.0.0.1:8443", "unix:/run/x.sock"]
        to = "localhost:8080"
        proxy_from = ["10.0.0.0/8", "unix"]
        rate = 5

        [proxy.tls.credentials]
        kind = "certificate"
        chain = "chain.pem"
        key = "key.pem"

        [[proxy.routes]]
        names = ["a.test", "*.a.test"]
        to = ["tls://db.test:5432", "tls://db2.test:5432"]
        send_proxy = "v2"
        """
    )
    options = ProxyOptions.from_toml(file, table="proxy")
    assert options.listen == ("127.0.0.1:8443", "unix:/run/x.sock")
    assert options.routes[0].names == ("a.test", "*.a.test")
    assert options.tls is not None
    assert options.tls.credentials.kind == "certificate"
    service = options.native_service()
    assert service["proxy_from_unix"]
    assert [way["send_proxy"] for way in service["routes"]] == ["v2", None]
    assert service["routes"][0]["upstream_tls"] is not None


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"to": "https://localhost:8080"}, "to", "write tls://localhost:8080"),
        ({"to": "https://db.example/path"}, "to", "write tls://db.example:443"),
        ({"to": "http://localhost:8080/"}, "to", "write host:port, here localhost:8080"),
        ({"to": "http://localhost"}, "to", "here localhost:80"),
        ({"to": 8080}, "to", "must be text, or several texts, not int"),
        ({"to": "localhost:1", "listen": 8443}, "listen", "must be text, or several texts, not int"),
        ({"to": "localhost:1", "listen": b"x"}, "listen", "must be text, or several texts, not bytes"),
    ],
)
def test_an_address_that_is_none_is_told_with_what_to_write(
    options: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(errors.ConfigError) as raised:
        ProxyOptions(**{"listen": "127.0.0.1:0", **options})
    assert raised.value.field == field
    assert words in raised.value.message


async def test_a_url_to_listen_at_is_told_with_what_to_write() -> None:
    with pytest.raises(errors.ConfigError, match=r"write localhost:8443; that clients speak TLS") as raised:
        await Proxy(listen="https://localhost:8443", to="localhost:1").start()
    assert raised.value.field == "listen"
