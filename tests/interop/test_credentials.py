"""Staples, resumption, names and PKCS#12 files with openssl's programs at the other end."""

from __future__ import annotations

import asyncio
import datetime
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509 import ocsp

import sapper.tls as tls
from sapper.errors import CertificateError, ConfigError
from support import needs
from support.certs import Certificates, Identity
from support.programs import free_port, run_program

pytestmark = pytest.mark.needs("openssl")

VERSIONS = ["TLSv1.2", "TLSv1.3"]
FLAG = {"TLSv1.2": "-tls1_2", "TLSv1.3": "-tls1_3"}


def response(
    certs: Certificates,
    *,
    about: Identity | None = None,
    signer: Identity | None = None,
    hours: tuple[float, float] = (-1, 24),
    revoked: bool = False,
    hash: hashes.HashAlgorithm | None = None,
) -> bytes:
    """An OCSP response; the default is what a client wants to see."""
    now = datetime.datetime.now(datetime.UTC)
    signer = signer or certs.ca
    status = ocsp.OCSPCertStatus.REVOKED if revoked else ocsp.OCSPCertStatus.GOOD
    made = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=(about or certs.server).certificate,
            issuer=certs.ca.certificate,
            algorithm=hash or hashes.SHA1(),
            cert_status=status,
            this_update=now + datetime.timedelta(hours=hours[0]),
            next_update=now + datetime.timedelta(hours=hours[1]),
            revocation_time=now - datetime.timedelta(hours=2) if revoked else None,
            revocation_reason=None,
        )
        .responder_id(ocsp.OCSPResponderEncoding.NAME, signer.certificate)
        .certificates([signer.certificate])
        .sign(signer.private_key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.DER)


def good(certs: Certificates) -> bytes:
    return response(certs)


STAPLES: dict[str, tuple[Callable[[Certificates], bytes | None], str | None]] = {
    "good": (good, None),
    "good, by its SHA-256": (lambda certs: response(certs, hash=hashes.SHA256()), None),
    "revoked": (lambda certs: response(certs, revoked=True), "revoked"),
    "of another": (lambda certs: response(certs, about=certs.client), "bad_staple"),
    "signed by a stranger": (lambda certs: response(certs, signer=certs.other_ca), "bad_staple"),
    "signed by itself": (lambda certs: response(certs, signer=certs.server), "bad_staple"),
    "too old": (lambda certs: response(certs, hours=(-48, -24)), "bad_staple"),
    "from the future": (lambda certs: response(certs, hours=(24, 48)), "bad_staple"),
    "none": (lambda certs: None, "bad_staple"),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", STAPLES)
def test_the_staple_of_s_server_is_checked(
    certs: Certificates, tmp_path: Path, inside: Any, version: str, kind: str
) -> None:
    make, reason = STAPLES[kind]
    staple = make(certs)
    flags: list[Any] = []
    if staple is not None:
        (tmp_path / "staple.der").write_bytes(staple)
        flags = ["-status_file", tmp_path / "staple.der"]

    def connect(ocsp: str) -> tls.HandshakeInfo:
        port = free_port()
        program = run_program(
            *("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-naccept", "1", "-quiet"),
            *("-cert", certs.server.cert_path, "-key", certs.server.key_path, FLAG[version], *flags),
            port=port,
        )
        config = tls.TlsConfig(roots=certs.ca.cert, ocsp=ocsp)
        options = {"socket": f"tcp://127.0.0.1:{port}", "server_hostname": certs.name, "credentials": config}
        with program, inside(**options) as us:
            info: tls.HandshakeInfo = us.bridge.handshake_sync()
            return info

    assert connect("off").peer_certificate == certs.server.cert_der
    if reason is None:
        connect("require")
        return
    if kind == "none":
        connect("check")
    wanted = "require" if kind == "none" else "check"
    with pytest.raises(CertificateError) as caught:
        connect(wanted)
    assert caught.value.reason == reason, caught.value
    assert caught.value.alert == (44 if reason == "revoked" else 113)


def ours(certs: Certificates, **more: Any) -> tls.Credentials:
    return tls.Credentials.certificate(certs.server.cert + certs.ca.cert, certs.server.key, **more)


@pytest.mark.parametrize("version", VERSIONS)
def test_s_client_gets_our_staple(
    certs: Certificates, tmp_path: Path, inside: Any, accepted: Any, version: str
) -> None:
    (tmp_path / "staple.der").write_bytes(good(certs))
    credentials = ours(certs, ocsp_response=tmp_path / "staple.der")
    connection, peer = accepted(
        lambda port: run_program(
            *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", FLAG[version], "-status"),
            *("-CAfile", certs.ca.cert_path, "-servername", certs.name, "-verify_return_error"),
        )
    )
    with inside(socket=connection, server_side=True, credentials=credentials) as us:
        us.bridge.handshake_sync()
        peer.wait_for(rb"OCSP Response Status: successful.*Cert Status: good")


@pytest.mark.parametrize("kind", [kind for kind, (_, reason) in STAPLES.items() if reason and kind != "none"])
def test_a_staple_that_nobody_would_believe_is_refused_when_it_is_given(
    certs: Certificates, kind: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tls.TlsConfig(credentials=ours(certs, ocsp_response=STAPLES[kind][0](certs)))
    assert caught.value.field == "credentials.ocsp_response"
    bare = tls.Credentials.certificate(certs.server.cert, certs.server.key, ocsp_response=good(certs))
    with pytest.raises(ConfigError, match="issuer"):
        tls.TlsConfig(credentials=bare)


def test_a_staple_is_renewed_by_a_reload(certs: Certificates, tmp_path: Path) -> None:
    file = tmp_path / "staple.der"
    file.write_bytes(good(certs))
    config = tls.TlsConfig(credentials=ours(certs, ocsp_response=file))
    file.write_bytes(response(certs, revoked=True))
    with pytest.raises(ConfigError, match="revoked"):
        config.reload()
    file.write_bytes(response(certs, hours=(-1, 48)))
    assert config.reload()


async def test_a_staple_is_not_sent_beyond_its_time(certs: Certificates) -> None:
    """One that is too old would be worse than none."""
    staple = response(certs, hours=(-1, 4 / 3600))
    server = tls.TlsConfig(credentials=ours(certs, ocsp_response=staple), resumption=False)
    insists = tls.TlsConfig(roots=certs.ca.cert, ocsp="require", resumption=False)

    async def visit(config: tls.TlsConfig) -> None:
        options: Any = {"credentials": config, "server_hostname": certs.name}
        async with await tls.connect("127.0.0.1", listener.port, **options):
            pass

    async with asyncio.timeout(30), tls.listen(("127.0.0.1", 0), credentials=server) as listener:
        serving = asyncio.create_task(listener.serve(lambda stream: stream.read()))
        await visit(insists)
        reason = None
        while reason is None:
            await asyncio.sleep(0.1)  # between two visits: its time passes by itself
            try:
                await visit(insists)
            except CertificateError as error:
                reason = error.reason
        assert reason == "bad_staple"
        await visit(tls.TlsConfig(roots=certs.ca.cert, resumption=False))
        serving.cancel()


@pytest.mark.parametrize("version", VERSIONS)
def test_our_client_resumes_with_s_server(certs: Certificates, inside: Any, version: str) -> None:
    port = free_port()
    config = tls.TlsConfig(roots=certs.ca.cert)
    options = {"socket": f"tcp://127.0.0.1:{port}", "server_hostname": certs.name, "credentials": config}
    with run_program(
        *("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-rev", FLAG[version]),
        *("-cert", certs.server.cert_path, "-key", certs.server.key_path),
        port=port,
    ):
        resumed = []
        for _ in range(2):
            with inside(**options) as us:
                resumed.append(us.bridge.handshake_sync().resumed)
                us.bridge.start()
                us.inner.sendall(b"abc\n")
                us.inner.settimeout(20)
                assert us.inner.recv(4) == b"cba\n"
        assert resumed == [False, True]


@pytest.mark.parametrize("version", VERSIONS)
def test_s_client_resumes_with_our_server(
    certs: Certificates, tmp_path: Path, inside: Any, accepted: Any, version: str
) -> None:
    config = tls.TlsConfig(credentials=ours(certs))
    session = tmp_path / "session.pem"
    for flag, resumed in (("-sess_out", False), ("-sess_in", True)):
        connection, peer = accepted(
            lambda port, flag=flag: run_program(
                *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", FLAG[version], flag, session),
                *("-CAfile", certs.ca.cert_path, "-servername", certs.name),
            )
        )
        with inside(socket=connection, server_side=True, credentials=config) as us:
            assert us.bridge.handshake_sync().resumed is resumed
            us.bridge.start()
            us.inner.sendall(b"a line to read\n")
            peer.wait_for(b"a line to read")
            peer.wait_for(b"Reused, TLS" if resumed else b"New, TLS")
            if not resumed:
                peer.send(b"Q\n")  # it saves the session at its end
                peer.process.wait(20)


def test_s_client_chooses_the_certificate_by_its_name(
    certs: Certificates, inside: Any, accepted: Any
) -> None:
    config = tls.TlsConfig(
        credentials=ours(certs),
        more_credentials=[tls.Credentials.certificate(certs.wrong_name.cert, certs.wrong_name.key)],
    )
    for name, common in ((certs.name, certs.name), ("elsewhere.test", "elsewhere.test")):
        connection, peer = accepted(
            lambda port, name=name: run_program(
                *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", name),
                *("-CAfile", certs.ca.cert_path, "-verify_hostname", name, "-verify_return_error"),
            )
        )
        with inside(socket=connection, server_side=True, credentials=config) as us:
            assert us.bridge.handshake_sync().server_name == name
            peer.wait_for(rb"subject=CN ?= ?" + common.encode())


def test_a_pkcs12_file_of_openssls_works(certs: Certificates, tmp_path: Path) -> None:
    file = tmp_path / "server.p12"
    subprocess.run(
        [
            *(needs.program("openssl"), "pkcs12", "-export", "-out", file, "-passout", "pass:opensesame"),
            *(
                "-in",
                certs.server.cert_path,
                "-inkey",
                certs.server.key_path,
                "-certfile",
                certs.ca.cert_path,
            ),
        ],
        check=True,
        timeout=30,
    )
    config = tls.TlsConfig(credentials=tls.Credentials.pkcs12(file, "opensesame"))
    assert config.native.engine == "rustls"


def test_a_list_of_openssls_works(certs: Certificates, tmp_path: Path) -> None:
    (tmp_path / "index.txt").write_text(
        f"R\t351231235959Z\t240101000000Z\t{certs.client.certificate.serial_number:040X}\tunknown\t/CN=x\n"
    )
    (tmp_path / "ca.cnf").write_text(
        f"[ca]\ndefault_ca = one\n[one]\ndatabase = {tmp_path}/index.txt\n"
        f"default_md = sha256\ndefault_crl_days = 30\ncrlnumber = {tmp_path}/number\n"
    )
    (tmp_path / "number").write_text("01\n")
    subprocess.run(
        [
            *(needs.program("openssl"), "ca", "-config", str(tmp_path / "ca.cnf"), "-gencrl"),
            *("-out", str(tmp_path / "list.pem"), "-keyfile", str(certs.ca.key_path)),
            *("-cert", str(certs.ca.cert_path)),
        ],
        check=True,
        timeout=30,
    )
    listed = x509.load_pem_x509_crl((tmp_path / "list.pem").read_bytes())
    assert listed.get_revoked_certificate_by_serial_number(certs.client.certificate.serial_number)
    tls.TlsConfig(roots=certs.ca.cert, crls=[tmp_path / "list.pem"])
