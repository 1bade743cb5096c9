"""The texts say what is there: links lead somewhere, options are documented, named tests exist."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sapper.tls as tls
from sapper import errors
from sapper.cli._tls_options import TLS_OPTIONS, option
from sapper.errors import ErrorKind, SapperError
from sapper.pump import PumpOptions
from support.needs import ROOT

DOCS = ROOT / "docs"
TEXTS = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(text: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text.read_text()):
        if "://" not in target:
            assert (text.parent / target).exists(), f"{text.name} links to {target}"


def test_every_option_of_the_bridge_is_documented() -> None:
    page = (DOCS / "bridge.md").read_text()
    for name in [*inspect.signature(tls.create_bridge).parameters, *PumpOptions.model_fields]:
        assert f"`{name}`" in page, f"docs/bridge.md does not explain {name}"


def test_every_option_of_tls_is_documented() -> None:
    page = (DOCS / "tls.md").read_text()
    for name in tls.TlsConfig.model_fields:
        assert f"`{name}`" in page, f"docs/tls.md does not explain {name}"


def test_every_option_of_the_proxy_is_documented() -> None:
    page = (DOCS / "proxy.md").read_text()
    for name in [*tls.ProxyOptions.model_fields, *tls.Route.model_fields]:
        assert f"`{name}`" in page, f"docs/proxy.md does not explain {name}"


def test_every_option_and_event_of_the_tunnel_is_documented() -> None:
    from sapper.tunnel import (
        ClientOptions,
        Limits,
        ServerOptions,
        Service,
        TunnelClient,
        TunnelServer,
        VisitorLimits,
        events,
    )

    page = (DOCS / "tunnel.md").read_text()
    for part in (TunnelServer, TunnelClient):
        for name in inspect.signature(part).parameters:
            assert f"`{name}`" in page, f"docs/tunnel.md does not explain {name}"
    for options in (ServerOptions, ClientOptions, Service, Limits, VisitorLimits):
        for name in options.model_fields:
            assert f"`{name}`" in page, f"docs/tunnel.md does not explain {name}"
    for one in events.__all__:
        if (name := getattr(getattr(events, one), "name", "")) and isinstance(name, str):
            assert f"`{name}`" in page, f"docs/tunnel.md does not explain {name}"


def test_every_error_is_documented() -> None:
    page = (DOCS / "errors.md").read_text()

    def below(kind: type[SapperError]) -> Iterator[type[SapperError]]:
        yield kind
        for one in kind.__subclasses__():
            yield from below(one)

    for kind in below(SapperError):
        if kind.__module__ == "sapper.errors":
            assert f"`{kind.__name__}`" in page, f"docs/errors.md does not explain {kind.__name__}"
    for word in ErrorKind:
        assert f"`{word.value}`" in page, f"docs/errors.md does not name {word.value}"


def rust_tests() -> set[str]:
    """Names of test functions in the crates, with those inside proptest's macro."""
    names: set[str] = set()
    for source in (ROOT / "crates").rglob("*.rs"):
        names |= set(
            re.findall(
                r"#\[(?:tokio::)?test[^\]]*\](?:\s*#\[[^\]]*\])*\s*(?:async )?fn (\w+)", source.read_text()
            )
        )
    return names


def test_the_alert_of_the_tunnel_s_page_is_the_one_that_is_sent() -> None:
    source = (ROOT / "crates/sapper-proto/src/tunnel/w3p.rs").read_text()
    sent = re.search(r"const TLS_ALERT: \[u8; 7\] = \[([\d, ]+)\]", source)
    assert sent
    alert = bytes(int(byte) for byte in sent[1].split(",")).hex(" ")
    assert re.search(rf"gets the alert\s+`{alert}`", (DOCS / "tunnel-wire.md").read_text())


def test_every_test_that_the_seeds_page_names_exists() -> None:
    page = (DOCS / "seeds.md").read_text()
    python = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    rust = re.findall(r"`crates::(\w+)`", page)
    benches = re.findall(r"`(benches/[\w/.]+)`", page)
    assert len(python) > 10
    for file, name in python:
        source = (ROOT / file).read_text()
        assert re.search(rf"^\s*(async )?def {name}\(", source, re.MULTILINE), f"there is no {file}::{name}"
    known = rust_tests()
    for name in rust:
        assert name in known, f"there is no Rust test {name}"
    for path in benches:
        assert (ROOT / path).exists()


def test_every_demand_of_the_seeds_page_has_its_test() -> None:
    page = (DOCS / "seeds.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| \d+\.\d+ \|", line)]
    assert len(rows) >= 20
    for row in rows:
        assert re.search(r"`(tests/|crates::|benches/)", row), f"no test is named in: {row}"


def options_of_tls(page: str) -> str:
    return page.split("## Options of TLS\n")[1].split("\n## ")[0]


def test_every_option_of_the_command_line_is_documented() -> None:
    import typer

    from sapper.cli import app

    page = (DOCS / "cli.md").read_text()
    command = typer.main.get_command(app)

    def below(name: str, one: Any) -> Iterator[tuple[str, Any]]:
        yield name, one
        for word, child in getattr(one, "commands", {}).items():
            yield from below(f"{name} {word}", child)

    # Those of TLS are explained once, and stand behind a prefix where a command has two such ends.
    of_tls = options_of_tls(page)
    usual = {option(one.name): one.name for one in TLS_OPTIONS}
    prefixed = {
        option(name, prefix): word for word, name in usual.items() for prefix in ("upstream", "visitor")
    }
    for word in usual:
        assert f"`{word}`" in of_tls, f"docs/cli.md does not explain {word}"
    for name, one in below("sapper", command):
        assert name in page
        for parameter in one.params:
            for word in parameter.opts:
                if word.startswith("--") and word not in prefixed:
                    assert f"`{word}`" in page, f"docs/cli.md does not explain {word} of {name}"


def test_which_end_an_option_of_tls_is_for_is_documented() -> None:
    page = (DOCS / "cli.md").read_text()
    rows = [line.split("|") for line in options_of_tls(page).splitlines() if line.startswith("| `--")]
    said = {word: row[2].strip() or None for row in rows for word in re.findall(r"`(--[\w-]+)`", row[1])}
    for one in TLS_OPTIONS:
        assert said[option(one.name)] == one.role, one.name


def rust_reasons() -> set[str]:
    """Every word that the native code gives as a reason."""
    found: set[str] = set()
    for source in (ROOT / "crates").glob("*/src/**/*.rs"):
        text = source.read_text()
        for given in re.findall(r"\.with_reason\(\s*([^()]*(?:\(\))?)\s*\)", text):
            if literal := re.fullmatch(r'"(\w+)"', given):
                found.add(literal[1])
            elif given == "reason":  # chosen just before: `let reason = match … { … => "word", … };`
                choices = re.findall(r"let reason = match \w+ \{(.*?)\n    \};", text, re.DOTALL)
                assert choices, f"{source} gives a reason that this test does not find"
                found |= set(re.findall(r'=> "(\w+)"', "".join(choices)))
            else:
                assert re.fullmatch(r"(CertificateReason::\w+|(self\.)?reason)\.as_str\(\)", given), given
        if source.name == "failure.rs":
            words = re.search(r"fn as_str\(self\) -> &'static str \{(.*?)\n    \}", text, re.DOTALL)
            assert words is not None
            found |= set(re.findall(r'=> "(\w+)"', words[1]))
    return found


def python_reasons() -> set[str]:
    """Every word that the Python code gives as a reason."""
    found: set[str] = set()
    for source in [*(ROOT / "python").rglob("*.py"), *(ROOT / "wasi/python").rglob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == ["reason"]:
                given = [node.value]
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                given = [one.value for one in node.keywords if one.arg == "reason"]
                given += node.args[2:3] if name == "config_error" else []
                given = given if name in ("config_error", "ErrorContext") else []
            else:
                continue
            for one in given:
                found |= {
                    word.value
                    for word in ast.walk(one)
                    if isinstance(word, ast.Constant)
                    and isinstance(word.value, str)
                    and word.value[:1] != "_"
                }
    return found


def test_every_reason_is_documented_and_every_documented_one_is_given() -> None:
    page = (DOCS / "errors.md").read_text()
    table = page.split("## Reasons\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    documented = [word for row in rows for word in re.findall(r"`(\w+)`", row[1])]
    assert len(documented) == len(set(documented)), "a reason stands there twice"
    given = rust_reasons() | python_reasons()
    assert len(given) > 40
    assert given == set(documented), given ^ set(documented)
    for row in rows:
        for name in re.findall(r"`(\w+)`", row[2]):
            assert issubclass(getattr(errors, name), SapperError)
