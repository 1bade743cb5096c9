"""``sapper wasi`` where its distribution is missing. What it does with it: tests/wasi."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import sapper
from support.needs import ROOT


def test_without_the_distribution_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sapper_wasi.py").write_text("raise ModuleNotFoundError('no', name='sapper_wasi')\n")
    done = subprocess.run(
        [sys.executable, "-m", "sapper.cli", "wasi", "run", "guest.wasm"],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "NO_COLOR": "1", "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install sapper-wasi" in done.stderr


def test_the_host_asks_for_the_version_that_it_is_built_with() -> None:
    project = tomllib.loads((ROOT / "wasi/pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [f"sapper=={sapper.__version__}"]
