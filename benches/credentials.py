"""Throw-away certificates for the rows that need them: an authority and a leaf for `localhost`, P-256."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benches.children import run
from benches.programs import program

SERVER_NAME = "localhost"
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-x509")


@dataclass(frozen=True)
class Files:
    """Paths of PEM files."""

    roots: Path
    chain: Path
    key: Path

    def arguments(self) -> list[str | Path]:
        """The options by which the programs of these rows take them."""
        return ["--roots", self.roots, "--certificate", self.chain, "--private-key", self.key]


class Credentials:
    """The files, in a directory that goes with the `with` block."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="sapper-bench-")

    def __enter__(self) -> Files:
        where = Path(self._directory.name)
        files = Files(where / "roots.pem", where / "leaf.pem", where / "leaf.key")
        authority = where / "authority.key"
        openssl = program("openssl")
        run(
            [openssl, "req", *_KEY, "-subj", "/CN=bench authority", "-keyout", authority, "-out", files.roots]
        )
        run([
            openssl, "req", *_KEY, "-subj", f"/CN={SERVER_NAME}", "-keyout", files.key, "-out", files.chain,
            "-CA", files.roots, "-CAkey", authority, "-addext", "basicConstraints=critical,CA:FALSE",
            "-addext", f"subjectAltName=DNS:{SERVER_NAME}",
        ])  # fmt: skip
        return files

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.cleanup()
