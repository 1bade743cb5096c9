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


#: A host that tells which TLS it was given, and runs nothing.
HOST = """
def run(guest, **given):
    for name, config in given["tls"].items():
        print(name, config.max_version)
    raise SystemExit(0)
"""


def wasi_run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (folder / "sapper_wasi.py").write_text(HOST)
    return subprocess.run(
        [sys.executable, "-m", "sapper.cli", "wasi", "run", "guest.wasm", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1", "COLUMNS": "200"},
    )  # fmt: skip


def test_options_of_tls_may_stand_in_their_table(tmp_path: Path) -> None:
    (tmp_path / "bare.toml").write_text('max_version = "TLSv1.2"\n')
    (tmp_path / "table.toml").write_text('[tls]\nmax_version = "TLSv1.2"\n')
    for file in ("bare.toml", "table.toml"):
        done = wasi_run(tmp_path, "--tls", f"db.example={tmp_path / file}")
        assert done.stdout.startswith("db.example TLSv1.2"), done.stderr


def test_what_stands_beside_the_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "both.toml").write_text('alpn = ["h2"]\n[tls]\nmax_version = "TLSv1.2"\n')
    done = wasi_run(tmp_path, "--tls", tmp_path / "both.toml")
    assert done.returncode == 2
    assert "alpn" in done.stderr
    assert "beside the table [tls]" in done.stderr
