"""What each option of TLS does in ``sapper proxy``, with clients and to services: not whether it is read.

A peer of ours at the other end says what was agreed. Each case has its opposite: without the option, or with
a peer that it is against, the outcome is another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import importlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509 import ocsp
from typer.testing import CliRunner

from sapper import tls
from sapper.cli import app
from sapper.cli._tls_options import TLS_OPTIONS, option
from sapper.errors import SapperError
from sapper.tls import Credentials, HandshakeInfo, Proxy, ProxyOptions, TlsConfig, TlsStream
from sapper.tls.proxy import ConnectionEvent, ProxyEvent
from support import pcapng, programs
from support.certs import Certificates, Identity
from support.proxies import LATEST, until
from support.services import echo

PASSWORD = "of the key"
PSK = bytes(range(32))
SIDES = ("clients", "services")


def options(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> ProxyOptions:
    """What ``sapper proxy`` makes of what is typed, in place of running it."""
    made: list[ProxyOptions] = []

    async def caught(options: ProxyOptions, *rest: object) -> int:
        made.append(options)
        return 0

    monkeypatch.setattr(importlib.import_module("sapper.cli.proxy"), "serve", caught)
    result = CliRunner().invoke(app, ["proxy", *map(str, words)])
    if isinstance(result.exception, SapperError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return made[0]


@dataclass
class Meeting:
    """A proxy whose TLS with one side is told by options, and a peer of ours at that side."""

    side: str
    certs: Certificates
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        self.usual: dict[str, Any] = (
            {"cert": self.certs.server.cert_path, "key": self.certs.server.key_path}
            if self.side == "clients"
            else {"roots": self.certs.ca.cert_path}
        )

    def variable(self, name: str, value: str) -> None:
        self.monkeypatch.setenv(f"SAPPER_{'' if self.side == 'clients' else 'UPSTREAM_'}{name}", value)

    def words(self, given: dict[str, Any]) -> list[str | Path]:
        prefix = "" if self.side == "clients" else "upstream"
        words: list[str | Path] = []
        for name, value in given.items():
            for one in value if isinstance(value, list) else [value]:
                words += [option(name, prefix)] + ([] if one is True else [one])
        return words

    def own(self, identity: Identity | None = None, **more: Any) -> TlsConfig:
        """The peer's configuration: a good one, with more."""
        if self.side == "clients":
            own = Credentials.certificate(identity.cert_path, identity.key_path) if identity else None
            return TlsConfig(
                **{"roots": self.certs.ca.cert_path}
                | ({"credentials": own} if own is not None else {})
                | more
            )
        identity = identity or self.certs.server
        return TlsConfig(
            **{"credentials": Credentials.certificate(identity.cert_path, identity.key_path)} | more
        )

    @contextlib.asynccontextmanager
    async def proxy(self, given: dict[str, Any], *words: str | Path) -> AsyncIterator[Proxied]:
        """It runs, with these options beside the usual ones (``None`` takes one of those away)."""
        given = {name: value for name, value in (self.usual | given).items() if value is not None}

        async def typed(*words: str | Path) -> ProxyOptions:
            return await asyncio.to_thread(options, self.monkeypatch, "127.0.0.1:0", *words)

        events: list[ProxyEvent] = []
        async with contextlib.AsyncExitStack() as stack:
            if self.side == "clients":
                service = stack.enter_context(echo())
                made = await typed(service.to, *self.words(given), *words)
                proxy = await stack.enter_async_context(Proxy(made, on_event=events.append))
                stack.callback(proxy.stop)
                yield Proxied(self, proxy, events, None)
            else:
                port = programs.free_port()
                made = await typed(f"tls://localhost:{port}", *self.words(given), *words)
                proxy = await stack.enter_async_context(Proxy(made, on_event=events.append))
                stack.callback(proxy.stop)
                yield Proxied(self, proxy, events, port)

    async def __call__(
        self, given: dict[str, Any], peer: TlsConfig | None = None, *, name: str = "localhost"
    ) -> HandshakeInfo | None:
        """One connection with these options; what the peer knows of it, or ``None`` where one is refused."""
        async with self.proxy(given) as one:
            return await one.meet(peer, name=name)


@dataclass
class Proxied:
    meeting: Meeting
    running: Proxy
    events: list[ProxyEvent]
    service_port: int | None

    @property
    def port(self) -> int:
        return int(self.running.addresses[0].rsplit(":", 1)[1])

    def outcomes(self) -> list[str]:
        return [one.outcome for one in self.events if isinstance(one, ConnectionEvent)]

    async def meet(self, peer: TlsConfig | None = None, *, name: str = "localhost") -> HandshakeInfo | None:
        peer = peer if peer is not None else self.meeting.own()
        async with asyncio.timeout(LATEST):
            if self.meeting.side == "clients":
                return await self._client(peer, name)
            return await self._service(peer)

    async def _client(self, config: TlsConfig, name: str) -> HandshakeInfo | None:
        refused = len(self.outcomes())
        try:
            asked = None if config.credentials.kind == "psk" else name
            connecting = tls.connect("127.0.0.1", self.port, credentials=config, server_hostname=asked)
            async with await connecting as stream:
                greeting = await stream.read(100)
                if greeting:
                    assert greeting == b"echo\n"
                    return stream.info
        except SapperError:
            pass
        await until(lambda: self.outcomes()[refused:], "the proxy's word about it")
        assert self.outcomes()[refused:] == ["handshake"], self.events
        return None

    async def _service(self, config: TlsConfig) -> HandshakeInfo | None:
        seen: list[HandshakeInfo] = []

        async def greet(stream: TlsStream) -> None:
            seen.append(stream.info)
            stream.write(b"service\n")
            stream.write_eof()
            await stream.read()

        assert self.service_port is not None
        refused = len(self.outcomes())
        listener = tls.listen(("127.0.0.1", self.service_port), credentials=config)
        async with listener:
            serving = asyncio.create_task(listener.serve(greet))
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                with contextlib.suppress(ConnectionError):
                    if await reader.read(100) == b"service\n":
                        writer.close()
                        return seen[-1]
                writer.close()
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
        await until(lambda: self.outcomes()[refused:], "the proxy's word about it")
        assert self.outcomes()[-1] in ("upstream", "failed"), self.events
        return None


Case = Callable[[Meeting], Awaitable[None]]
#: By side and option.
CASES: dict[tuple[str, str], Case] = {}


def shows(*names: str, sides: tuple[str, ...] = SIDES) -> Callable[[Case], Case]:
    """A case that shows what these options do at these sides."""

    def keep(case: Case) -> Case:
        CASES.update({(side, name): case for side in sides for name in names})
        return case

    return keep


def shown_by(meeting: Meeting) -> Identity:
    return meeting.certs.server if meeting.side == "clients" else meeting.certs.client


def asking(meeting: Meeting) -> TlsConfig:
    """A peer that wants to see a certificate."""
    return meeting.own() if meeting.side == "clients" else meeting.own(roots=meeting.certs.ca.cert_path)


@shows("cert", "key")
async def own_certificate(meeting: Meeting) -> None:
    one = shown_by(meeting)
    encrypted = meeting.folder / "encrypted.pem"
    encrypted.write_bytes(one.encrypted_key(PASSWORD.encode()))
    meeting.variable("KEY_PASSWORD", PASSWORD)
    for key in (one.key_path, encrypted):
        info = await meeting({"cert": one.cert_path, "key": key}, asking(meeting))
        assert info is not None
        assert info.peer_certificate == one.cert_der
    if meeting.side == "services":
        assert await meeting({}, asking(meeting)) is None


@shows("pkcs12")
async def both_in_one(meeting: Meeting) -> None:
    one = shown_by(meeting)
    sealed = serialization.BestAvailableEncryption(PASSWORD.encode())
    (meeting.folder / "own.p12").write_bytes(
        pkcs12.serialize_key_and_certificates(b"own", one.private_key, one.certificate, None, sealed)
    )
    meeting.variable("KEY_PASSWORD", PASSWORD)
    info = await meeting({"cert": None, "key": None, "pkcs12": meeting.folder / "own.p12"}, asking(meeting))
    assert info is not None
    assert info.peer_certificate == one.cert_der


def staple(certs: Certificates) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    made = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=certs.server.certificate,
            issuer=certs.ca.certificate,
            algorithm=hashes.SHA256(),
            cert_status=ocsp.OCSPCertStatus.GOOD,
            this_update=now - datetime.timedelta(hours=1),
            next_update=now + datetime.timedelta(hours=1),
            revocation_time=None,
            revocation_reason=None,
        )
        .responder_id(ocsp.OCSPResponderEncoding.NAME, certs.ca.certificate)
        .sign(certs.ca.private_key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.DER)


def with_issuer(meeting: Meeting) -> Path:
    chain = meeting.folder / "chain.pem"
    chain.write_bytes(meeting.certs.server.cert + meeting.certs.ca.cert)
    return chain


@shows("ocsp-response", sides=("clients",))
async def stapled(meeting: Meeting) -> None:
    (meeting.folder / "staple").write_bytes(staple(meeting.certs))
    chain, insists = with_issuer(meeting), meeting.own(ocsp="require")
    assert await meeting({"cert": chain, "ocsp-response": meeting.folder / "staple"}, insists) is not None
    assert await meeting({"cert": chain}, insists) is None


@shows("ocsp", sides=("services",))
async def staple_required(meeting: Meeting) -> None:
    chain, key = with_issuer(meeting), meeting.certs.server.key_path
    bare = Credentials.certificate(chain, key)
    good = Credentials.certificate(chain, key, ocsp_response=staple(meeting.certs))
    assert await meeting({"ocsp": "require"}, TlsConfig(credentials=good)) is not None
    assert await meeting({"ocsp": "require"}, TlsConfig(credentials=bare)) is None
    assert await meeting({"ocsp": "check"}, TlsConfig(credentials=bare)) is not None


@shows("more-cert", "more-key", sides=("clients",))
async def chosen_by_name(meeting: Meeting) -> None:
    other = meeting.certs.wrong_name
    async with meeting.proxy({"more-cert": other.cert_path, "more-key": other.key_path}) as one:
        for name, shown in (("localhost", meeting.certs.server), ("elsewhere.test", other)):
            info = await one.meet(name=name)
            assert info is not None
            assert info.peer_certificate == shown.cert_der


@shows("roots")
async def believed(meeting: Meeting) -> None:
    given = {"roots": meeting.certs.ca.cert_path}
    good = meeting.certs.client if meeting.side == "clients" else meeting.certs.server
    assert await meeting(given, meeting.own(good)) is not None
    strange = meeting.certs.untrusted_client if meeting.side == "clients" else meeting.certs.untrusted
    assert await meeting(given, meeting.own(strange)) is None


@shows("pin")
async def pinned(meeting: Meeting) -> None:
    good, other = meeting.certs.rsa_server, meeting.certs.server
    given = {"pin": [bytes(32).hex(), good.pin.hex()]}
    assert await meeting(given, meeting.own(good)) is not None
    assert await meeting(given, meeting.own(other)) is None


@shows("allow")
async def allowed(meeting: Meeting) -> None:
    roots = {"roots": meeting.certs.ca.cert_path}
    one = meeting.own(meeting.certs.server)
    assert await meeting(roots | {"allow": ["cn:nobody", "dns:device.test"]}, one) is not None
    assert await meeting(roots | {"allow": "cn:nobody"}, one) is None


@shows("client-auth", sides=("clients",))
async def asked_for(meeting: Meeting) -> None:
    given = {"roots": meeting.certs.ca.cert_path}
    nobody = meeting.own()
    assert await meeting(given, nobody) is None
    assert await meeting(given | {"client-auth": "optional"}, nobody) is not None
    stranger = meeting.own(meeting.certs.untrusted_client)
    assert await meeting(given | {"client-auth": "optional"}, stranger) is None


@shows("crl")
async def revoked(meeting: Meeting) -> None:
    now = datetime.datetime.now(datetime.UTC)
    gone = x509.RevokedCertificateBuilder().revocation_date(now - datetime.timedelta(days=1))
    gone = gone.serial_number(meeting.certs.rsa_server.certificate.serial_number)
    listed = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(meeting.certs.ca.certificate.subject)
        .last_update(now - datetime.timedelta(days=1))
        .next_update(now + datetime.timedelta(days=1))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_revoked_certificate(gone.build())
        .sign(meeting.certs.ca.private_key, hashes.SHA256())
    )
    (meeting.folder / "crl").write_bytes(listed.public_bytes(serialization.Encoding.PEM))
    given = {"roots": meeting.certs.ca.cert_path, "crl": meeting.folder / "crl"}
    assert await meeting(given, meeting.own(meeting.certs.server)) is not None
    assert await meeting(given, meeting.own(meeting.certs.rsa_server)) is None


@shows("psk-identity", "psk-file")
async def pre_shared_key(meeting: Meeting) -> None:
    (meeting.folder / "psk").write_text(PSK.hex())
    none = dict.fromkeys(meeting.usual)
    given = none | {"psk-identity": "name", "psk-file": meeting.folder / "psk"}
    right, of_another, another = (
        TlsConfig(credentials=Credentials.psk(name, key))
        for name, key in (("name", PSK), ("other", PSK), ("name", bytes(32)))
    )
    assert await meeting(given, right) is not None
    assert await meeting(given, of_another) is None
    assert await meeting(given, another) is None
    meeting.variable("PSK", bytes(32).hex())
    assert await meeting(none | {"psk-identity": "name"}, another) is not None


@shows("alpn")
async def application_protocol(meeting: Meeting) -> None:
    for first in ("h2", "x/1"):
        info = await meeting({"alpn": f"{first},y/1"}, meeting.own(alpn=("x/1", "h2")))
        assert info is not None
        assert info.alpn == first.encode()


@shows("min-tls")
async def oldest_version(meeting: Meeting) -> None:
    old = meeting.own(max_version="TLSv1.2")
    assert await meeting({"min-tls": "1.3"}, old) is None
    assert await meeting({"min-tls": "1.2"}, old) is not None


@shows("max-tls")
async def newest_version(meeting: Meeting) -> None:
    for typed, agreed in (("1.2", "TLSv1.2"), ("1.3", "TLSv1.3")):
        info = await meeting({"max-tls": typed})
        assert info is not None
        assert info.version == agreed


@shows("cipher-suite")
async def suite(meeting: Meeting) -> None:
    for wanted in ("TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_256_GCM_SHA384"):
        info = await meeting({"cipher-suite": wanted})
        assert info is not None
        assert info.cipher_suite == wanted


@shows("group")
async def key_exchange(meeting: Meeting) -> None:
    for wanted in ("X25519", "secp384r1"):
        info = await meeting({"group": wanted})
        assert info is not None
        assert info.group == wanted


@shows("no-resumption")
async def no_tickets(meeting: Meeting) -> None:
    for given, again in (({}, True), ({"no-resumption": True}, False)):
        peer = meeting.own()
        async with meeting.proxy(given) as one:
            for resumed in (False, again):
                info = await one.meet(peer)
                assert info is not None
                assert info.resumed is resumed


@shows("ticket-lifetime", sides=("clients",))
async def tickets_for_so_long(meeting: Meeting) -> None:
    def hint(port: int) -> int:
        context = ssl.create_default_context(cafile=str(meeting.certs.ca.cert_path))
        with (
            socket.create_connection(("127.0.0.1", port), timeout=LATEST) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as client,
        ):
            assert client.recv(5) == b"echo\n"
            assert client.session is not None
            return client.session.ticket_lifetime_hint

    hints = []
    for seconds in ("60", "600"):
        async with meeting.proxy({"ticket-lifetime": seconds, "max-tls": "1.2"}) as one:
            hints.append(await asyncio.to_thread(hint, one.port))
    assert hints[1] == 10 * hints[0]
    assert hints[0] in (60, 120)


@shows("key-log")
async def secrets_are_written(meeting: Meeting) -> None:
    log = meeting.folder / "keys"
    assert await meeting({"key-log": log}) is not None
    labels = {line.split(" ")[0] for line in log.read_text().splitlines()}
    assert labels >= {"CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"}


@shows("capture")
async def ciphertext_is_written(meeting: Meeting) -> None:
    file = meeting.folder / "capture.pcapng"
    info = await meeting({"capture": file})
    assert info is not None
    captured = await asyncio.to_thread(whole, file)
    ((client, server),) = captured.clients
    stream = captured.streams[server, client]
    said = pcapng.decrypt13(stream, captured.secrets["SERVER_TRAFFIC_SECRET_0"], info.cipher_suite)
    assert said == (b"echo\n" if meeting.side == "clients" else b"service\n")


def whole(file: Path) -> pcapng.Captured:
    """What was captured, once its configuration is gone and the last byte is on the disk."""
    gc.collect()
    return pcapng.read(file)


@shows("danger-accept-any-certificate")
async def anybody(meeting: Meeting) -> None:
    given: dict[str, Any] = {"roots": None, "danger-accept-any-certificate": True}
    if meeting.side == "clients":
        given["client-auth"] = "required"
        assert await meeting(given, meeting.own(meeting.certs.untrusted_client)) is not None
        assert await meeting(given, meeting.own()) is None  # it shows none at all
    else:
        assert await meeting(given, meeting.own(meeting.certs.untrusted)) is not None
        assert await meeting({}, meeting.own(meeting.certs.untrusted)) is None


@shows("danger-ignore-server-name", sides=("services",))
async def any_name(meeting: Meeting) -> None:
    elsewhere = meeting.own(meeting.certs.wrong_name)
    assert await meeting({}, elsewhere) is None
    assert await meeting({"danger-ignore-server-name": True}, elsewhere) is not None


@shows("danger-security-level-0")
async def small_keys(meeting: Meeting) -> None:
    small = meeting.certs._leaf("small", meeting.certs.ca, key=rsa.generate_private_key(65537, 1024))
    careless = meeting.own(None if meeting.side == "clients" else small, danger_security_level_0=True)
    own = {"cert": small.cert_path, "key": small.key_path} if meeting.side == "clients" else {}
    assert await meeting(own | {"danger-security-level-0": True}, careless) is not None
    if meeting.side == "clients":
        with pytest.raises(SapperError) as caught:
            await meeting(own, careless)
        assert caught.value.field == "--key"
    else:
        assert await meeting(own, careless) is None


@shows("danger-legacy-suites")
async def old_suites(meeting: Meeting) -> None:
    old = "TLS_RSA_WITH_AES_128_GCM_SHA256"
    certificate = meeting.certs.rsa_server
    peer = meeting.own(
        None if meeting.side == "clients" else certificate,
        cipher_suites=(old,),
        danger_legacy_suites=True,
    )
    own = {"cert": certificate.cert_path, "key": certificate.key_path} if meeting.side == "clients" else {}
    info = await meeting(own | {"danger-legacy-suites": True}, peer)
    assert info is not None
    assert info.cipher_suite == old
    assert await meeting(own, peer) is None


@shows("danger-short-psk")
async def short_keys(meeting: Meeting) -> None:
    meeting.variable("PSK", "0011")
    given = dict.fromkeys(meeting.usual) | {"psk-identity": "name"}
    peer = TlsConfig(credentials=Credentials.psk("name", "0011"), danger_short_psk=True)
    assert await meeting(given | {"danger-short-psk": True}, peer) is not None
    with pytest.raises(SapperError) as caught:
        await meeting(given, peer)
    assert caught.value.field == ("SAPPER_PSK" if meeting.side == "clients" else "SAPPER_UPSTREAM_PSK")


@shows("danger-ignore-truncation")
async def an_end_without_goodbye(meeting: Meeting) -> None:
    for given, outcome in (({}, "failed"), ({"danger-ignore-truncation": True}, "ended")):
        async with meeting.proxy(given) as one:
            await asyncio.to_thread(cut_off, meeting, one)
            stats = one.running.stats
            await until(lambda: stats().ended, "the connection's end")  # noqa: B023 - called in this turn
            assert stats().ended == {outcome: 1}


def cut_off(meeting: Meeting, one: Proxied) -> None:
    """A connection whose TLS at that side ends with TCP's end alone."""
    if meeting.side == "clients":
        context = ssl.create_default_context(cafile=str(meeting.certs.ca.cert_path))
        raw = socket.create_connection(("127.0.0.1", one.port), timeout=LATEST)
        with context.wrap_socket(raw, server_hostname="localhost") as client:
            assert client.recv(5) == b"echo\n"
        return
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(meeting.certs.server.cert_path, meeting.certs.server.key_path)
    with (
        socket.create_server(("127.0.0.1", one.service_port or 0)) as listener,
        socket.create_connection(("127.0.0.1", one.port), timeout=LATEST) as client,
    ):
        accepted, _ = listener.accept()
        with context.wrap_socket(accepted, server_side=True) as service:
            service.sendall(b"said")
            assert client.recv(4) == b"said"
            client.shutdown(socket.SHUT_WR)
            assert service.recv(1) == b""
        with contextlib.suppress(ConnectionError):
            client.recv(1)


@shows("danger-legacy-renegotiation", sides=("services",))
async def renegotiation(meeting: Meeting) -> None:
    for given, goes_on in (({"danger-legacy-renegotiation": True}, True), ({}, False)):
        async with meeting.proxy(given | {"max-tls": "1.2"}) as one:
            assert await asyncio.to_thread(renegotiates, meeting, one) is goes_on


def renegotiates(meeting: Meeting, one: Proxied) -> bool:
    server = meeting.certs.server
    with (
        programs.run_program(
            *("openssl", "s_server", "-accept", f"127.0.0.1:{one.service_port}", "-tls1_2"),
            *("-cert", server.cert_path, "-key", server.key_path),
            port=one.service_port,
        ) as service,
        socket.create_connection(("127.0.0.1", one.port), timeout=LATEST) as client,
    ):
        client.sendall(b"before it\n")
        service.wait_for(b"before it", LATEST)
        service.send(b"r\n")
        service.wait_for(rb"SSL_do_handshake -> [^\n]*\n", LATEST)
        with contextlib.suppress(ConnectionError, AssertionError):
            client.sendall(b"behind it\n")
            service.wait_for(b"behind it", 3)
            return True
        return False


def test_there_is_a_case_for_each_option() -> None:
    ends = {"clients": "server", "services": "client"}
    offered = {(side, one.name) for side in SIDES for one in TLS_OPTIONS if one.role in (None, ends[side])}
    assert set(CASES) == offered


@pytest.mark.parametrize(("side", "name"), sorted(CASES))
async def test_an_option_does_what_it_says(
    side: str, name: str, certs: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await CASES[side, name](Meeting(side, certs, tmp_path, monkeypatch))
