"""What a handshake agrees on: resumption, groups, channel bindings."""

from __future__ import annotations

import asyncio
import datetime
import socket
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes

from sapper import tls
from sapper.errors import CertificateError, SapperError
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, TlsConfig
from support.certs import Certificates
from support.handshakes import meet

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_sessions_are_resumed_unless_one_end_does_not_want_it(
    made: ThrowawayCertificates, version: str
) -> None:
    def configs(**options: Any) -> tuple[TlsConfig, TlsConfig]:
        both = {"min_version": version, "max_version": version}
        return (
            TlsConfig(roots=made.authority, **both),
            TlsConfig(credentials=made.server_credentials(), **both, **options),
        )

    client, server = configs()
    assert [one.resumed for one in meet(client, server)] == [False, False]
    assert [one.resumed for one in meet(client, server)] == [True, True]
    # Another name is another session, and so is another configuration.
    assert not meet(TlsConfig(roots=made.authority), server)[0].resumed
    client, server = configs(resumption=False)
    assert not any(one.resumed for _ in range(2) for one in meet(client, server))
    client, server = configs()
    kept = {name: getattr(client, name) for name in TlsConfig.model_fields}
    client = TlsConfig(**{**kept, "resumption": False})
    assert not any(one.resumed for _ in range(2) for one in meet(client, server))


def test_a_session_ends_with_its_clients_certificate(certs: Certificates) -> None:
    """A ticket shows no certificate: what has expired since would go on for ever with the next ticket."""
    short = certs.short_lived(8.0)
    pairs = []
    for version in ("TLSv1.2", "TLSv1.3"):
        ours = Credentials.certificate(certs.server.cert, certs.server.key, roots=certs.ca.cert)
        theirs = Credentials.certificate(short.cert, short.key, roots=certs.ca.cert)
        pairs.append((TlsConfig(credentials=theirs), TlsConfig(credentials=ours, max_version=version)))
    for client, server in pairs:
        assert [meet(client, server, certs.name)[1].resumed for _ in range(2)] == [False, True]
    end = short.certificate.not_valid_after_utc + datetime.timedelta(seconds=1)
    while datetime.datetime.now(datetime.UTC) <= end:
        time.sleep(0.05)
    for client, server in pairs:
        with pytest.raises(CertificateError) as caught:
            meet(client, server, certs.name)
        assert caught.value.reason == "expired"


def test_the_hybrid_group_comes_first(made: ThrowawayCertificates) -> None:
    info, _ = meet(made.client_credentials(), made.server_credentials())
    assert info.group == "X25519MLKEM768"
    server = TlsConfig(credentials=made.server_credentials(), groups=["x25519"])
    assert meet(made.client_credentials(), server)[0].group == "X25519"


def test_the_end_point_of_a_server_is_the_same_at_both_ends(certs: Certificates) -> None:
    for identity in (certs.server, certs.rsa_server):
        server = Credentials.certificate(identity.cert, identity.key, roots=certs.ca.cert)
        client = Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
        ours, theirs = meet(client, server, certs.name)
        expected = identity.certificate.fingerprint(hashes.SHA256())
        assert ours.server_end_point == theirs.server_end_point == expected
    key = Credentials.psk("x", bytes(range(32)))
    assert meet(key, key)[0].server_end_point is None


async def test_the_exporter_binding_is_the_same_at_both_ends_and_nowhere_else(
    made: ThrowawayCertificates,
) -> None:
    async def binding(version: str) -> tuple[bytes, bytes]:
        near, far = socket.socketpair()
        sinks = [socket.socketpair() for _ in range(2)]
        client = TlsConfig(roots=made.authority, max_version=version)
        ours = tls.create_bridge(
            socket=near, sink=sinks[0][0], credentials=client, server_hostname="localhost"
        )
        theirs = tls.create_bridge(
            socket=far, sink=sinks[1][0], credentials=made.server_credentials(), server_side=True
        )
        async with ours, theirs:
            await asyncio.gather(ours.handshake(), theirs.handshake())
            try:
                return await ours.channel_binding(), await theirs.channel_binding()
            finally:
                for _, end in sinks:
                    end.close()

    one, two = await binding("TLSv1.3"), await binding("TLSv1.3")
    assert one[0] == one[1]
    assert two[0] == two[1] != one[0]
    assert len(one[0]) == 32
    with pytest.raises(SapperError, match=r"TLS 1\.3"):
        await binding("TLSv1.2")
