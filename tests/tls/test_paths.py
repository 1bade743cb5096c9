"""The field of an error about a configuration is the path of what is wrong, as it is in the file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sapper.cli import app
from sapper.errors import ConfigError
from sapper.testing import throwaway_certificates
from sapper.tls import Proxy, ProxyOptions, TlsConfig

LONG = "00" * 16
PSK = 'kind = "psk"\n'
OWN = 'kind = "certificate"\nchain = "chain"\n'

#: What the table [credentials] says, and where the mistake is in it.
MISTAKES = {
    "no hexadecimal key": (PSK + 'identity = "alice"\nkey = "zz"', "key"),
    "no hexadecimal key among several": (PSK + 'identities = { alice = "zz" }', "identities.alice"),
    "no text and no bytes": (PSK + "identities = { alice = 5 }", "identities.alice"),
    "a short key": (PSK + 'identity = "alice"\nkey = "0011"', "key"),
    "a short key in a file": (PSK + 'identity = "alice"\nkey_file = "short"', "key_file"),
    "half a byte in a file": (PSK + 'identity = "alice"\nkey_file = "odd"', "key_file"),
    "no such file": (PSK + 'identity = "alice"\nkey_file = "none.key"', "key_file"),
    "a short key among several": (
        PSK + f'identities = {{ bob = "{LONG}", alice = "0011" }}',
        "identities.alice",
    ),
    "a long identity": (PSK + f'identity = "{"a" * 300}"\nkey = "{LONG}"', "identity"),
    "no key": (PSK + 'identity = "alice"', "key"),
    "two keys": (PSK + f'identity = "alice"\nkey = "{LONG}"\nkey_file = "short"', "key_file"),
    "two ways": (PSK + f'identity = "alice"\nkey = "{LONG}"\nidentities = {{ b = "{LONG}" }}', "identity"),
    "a key of nobody": (PSK + f'key = "{LONG}"', "key"),
    "no hash": (PSK + f'identity = "alice"\nkey = "{LONG}"\nhash = "md5"', "hash"),
    "a typing error": (OWN + 'key = "key"\nrat = 1', "rat"),
    "no chain": ('kind = "certificate"\nchain = "short"\nkey = "key"', "chain"),
    "no such chain": ('kind = "certificate"\nchain = "none.pem"\nkey = "key"', "chain"),
    "another's key": (OWN + 'key = "key2"', "key"),
    "a key is missing": (OWN, "key"),
    "no pin": (OWN + 'key = "key"\npins = ["ab"]', "pins.0"),
    "no roots": (OWN + 'key = "key"\nroots = "short"', "roots"),
    "no response": (OWN + 'key = "key"\nocsp_response = "short"', "ocsp_response"),
    "no PKCS#12": ('kind = "pkcs12"\nfile = "short"', "file"),
    "no kind": ('chain = "chain"\nkey = "key"', "kind"),
    "another kind": ('kind = "certificat"\nchain = "chain"\nkey = "key"', "kind"),
}
#: What stands before that table, and its path.
TABLES = {
    "credentials": ("[%s.credentials]\n", "credentials"),
    "more_credentials": (
        """
[%s.credentials]
kind = "certificate"
chain = "chain"
key = "key"
[[%s.more_credentials]]
kind = "certificate"
chain = "chain2"
key = "key2"
[[%s.more_credentials]]
""",
        "more_credentials.1",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paths")
    one, two = throwaway_certificates("localhost"), throwaway_certificates("other.test")
    contents = {"chain": one.server[0], "key": one.server[1], "chain2": two.server[0], "key2": two.server[1]}
    for name, content in {**contents, "short": b"0011", "odd": b"00112"}.items():
        (folder / name).write_bytes(content)
    return folder


def is_there(document: Any, path: str) -> bool:
    """Whether the file has that, or has the table that lacks it."""
    for part in path.split(".")[:-1]:
        document = document[int(part)] if isinstance(document, list) else document[part]
    return isinstance(document, dict | list)


def written(folder: Path, text: str) -> Path:
    (folder / "file.toml").write_text(text)
    return folder / "file.toml"


def is_told(mistake: str, table: str) -> bool:
    """Whether that table can hold it: a server shows no keys by name, and what is of all is told first."""
    content, where = MISTAKES[mistake]
    return table != "more_credentials" or (PSK not in content and where not in ("pins.0", "roots"))


@pytest.mark.parametrize(
    ("mistake", "table"), [(one, table) for one in MISTAKES for table in TABLES if is_told(one, table)]
)
def test_it_is_the_path_in_the_file(mistake: str, table: str, folder: Path) -> None:
    content, where = MISTAKES[mistake]
    form, prefix = TABLES[table]
    path = f"{prefix}.{where}"

    def text(at: str) -> str:
        return form.replace("%s", at) + content

    with pytest.raises(ConfigError) as caught:
        TlsConfig.from_toml(written(folder, text("tls")), table="tls")
    assert caught.value.field == path
    assert is_there(tomllib.loads(text("tls"))["tls"], path)
    head = '[proxy]\nlisten = ":0"\nto = "localhost:1"\n'
    with pytest.raises(ConfigError) as caught:
        ProxyOptions.from_toml(written(folder, head + text("proxy.tls")), table="proxy")
    assert caught.value.field == f"tls.{path}"
    result = CliRunner().invoke(app, ["proxy", "--config", str(folder / "file.toml")])
    assert isinstance(result.exception, ConfigError), result.output
    assert str(result.exception).startswith(f"--config: [proxy] tls.{path}: "), str(result.exception)
    head = '[proxy]\nlisten = ":0"\n[[proxy.routes]]\nnames = "a.test"\nto = "localhost:1"\n'
    with pytest.raises(ConfigError) as caught:
        ProxyOptions.from_toml(written(folder, head + text("proxy.routes.tls")), table="proxy")
    assert caught.value.field == f"routes.0.tls.{path}"


def test_keys_that_were_said_in_two_ways_are_the_same(folder: Path) -> None:
    (folder / "long").write_text(LONG)
    forms = [
        f'identity = "a"\nkey = "{LONG}"',
        'identity = "a"\nkey_file = "long"',
        f'identities = {{ a = "{LONG}" }}',
    ]
    made = [TlsConfig.from_toml(written(folder, f"[credentials]\n{PSK}{form}")).credentials for form in forms]
    assert made[0] == made[1] == made[2]
    assert not any(LONG in repr(one) or "long" in repr(one) for one in made)


def test_the_command_line_names_what_was_typed(folder: Path) -> None:
    own = ["--cert", str(folder / "chain"), "--key", str(folder / "key")]
    more = ["--more-cert", str(folder / "chain2")]
    for words, named in [
        (["--cert", str(folder / "chain"), "--key", str(folder / "key2")], "--key"),
        (["--cert", str(folder / "short"), "--key", str(folder / "key")], "--cert"),
        ([*own, *more, "--more-key", str(folder / "key")], "--more-key"),
        ([*own, "--more-cert", str(folder / "short"), "--more-key", str(folder / "key")], "--more-cert"),
        (["--psk-identity", "x", "--psk-file", str(folder / "short")], "--psk-file"),
        (["--psk-identity", "x" * 300, "--psk-file", str(folder / "short")], "--psk-identity"),
    ]:
        result = CliRunner().invoke(app, ["proxy", ":0", "localhost:1", *words])
        assert isinstance(result.exception, ConfigError), result.output
        assert result.exception.field == named, str(result.exception)


async def test_a_mistake_of_a_service_is_in_its_own_table() -> None:
    proxy = Proxy(
        listen="127.0.0.1:0",
        routes=({"names": "a.test", "to": "tls://x:1", "upstream_name": "a b", "pass_through": False},),
        tls={"credentials": {"kind": "psk", "identity": "x", "key": LONG}},
    )
    with pytest.raises(ConfigError) as caught:
        await proxy.start()
    assert caught.value.field == "routes.0.upstream_name"
