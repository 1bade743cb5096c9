"""The examples of README.md run as they stand there and print what stands below them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.needs import ROOT

# A block of Python, and directly after it what it prints; an ellipsis stands for anything within a line.
BLOCKS = re.compile(r"^```python\n(.*?)^```\n+(?:^```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text()
EXAMPLES = BLOCKS.findall(README)


def test_there_are_five_examples_each_with_its_output() -> None:
    assert len(EXAMPLES) == 5
    assert all(expected for _, expected in EXAMPLES)


@pytest.mark.parametrize(("code", "expected"), EXAMPLES, ids=range(1, len(EXAMPLES) + 1))
def test_an_example_prints_what_is_shown(code: str, expected: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    pattern = ".*".join(re.escape(part) for part in expected.split("…"))
    assert re.fullmatch(pattern, done.stdout), f"printed {done.stdout!r}, README shows {expected!r}"


def test_the_two_commands_are_there() -> None:
    for command in ("make run", "make test"):
        assert re.search(rf"^    {command}\b", README, re.MULTILINE)
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
