"""Upgrades in place with the real programs: psql and PostgreSQL, smtplib and aiosmtpd, imaplib and Dovecot.

Each once with Sapper on the client's side and once on the server's, by bridges and by the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import imaplib
import os
import shutil
import smtplib
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sapper import tls
from sapper.errors import CertificateError, ConnectionLost, HandshakeDeadline, SapperError
from sapper.tls import Credentials, Proxy
from sapper.tls.proxy import ProxyEvent
from support import needs
from support.certs import Certificates
from support.postgres import run_postgres
from support.programs import free_port, run_program
from support.proxies import ends


@contextlib.asynccontextmanager
async def gate(*, server_side: bool, target: int, **options: Any) -> AsyncIterator[tuple[int, list[Any]]]:
    """Sapper in front of a service on this machine, a bridge for each connection; its port, its failures."""
    failures: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        near, far = (reader, writer), ("127.0.0.1", target)
        network, inside = (near, far) if server_side else (far, near)
        bridge = tls.create_bridge(
            socket=network,
            sink=inside,
            server_side=server_side,
            server_hostname=None if server_side else "localhost",
            on_error=failures.append,
            **options,
        )
        try:
            await bridge.handshake()
            bridge.start()
            await bridge.wait_closed()
        except SapperError as error:
            failures.append(error)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], failures


def serious(failures: list[Any]) -> list[Any]:
    """All but peers that leave without close_notify: Python's clients and MariaDB do."""
    return [error for error in failures if not isinstance(error, ConnectionLost)]


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.01)  # between two looks: the failure is told on another thread


def port_of(proxy: Proxy) -> int:
    return int(proxy.addresses[0].rsplit(":", 1)[1])


def reasons(events: list[ProxyEvent], outcome: str) -> list[str | None]:
    return [one.error.reason for one in ends(events, outcome) if one.error is not None]


def failed_with(events: list[ProxyEvent], kind: type[SapperError]) -> bool:
    return any(isinstance(one.error, kind) for one in ends(events, "handshake"))


def client_credentials(certs: Certificates) -> Any:
    return Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)


def server_credentials(certs: Certificates) -> Any:
    return Credentials.certificate(certs.server.cert, certs.server.key)


# -- PostgreSQL ----------------------------------------------------------------------------------------


async def psql(port: int, query: str, **options: object) -> subprocess.CompletedProcess[str]:
    words = {"host": "localhost", "port": port, "user": "client.test", "dbname": "postgres"} | options
    command = [
        needs.program("psql"), "--no-psqlrc", "-tA", "-c", query,
        " ".join(f"{name}={value}" for name, value in words.items()),
    ]  # fmt: skip
    environment = {**os.environ, "PGCONNECT_TIMEOUT": "20", "HOME": "/nonexistent"}
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, env=environment, check=False
    )


@pytest.mark.needs("psql")
async def test_psql_without_tls_to_a_server_that_wants_a_certificate(certs: Certificates) -> None:
    """Sapper on the client's side."""
    with run_postgres(certs, tls=True) as port:
        credentials = client_credentials(certs)
        async with gate(server_side=False, target=port, upgrade="postgres", credentials=credentials) as (
            near,
            failures,
        ):
            query = "SELECT ssl, version, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            done = await psql(near, query, sslmode="disable", gssencmode="disable")
            assert (done.stdout, done.stderr) == ("t|TLSv1.3|/CN=client.test\n", "")
            done = await psql(near, "SELECT repeat('x', 3000000)", sslmode="disable", gssencmode="disable")
            assert len(done.stdout) == 3_000_001
            assert failures == []


@pytest.mark.needs("psql")
async def test_psql_with_mutual_tls_to_a_server_without_any(certs: Certificates, tmp_path: Path) -> None:
    """Sapper on the server's side."""
    for name, content in (
        ("root.crt", certs.ca.cert),
        ("client.crt", certs.client.cert),
        ("client.key", certs.client.key),
    ):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    verified = {"sslmode": "verify-full", "sslrootcert": tmp_path / "root.crt"}
    mutual = verified | {"sslcert": tmp_path / "client.crt", "sslkey": tmp_path / "client.key"}
    credentials = tls.TlsConfig(
        credentials=server_credentials(certs), roots=certs.ca.cert, client_auth="required"
    )
    with run_postgres(certs, tls=False) as port:
        async with gate(server_side=True, target=port, upgrade="postgres", credentials=credentials) as (
            near,
            failures,
        ):
            for encryption in ("disable", "prefer"):
                done = await psql(near, "SELECT 6 * 7", **mutual, gssencmode=encryption)
                assert (done.stdout, done.stderr) == ("42\n", "")
            assert serious(failures) == []
            done = await psql(near, "SELECT 1", **verified, sslcert="/nonexistent")
            assert done.returncode != 0
            done = await psql(near, "SELECT 1", sslmode="disable", gssencmode="disable")
            assert "connections are under TLS only" in done.stderr
            await until(lambda: any(error.reason == "no_tls" for error in failures))


@pytest.mark.needs("psql")
async def test_psql_through_two_proxies_with_mutual_tls_between(certs: Certificates) -> None:
    """Neither psql nor the server knows of TLS."""
    events: list[ProxyEvent] = []
    mutual = tls.TlsConfig(credentials=server_credentials(certs), roots=certs.ca.cert, client_auth="required")
    with run_postgres(certs, tls=False) as port:
        async with (
            Proxy(
                listen="127.0.0.1:0",
                to=f"127.0.0.1:{port}",
                tls=mutual,
                upgrade="postgres",
                on_event=events.append,
            ) as far,
            Proxy(
                listen="127.0.0.1:0",
                to=f"tls://localhost:{port_of(far)}",
                upstream_tls=client_credentials(certs),
                upstream_upgrade="postgres",
                on_event=events.append,
            ) as near,
            Proxy(
                listen="127.0.0.1:0",
                to=f"tls://localhost:{port_of(far)}",
                upstream_tls=client_credentials(certs),
                upstream_upgrade="postgres-direct",
                on_event=events.append,
            ) as direct,
        ):
            for proxy in (near, direct):
                query = "SELECT repeat('x', 3000000)"
                done = await psql(port_of(proxy), query, sslmode="disable", gssencmode="disable")
                assert (len(done.stdout), done.stderr) == (3_000_001, "")
            await until(lambda: far.stats().handshakes == {"TLSv1.3": 2})
            assert events == []
            # Without TLS nobody gets in, and is told so in words that psql shows.
            done = await psql(port_of(far), "SELECT 1", sslmode="disable", gssencmode="disable")
            assert "connections are under TLS only" in done.stderr
            await until(lambda: "no_tls" in reasons(events, "handshake"))


@pytest.mark.needs("psql")
async def test_psql_with_mutual_tls_on_both_sides_of_a_proxy(certs: Certificates, tmp_path: Path) -> None:
    """The proxy shows the server its own certificate: to it every client is the proxy."""
    for name, content in (
        ("root.crt", certs.ca.cert),
        ("client.crt", certs.client.cert),
        ("client.key", certs.client.key),
    ):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    mutual = {
        "sslmode": "verify-full",
        "sslrootcert": tmp_path / "root.crt",
        "sslcert": tmp_path / "client.crt",
        "sslkey": tmp_path / "client.key",
    }
    with run_postgres(certs, tls=True) as port:
        # By the name that psql asks for, behind its request in clear.
        route = tls.Route(
            names=("localhost",),
            to=(f"tls://localhost:{port}",),
            tls=tls.TlsConfig(
                credentials=server_credentials(certs), roots=certs.ca.cert, client_auth="required"
            ),
            upstream_tls=client_credentials(certs),
            upstream_upgrade="postgres",
        )
        async with Proxy(listen="127.0.0.1:0", routes=(route,), upgrade="postgres") as proxy:
            query = "SELECT ssl, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            done = await psql(port_of(proxy), query, **mutual)
            assert (done.stdout, done.stderr) == ("t|/CN=client.test\n", "")


# -- SMTP ----------------------------------------------------------------------------------------------


class Mailbox:
    """Keeps what an aiosmtpd server is given."""

    def __init__(self) -> None:
        self.received: list[tuple[bytes, bool]] = []

    async def handle_DATA(self, _server: Any, session: Any, envelope: Any) -> str:
        self.received.append((envelope.content, session.ssl is not None))
        return "250 kept"


@contextlib.asynccontextmanager
async def mail_server(mailbox: Mailbox, context: ssl.SSLContext | None) -> AsyncIterator[int]:
    smtp = pytest.importorskip("aiosmtpd.smtp")
    connections: list[Any] = []

    def connection() -> Any:
        connections.append(smtp.SMTP(mailbox, tls_context=context, require_starttls=context is not None))
        return connections[-1]

    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
    try:
        async with server:
            yield server.sockets[0].getsockname()[1]
    finally:
        # The end of the last one may not have come yet, and nobody else closes it.
        for one in connections:
            if one.transport is not None:
                one.transport.abort()


def send_mail(port: int, text: str, context: ssl.SSLContext | None) -> None:
    with smtplib.SMTP("localhost", port, timeout=20) as client:
        if context is not None:
            client.starttls(context=context)
        client.sendmail("a@example", ["b@example"], text)


async def test_smtplib_without_tls_to_a_server_that_wants_it(certs: Certificates) -> None:
    """Sapper on the client's side."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certs.server.cert_path, certs.server.key_path)
    mailbox = Mailbox()
    credentials = Credentials.none(roots=certs.ca.cert)
    async with (
        mail_server(mailbox, context) as port,
        gate(server_side=False, target=port, upgrade="smtp", credentials=credentials) as (near, failures),
    ):
        await asyncio.to_thread(send_mail, near, "Subject: hello\r\n\r\n" + "line\r\n" * 10_000, None)
    (content, under_tls), *rest = mailbox.received
    assert (content.count(b"line"), under_tls, rest, failures) == (10_000, True, [], [])


async def test_smtplib_with_starttls_to_a_server_without(certs: Certificates) -> None:
    """Sapper on the server's side."""
    context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
    mailbox = Mailbox()
    credentials = server_credentials(certs)
    async with (
        mail_server(mailbox, None) as port,
        gate(server_side=True, target=port, upgrade="smtp", credentials=credentials) as (near, failures),
    ):
        await asyncio.to_thread(send_mail, near, "Subject: hello\r\n\r\nline\r\n", context)
        assert serious(failures) == []
        with pytest.raises(smtplib.SMTPSenderRefused, match="STARTTLS"):
            await asyncio.to_thread(send_mail, near, "never", None)
    assert [content.count(b"line") for content, _ in mailbox.received] == [1]


async def test_smtplib_through_the_proxy(certs: Certificates) -> None:
    """STARTTLS with the client, with the server, and with both."""
    context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
    of_server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    of_server.load_cert_chain(certs.server.cert_path, certs.server.key_path)
    plain, secure = Mailbox(), Mailbox()
    events: list[ProxyEvent] = []
    with_client: dict[str, Any] = {"tls": server_credentials(certs), "upgrade": "smtp"}
    with_server: dict[str, Any] = {
        "upstream_tls": Credentials.none(roots=certs.ca.cert),
        "upstream_upgrade": "smtp",
    }
    listen: dict[str, Any] = {"listen": "127.0.0.1:0", "on_event": events.append}
    async with mail_server(plain, None) as port, mail_server(secure, of_server) as tls_port:
        for to, said, client in (
            (f"127.0.0.1:{port}", with_client, context),
            (f"tls://localhost:{tls_port}", with_server, None),
            (f"tls://localhost:{tls_port}", with_client | with_server, context),
        ):
            async with Proxy(**listen, to=to, **said) as proxy:
                await asyncio.to_thread(send_mail, port_of(proxy), "Subject: x\r\n\r\nline\r\n", client)
        assert [under_tls for _, under_tls in plain.received + secure.received] == [False, True, True]
        assert all(content.count(b"line") == 1 for content, _ in plain.received + secure.received)
        assert events == []
        async with Proxy(**listen, to=f"127.0.0.1:{port}", **with_client) as proxy:
            with pytest.raises(smtplib.SMTPSenderRefused, match="STARTTLS"):
                await asyncio.to_thread(send_mail, port_of(proxy), "never", None)
            # A command behind STARTTLS would be taken for a protected one.
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
            writer.write(b"EHLO me\r\nSTARTTLS\r\nNOOP\r\n")
            async with asyncio.timeout(20):
                heard = await reader.read()
            assert b"220 2.0.0" not in heard
            writer.close()

            await until(lambda: "early_data" in reasons(events, "handshake"))
        # A service that is not ready: its client had a greeting, and hears no orderly end.
        async with busy_server() as busy, Proxy(**listen, to=f"127.0.0.1:{busy}", **with_client) as proxy:
            with pytest.raises((smtplib.SMTPException, OSError)):
                await asyncio.to_thread(send_mail, port_of(proxy), "never", context)
            await until(lambda: "service" in reasons(events, "upstream"))
    assert len(plain.received) == 1


@contextlib.asynccontextmanager
async def busy_server() -> AsyncIterator[int]:
    """A mail server that serves nobody."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"421 try again later\r\n")
            with contextlib.suppress(OSError):
                await reader.read()
        finally:
            writer.close()  # also where the test is over first

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


# -- IMAP ----------------------------------------------------------------------------------------------


@pytest.fixture
def dovecot(certs: Certificates) -> Iterator[int]:
    """A Dovecot that has STARTTLS, with one user."""
    if os.geteuid() != 0:
        needs.lacking("it needs root: Dovecot changes users")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="sapper-dovecot-") as folder:
        home = Path(folder)
        home.chmod(0o755)
        (home / "mail").mkdir()
        shutil.chown(home / "mail", "nobody")
        (home / "dovecot.conf").write_text(
            f"""
            base_dir = {home}/run
            log_path = {home}/log
            protocols = imap
            listen = 127.0.0.1
            ssl = yes
            ssl_cert = <{certs.server.cert_path}
            ssl_key = <{certs.server.key_path}
            disable_plaintext_auth = no
            mail_location = maildir:{home}/mail
            first_valid_uid = 1
            default_internal_user = nobody
            default_login_user = nobody
            service imap-login {{
              chroot =
              inet_listener imap {{
                port = {port}
              }}
              inet_listener imaps {{
                port = 0
              }}
            }}
            service anvil {{
              chroot =
            }}
            passdb {{
              driver = static
              args = password=secret
            }}
            userdb {{
              driver = static
              args = uid=nobody gid=nogroup home={home}/mail
            }}
            """
        )
        with run_program("dovecot", "-F", "-c", home / "dovecot.conf") as program:
            program.wait_for_port(port)
            yield port


def read_mail(port: int, context: ssl.SSLContext | None) -> list[bytes]:
    with imaplib.IMAP4("localhost", port, timeout=20) as client:
        if context is not None:
            client.starttls(context)
        client.login("somebody", "secret")
        client.append("INBOX", "", "", b"Subject: hello\r\n\r\n" + b"line\r\n" * 1_000)
        client.select("INBOX")
        _, found = client.fetch("1:*", "(RFC822)")
        return [part[1] for part in found if isinstance(part, tuple)]


@pytest.mark.needs("dovecot")
async def test_imaplib_with_sapper_on_either_side(dovecot: int, certs: Certificates) -> None:
    roots = Credentials.none(roots=certs.ca.cert)
    context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
    async with (
        gate(server_side=False, target=dovecot, upgrade="imap", credentials=roots) as (near, near_failures),
        gate(server_side=True, target=dovecot, upgrade="imap", credentials=server_credentials(certs)) as (
            far,
            far_failures,
        ),
    ):
        (one,) = await asyncio.to_thread(read_mail, near, None)
        assert one.count(b"line") == 1_000
        both = await asyncio.to_thread(read_mail, far, context)
        assert [mail.count(b"line") for mail in both] == [1_000, 1_000]
        assert (near_failures, serious(far_failures)) == ([], [])
        with pytest.raises(imaplib.IMAP4.error, match="STARTTLS"):
            await asyncio.to_thread(read_mail, far, None)
    async with Proxy(
        listen="127.0.0.1:0",
        to=f"tls://localhost:{dovecot}",
        tls=server_credentials(certs),
        upgrade="imap",
        upstream_tls=roots,
        upstream_upgrade="imap",
    ) as proxy:
        mails = await asyncio.to_thread(read_mail, port_of(proxy), context)
        assert [mail.count(b"line") for mail in mails] == [1_000] * 3


# -- MySQL ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_mariadb(certs: Certificates, *, under_tls: bool) -> Iterator[int]:
    """A MariaDB server with one user, who must come under TLS or must not."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="sapper-mariadb-") as folder:
        home, data = Path(folder), Path(folder) / "data"
        home.chmod(0o755)
        for name, content in (("server.crt", certs.server.cert), ("server.key", certs.server.key)):
            (home / name).write_bytes(content)
        require = "REQUIRE SSL" if under_tls else "REQUIRE NONE"
        (home / "init.sql").write_text(
            f"CREATE USER 'somebody'@'%' IDENTIFIED BY 'secret' {require};\n"
            "GRANT ALL ON *.* TO 'somebody'@'%';\n"
        )
        user = []
        if os.geteuid() == 0:
            user = ["--user=nobody"]
            for path in (home, *home.iterdir()):
                shutil.chown(path, "nobody")
        subprocess.run(
            [needs.program("mariadb-install-db"), "--no-defaults", f"--datadir={data}", *user],
            check=True, capture_output=True, cwd=home,
        )  # fmt: skip
        secure = (
            [f"--ssl-cert={home}/server.crt", f"--ssl-key={home}/server.key"] if under_tls else ["--skip-ssl"]
        )
        with run_program(
            "mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={home}/socket", f"--port={port}",
            "--bind-address=127.0.0.1", f"--init-file={home}/init.sql", "--skip-name-resolve", *secure, *user,
        ) as program:  # fmt: skip
            program.wait_for(b"ready for connections", 60)
            yield port


def ask_mysql(port: int, **options: Any) -> tuple[Any, ...]:
    pymysql = pytest.importorskip("pymysql")
    connection = pymysql.connect(
        host="localhost", port=port, user="somebody", password="secret", connect_timeout=20, **options
    )
    with connection, connection.cursor() as cursor:
        cursor.execute("SHOW STATUS LIKE 'Ssl_version'")
        version = cursor.fetchone()[1]
        cursor.execute("SELECT repeat('x', 1000000)")
        return version, len(cursor.fetchone()[0])


@pytest.mark.needs("mariadbd", "mariadb-install-db")
async def test_pymysql_without_tls_to_a_server_that_wants_it(certs: Certificates) -> None:
    """Sapper on the client's side."""
    roots = Credentials.none(roots=certs.ca.cert)
    with run_mariadb(certs, under_tls=True) as port:
        async with gate(server_side=False, target=port, upgrade="mysql", credentials=roots) as (
            near,
            failures,
        ):
            answer = await asyncio.to_thread(ask_mysql, near, ssl_disabled=True)
            assert (answer, serious(failures)) == (("TLSv1.3", 1_000_000), [])


@pytest.mark.needs("mariadbd", "mariadb-install-db")
async def test_pymysql_with_tls_to_a_server_without(certs: Certificates) -> None:
    """Sapper on the server's side."""
    pymysql = pytest.importorskip("pymysql")
    context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
    identity = server_credentials(certs)
    with run_mariadb(certs, under_tls=False) as port:
        async with gate(server_side=True, target=port, upgrade="mysql", credentials=identity) as (
            near,
            failures,
        ):
            answer = await asyncio.to_thread(ask_mysql, near, ssl=context)
            assert (answer, serious(failures)) == (("", 1_000_000), [])
            with pytest.raises(pymysql.OperationalError, match="under TLS only"):
                await asyncio.to_thread(ask_mysql, near, ssl_disabled=True)
            await until(lambda: any(error.reason == "no_tls" for error in failures))


@pytest.mark.needs("mariadbd", "mariadb-install-db")
async def test_pymysql_through_the_proxy(certs: Certificates) -> None:
    """With the client, with the server, and with both; mutual TLS and its rules with the client."""
    pymysql = pytest.importorskip("pymysql")
    context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
    context.load_cert_chain(certs.client.cert_path, certs.client.key_path)
    stranger = ssl.create_default_context(cafile=str(certs.ca.cert_path))
    events: list[ProxyEvent] = []
    with_client: dict[str, Any] = {
        "tls": Credentials.certificate(certs.server.cert, certs.server.key, roots=certs.ca.cert),
        "upgrade": "mysql",
    }
    with_server: dict[str, Any] = {
        "upstream_tls": Credentials.none(roots=certs.ca.cert),
        "upstream_upgrade": "mysql",
    }
    listen: dict[str, Any] = {"listen": "127.0.0.1:0", "on_event": events.append, "handshake_timeout": 5}
    with run_mariadb(certs, under_tls=False) as port, run_mariadb(certs, under_tls=True) as tls_port:
        for to, said, options, version in (
            (f"127.0.0.1:{port}", with_client, {"ssl": context}, ""),
            (f"tls://localhost:{tls_port}", with_server, {"ssl_disabled": True}, "TLSv1.3"),
            (f"tls://localhost:{tls_port}", with_client | with_server, {"ssl": context}, "TLSv1.3"),
        ):
            async with Proxy(**listen, to=to, **said) as proxy:
                for _ in range(3):
                    answer = await asyncio.to_thread(ask_mysql, port_of(proxy), **options)
                    assert answer == (version, 1_000_000)
        assert ends(events, "handshake") == ends(events, "upstream") == []
        async with Proxy(**listen, to=f"127.0.0.1:{port}", **with_client) as proxy:
            with pytest.raises(pymysql.OperationalError, match="under TLS only"):
                await asyncio.to_thread(ask_mysql, port_of(proxy), ssl_disabled=True)
            await until(lambda: "no_tls" in reasons(events, "handshake"))
            # No certificate: refused in the handshake, the log-in never reaches the service.
            with pytest.raises(pymysql.OperationalError):
                await asyncio.to_thread(ask_mysql, port_of(proxy), ssl=stranger)
            await until(lambda: failed_with(events, CertificateError))
            # Who says nothing has the greeting, and meets the deadline.
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
            async with asyncio.timeout(20):
                greeting = await reader.read()
            assert b"MariaDB" in greeting
            writer.close()
            await until(lambda: failed_with(events, HandshakeDeadline))
        # A wrong certificate of the service ends it before a password is said.
        other = Credentials.none(roots=certs.other_ca.cert)
        wrong: dict[str, Any] = {"upstream_tls": other, "upstream_upgrade": "mysql"}
        async with Proxy(**listen, to=f"tls://localhost:{tls_port}", **wrong) as proxy:
            with pytest.raises(pymysql.OperationalError):
                await asyncio.to_thread(ask_mysql, port_of(proxy), ssl_disabled=True)
            await until(lambda: "unknown_issuer" in reasons(events, "upstream"))
