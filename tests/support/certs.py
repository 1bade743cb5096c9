"""Throw-away certificates: an authority, those that it signed, and those that must be refused."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

NAME = "device.test"


@dataclass(frozen=True)
class Identity:
    """A certificate with its key, as objects, as files and as bytes."""

    certificate: x509.Certificate
    private_key: Key
    cert_path: Path
    key_path: Path

    @property
    def cert(self) -> bytes:
        """The certificate, PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def cert_der(self) -> bytes:
        """The certificate, DER."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def key(self) -> bytes:
        """The key, PEM, PKCS#8, not encrypted."""
        return self.private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @property
    def key_der(self) -> bytes:
        """The key, DER, PKCS#8."""
        return self.private_key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def encrypted_key(self, password: bytes) -> bytes:
        """The key, PEM, PKCS#8, encrypted."""
        return self.private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password),
        )

    @property
    def pin(self) -> bytes:
        """The SHA-256 of the public key as certificates carry it."""
        spki = self.certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(spki).digest()


class Certificates:
    """The whole set. ``server`` and ``client`` are good; the others say by their names what is wrong."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = NAME
        self.ca = self._authority("ca")
        self.other_ca = self._authority("other-ca")
        self.server = self._leaf("server", self.ca)
        self.rsa_server = self._leaf("rsa-server", self.ca, key=rsa.generate_private_key(65537, 2048))
        self.client = self._leaf("client", self.ca, names=("client.test",))
        self.expired = self._leaf("expired", self.ca, days=(-30, -1))
        self.not_yet = self._leaf("not-yet", self.ca, days=(10, 30))
        self.wrong_name = self._leaf("wrong-name", self.ca, names=("elsewhere.test",))
        self.untrusted = self._leaf("untrusted", self.other_ca)
        self.untrusted_client = self._leaf("untrusted-client", self.other_ca, names=("client.test",))
        self.self_signed = self._leaf("self-signed", None)

    def short_lived(self, seconds: float) -> Identity:
        """A client's, of which so much time is left."""
        return self._leaf("short-lived", self.ca, names=("client.test",), days=(-1, seconds / 86_400))

    def _authority(self, label: str) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"sapper test {label}")])
        builder = self._builder(name, name, key, (-1, 365)).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        return self._save(label, builder.sign(key, hashes.SHA256()), key)

    def _leaf(
        self,
        label: str,
        issuer: Identity | None,
        *,
        names: tuple[str, ...] = (NAME, "localhost"),
        days: tuple[float, float] = (-1, 90),
        key: Key | None = None,
    ) -> Identity:
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        issuer_name = subject if issuer is None else issuer.certificate.subject
        alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        if "localhost" in names:
            alternatives += [x509.IPAddress(ipaddress.ip_address(a)) for a in ("127.0.0.1", "::1")]
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            self._builder(subject, issuer_name, key, days)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        )
        signer = key if issuer is None else issuer.private_key
        return self._save(label, builder.sign(signer, hashes.SHA256()), key)

    @staticmethod
    def _builder(
        subject: x509.Name, issuer: x509.Name, key: Key, days: tuple[float, float]
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=days[0]))
            .not_valid_after(now + datetime.timedelta(days=days[1]))
        )

    def _save(self, label: str, certificate: x509.Certificate, key: Key) -> Identity:
        identity = Identity(
            certificate, key, self._folder / f"{label}.pem", self._folder / f"{label}.key.pem"
        )
        identity.cert_path.write_bytes(identity.cert)
        identity.key_path.write_bytes(identity.key)
        identity.key_path.chmod(0o600)
        return identity
