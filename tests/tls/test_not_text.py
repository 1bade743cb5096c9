"""Text that is none (a lone surrogate; on the command line bytes that are no UTF-8) is told by its option."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapper.endpoint import parse
from sapper.errors import ConfigError
from sapper.tls import Credentials, PeerRules, Proxy, TlsConfig
from support.certs import Certificates

BAD = "a\ud800b"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("listen", {"listen": f"{BAD}:1"}),
        ("listen", {"listen": f"unix:/tmp/{BAD}"}),
        ("listen", {"listen": f"systemd:{BAD}"}),
        ("listen.1", {"listen": ("127.0.0.1:0", f"[::1%{BAD}]:1")}),
        ("to", {"to": f"{BAD}:1"}),
        ("to", {"to": f"tls://{BAD}:1"}),
        ("to", {"to": f"tls:unix:/{BAD}"}),
        ("upstream_name", {"to": "tls://x:1", "upstream_name": BAD}),
        ("routes.0.names", {"routes": [{"names": BAD, "to": "x:1"}]}),
        ("proxy_from", {"proxy_from": BAD}),
        ("upstream_tls.cipher_suites", {"to": "tls://x:1", "upstream_tls": {"cipher_suites": [BAD]}}),
        ("upgrade", {"upgrade": BAD}),
    ],
)
def test_options_of_a_proxy(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a character that is none") as caught:
        Proxy(**{"listen": "127.0.0.1:0", "to": "127.0.0.1:1", **values})
    assert (caught.value.field, caught.value.reason) == (field, "not_text")


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("cipher_suites", lambda: TlsConfig(cipher_suites=(BAD,))),
        ("groups.1", lambda: TlsConfig(groups=("X25519", BAD))),
        ("alpn.0", lambda: TlsConfig(alpn=(BAD,))),
        ("key_log_file", lambda: TlsConfig(key_log_file=Path(BAD))),
        ("capture_file", lambda: TlsConfig(capture_file=Path(BAD))),
        ("cn", lambda: PeerRules(cn=(BAD,))),
        ("chain", lambda: Credentials.certificate(BAD, "key.pem")),
        ("address", lambda: parse(f"unix:/{BAD}", field="address")),
    ],
)
def test_options_of_tls_and_endpoints(field: str, make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="a character that is none") as caught:
        make()
    assert (caught.value.field, caught.value.reason) == (field, "not_text")


def test_names_of_files_need_not_be_text(certs: Certificates, tmp_path: Path) -> None:
    name = "chain\udcff.pem"
    with pytest.raises(ConfigError, match=r"cannot read .*chain\\udcff\.pem: No such file"):
        Credentials.certificate(tmp_path / name, certs.server.key_path)
    (tmp_path / name).write_bytes(certs.server.cert_path.read_bytes())
    own = Credentials.certificate(tmp_path / name, certs.server.key_path)
    TlsConfig(credentials=own, key_log_file=tmp_path / "log\udcff")
    assert (tmp_path / "log\udcff").exists()
    proxy = Proxy(listen=f"unix:{tmp_path}/socket\udcff", to="127.0.0.1:1", tls=own)
    assert proxy.options.listen == (f"unix:{tmp_path}/socket\udcff",)


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("LISTEN", [b"\xff:1", b"localhost:1"]),
        ("SERVICE", [b":0", b"\xff:1"]),
        ("--route", [b":0", b"--route", b"\xff=localhost:1"]),
        ("--alpn", [b":0", b"localhost:1", b"--alpn", b"\xff"]),
    ],
)
def test_bytes_of_a_command_line(word: str, arguments: list[bytes]) -> None:
    command: list[str | bytes] = [sys.executable, "-m", "sapper.cli", "proxy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {word}: holds a character that is none")
