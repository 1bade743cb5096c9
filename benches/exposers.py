"""The reverse tunnels under comparison: how each one is told to expose a service of this machine.

Every one is two processes, a server and a client, over loopback. bore and rathole make a connection between
the two for each visitor, so they pay nothing for sharing; `ssh -R` and ours share one.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benches.children import BenchError, Child, Children, run
from benches.credentials import SERVER_NAME, Files
from benches.figures import OURS
from benches.programs import crate, program, sshd
from benches.subjects import our_program

COMMANDS, RATHOLE, BORE, SSH = "sapper's commands", "rathole", "bore", "ssh -R"
PEERS = (RATHOLE, BORE, SSH)
TLS_PEERS = (RATHOLE,)

_READY_SECONDS = 20.0
_BORE_PORT = 7835  # it knows no other


@dataclass
class Way:
    """What a tunnel is to do."""

    service: int
    folder: Path
    #: TLS between the two ends, where there is some.
    files: Files | None
    #: How many visitors come at a time, where that is more than ours takes by itself.
    visitors: int
    main: int
    #: Where visitors come in, unless the tunnel says otherwise.
    public: int


class Exposed:
    """A running tunnel."""

    def __init__(self, way: Way, server: Child, client: Child) -> None:
        self.port = way.public
        self._ends = {"server": server, "client": client}

    def cpu_seconds(self) -> float:
        """Processor time so far of both ends, user and kernel."""
        ticks = 0
        for child in self._ends.values():
            for pid in _family(child.pid):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def resident(self, end: str) -> int:
        """Resident bytes of one end's processes, `server` or `client`."""
        total = 0
        for pid in _family(self._ends[end].pid):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) * 1024
        return total


def expose(
    name: str, children: Children, service: int, folder: Path, files: Files | None = None, visitors: int = 0
) -> Exposed:
    """Starts both ends and waits until a byte comes back through them."""
    way = Way(service, folder, files, visitors, *_free_ports())
    server, client = {OURS: _ours, COMMANDS: _commands, RATHOLE: _rathole, BORE: _bore, SSH: _ssh}[name](
        way, children
    )
    limit = time.monotonic() + _READY_SECONDS
    while not _echoes(way.public):
        for child in (server, client):
            if not child.running:
                child.result(1)
                raise BenchError(f"{name} ended early")
        if time.monotonic() > limit:
            raise BenchError(f"{name} exposed nothing within {_READY_SECONDS:.0f} s: {client.complaint}")
        time.sleep(0.02)
    return Exposed(way, server, client)


def _ours(way: Way, children: Children) -> tuple[Child, Child]:
    program = our_program("expose")
    told: dict[str, object] = {"port": way.main, "visitors": way.visitors}
    if way.files:
        told |= {"chain": str(way.files.chain), "key": str(way.files.key)}
    server = children.start([*program, json.dumps({"role": "server", **told})])
    _wait_for(server, way.main)
    told = {"port": way.main, "service": way.service}
    if way.files:
        told |= {"roots": str(way.files.roots), "name": SERVER_NAME}
    client = children.start([*program, json.dumps({"role": "client", **told})])
    way.public = int(client.first_line(_READY_SECONDS))
    return server, client


def _commands(way: Way, children: Children) -> tuple[Child, Child]:
    if way.files or way.visitors:
        raise BenchError("the commands are measured idle")
    command: list[str | Path] = [sys.executable, "-m", "sapper.cli"]
    serve = [
        *command, "tunnel", "serve", "--host", "127.0.0.1", "--port", str(way.main),
        "--public-ports", f"{way.public}-{way.public}", "--danger-allow-anonymous", "--state", way.folder,
    ]  # fmt: skip
    server = children.start(serve)
    _wait_for(server, way.main)
    return server, children.start([*command, "expose", str(way.service), "--to", f"127.0.0.1:{way.main}"])


def _rathole(way: Way, children: Children) -> tuple[Child, Child]:
    config = way.folder / "rathole.toml"
    server_tls = client_tls = ""
    if way.files:
        pfx = way.folder / "rathole.pfx"
        run([
            program("openssl"), "pkcs12", "-export", "-out", pfx, "-in", way.files.chain,
            "-inkey", way.files.key, "-passout", "pass:bench",
        ])  # fmt: skip
        server_tls = f"""
[server.transport]
type = "tls"
[server.transport.tls]
pkcs12 = "{pfx}"
pkcs12_password = "bench"
"""
        client_tls = f"""
[client.transport]
type = "tls"
[client.transport.tls]
trusted_root = "{way.files.roots}"
hostname = "{SERVER_NAME}"
"""
    config.write_text(f"""
[server]
bind_addr = "127.0.0.1:{way.main}"
default_token = "bench"
{server_tls}
[server.services.bench]
bind_addr = "127.0.0.1:{way.public}"

[client]
remote_addr = "127.0.0.1:{way.main}"
default_token = "bench"
{client_tls}
[client.services.bench]
local_addr = "127.0.0.1:{way.service}"
""")
    config.chmod(0o600)
    quiet = {"RUST_LOG": "error"}
    server = children.start([crate("rathole"), "--server", config], environment=quiet)
    _wait_for(server, way.main)
    return server, children.start([crate("rathole"), "--client", config], environment=quiet)


def _bore(way: Way, children: Children) -> tuple[Child, Child]:
    if way.files:
        raise BenchError("bore has no TLS")
    quiet = {"RUST_LOG": "error"}
    server = children.start([crate("bore"), "server", "--bind-addr", "127.0.0.1"], environment=quiet)
    _wait_for(server, _BORE_PORT)
    client: list[str | Path] = [
        crate("bore"), "local", str(way.service), "--local-host", "127.0.0.1", "--to", "127.0.0.1",
        "--port", str(way.public),
    ]  # fmt: skip
    return server, children.start(client, environment=quiet)


def _ssh(way: Way, children: Children) -> tuple[Child, Child]:
    if way.files:
        raise BenchError("ssh has no TLS")
    for name in ("host", "user"):
        run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", way.folder / name])
    config = way.folder / "sshd_config"
    config.write_text(f"""
ListenAddress 127.0.0.1:{way.main}
HostKey {way.folder / "host"}
AuthorizedKeysFile {way.folder / "user.pub"}
PidFile none
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding remote
LogLevel ERROR
""")
    server = children.start([*_with_its_user(way.folder), sshd(), "-D", "-e", "-f", config])
    _wait_for(server, way.main)
    user = pwd.getpwuid(os.geteuid()).pw_name
    known = way.folder / "known_hosts"
    known.write_text(f"[127.0.0.1]:{way.main} {(way.folder / 'host.pub').read_text()}")
    client: list[str | Path] = [
        program("ssh"), "-F", "none", "-N", "-p", str(way.main), "-i", way.folder / "user",
        "-o", f"UserKnownHostsFile={known}", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
        "-o", "ExitOnForwardFailure=yes",
        "-R", f"127.0.0.1:{way.public}:127.0.0.1:{way.service}", f"{user}@127.0.0.1",
    ]  # fmt: skip
    return server, children.start(client)


def _with_its_user(folder: Path) -> Sequence[str | Path]:
    """In front of sshd, which as root wants a user and a folder that a package would make.

    It sees them in a mount namespace of its own: the machine stays as it is.
    """
    if os.geteuid() != 0:
        return ()
    users = folder / "passwd"
    known = Path("/etc/passwd").read_text()
    if not any(line.startswith("sshd:") for line in known.splitlines()):
        known += "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
    users.write_text(known)
    users.chmod(0o644)
    script = (
        'mount --bind "$1" /etc/passwd && mount -t tmpfs -o mode=755 none /run && mkdir -m 755 /run/sshd '
        '&& shift && exec "$@"'
    )
    return (program("unshare"), "--mount", program("sh"), "-c", script, "sh", users)


def _free_ports() -> tuple[int, int]:
    """Two ports that nobody listens at, and that no connection of this machine gets by chance."""
    found: list[int] = []
    with socket.socket() as one, socket.socket() as other:
        for listener in (one, other):
            for port in range(20_000 + os.getpid() % 5_000, 32_000):
                try:
                    listener.bind(("127.0.0.1", port))
                except OSError:
                    continue
                found.append(port)
                break
    if len(found) < 2:
        raise BenchError("there are no free ports")
    return found[0], found[1]


def _wait_for(child: Child, port: int) -> None:
    limit = time.monotonic() + _READY_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if not child.running:
                child.result(1)
            if time.monotonic() > limit or not child.running:
                raise BenchError(f"{child.name} does not listen: {child.complaint}") from None
            time.sleep(0.02)
        else:
            return


def _echoes(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as visitor:
            visitor.sendall(b"E")
            return visitor.recv(1) == b"E"
    except OSError:
        return False


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for one in found:
        children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        found.extend(int(child) for child in children)
    return found
