"""What both ends of TLS agree on: :class:`TlsConfig`.

It is parsed once by native code and shared by any number of connections. The credentials choose
the engine: certificates run on rustls, pre-shared keys and the legacy switches on OpenSSL. A Python
``ssl.SSLContext`` cannot be used: its private keys cannot be read. Who is client and who is server belongs to
a connection, not here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Strict, model_validator

from sapper import _native
from sapper._mistakes import again, unused
from sapper._options import Options, config_error
from sapper.errors import ConfigError
from sapper.tls.credentials import (
    AnyCredentials,
    CertificateCredentials,
    Credentials,
    NoCredentials,
    OneMore,
    OwnCertificate,
    Pkcs12Credentials,
    PskCredentials,
    PskLookupCredentials,
    Unpicklable,
    not_pickled,
)
from sapper.tls.lookup import PskAnswers
from sapper.tls.material import (
    Content,
    FileBytes,
    Flag,
    Material,
    Names,
    Pin,
    Roots,
    Word,
    as_list,
    key_in,
    native_material,
)
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


class PeerRules(Options):
    """One kind of welcome peer. Each list that is given must have an entry that its certificate fits.

    Rules are asked natively, after the chain was verified and before any application data. A peer that
    none of :attr:`TlsConfig.peer_rules` fits gets the alert ``access_denied``.
    """

    dns: Names = ()
    """DNS names of its subject alternative names; ``*.`` in front stands for any one label."""
    uri: Names = ()
    """URIs of its subject alternative names; ``*`` at the end stands for any rest."""
    email: Names = ()
    """Mail addresses of its subject alternative names."""
    ip: Names = ()
    """Networks (``10.0.0.0/8``) or addresses that hold an address of its subject alternative names."""
    cn: Names = ()
    """Common names of its subject."""
    ou: Names = ()
    """Organizational units of its subject."""
    pin: Annotated[tuple[Pin, ...], BeforeValidator(as_list)] = ()
    """SHA-256 of its own public key (SubjectPublicKeyInfo)."""

    @model_validator(mode="after")
    def _as_in_certificates(self) -> Self:
        for number, name in enumerate(self.dns):
            if not name.isascii():
                with contextlib.suppress(UnicodeError):
                    ascii_name = name.encode("idna").decode()
                    where = "dns" if len(self.dns) == 1 else f"dns.{number}"
                    raise config_error(where, f"{name!r} is {ascii_name!r} in a certificate: write that")
        return self

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
    more_credentials: tuple[OneMore, ...] = ()
    """Further certificates of a server, chosen by the name that the client asks for (SNI); ``credentials``
    are shown where none fits. Of several for one name the first that the client can verify is shown."""
    roots: Roots = None
    """Whom to believe about the peer's certificate: ``"system"``, or PEM or DER of our own.
    ``None`` is the credentials' roots, else the pins alone where there are pins, else the system's."""
    pins: tuple[Pin, ...] = ()
    """SHA-256 of the public keys (SubjectPublicKeyInfo) of which the peer's chain must have one."""
    client_auth: Literal["off", "optional", "required"] | None = None
    """Whether a server asks for certificates. ``None``: required where roots or pins are given."""
    peer_rules: tuple[PeerRules, ...] = ()
    """Who is welcome among those whose certificate is good: whoever fits one of these. Empty is all."""
    crls: Annotated[tuple[Content, ...], Field(repr=False)] = ()
    """Certificate revocation lists, PEM or DER: each certificate of a chain must be covered by one whose
    next update is still to come. They need roots of our own."""
    ocsp: Literal["off", "check", "require"] | None = None
    """Whether a client looks at its server's stapled OCSP response: ``"check"`` where there is one (or the
    certificate announces one), ``"require"`` always. ``None`` is ``"check"``; in legacy modes, and where
    nobody is asked about certificates, ``"off"``."""
    min_version: Version = "TLSv1.2"
    """Oldest version to speak."""
    max_version: Version = "TLSv1.3"
    """Newest version to speak."""
    cipher_suites: tuple[str, ...] = ()
    """Suites by IANA or OpenSSL names, best first; empty is the default."""
    groups: tuple[str, ...] = ()
    """Key exchange groups, best first; empty is the default (X25519MLKEM768 first)."""
    alpn: tuple[Word, ...] = ()
    """Application protocols, best first."""
    resumption: Flag = True
    """Whether sessions of certificates may be resumed."""
    ticket_lifetime: Annotated[float, Strict()] = 21_600.0
    """Seconds after which a server encrypts its session tickets with a new key, at most 21600. They are
    accepted for twice as long."""
    key_log_file: Path | None = None
    """Session secrets are appended here for a packet analyser. Whoever reads it reads the traffic."""
    capture_file: Path | None = None
    """The ciphertext of all connections with its secrets is written here, as pcapng, from the first one on;
    what the file held is replaced. Whoever reads it reads the traffic."""
    danger_accept_any_certificate: Flag = False
    """Ask nobody about the peer's certificate (pins still count)."""
    danger_ignore_server_name: Flag = False
    """A client does not compare its server's name with the certificate."""
    danger_legacy_renegotiation: Flag = False
    """TLS 1.2 with a peer that knows only the insecure renegotiation."""
    danger_security_level_0: Flag = False
    """OpenSSL's security level 0: small keys, SHA-1 signatures."""
    danger_legacy_suites: Flag = False
    """Suites with CBC or without forward secrecy: added to the default, allowed in ``cipher_suites``."""
    danger_short_psk: Flag = False
    """Pre-shared keys below 16 bytes."""
    danger_ignore_truncation: Flag = False
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
        if any(isinstance(one, Unpicklable) for one in (self.credentials, *self.more_credentials)):
            raise not_pickled(self)
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[Any, Any]:
        if any(isinstance(one, Unpicklable) for one in (self.credentials, *self.more_credentials)):
            raise not_pickled(self)
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
        except BaseException as error:
            if self.psk_answers is not None:
                self.psk_answers.cancel()
            if isinstance(error, ConfigError):
                raise self._where_said(error) from None
            raise

    def for_server(self, table: str = "") -> _native.TlsConfig:
        """The parsed form, for a server.

        Args:
            table: Where the configuration stands, in front of the names of its options.

        Raises:
            ConfigError: Something was said about clients' certificates, and nobody asks for them.
        """
        if self._unused_by_servers is not None:
            where, why = self._unused_by_servers
            raise unused(table + where, why)
        return self.native

    @functools.cached_property
    def _unused_by_servers(self) -> tuple[str, str] | None:
        """What a server has no use for, and why. Found once: each connection of a server asks."""
        if asks_clients(self):
            return None
        why = "is about clients' certificates, which nobody asks for"
        for name in ("roots", "pins"):
            if self.client_auth != "off" or self.peer_rules:  # those are refused natively, first
                break
            if getattr(self, name) or getattr(self.credentials, name, None):
                where = name if getattr(self, name) else f"credentials.{name}"
                return where, f'{why}: client_auth is "off"'
        return ("danger_accept_any_certificate", why) if self.danger_accept_any_certificate else None

    def for_client(self, table: str) -> _native.TlsConfig:
        """The parsed form, for a place that is a client's alone: elsewhere a server may share it.

        Args:
            table: That place, in front of the names of the options.

        Raises:
            ConfigError: Something was said that is for servers.
        """
        asks = self.client_auth not in (None, "off")
        for name in ("more_credentials", *(("client_auth",) if asks else ()), "ticket_lifetime"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise unused(table + name, "is for servers: this is a client's end")
        return self.native

    def _where_said(self, error: ConfigError) -> ConfigError:
        """The error of native code, with the path of what is wrong as it was given here."""
        field, credentials = error.field or "", self.credentials
        table, _, rest = field.partition(".")
        if table in ("roots", "pins") and getattr(self, table, None) in (None, ()):
            field = f"credentials.{field}" if getattr(credentials, table, None) else field
        elif table == "credentials" and isinstance(credentials, PskCredentials):
            field = f"credentials.{credentials.said(rest)}" if rest else field
        return again(error, error.message, field or None)

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
        files = (self.key_log_file, self.capture_file)
        if None not in files and len({os.path.realpath(one) for one in files if one is not None}) == 1:
            raise config_error(
                "capture_file", "is the key log's file too: one would overwrite the other", "same"
            )
        return self

    def _believed_roots(self) -> bytes | Literal["system"] | None:
        return self.roots if self.roots is not None else getattr(self.credentials, "roots", None)

    def native_values(self) -> _native.TlsDict:
        """The options as a binding takes them; what a distribution of its own parses anew."""
        roots = self._believed_roots()
        pins = self.pins or getattr(self.credentials, "pins", ())
        client_auth = self.client_auth or ("required" if asks_clients(self) else "off")
        credentials = self.credentials
        return {
            "own": credentials._native_values() if isinstance(credentials, OwnCertificate) else None,
            "more": [one._native_values() for one in self.more_credentials],
            "psks": [
                (name, bytes(key.get_secret_value()), getattr(key.get_secret_value(), "path", None))
                for name, key in credentials.identities.items()
            ]
            if isinstance(credentials, PskCredentials)
            else None,
            "psk_lookup": self.psk_answers.taken() if self.psk_answers is not None else None,
            "psk_hash": credentials.hash
            if isinstance(credentials, PskCredentials | PskLookupCredentials)
            else "sha256",
            "roots": "none"
            if self.danger_accept_any_certificate
            else native_material(roots)
            if isinstance(roots, bytes)
            else roots,
            "pins": list(pins),
            "client_auth": client_auth,
            "peer_rules": [rule._native_values() for rule in self.peer_rules],
            "crls": [native_material(one) for one in self.crls],
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
        try:
            return self.native.reload()
        except ConfigError as error:
            raise self._where_said(error) from None

    def watch(self, on_reload: ReloadCallback | None = None) -> TlsWatch:
        """Does :meth:`reload` by itself when the files change, until the watch is closed.

        Args:
            on_reload: Called after each attempt: with ``None``, or with the error that says why what was
                there stays in use. It runs on the event loop that is running now; without one, on the
                call-backs' thread. Without it failures go to the log ``sapper``.

        Raises:
            ConfigError: Nothing came from a file.
        """
        return TlsWatch(self.native, on_reload, self._where_said)

    @model_validator(mode="after")
    def _default_for_more(self) -> Self:
        for index, one in enumerate(self.more_credentials):
            for name in ("roots", "pins"):
                if getattr(one, name):
                    where = f"more_credentials.{index}.{name}"
                    raise config_error(where, f"{name} belong to the configuration as a whole")
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


def asks_clients(config: TlsConfig) -> bool:
    """Whether a server with it asks its clients for certificates."""
    if config.client_auth is not None:
        return config.client_auth != "off"
    credentials = config.credentials
    roots = config.roots if config.roots is not None else getattr(credentials, "roots", None)
    return isinstance(roots, bytes) or bool(config.pins or getattr(credentials, "pins", ()))
