"""Builds and finds the programs that the rows need, and names plainly what is missing.

C programs are built with the system's OpenSSL, wireguard-go by the Go tool, peers in Rust by cargo, at pinned
versions; all land in `benches/.build`, which is not committed, and are rebuilt when a source is newer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benches.children import BenchError, run

HERE = Path(__file__).resolve().parent
BUILD = HERE / ".build"
WIREGUARD = "golang.zx2c4.com/wireguard@v0.0.0-20260522210424-ecfc5a8d5446"

_CRATES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # Without what these rows do not use; TLS is the system's OpenSSL.
    "rathole": ("rathole", "0.5.0", ("--no-default-features", "--features", "server,client,tls")),
    "bore": ("bore-cli", "0.6.0", ()),
}

_C = {
    "load": ("load/load.c", "load/inner_tcp.c", "load/record.c"),
    "hold": ("load/hold.c",),
    "tls_load": ("load/tls_load.c",),
    "tunnel_load": ("load/tunnel_load.c",),
    "native_pump": ("peers/native_pump.c",),
    "forwarder": ("peers/forwarder.c",),
}
_PACKAGES = {
    "gcc": "gcc",
    "go": "golang, or the archive from go.dev",
    "ip": "iproute2",
    "haproxy": "haproxy",
    "iperf3": "iperf3",
    "nginx": "nginx-light and libnginx-mod-stream",
    "openssl": "openssl",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "stunnel": "stunnel4",
}


@cache
def program(name: str) -> Path:
    """A program of the system."""
    found = shutil.which(name)
    if not found:
        raise BenchError(f"{name} is not installed (package: {_PACKAGES.get(name, name)})")
    return Path(found)


@cache
def compiled(name: str) -> Path:
    """One of our C programs."""
    sources = [HERE / source for source in _C[name]]
    headers = HERE.glob("*/*.h")
    out = BUILD / name
    if out.exists() and all(out.stat().st_mtime >= each.stat().st_mtime for each in (*sources, *headers)):
        return out
    if not _has_headers():
        raise BenchError("OpenSSL's headers are not installed (package: libssl-dev)")
    BUILD.mkdir(exist_ok=True)
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-pthread")
    # A name of its own and a rename: two benches at once do not see half a program.
    fresh = BUILD / f".{name}.{os.getpid()}"
    run([program("gcc"), *flags, "-o", fresh, *sources, "-lssl", "-lcrypto"], 120)
    fresh.rename(out)
    return out


@cache
def wireguard() -> Path:
    """wireguard-go at the pinned version."""
    out = BUILD / "wireguard"
    version = WIREGUARD.rpartition("@")[2]
    go = program("go")
    if out.exists() and version in run([go, "version", "-m", out]):
        return out
    BUILD.mkdir(exist_ok=True)
    run(["env", f"GOBIN={BUILD}", go, "install", WIREGUARD], 300)
    return out


@cache
def crate(name: str) -> Path:
    """A published crate's program at its pinned version, with the newest dependencies that it allows."""
    package, version, features = _CRATES[name]
    root = BUILD / "crates"
    out = root / "bin" / name
    installed = root / ".crates.toml"
    if out.exists() and installed.exists() and f'"{package} {version} ' in installed.read_text():
        return out
    root.mkdir(parents=True, exist_ok=True)
    objects = root / "target"
    where = ("--root", root, "--target-dir", objects)
    run([program("cargo"), "install", "--quiet", *where, *features, f"{package}@{version}"], 1200)
    shutil.rmtree(objects)
    return out


@cache
def sshd() -> Path:
    """OpenSSH's server: the system's, or its Debian package unpacked, so that nothing starts by itself."""
    found = shutil.which("sshd", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))
    if found:
        return Path(found)
    folder = BUILD / "openssh"
    out = folder / "usr/sbin/sshd"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        script = 'cd "$1" && apt-get download -q openssh-server && dpkg -x openssh-server_*.deb .'
        try:
            run([program("sh"), "-c", script, "sh", folder], 120)
        except BenchError as error:
            raise BenchError(f"sshd is not installed (package: openssh-server): {error}") from None
    return out


@cache
def peer_python() -> tuple[Path, bool]:
    """The interpreter of the Python peers, and whether its ssl module has pre-shared keys (from 3.13 on)."""
    for candidate in _interpreters():
        probe = "import ssl, sys; sys.exit(not hasattr(ssl.SSLContext, 'set_psk_client_callback'))"
        if not subprocess.run([candidate, "-c", probe], check=False, capture_output=True).returncode:
            return candidate, True
    return Path(sys.executable), False


def _interpreters() -> Iterator[Path]:
    yield Path(sys.executable)
    for minor in range(20, 12, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            yield Path(found)
    # pyenv's and uv's interpreters are not on the path unless somebody chose them.
    for pattern in (".pyenv/versions/3.*/bin/python3", ".local/share/uv/python/cpython-3.*/bin/python3"):
        yield from sorted(Path.home().glob(pattern), key=_version, reverse=True)


def _version(path: Path) -> tuple[int, ...]:
    name = path.parent.parent.name.removeprefix("cpython-").split("-")[0]
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _has_headers() -> bool:
    test = subprocess.run(
        [program("gcc"), "-E", "-include", "openssl/ssl.h", "-x", "c", os.devnull, "-o", os.devnull],
        check=False,
        capture_output=True,
    )
    return not test.returncode
