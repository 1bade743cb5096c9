"""The TLS proxies under comparison: how each is told to put TLS 1.3 in front of a plain service.

All of them have the same certificate (ECDSA, P-256), TLS_AES_256_GCM_SHA384, X25519, no more than the
machine's cores, no access log, and no limit that the work would meet.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benches.children import Child, Children, wait_until
from benches.credentials import Files
from benches.figures import OURS
from benches.programs import program

HAPROXY, NGINX, STUNNEL = "HAProxy", "nginx stream", "stunnel"
PEERS = (HAPROXY, NGINX, STUNNEL)

_SUITE = "TLS_AES_256_GCM_SHA384"


class Subject:
    """A running proxy, with the processes that do its work."""

    def __init__(self, child: Child, port: int) -> None:
        self._child = child
        self.port = port

    def _pids(self) -> list[int]:
        children = Path(f"/proc/{self._child.pid}/task/{self._child.pid}/children").read_text().split()
        return [self._child.pid, *(int(pid) for pid in children)]

    def cpu_seconds(self) -> float:
        """Processor time so far, user and kernel, of all its processes."""
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def private_bytes(self) -> int:
        """Private resident memory of all its processes."""
        total = 0
        for pid in self._pids():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Private_Clean:", "Private_Dirty:")):
                    total += int(line.split()[1]) * 1024
        return total


def start(
    name: str, children: Children, files: Files, port: int, service: int, folder: Path, *, mutual: bool
) -> Subject:
    """Starts one of them on 127.0.0.1:port, towards the service's port, and waits until it listens."""
    pem = folder / "both.pem"
    pem.write_bytes(files.chain.read_bytes() + files.key.read_bytes())
    pem.chmod(0o600)
    command = {OURS: _ours, HAPROXY: _haproxy, NGINX: _nginx, STUNNEL: _stunnel}[name](
        files, port, service, folder, mutual
    )
    child = children.start(command)
    wait_until(lambda: child.failed or _listens(port), f"{name} listens")
    if not child.running:
        child.result(1)
    return Subject(child, port)


def _ours(files: Files, port: int, service: int, folder: Path, mutual: bool) -> list[str | Path]:
    config = folder / "proxy.toml"
    config.write_text(f"""
[proxy]
listen = "127.0.0.1:{port}"
to = "127.0.0.1:{service}"

[proxy.tls]
cipher_suites = ["{_SUITE}"]
groups = ["X25519"]
{f'roots = "{files.roots}"' if mutual else ""}

[proxy.tls.credentials]
kind = "certificate"
chain = "{files.chain}"
key = "{files.key}"
""")
    return [sys.executable, "-m", "sapper.cli", "proxy", "--config", config, "--quiet"]


def _haproxy(files: Files, port: int, service: int, folder: Path, mutual: bool) -> list[str | Path]:
    config = folder / "haproxy.cfg"
    verify = f" ca-file {files.roots} verify required" if mutual else ""
    config.write_text(f"""
global
    maxconn 9000
    nbthread {os.cpu_count()}
    ssl-default-bind-ciphersuites {_SUITE}
    ssl-default-bind-curves X25519
    tune.ssl.cachesize 100000
defaults
    mode tcp
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen front
    bind 127.0.0.1:{port} ssl crt {folder / "both.pem"} ssl-min-ver TLSv1.3{verify}
    server back 127.0.0.1:{service}
""")
    return [program("haproxy"), "-db", "-f", config]


def _nginx(files: Files, port: int, service: int, folder: Path, mutual: bool) -> list[str | Path]:
    config = folder / "nginx.conf"
    verify = f"ssl_client_certificate {files.roots}; ssl_verify_client on;" if mutual else ""
    config.write_text(f"""
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
user root;
worker_processes {os.cpu_count()};
worker_rlimit_nofile 60000;
pid {folder / "nginx.pid"};
error_log stderr crit;
events {{ worker_connections 25000; }}
stream {{
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites {_SUITE};
    ssl_ecdh_curve X25519;
    ssl_session_cache shared:s:20m;
    server {{
        listen 127.0.0.1:{port} ssl reuseport;
        ssl_certificate {files.chain};
        ssl_certificate_key {files.key};
        {verify}
        proxy_timeout 1h;
        tcp_nodelay on;
        proxy_pass 127.0.0.1:{service};
    }}
}}
""")
    return [program("nginx"), "-p", folder, "-e", folder / "error.log", "-c", config]


def _stunnel(files: Files, port: int, service: int, folder: Path, mutual: bool) -> list[str | Path]:
    config = folder / "stunnel.conf"
    verify = f"CAfile = {files.roots}\nverifyChain = yes" if mutual else ""
    config.write_text(f"""
foreground = quiet
pid =
debug = err
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[front]
accept = 127.0.0.1:{port}
connect = 127.0.0.1:{service}
cert = {files.chain}
key = {files.key}
sslVersionMin = TLSv1.3
ciphersuites = {_SUITE}
curves = X25519
sessionCacheSize = 100000
{verify}
""")
    return [program("stunnel"), config]


def _listens(port: int) -> bool:
    wanted = f"0100007F:{port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == wanted and fields[3] == "0A":
            return True
    return False
