"""The proxy between programs that people run: nginx and HAProxy behind it and before it, curl its client."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sapper.tls import Credentials, Proxy, TlsConfig
from support import needs
from support.certs import Certificates
from support.programs import free_port, run_program
from support.proxies import own, trusting
from support.services import echo


def port_of(proxy: Proxy) -> int:
    return int(proxy.addresses[0].rsplit(":", 1)[1])


@contextmanager
def nginx(folder: Path, servers: str, port: int) -> Iterator[None]:
    """One process of nginx with these servers, in the foreground."""
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr;\n"
        f"events {{}}\nhttp {{\n access_log off;\n"
        + "".join(
            f" {one}_temp_path {folder}/{one};\n"
            for one in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f"{servers}\n}}\n"
    )
    with run_program("nginx", "-p", folder, "-e", "stderr", "-c", folder / "nginx.conf", port=port):
        yield


@contextmanager
def haproxy(folder: Path, parts: str, port: int) -> Iterator[None]:
    times = "timeout connect 10s\n timeout client 10s\n timeout server 10s"
    (folder / "haproxy.cfg").write_text(f"defaults\n {times}\n{parts}\n")
    with run_program("haproxy", "-db", "-f", folder / "haproxy.cfg", port=port):
        yield


async def curl(url: str, *flags: str | os.PathLike[str]) -> str:
    """What curl gets; it fails where curl does."""
    command = [needs.program("curl"), "-sS", "--noproxy", "*", "--max-time", "20", *flags, url]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.needs("nginx", "curl")
@pytest.mark.parametrize("version", [None, "v1", "v2"])
async def test_before_a_plain_nginx(certs: Certificates, tmp_path: Path, version: Any) -> None:
    """It serves HTTP, and hears by the PROXY header who asks."""
    port = free_port()
    header, seen = ("proxy_protocol", "$proxy_protocol_addr") if version else ("", "$remote_addr")
    server = (
        f'server {{ listen 127.0.0.1:{port} {header}; location / {{ return 200 "{seen} $request_uri\\n"; }}\n'
        f" location /large {{ root {tmp_path}; }} }}"
    )
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    with nginx(tmp_path, server, port):
        async with Proxy(
            listen="127.0.0.1:0", to=f"127.0.0.1:{port}", tls=own(certs.server), send_proxy=version
        ) as proxy:
            trust = ("--cacert", certs.ca.cert_path)
            url = f"https://localhost:{port_of(proxy)}"
            assert await curl(f"{url}/page", *trust) == "127.0.0.1 /page\n"
            assert len(await curl(f"{url}/large", *trust)) == 3_000_000
            # Many on one connection, then as many connections.
            several = await curl(f"{url}/[1-20]", *trust)
            assert several == "".join(f"127.0.0.1 /{n}\n" for n in range(1, 21))


@pytest.mark.needs("nginx", "curl")
async def test_before_an_nginx_that_wants_a_certificate(certs: Certificates, tmp_path: Path) -> None:
    """Re-encrypting with mutual TLS: nginx sees the proxy's certificate."""
    port = free_port()
    server = (
        f"server {{ listen 127.0.0.1:{port} ssl proxy_protocol; ssl_certificate {certs.server.cert_path};\n"
        f" ssl_certificate_key {certs.server.key_path}; ssl_client_certificate {certs.ca.cert_path};\n"
        " ssl_verify_client on; ssl_protocols TLSv1.3;\n"
        ' location / { return 200 "$ssl_client_s_dn $ssl_server_name '
        '$proxy_protocol_addr $ssl_protocol\\n"; } }'
    )
    us = Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
    with nginx(tmp_path, server, port):
        async with Proxy(
            listen="127.0.0.1:0",
            to=f"tls://localhost:{port}",
            tls=own(certs.server),
            upstream_tls=us,
            send_proxy="v2",
        ) as proxy:
            said = await curl(f"https://localhost:{port_of(proxy)}/", "--cacert", certs.ca.cert_path)
            assert said == "CN=client.test localhost 127.0.0.1 TLSv1.3\n"


@pytest.mark.needs("haproxy", "curl")
async def test_before_haproxy_that_reads_what_version_2_tells(certs: Certificates, tmp_path: Path) -> None:
    port = free_port()
    behind = (
        f"frontend in\n mode http\n bind 127.0.0.1:{port} accept-proxy\n"
        ' http-request return status 200 content-type text/plain lf-string "%[src] %[fc_pp_authority]"'
    )
    with haproxy(tmp_path, behind, port):
        async with Proxy(
            listen="127.0.0.1:0", to=f"127.0.0.1:{port}", tls=own(certs.server), send_proxy="v2"
        ) as proxy:
            url = f"https://localhost:{port_of(proxy)}/"
            assert await curl(url, "--cacert", certs.ca.cert_path) == "127.0.0.1 localhost"


@pytest.mark.needs("haproxy", "curl")
@pytest.mark.parametrize(
    "said", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options ssl,cert-cn,authority"]
)
async def test_behind_haproxy_that_tells_who_comes(certs: Certificates, tmp_path: Path, said: str) -> None:
    """Its PROXY header, in front of the client's TLS that it passes on, is believed."""
    port = free_port()
    with echo() as service:
        async with Proxy(
            listen="127.0.0.1:0",
            to=service.to,
            tls=TlsConfig(credentials=Credentials.certificate(certs.server.cert, certs.server.key)),
            proxy_from="127.0.0.0/8",
        ) as proxy:
            before = (
                f"frontend in\n bind 127.0.0.1:{port}\n default_backend out\n"
                f"backend out\n server one 127.0.0.1:{port_of(proxy)} {said}"
            )
            with haproxy(tmp_path, before, port):
                with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                    named = raw.getsockname()[1]
                    shake = trusting(certs).wrap_socket
                    one = await asyncio.to_thread(shake, raw, server_hostname="localhost")
                    with one:
                        assert await asyncio.to_thread(one.recv, 5) == b"echo\n"
                        (shown,) = proxy.connections()
                        assert shown.client == f"127.0.0.1:{named}"
