"""What both ends of TLS prove and believe: credentials and :class:`TlsConfig`.

A :class:`TlsConfig` is parsed once by native code and shared by any number of connections. The
credentials choose the engine: certificates run on rustls, pre-shared keys and the legacy switches
on OpenSSL. A Python ``ssl.SSLContext`` cannot be used: its private keys cannot be read. Who is client and
who is server belongs to a connection, not here.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BeforeValidator, Field, PlainValidator, SecretBytes, Strict, model_validator

from sapper import _arguments, _native
from sapper._options import Options, config_error
from sapper.errors import ConfigError
from sapper.tls.lookup import PskAnswers, PskFinder
from sapper.tls.material import FileBytes, Material, key_in, read_material, read_pin, read_psk, read_secret
from sapper.tls.reload import ReloadCallback, TlsWatch

__all__ = [
    "CertificateCredentials",
    "Credentials",
    "FileBytes",
    "Material",
    "NoCredentials",
    "OwnCertificate",
    "PeerRules",
    "Pkcs12Credentials",
    "PskCredentials",
    "PskLookupCredentials",
    "TlsConfig",
    "key_in",
]

Version = Literal["TLSv1.2", "TLSv1.3"]
# Nothing that only looks like a truth value is taken for one.
_Flag = Annotated[bool, Strict()]


def _must_be_callable(value: object) -> object:
    if not callable(value):
        raise ValueError("must be callable")
    return value


def _as_bytes(value: object) -> object:
    return value.encode() if isinstance(value, str) else value


def _read_if_given(value: object) -> bytes | None:
    return None if value is None else read_material(value)


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str | bytes) else value


_Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
_Content = Annotated[bytes, PlainValidator(read_material)]
_Public = Annotated[bytes, PlainValidator(read_material), Field(repr=False)]
_Response = Annotated[bytes | None, PlainValidator(_read_if_given), Field(repr=False)]
_Secret = Annotated[SecretBytes, PlainValidator(read_secret)]
_PskKey = Annotated[SecretBytes, BeforeValidator(read_psk)]
_Pin = Annotated[bytes, BeforeValidator(read_pin)]
_Word = Annotated[bytes, BeforeValidator(_as_bytes)]


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
        try:
            return PskCredentials.from_mapping({"identities": {name: key}, "hash": hash})
        except ConfigError as error:
            if not (error.field or "").startswith("identities"):
                raise
            raise config_error("key", error.message, error.reason) from None

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


class _Unpicklable:
    """What holds a key: whoever reads a pickle of it would have the key."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise _not_pickled(self)

    def __getstate__(self) -> NoReturn:
        raise _not_pickled(self)


def _not_pickled(what: object) -> TypeError:
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


def _read_roots(value: object) -> object:
    return value if value is None or value == "system" else read_material(value)


_Roots = Annotated[Literal["system"] | bytes | None, PlainValidator(_read_roots), Field(repr=False)]


class PskCredentials(_Unpicklable, Credentials):
    """Pre-shared keys; see :meth:`Credentials.psk`."""

    kind: Literal["psk"] = "psk"
    identities: dict[_Word, _PskKey] = Field(min_length=1)
    """Key by identity: one for a client, as many as there are peers for a server."""
    hash: Literal["sha256", "sha384"] = "sha256"
    """The hash the keys belong to in TLS 1.3."""

    @model_validator(mode="before")
    @classmethod
    def _one_identity(cls, values: Any) -> Any:
        """A TOML table may say ``identity`` and ``key`` (or ``key_file``) in place of ``identities``."""
        if isinstance(values, dict) and "identity" in values:
            values = dict(values)
            identity = values.pop("identity")
            key = values.pop("key", None)
            if key is None and "key_file" in values:
                key = _read_key_file(values.pop("key_file"))
            if key is None:
                raise ValueError("a pre-shared key needs key or key_file beside identity")
            values["identities"] = {identity: key}
        return values


def _read_key_file(path: object) -> bytes:
    content = read_material(path)
    if not isinstance(content, bytes):
        raise ValueError("key_file is the path of a file")
    return key_in(content)


class PskLookupCredentials(Credentials):
    """Pre-shared keys that a program is asked for; see :meth:`Credentials.psk_lookup`."""

    kind: Literal["psk_lookup"] = "psk_lookup"
    finder: Annotated[PskFinder, PlainValidator(_must_be_callable)]
    """Gives the key of an identity."""
    timeout: float = Field(default=5.0, gt=0)
    """Seconds to wait for it."""
    hash: Literal["sha256", "sha384"] = "sha256"
    """The hash the keys belong to in TLS 1.3."""


class OwnCertificate(_Unpicklable, Credentials):
    """What a certificate of our own has, wherever it and its key are."""

    password: SecretBytes | None = None
    """Opens an encrypted key, or the PKCS#12 file."""
    roots: _Roots = None
    """Whom to believe about the peer's certificate."""
    pins: tuple[_Pin, ...] = ()
    """SHA-256 of the public keys of which the peer's chain must have one."""
    ocsp_response: _Response = None
    """An OCSP response (DER) that a server staples."""
    names: tuple[str, ...] = ()
    """Names (SNI) for which a server shows it; empty is those in the certificate."""

    def _native_values(self) -> _native.OwnDict:
        return {
            "chain": None,
            "key": None,
            "pkcs12": None,
            "password": self.password.get_secret_value() if self.password is not None else None,
            "ocsp_response": _material(self.ocsp_response) if self.ocsp_response is not None else None,
            "names": list(self.names),
        }


class CertificateCredentials(OwnCertificate):
    """A certificate with its key; see :meth:`Credentials.certificate`."""

    kind: Literal["certificate"] = "certificate"
    chain: _Public
    """The chain, our own certificate first."""
    key: _Secret
    """The key."""

    def _native_values(self) -> _native.OwnDict:
        values = super()._native_values()
        values["chain"], values["key"] = _material(self.chain), _material(self.key.get_secret_value())
        return values


class Pkcs12Credentials(OwnCertificate):
    """A certificate with its key in one file; see :meth:`Credentials.pkcs12`."""

    kind: Literal["pkcs12"] = "pkcs12"
    file: _Secret
    """The file."""

    def _native_values(self) -> _native.OwnDict:
        values = super()._native_values()
        values["pkcs12"] = _material(self.file.get_secret_value())
        return values


def _material(content: bytes) -> _native.Material:
    return bytes(content), getattr(content, "path", None)


class NoCredentials(Credentials):
    """Nothing to prove; see :meth:`Credentials.none`."""

    kind: Literal["none"] = "none"
    roots: _Roots = None
    """Whom to believe about the peer's certificate."""
    pins: tuple[_Pin, ...] = ()
    """SHA-256 of the public keys of which the peer's chain must have one."""


AnyCredentials = Annotated[
    PskCredentials | PskLookupCredentials | CertificateCredentials | Pkcs12Credentials | NoCredentials,
    Field(discriminator="kind"),
]
_OneMore = Annotated[CertificateCredentials | Pkcs12Credentials, Field(discriminator="kind")]


class PeerRules(Options):
    """One kind of welcome peer. Each list that is given must have an entry that its certificate fits.

    Rules are asked natively, after the chain was verified and before any application data. A peer that
    none of :attr:`TlsConfig.peer_rules` fits gets the alert ``access_denied``.
    """

    dns: _Names = ()
    """DNS names of its subject alternative names; ``*.`` in front stands for any one label."""
    uri: _Names = ()
    """URIs of its subject alternative names; ``*`` at the end stands for any rest."""
    email: _Names = ()
    """Mail addresses of its subject alternative names."""
    ip: _Names = ()
    """Networks (``10.0.0.0/8``) or addresses that hold an address of its subject alternative names."""
    cn: _Names = ()
    """Common names of its subject."""
    ou: _Names = ()
    """Organizational units of its subject."""
    pin: Annotated[tuple[_Pin, ...], BeforeValidator(_as_list)] = ()
    """SHA-256 of its own public key (SubjectPublicKeyInfo)."""

    def _native_values(self) -> _native.RuleDict:
        return {
            "dns": list(self.dns),
            "uri": list(self.uri),
            "email": list(self.email),
            "ip": list(self.ip),
            "cn": list(self.cn),
            "ou": list(self.ou),
            "pin": list(self.pin),
        }


class TlsConfig(Options):
    """All options of TLS, for clients and servers alike; parsed once, shared by any number of connections.

    Reads TOML with :meth:`from_toml`: the same names, ``[credentials]`` with ``kind = "psk"``,
    ``"certificate"``, ``"pkcs12"`` or ``"none"``; files by their paths relative to the TOML file.

    Raises:
        ConfigError: A value is wrong, a key does not match its certificate, a suite does not exist, …;
            ``field`` names it.
    """

    credentials: AnyCredentials = NoCredentials()
    """What we prove to the peer."""
    more_credentials: tuple[_OneMore, ...] = ()
    """Further certificates of a server, chosen by the name that the client asks for (SNI); ``credentials``
    are shown where none fits. Of several for one name the first that the client can verify is shown."""
    roots: _Roots = None
    """Whom to believe about the peer's certificate: ``"system"``, or PEM or DER of our own.
    ``None`` is the credentials' roots, else the pins alone where there are pins, else the system's."""
    pins: tuple[_Pin, ...] = ()
    """SHA-256 of the public keys (SubjectPublicKeyInfo) of which the peer's chain must have one."""
    client_auth: Literal["off", "optional", "required"] | None = None
    """Whether a server asks for certificates. ``None``: required where roots or pins are given."""
    peer_rules: tuple[PeerRules, ...] = ()
    """Who is welcome among those whose certificate is good: whoever fits one of these. Empty is all."""
    crls: Annotated[tuple[_Content, ...], Field(repr=False)] = ()
    """Certificate revocation lists, PEM or DER: each certificate of a chain must be covered by one that is
    valid now. They need roots of our own."""
    ocsp: Literal["off", "check", "require"] | None = None
    """Whether a client looks at its server's stapled OCSP response: ``"check"`` where there is one (or the
    certificate announces one), ``"require"`` always. ``None`` is ``"check"``, in legacy modes ``"off"``."""
    min_version: Version = "TLSv1.2"
    """Oldest version to speak."""
    max_version: Version = "TLSv1.3"
    """Newest version to speak."""
    cipher_suites: tuple[str, ...] = ()
    """Suites by IANA or OpenSSL names, best first; empty is the default."""
    groups: tuple[str, ...] = ()
    """Key exchange groups, best first; empty is the default (X25519MLKEM768 first)."""
    alpn: tuple[_Word, ...] = ()
    """Application protocols, best first."""
    resumption: _Flag = True
    """Whether sessions of certificates may be resumed."""
    ticket_lifetime: Annotated[float, Strict()] = 21_600.0
    """Seconds after which a server encrypts its session tickets with a new key, at most 21600. They are
    accepted for twice as long."""
    key_log_file: Path | None = None
    """Session secrets are appended here for a packet analyser. Whoever reads it reads the traffic."""
    capture_file: Path | None = None
    """The ciphertext of all connections with its secrets is written here, as pcapng, from the first one on;
    what the file held is replaced. Whoever reads it reads the traffic."""
    danger_accept_any_certificate: _Flag = False
    """Ask nobody about the peer's certificate (pins still count)."""
    danger_ignore_server_name: _Flag = False
    """A client does not compare its server's name with the certificate."""
    danger_legacy_renegotiation: _Flag = False
    """TLS 1.2 with a peer that knows only the insecure renegotiation."""
    danger_security_level_0: _Flag = False
    """OpenSSL's security level 0: small keys, SHA-1 signatures."""
    danger_legacy_suites: _Flag = False
    """Suites with CBC or without forward secrecy: added to the default, allowed in ``cipher_suites``."""
    danger_short_psk: _Flag = False
    """Pre-shared keys below 16 bytes."""
    danger_ignore_truncation: _Flag = False
    """An end without close_notify counts as an orderly one."""
    danger_early_data: Annotated[int, Strict(), Field(ge=0, le=65_536)] = 0
    """Bytes of early data (0-RTT): what a server takes, and the most that a client may send. Whoever sees
    early data can send it again. Only for streams: :func:`sapper.tls.connect`, ``listen`` and the like. 0 is
    off."""

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)
        _ = self.native  # parsed now, so that every mistake is told here

    def __hash__(self) -> int:
        return hash((self.min_version, self.max_version, self.cipher_suites, self.alpn, self.pins))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if any(isinstance(one, _Unpicklable) for one in (self.credentials, *self.more_credentials)):
            raise _not_pickled(self)
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[Any, Any]:
        if any(isinstance(one, _Unpicklable) for one in (self.credentials, *self.more_credentials)):
            raise _not_pickled(self)
        state = super().__getstate__()
        # The parsed form stays here: it is parsed anew when it is used.
        kept = {
            name: value for name, value in state["__dict__"].items() if name not in ("native", "psk_answers")
        }
        return {**state, "__dict__": kept}

    @functools.cached_property
    def psk_answers(self) -> PskAnswers | None:
        """Who answers native questions for pre-shared keys, where a program is asked for them."""
        credentials = self.credentials
        if isinstance(credentials, PskLookupCredentials):
            return PskAnswers(credentials.finder, credentials.timeout)
        return None

    @functools.cached_property
    def native(self) -> _native.TlsConfig:
        """The parsed form, for the binding."""
        try:
            return _native.TlsConfig(self.native_values())
        except BaseException:
            if self.psk_answers is not None:
                self.psk_answers.cancel()
            raise

    @classmethod
    def of(cls, value: object, *, field: str = "credentials", early_data: bool = False) -> TlsConfig:
        """A TlsConfig from what a ``credentials=`` argument takes.

        Args:
            value: What was given.
            field: The argument's name.
            early_data: Whether early data can be told from other data there.

        Raises:
            ConfigError: It is neither credentials nor a TlsConfig, or has early data where that cannot be.
        """
        if isinstance(value, TlsConfig):
            if not early_data:
                value.without_early_data()
            return value
        if isinstance(value, Credentials):
            return cls(credentials=value)
        if value is None:
            return cls()
        if isinstance(value, ssl.SSLContext):
            raise config_error(
                field,
                "an ssl.SSLContext cannot be used: its private keys cannot be read from it. "
                "Give the same files to Credentials.certificate(chain, key, roots=…)",
                "ssl_context",
            )
        raise config_error(
            field, f"must be Credentials or a TlsConfig, not {type(value).__name__}", "wrong_type"
        )

    def without_early_data(self) -> Self:
        """Itself, for whoever has no use for early data.

        Raises:
            ConfigError: It allows some.
        """
        if self.danger_early_data:
            raise config_error(
                "danger_early_data",
                "is for streams that a program reads (connect, start_client, start_server, listen): here "
                "nobody could tell early data, which may be a repetition, from other data",
                "streams_only",
            )
        return self

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        for name in ("roots", "pins"):
            if getattr(self, name) and getattr(self.credentials, name, None):
                raise config_error(name, f"{name} are given twice: here and in credentials")
        if self.danger_accept_any_certificate and self._believed_roots() is not None:
            raise config_error("danger_accept_any_certificate", "says to ask nobody, but roots are given")
        return self

    def _believed_roots(self) -> bytes | Literal["system"] | None:
        return self.roots if self.roots is not None else getattr(self.credentials, "roots", None)

    def native_values(self) -> _native.TlsDict:
        """The options as a binding takes them; what a distribution of its own parses anew."""
        roots = self._believed_roots()
        pins = self.pins or getattr(self.credentials, "pins", ())
        client_auth = self.client_auth or ("required" if pins or isinstance(roots, bytes) else "off")
        credentials = self.credentials
        return {
            "own": credentials._native_values() if isinstance(credentials, OwnCertificate) else None,
            "more": [one._native_values() for one in self.more_credentials],
            "psks": [(name, key.get_secret_value()) for name, key in credentials.identities.items()]
            if isinstance(credentials, PskCredentials)
            else None,
            "psk_lookup": self.psk_answers.taken() if self.psk_answers is not None else None,
            "psk_hash": credentials.hash
            if isinstance(credentials, PskCredentials | PskLookupCredentials)
            else "sha256",
            "roots": "none"
            if self.danger_accept_any_certificate
            else _material(roots)
            if isinstance(roots, bytes)
            else roots,
            "pins": list(pins),
            "client_auth": client_auth,
            "peer_rules": [rule._native_values() for rule in self.peer_rules],
            "crls": [_material(one) for one in self.crls],
            "ocsp": self.ocsp,
            "min_version": self.min_version,
            "max_version": self.max_version,
            "cipher_suites": list(self.cipher_suites),
            "groups": list(self.groups),
            "alpn": list(self.alpn),
            "resumption": self.resumption,
            "ticket_lifetime": self.ticket_lifetime,
            "key_log_file": self.key_log_file,
            "capture_file": self.capture_file,
            "danger_ignore_server_name": self.danger_ignore_server_name,
            "danger_legacy_renegotiation": self.danger_legacy_renegotiation,
            "danger_security_level_0": self.danger_security_level_0,
            "danger_legacy_suites": self.danger_legacy_suites,
            "danger_short_psk": self.danger_short_psk,
            "danger_ignore_truncation": self.danger_ignore_truncation,
            "danger_early_data": self.danger_early_data,
        }

    def offering(self, protocols: Sequence[bytes | str]) -> TlsConfig:
        """The same with these application protocols, best first. It is reloaded with this one.

        Args:
            protocols: Their names.

        Raises:
            ConfigError: One is empty, or longer than 255 bytes.
        """
        names = [one.encode() if isinstance(one, str) else one for one in protocols]
        native = self.native.with_alpn(names)
        values = {name: getattr(self, name) for name in type(self).model_fields}
        made = type(self).model_construct(**values | {"alpn": tuple(names)})
        # Not parsed anew: files may hold something else by now, and sessions are kept where they are.
        made.__dict__["native"], made.__dict__["psk_answers"] = native, self.psk_answers
        return made

    def reload(self) -> bool:
        """Reads the files that options came from again. New connections get it, running ones go on.

        The fields of this object say what was there at first. Sessions from before are not resumed.

        Returns:
            Whether anything has changed.

        Raises:
            ConfigError: What is there now cannot be used; what was there stays in use.
        """
        return self.native.reload()

    def watch(self, on_reload: ReloadCallback | None = None) -> TlsWatch:
        """Does :meth:`reload` by itself when the files change, until the watch is closed.

        Args:
            on_reload: Called after each attempt: with ``None``, or with the error that says why what was
                there stays in use. It runs on the event loop that is running now; without one, on the
                call-backs' thread. Without it failures go to the log ``sapper``.

        Raises:
            ConfigError: Nothing came from a file.
        """
        return TlsWatch(self.native, on_reload)

    @model_validator(mode="after")
    def _default_for_more(self) -> Self:
        for one in self.more_credentials:
            for name in ("roots", "pins"):
                if getattr(one, name):
                    raise config_error("more_credentials", f"{name} belong to the configuration as a whole")
        return self

    @classmethod
    def _relative_to(cls, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        def path(text: object) -> object:
            is_path = isinstance(text, str) and text != "system" and "-----BEGIN" not in text
            return folder / text if is_path and isinstance(text, str) else text

        def resolved(table: dict[str, Any], *names: str) -> dict[str, Any]:
            return {name: path(value) if name in names else value for name, value in table.items()}

        def certificate(table: Any) -> Any:
            if not isinstance(table, dict):
                return table
            names = ["chain", "file", "roots", "key_file", "ocsp_response"]
            if table.get("kind", "certificate") == "certificate":
                names.append("key")
            return resolved(table, *names)

        values = resolved(values, "roots", "key_log_file", "capture_file")
        if "credentials" in values:
            values["credentials"] = certificate(values["credentials"])
        if isinstance(values.get("more_credentials"), list):
            values["more_credentials"] = [certificate(one) for one in values["more_credentials"]]
        if isinstance(values.get("crls"), list):
            values["crls"] = [path(one) for one in values["crls"]]
        return values
