"""The tools that guard the tree find what they are there to find."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Self

import pytest

import check_stubs
from support.needs import ROOT

STUB = """
VERSION: str
class Handle:
    def __new__(cls, name: str, *, size: int = 3) -> Handle: ...
    def read(self, count: int = 5) -> bytes: ...
    @property
    def state(self) -> str: ...
    @staticmethod
    def make(name: str) -> Handle: ...
def open(path: str, mode: str = "r") -> Handle: ...
"""


def module() -> types.ModuleType:
    class Handle:
        def __new__(cls, name: str, *, size: int = 3) -> Self:
            return super().__new__(cls)

        def read(self, count: int = 5) -> bytes:
            return b""

        @property
        def state(self) -> str:
            return ""

        @staticmethod
        def make(name: str) -> Handle:
            return Handle(name)

    def open_(path: str, mode: str = "r") -> Handle:
        return Handle(path)

    built = types.ModuleType("built")
    vars(built).update(VERSION="1", Handle=Handle, open=open_)
    return built


def test_a_stub_that_fits_is_left_alone() -> None:
    assert check_stubs.compare(ast.parse(STUB), module()) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("count: int = 5", "count: int = 6", "Handle.read: count defaults to 6, built 5"),
        ("count: int = 5", "count: int", "Handle.read"),
        ("count: int", "amount: int", "Handle.read: the stub has (amount=5), the module (count: 'int' = 5)"),
        ("*, size", "size", "Handle()"),
        ("    @property\n", "", "Handle.state: a property in the module"),
        ("    @staticmethod\n", "", "Handle.make"),
        ("def make", "def made", "Handle.made: in the stub, but not built"),
        ("def open", "def close", "open: built, but not in the stub"),
        ("VERSION: str\n", "", "VERSION: built, but not in the stub"),
        ("VERSION: str", "VERSION: str\nMORE: int", "MORE: in the stub, but not built"),
    ],
)
def test_each_difference_is_found(ours: str, theirs: str, said: str) -> None:
    changed = STUB.replace(ours, theirs, 1)
    assert changed != STUB
    problems = check_stubs.compare(ast.parse(changed), module())
    assert any(said in problem for problem in problems), problems


def find_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools" / "find-python.sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), "PYENV_ROOT": str(folder)},
    )


def test_a_name_on_path_that_does_not_work_is_passed_over(tmp_path: Path) -> None:
    shim = tmp_path / "python3"
    shim.write_text("#!/bin/sh\necho 'that version is not installed' >&2\nexit 127\n")
    shim.chmod(0o755)
    real = tmp_path / "versions" / "real" / "bin" / "python3"
    real.parent.mkdir(parents=True)
    real.symlink_to(os.path.realpath(sys.executable))
    found = find_python(tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() != str(shim)


def test_it_says_what_was_looked_for(tmp_path: Path) -> None:
    found = find_python(tmp_path, "3.99t")
    assert found.returncode == 1
    assert "No CPython 3.99 or newer without the GIL" in found.stderr
