"""The options of TLS on the command line: the one list of them, for every command.

Nothing but names and texts, because a server keeps for months what is here. Not here: how they are read, and
what is made of them (:mod:`sapper.cli._tls`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

__all__ = ["PASSWORD", "PSK", "TLS_OPTIONS", "Role", "TlsOption", "option", "tls_words", "variable"]

#: Variables of the environment, by the ends of their names: what opens an encrypted key, and a pre-shared key
#: in hexadecimal where no file is given.
PASSWORD, PSK = "KEY_PASSWORD", "PSK"

#: Which end of a connection we are.
Role = Literal["client", "server"]

_Version = Literal["1.2", "1.3"] | None
_Texts = list[str] | None
_Paths = list[Path] | None


class TlsOption(NamedTuple):
    """One option.

    Attributes:
        name: Without dashes and prefix.
        kind: What is typed: a type that typer reads. ``bool`` is an option without a value.
        text: Its help. ``{roots}`` and ``{pin}`` are options, ``{password}`` and ``{psk}`` are variables.
        fields: What the API calls it, in errors.
        role: Which end has a use for it; ``None``: both.
    """

    name: str
    kind: Any
    text: str
    fields: tuple[str, ...] = ()
    role: Role | None = None


_RULES = ("peer_rules", "dns", "uri", "email", "ip", "cn", "ou", "pin")


def _danger(name: str, text: str, role: Role | None = None) -> TlsOption:
    return TlsOption(f"danger-{name}", bool, text, (f"danger_{name.replace('-', '_')}",), role)


#: In the order of the help.
TLS_OPTIONS = (
    TlsOption("cert", Path | None, "Own certificate chain, PEM or DER.", ("chain", "credentials")),
    TlsOption("key", Path | None, "Its key. A password is read from {password}.", ("key",)),
    TlsOption(
        "pkcs12", Path | None, "Both in one PKCS#12 file. A password is read from {password}.", ("file",)
    ),
    TlsOption(
        "ocsp-response",
        Path | None,
        "OCSP response (DER) that is stapled to the certificate.",
        ("ocsp_response",),
        "server",
    ),
    TlsOption(
        "more-cert",
        _Paths,
        "Another certificate, for its own names; repeatable.",
        ("more_credentials",),
        "server",
    ),
    TlsOption("more-key", _Paths, "Its key, in the same order.", ("more_credentials.key",), "server"),
    TlsOption("roots", str | None, "Whom to believe: a file of certificates, or 'system'.", ("roots",)),
    TlsOption("pin", _Texts, "SHA-256 of a public key that the peer must have; repeatable.", ("pins",)),
    TlsOption(
        "allow",
        _Texts,
        "Only a peer whose certificate has this: cn:NAME, ou, dns, uri, email, ip, pin; repeatable.",
        _RULES,
    ),
    TlsOption(
        "client-auth",
        Literal["off", "optional", "required"] | None,
        "Whether clients are asked for certificates; required where {roots} is a file, or with {pin}.",
        ("client_auth",),
        "server",
    ),
    TlsOption("crl", _Paths, "A certificate revocation list; repeatable.", ("crls",)),
    TlsOption(
        "ocsp",
        Literal["off", "check", "require"] | None,
        "Whether to look at a stapled OCSP response.",
        ("ocsp",),
        "client",
    ),
    TlsOption(
        "psk-identity",
        str | None,
        "Name of a pre-shared key; TLS 1.2 allows an empty one.",
        ("identity",),
    ),
    TlsOption(
        "psk-file",
        Path | None,
        "File with the key, hexadecimal or raw; without it {psk}, hexadecimal.",
        ("identities", "key_file"),
    ),
    TlsOption("alpn", str | None, "Application protocols, comma-separated, best first.", ("alpn",)),
    TlsOption("min-tls", _Version, "Oldest version.", ("min_version",)),
    TlsOption("max-tls", _Version, "Newest version.", ("max_version",)),
    TlsOption("cipher-suite", _Texts, "A suite; repeatable, best first.", ("cipher_suites",)),
    TlsOption("group", _Texts, "A key exchange group; repeatable, best first.", ("groups",)),
    TlsOption("no-resumption", bool, "Do the whole handshake every time.", ("resumption",)),
    TlsOption(
        "ticket-lifetime",
        float | None,
        "Seconds after which session tickets get a new key.",
        ("ticket_lifetime",),
        "server",
    ),
    TlsOption(
        "key-log",
        Path | None,
        "Append session secrets here: whoever reads it reads the traffic.",
        ("key_log_file",),
    ),
    TlsOption(
        "capture",
        Path | None,
        "Write the ciphertext with its secrets to this pcapng file: whoever reads it reads all.",
        ("capture_file",),
    ),
    _danger("accept-any-certificate", "Believe anybody."),
    _danger("ignore-server-name", "Any name will do in the server's certificate.", "client"),
    _danger("legacy-renegotiation", "TLS 1.2 with insecure renegotiation.", "client"),
    _danger("security-level-0", "Small keys, SHA-1 signatures."),
    _danger("legacy-suites", "Allow suites with CBC or without forward secrecy."),
    _danger("short-psk", "Pre-shared keys below 16 bytes."),
    _danger("ignore-truncation", "An end without close_notify is an orderly one."),
)


def option(name: str, prefix: str = "", renamed: Mapping[str, str] | None = None) -> str:
    """An option as it is typed: ``--cert``, ``--upstream-cert``."""
    return f"--{prefix and prefix + '-'}{(renamed or {}).get(name, name)}"


def variable(name: str, prefix: str = "") -> str:
    """The environment's variable of a secret: ``SAPPER_PSK``, ``SAPPER_UPSTREAM_PSK``."""
    return "_".join(("SAPPER", *([prefix.upper()] if prefix else []), name))


def tls_words(prefix: str = "", renamed: Mapping[str, str] | None = None) -> dict[str, str]:
    """What is typed for an option of the API."""
    words = {field: option(one.name, prefix, renamed) for one in TLS_OPTIONS for field in one.fields}
    return words | {"password": variable(PASSWORD, prefix)}
