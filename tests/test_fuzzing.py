"""Every parser of outside bytes has its fuzz target: the table in docs/testing.md against the sources."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz_seeds import seeds
from support.needs import ROOT

CRATES, FUZZ = ROOT / "crates", ROOT / "fuzz"

#: What a parser looks like: it is called so, or it makes something of bytes or text.
PARSES = re.compile(
    r"\bfn (parse|decode|peek|recognise|stated_len|from_json|handle_bytes|step)\w*[(<]"
    r"|from_der\(|serde_json::from_|_from_pem|pem_slice|from_(be|le|ne)_bytes|from_utf8\(|impl FromStr"
)
#: Files that look like it, and whose bytes are not from outside.
NOT_OUTSIDE = {
    "sapper-wasi/src/allow.rs": "what the host's own user allows its guests",
    "sapper-net/src/load.rs": "blocks that this very module has sent",
    "sapper-net/src/port/sys/address.rs": "the kernel's answers about our own interface",
    "sapper-net/src/tls/settings.rs": "a server's name, which rustls reads",
    "sapper-net/src/tls/session_end.rs": "certificates that verify.rs has let in, and our own stamps",
    "sapper-net/src/tls/openssl_config.rs": "certificates that credentials.rs has read, and our own lines",
    "sapper-net/src/tunnel/mod.rs": "random bytes",
    "sapper-net/src/tunnel/server/session.rs": "random bytes",
}
#: Sources of tests, which no build has.
TESTS = re.compile(r"tests|testing|conformance|fuzzed|/bench\.rs|tcpdump\.rs")


def table() -> list[tuple[list[str], list[str]]]:
    """The files and the targets of each row."""
    text = (ROOT / "docs/testing.md").read_text()
    rows = [line.split("|")[2:4] for line in text.splitlines() if "/src/" in line and line.startswith("|")]
    return [(re.findall(r"`([^`]+)`", files), re.findall(r"`(\w+)`", targets)) for files, targets in rows]


def parsers() -> Iterator[str]:
    for path in sorted(CRATES.glob("*/src/**/*.rs")):
        name = path.relative_to(CRATES).as_posix()
        source = path.read_text().split("#[cfg(test)]\nmod tests {")[0]
        if not TESTS.search(name) and PARSES.search(source):
            yield name


def test_every_parser_has_its_row() -> None:
    listed = {file for files, _ in table() for file in files}
    found = set(parsers())
    assert len(found) > 30, "the pattern finds them no more"
    assert found - listed - set(NOT_OUTSIDE) == set(), "give it a fuzz target and a row in docs/testing.md"
    assert set(NOT_OUTSIDE) <= found, "this one is gone"
    assert listed & set(NOT_OUTSIDE) == set()


@pytest.mark.parametrize(("files", "targets"), table())
def test_every_row_is_true(files: list[str], targets: list[str]) -> None:
    for file in files:
        assert (CRATES / file).is_file(), file
    assert targets
    for target in targets:
        assert (FUZZ / "targets" / f"{target}.rs").is_file(), target


def test_every_target_is_built_has_its_row_and_begins_with_something() -> None:
    targets = {path.stem for path in (FUZZ / "targets").glob("*.rs")}
    built = dict(re.findall(r'name = "(\w+)"\npath = "targets/(\w+)\.rs"', (FUZZ / "Cargo.toml").read_text()))
    assert built == {name: name for name in targets}
    assert {target for _, row in table() for target in row} == targets
    assert set(seeds()) == targets
    assert all(inputs and all(inputs) for inputs in seeds().values())


def test_the_binding_parses_nothing() -> None:
    """It converts; what it reads from outside is read in the crates below."""
    assert [name for name in parsers() if name.startswith("sapper-py/")] == []


def test_a_row_that_lacks_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "sapper-proto/src/new.rs"
    source.parent.mkdir(parents=True)
    source.write_text("pub fn parse(bytes: &[u8]) -> Result<(), ()> { Err(()) }")
    monkeypatch.setattr(sys.modules[__name__], "CRATES", tmp_path)
    assert list(parsers()) == ["sapper-proto/src/new.rs"]
