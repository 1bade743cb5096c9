"""What one end of TLS proves to the other, and whom it believes: :class:`Credentials`.

Not here: versions, suites and rules (:mod:`sapper.tls.config`), and the verification itself, which is
native.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, PlainValidator, SecretBytes, SerializeAsAny, Strict, model_validator

from sapper import _arguments, _native
from sapper._mistakes import WrongTypeError
from sapper._options import Options, config_error
from sapper.tls.lookup import PskFinder
from sapper.tls.material import (
    Material,
    Pin,
    PskBytes,
    PskKey,
    Public,
    Response,
    Roots,
    Secret,
    Word,
    native_material,
    read_psk,
)

__all__ = [
    "AnyCredentials",
    "CertificateCredentials",
    "Credentials",
    "Material",
    "NoCredentials",
    "OwnCertificate",
    "Pkcs12Credentials",
    "PskCredentials",
    "PskLookupCredentials",
]


class Credentials(Options):
    """What one end proves to the other.

    Made by :meth:`certificate`, :meth:`pkcs12`, :meth:`psk`, :meth:`psks`, :meth:`psk_lookup`,
    :meth:`none`.

    Keys never show in ``repr``, logs or errors, and are not pickled: a pickle would hold them readable.
    """

    @staticmethod
    def psk(
        identity: str | bytes,
        key: bytes | str,
        *,
        hash: Literal["sha256", "sha384"] = "sha256",
    ) -> PskCredentials:
        """A pre-shared key.

        Args:
            identity: The key's name, sent in clear. TLS 1.2 allows an empty one, TLS 1.3 does not.
            key: The key; text is read as hexadecimal.
            hash: The hash the key belongs to in TLS 1.3 (``"sha384"`` for ``TLS_AES_256_GCM_SHA384``).

        Raises:
            ConfigError: An argument is of a wrong type, or the key is no hexadecimal text.
        """
        name = _identity(identity, "identity")
        return PskCredentials.from_mapping({"identity": name, "key": key, "hash": hash})

    @staticmethod
    def psks(
        identities: Mapping[str | bytes, bytes | str],
        *,
        hash: Literal["sha256", "sha384"] = "sha256",
    ) -> PskCredentials:
        """The pre-shared keys of all clients that a server knows, by identity. See :meth:`psk`."""
        if not isinstance(identities, Mapping):
            raise _arguments.wrong_type("identities", "a mapping from identities to keys", identities)
        keys = {_identity(name, "identities"): key for name, key in identities.items()}
        return PskCredentials.from_mapping({"identities": keys, "hash": hash})

    @staticmethod
    def psk_lookup(
        finder: PskFinder,
        *,
        timeout: float = 5.0,
        hash: Literal["sha256", "sha384"] = "sha256",
    ) -> PskLookupCredentials:
        """Pre-shared keys that a server's program is asked for, within the handshake of each client.

        Args:
            finder: Called with the identity (bytes); gives the key (text is read as hexadecimal), or
                ``None`` where there is no such client. Plain or async. It runs on the event loop that is
                running when the :class:`TlsConfig` is made; without one, on the call-backs' thread.
            timeout: Seconds. No answer until then, and any failure, means that there is no such client.
            hash: As in :meth:`psk`.

        Raises:
            ConfigError: A value has the wrong type.
        """
        return PskLookupCredentials.from_mapping({"finder": finder, "timeout": timeout, "hash": hash})

    @staticmethod
    def certificate(
        chain: Material,
        key: Material,
        *,
        password: bytes | str | None = None,
        roots: Material | Literal["system"] | None = None,
        pins: tuple[bytes | str, ...] | list[bytes | str] = (),
        ocsp_response: Material | None = None,
        names: tuple[str, ...] | list[str] = (),
    ) -> CertificateCredentials:
        """A certificate with its key.

        What comes from a path can be read again (:meth:`TlsConfig.reload`, :meth:`TlsConfig.watch`).

        Args:
            chain: The chain, our own certificate first: PEM, or DER of one certificate.
            key: Its key, PEM or DER: PKCS#8 (also encrypted), PKCS#1 or SEC1.
            password: Opens an encrypted key.
            roots: Whom to believe about the peer's certificate. On a server they also turn on
                ``client_auth="required"`` unless a :class:`TlsConfig` says otherwise.
            pins: SHA-256 of the public keys of which the peer's chain must have one.
            ocsp_response: An OCSP response (DER) that a server staples; the chain must have the issuer.
            names: Names (SNI) for which a server shows it, ``*.`` in front for any one label; empty is
                those in the certificate.

        Raises:
            ConfigError: A file cannot be read or a value has the wrong type.
        """
        return CertificateCredentials.from_mapping(
            {
                "chain": chain,
                "key": key,
                "password": _password(password),
                "roots": roots,
                "pins": _tuple(pins, "pins"),
                "ocsp_response": ocsp_response,
                "names": _tuple(names, "names"),
            }
        )

    @staticmethod
    def pkcs12(
        file: bytes | PathLike[str] | str,
        password: bytes | str | None = None,
        *,
        roots: Material | Literal["system"] | None = None,
        pins: tuple[bytes | str, ...] | list[bytes | str] = (),
        ocsp_response: Material | None = None,
        names: tuple[str, ...] | list[str] = (),
    ) -> Pkcs12Credentials:
        """A certificate with its key and its chain in one PKCS#12 file (``.p12``, ``.pfx``).

        Args:
            file: The file, or its content.
            password: Opens it.
            roots: As in :meth:`certificate`, and so are the others.
            pins: As there.
            ocsp_response: As there.
            names: As there.

        Raises:
            ConfigError: The file cannot be read or a value has the wrong type.
        """
        return Pkcs12Credentials.from_mapping(
            {
                "file": file,
                "password": _password(password),
                "roots": roots,
                "pins": _tuple(pins, "pins"),
                "ocsp_response": ocsp_response,
                "names": _tuple(names, "names"),
            }
        )

    @staticmethod
    def none(
        *,
        roots: Material | Literal["system"] | None = None,
        pins: tuple[bytes | str, ...] | list[bytes | str] = (),
    ) -> NoCredentials:
        """Nothing: a client that only checks its server (against the system's roots by default)."""
        return NoCredentials.from_mapping({"roots": roots, "pins": _tuple(pins, "pins")})


class Unpicklable:
    """What holds a key: whoever reads a pickle of it would have the key."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise not_pickled(self)

    def __getstate__(self) -> NoReturn:
        raise not_pickled(self)


def not_pickled(what: object) -> TypeError:
    return TypeError(
        f"{type(what).__name__} cannot be pickled: the secrets would be written out in readable form. "
        "Give the other process the path of a file, and let it make its own"
    )


def _identity(value: object, name: str) -> bytes:
    return value if isinstance(value, bytes) else _arguments.text(value, name).encode()


def _password(value: object) -> object:
    return _arguments.text(value, "password").encode() if isinstance(value, str) else value


def _tuple(value: object, name: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise _arguments.wrong_type(name, "a tuple or a list", value)
    return tuple(value)


class PskCredentials(Unpicklable, Credentials):
    """Pre-shared keys; see :meth:`Credentials.psk`."""

    kind: Literal["psk"] = "psk"
    identities: dict[Word, PskKey] = Field(min_length=1)
    """Key by identity: one for a client, as many as there are peers for a server."""
    hash: Literal["sha256", "sha384"] = "sha256"
    """The hash the keys belong to in TLS 1.3."""

    @model_validator(mode="before")
    @classmethod
    def _one_identity(cls, values: Any) -> Any:
        """A TOML table may say ``identity`` and ``key`` (or ``key_file``) in place of ``identities``."""
        if not isinstance(values, dict):
            return values
        if "identity" not in values:
            for name in ("key", "key_file"):
                if name in values:
                    raise config_error(name, "is the key of one identity: say identity too")
            return values
        if "identities" in values:
            raise config_error("identity", "there are identities too: put it among them")
        values = dict(values)
        identity = values.pop("identity")
        if not isinstance(identity, str | bytes):
            raise _arguments.wrong_type("identity", "text or bytes", identity)
        if "key" in values and "key_file" in values:
            raise config_error("key_file", "there is a key too: give one of them")
        values["identities"] = {identity: _only_key(values)}
        return values

    def said(self, field: str) -> str:
        """What native code calls ``field`` of these keys, as it was said."""
        how = [getattr(key.get_secret_value(), "said", "identities") for key in self.identities.values()]
        if how == ["identities"] or len(how) != 1 or not field.startswith("identities"):
            return field
        return "identity" if field == "identities" else how[0]


def _only_key(values: dict[str, Any]) -> SecretBytes:
    """Takes the key of the only identity out of a table."""
    for name in ("key", "key_file"):
        if name not in values:
            continue
        given = values.pop(name)
        try:
            if name == "key_file":
                return SecretBytes(PskBytes.of_file(given))
            read = given if isinstance(given, PskBytes) else PskBytes(read_psk(given).get_secret_value())
        except ValueError as error:
            reason = "wrong_type" if isinstance(error, WrongTypeError) else None
            raise config_error(name, str(error), reason) from None
        if read.path is None:
            read.said = "key"
        return SecretBytes(read)
    raise config_error("key", "is required beside identity, or key_file")


#: A longest time, so that every deadline is a moment that the clock knows.
_YEAR = 365 * 86_400.0


def _must_be_callable(value: object) -> object:
    if not callable(value):
        raise ValueError("must be callable")
    return value


class PskLookupCredentials(Credentials):
    """Pre-shared keys that a program is asked for; see :meth:`Credentials.psk_lookup`."""

    kind: Literal["psk_lookup"] = "psk_lookup"
    finder: Annotated[PskFinder, PlainValidator(_must_be_callable)]
    """Gives the key of an identity."""
    timeout: Annotated[float, Strict(), Field(gt=0, le=_YEAR, allow_inf_nan=False)] = 5.0
    """Seconds to wait for it."""
    hash: Literal["sha256", "sha384"] = "sha256"
    """The hash the keys belong to in TLS 1.3."""


class OwnCertificate(Unpicklable, Credentials):
    """What a certificate of our own has, wherever it and its key are."""

    password: SecretBytes | None = None
    """Opens an encrypted key, or the PKCS#12 file."""
    roots: Roots = None
    """Whom to believe about the peer's certificate."""
    pins: tuple[Pin, ...] = ()
    """SHA-256 of the public keys of which the peer's chain must have one."""
    ocsp_response: Response = None
    """An OCSP response (DER) that a server staples."""
    names: tuple[str, ...] = ()
    """Names (SNI) for which a server shows it; empty is those in the certificate."""

    def _native_values(self) -> _native.OwnDict:
        return {
            "chain": None,
            "key": None,
            "pkcs12": None,
            "password": self.password.get_secret_value() if self.password is not None else None,
            "ocsp_response": native_material(self.ocsp_response) if self.ocsp_response is not None else None,
            "names": list(self.names),
        }


class CertificateCredentials(OwnCertificate):
    """A certificate with its key; see :meth:`Credentials.certificate`."""

    kind: Literal["certificate"] = "certificate"
    chain: Public
    """The chain, our own certificate first."""
    key: Secret
    """The key."""

    def _native_values(self) -> _native.OwnDict:
        values = super()._native_values()
        values["chain"], values["key"] = (
            native_material(self.chain),
            native_material(self.key.get_secret_value()),
        )
        return values


class Pkcs12Credentials(OwnCertificate):
    """A certificate with its key in one file; see :meth:`Credentials.pkcs12`."""

    kind: Literal["pkcs12"] = "pkcs12"
    file: Secret
    """The file."""

    def _native_values(self) -> _native.OwnDict:
        values = super()._native_values()
        values["pkcs12"] = native_material(self.file.get_secret_value())
        return values


class NoCredentials(Credentials):
    """Nothing to prove; see :meth:`Credentials.none`."""

    kind: Literal["none"] = "none"
    roots: Roots = None
    """Whom to believe about the peer's certificate."""
    pins: tuple[Pin, ...] = ()
    """SHA-256 of the public keys of which the peer's chain must have one."""


_KINDS: dict[str, type[Credentials]] = {
    "psk": PskCredentials,
    "psk_lookup": PskLookupCredentials,
    "certificate": CertificateCredentials,
    "pkcs12": Pkcs12Credentials,
    "none": NoCredentials,
}


def _of_kind(*kinds: str) -> PlainValidator:
    """Reads a table by its ``kind``. Not by pydantic, in whose errors the kind is a part of the path."""
    classes = tuple(_KINDS[kind] for kind in kinds)

    def read(value: object) -> Credentials:
        if isinstance(value, classes):
            return value
        if not isinstance(value, Mapping):
            raise WrongTypeError(f"must be a table or Credentials, not {type(value).__name__}")
        kind, words = value.get("kind"), ", ".join(kinds)
        if kind is None:
            raise config_error("kind", f"is required: one of {words}")
        if not isinstance(kind, str) or kind not in kinds:
            raise config_error("kind", f"must be one of {words}")
        return _KINDS[kind].from_mapping(value)

    return PlainValidator(read)


AnyCredentials = Annotated[
    PskCredentials | PskLookupCredentials | CertificateCredentials | Pkcs12Credentials | NoCredentials,
    _of_kind("psk", "psk_lookup", "certificate", "pkcs12", "none"),
    SerializeAsAny(),
]
OneMore = Annotated[
    CertificateCredentials | Pkcs12Credentials, _of_kind("certificate", "pkcs12"), SerializeAsAny()
]
