"""``sapper bridge``: joins any two endpoints. Its work is done by :mod:`sapper.cli._run`."""

from __future__ import annotations

import asyncio
import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from sapper._options import config_error
from sapper.cli._names import PASSWORD_VARIABLE, PSK_VARIABLE, in_file, naming
from sapper.cli._run import Report, run
from sapper.endpoint import Endpoint, Fd, Stdio, parse
from sapper.errors import ConfigError
from sapper.pump import Framing, PumpOptions, TapOptions, Upgrade
from sapper.tls import Credentials, PeerRules, TlsConfig
from sapper.tls.config import PskCredentials, key_in

__all__ = ["PASSWORD_VARIABLE", "PSK_VARIABLE", "bridge"]

T = TypeVar("T", PumpOptions, TlsConfig)

_WITH_TLS = "TLS (for tls: and tls-listen: endpoints)"
_PACKETS = "Packets"
_WAITING = "Waiting"
_OUTPUT = "Output"


def _tls_option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_WITH_TLS)


def _packet_option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_PACKETS)


def _waiting_option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_WAITING, min=0)


def bridge(
    first: Annotated[
        str, typer.Argument(metavar="A", help="An endpoint: tls://host:443, tun:name, stdio:, …")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="The other endpoint.")],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with the tables \\[tls] and \\[bridge]; options given here come first."),
    ] = None,
    cert: Annotated[Path | None, _tls_option("Own certificate chain, PEM or DER.")] = None,
    key: Annotated[Path | None, _tls_option(f"Its key. A password is read from {PASSWORD_VARIABLE}.")] = None,
    pkcs12: Annotated[
        Path | None, _tls_option(f"Both in one PKCS#12 file. A password is read from {PASSWORD_VARIABLE}.")
    ] = None,
    ocsp_response: Annotated[
        Path | None, _tls_option("OCSP response (DER) that a server staples to its certificate.")
    ] = None,
    more_cert: Annotated[
        list[Path] | None, _tls_option("Another certificate of a server, for its own names; repeatable.")
    ] = None,
    more_key: Annotated[list[Path] | None, _tls_option("Its key, in the same order.")] = None,
    roots: Annotated[str | None, _tls_option("Whom to believe: a file of certificates, or 'system'.")] = None,
    pin: Annotated[
        list[str] | None, _tls_option("SHA-256 of a public key that the peer must have; repeatable.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        _tls_option(
            "Only a peer whose certificate has this: cn:NAME, ou, dns, uri, email, ip, pin; repeatable."
        ),
    ] = None,
    client_auth: Annotated[
        Literal["off", "optional", "required"] | None,
        _tls_option(
            "Whether a server asks for certificates; required where --roots is a file, or with --pin."
        ),
    ] = None,
    crl: Annotated[list[Path] | None, _tls_option("A certificate revocation list; repeatable.")] = None,
    ocsp: Annotated[
        Literal["off", "check", "require"] | None, _tls_option("Whether to look at a stapled OCSP response.")
    ] = None,
    psk_identity: Annotated[
        str | None, _tls_option("Name of a pre-shared key; TLS 1.2 allows an empty one.")
    ] = None,
    psk_file: Annotated[
        Path | None,
        _tls_option(f"File with the key, hexadecimal or raw; without it {PSK_VARIABLE}, hexadecimal."),
    ] = None,
    server_name: Annotated[str | None, _tls_option("Name to check, where it is not the host.")] = None,
    alpn: Annotated[str | None, _tls_option("Application protocols, comma-separated, best first.")] = None,
    min_tls: Annotated[Literal["1.2", "1.3"] | None, _tls_option("Oldest version.")] = None,
    max_tls: Annotated[Literal["1.2", "1.3"] | None, _tls_option("Newest version.")] = None,
    cipher_suite: Annotated[list[str] | None, _tls_option("A suite; repeatable, best first.")] = None,
    group: Annotated[list[str] | None, _tls_option("A key exchange group; repeatable, best first.")] = None,
    no_resumption: Annotated[
        bool, _tls_option("Do the whole handshake every time.", "--no-resumption")
    ] = False,
    ticket_lifetime: Annotated[
        float | None, _tls_option("Seconds after which a server's tickets get a new key.")
    ] = None,
    key_log: Annotated[
        Path | None, _tls_option("Append session secrets here: whoever reads it reads the traffic.")
    ] = None,
    capture: Annotated[
        Path | None,
        _tls_option("Write the ciphertext with its secrets to this pcapng file: whoever reads it reads all."),
    ] = None,
    danger_accept_any_certificate: Annotated[
        bool, _tls_option("Believe anybody.", "--danger-accept-any-certificate")
    ] = False,
    danger_ignore_server_name: Annotated[
        bool, _tls_option("Any name will do in the server's certificate.", "--danger-ignore-server-name")
    ] = False,
    danger_legacy_renegotiation: Annotated[
        bool, _tls_option("TLS 1.2 with insecure renegotiation.", "--danger-legacy-renegotiation")
    ] = False,
    danger_security_level_0: Annotated[
        bool, _tls_option("Small keys, SHA-1 signatures.", "--danger-security-level-0")
    ] = False,
    danger_legacy_suites: Annotated[
        bool, _tls_option("Allow suites with CBC or without forward secrecy.", "--danger-legacy-suites")
    ] = False,
    danger_short_psk: Annotated[
        bool, _tls_option("Pre-shared keys below 16 bytes.", "--danger-short-psk")
    ] = False,
    danger_ignore_truncation: Annotated[
        bool, _tls_option("An end without close_notify is an orderly one.", "--danger-ignore-truncation")
    ] = False,
    upgrade: Annotated[Upgrade | None, _tls_option("What the protocol says in clear before TLS.")] = None,
    framing: Annotated[Framing | None, _packet_option("How packets lie in the network end's stream.")] = None,
    sink_framing: Annotated[Framing | None, _packet_option("The same for the other end.")] = None,
    max_packet: Annotated[int | None, _packet_option("Largest packet in bytes.")] = None,
    records_per_write: Annotated[int | None, _packet_option("Records that share one write.")] = None,
    resync: Annotated[
        bool, _packet_option("Go on at the next record after a bad packet header.", "--resync")
    ] = False,
    tap: Annotated[Path | None, _packet_option("Copy packets to this pcapng file.")] = None,
    tap_filter: Annotated[str | None, _packet_option("Only these packets: 'tcp and port 443'.")] = None,
    tap_max_bytes: Annotated[int | None, _packet_option("Largest size of that file.")] = None,
    direction: Annotated[
        Literal["duplex", "encrypt-only", "decrypt-only"] | None,
        typer.Option(help="Which way payload may flow."),
    ] = None,
    connect_timeout: Annotated[float | None, _waiting_option("Seconds for making a connection.")] = None,
    accept_timeout: Annotated[float | None, _waiting_option("Seconds to wait for a visitor.")] = None,
    handshake_timeout: Annotated[float | None, _waiting_option("Seconds for the handshake.")] = None,
    idle_timeout: Annotated[float | None, _waiting_option("Seconds without a byte, then it ends.")] = None,
    drain: Annotated[float, _waiting_option("Seconds that Ctrl-C gives to deliver what waits.")] = 2.0,
    stats: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds between figures; 0 is none. Default: 1 on a terminal.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer /metrics and /status here: 127.0.0.1:9100, unix:/path; repeatable.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="JSON lines on standard output (beside stdio: on standard error).",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Errors only.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Join two endpoints until one ends; native code moves the bytes.

    Endpoints: tls://host:port, tls-listen://[::]:port, tcp://host:port, tcp-listen://[::]:port, unix:/path,
    unix-listen:/path, dgram:/path, seqpacket:/path, udp://host:port, tun:name?mtu=1280&address=fd00::1/64,
    tap:name, fd:3, fd:3,4, stdio:, file:/path?mode=w, null:, counter:

    Ctrl-C delivers what waits (--drain), then ends; a second one ends at once. Keys come from files or from
    the environment and are never shown.
    """
    ends = parse(first, field="A"), parse(second, field="B")
    tables = _tables(config)
    if tap is None and (tap_filter is not None or tap_max_bytes is not None):
        raise config_error("--tap", "--tap-filter and --tap-max-bytes need --tap")
    with naming():
        tap_options = TapOptions(path=tap, filter=tap_filter, max_bytes=tap_max_bytes) if tap else None
    _must_be_open(ends)
    options = _merged(
        PumpOptions,
        config if "bridge" in tables else None,
        "bridge",
        framing=framing,
        sink_framing=sink_framing,
        direction=direction,
        max_packet=max_packet,
        records_per_write=records_per_write,
        resync=resync or None,
        connect_timeout=connect_timeout,
        accept_timeout=accept_timeout,
        handshake_timeout=handshake_timeout,
        idle_timeout=idle_timeout,
        upgrade=upgrade,
        tap=tap_options,
    )
    tls = {
        "credentials": _credentials(cert, key, pkcs12, ocsp_response, psk_identity, psk_file),
        "more_credentials": _more(more_cert, more_key),
        "roots": Path(roots) if roots not in (None, "system") else roots,
        "pins": tuple(pin) if pin else None,
        "peer_rules": tuple(_rule(text) for text in allow) if allow else None,
        "client_auth": client_auth,
        "crls": tuple(crl) if crl else None,
        "ocsp": ocsp,
        "alpn": tuple(alpn.split(",")) if alpn is not None else None,
        "min_version": min_tls and f"TLSv{min_tls}",
        "max_version": max_tls and f"TLSv{max_tls}",
        "cipher_suites": tuple(cipher_suite) if cipher_suite else None,
        "groups": tuple(group) if group else None,
        "resumption": False if no_resumption else None,
        "ticket_lifetime": ticket_lifetime,
        "key_log_file": key_log,
        "capture_file": capture,
        "danger_accept_any_certificate": danger_accept_any_certificate or None,
        "danger_ignore_server_name": danger_ignore_server_name or None,
        "danger_legacy_renegotiation": danger_legacy_renegotiation or None,
        "danger_security_level_0": danger_security_level_0 or None,
        "danger_legacy_suites": danger_legacy_suites or None,
        "danger_short_psk": danger_short_psk or None,
        "danger_ignore_truncation": danger_ignore_truncation or None,
    }
    said = "tls" in tables or any(value is not None for value in tls.values())
    given_key = psk_identity is not None or psk_file is not None
    psk = ("--psk-file" if psk_file is not None else PSK_VARIABLE) if given_key else "--config"
    tls_config = _merged(TlsConfig, config if "tls" in tables else None, "tls", psk, **tls) if said else None
    out = sys.stderr if any(isinstance(end, Stdio) for end in ends) else sys.stdout
    report = Report(out if as_json else None, quiet=quiet, interval=stats)
    code = asyncio.run(run(ends, tls_config, server_name, options, drain, report, tuple(metrics or ()), psk))
    if code:
        raise typer.Exit(code)


def _must_be_open(ends: tuple[Endpoint, Endpoint]) -> None:
    """Refuses standard streams that were closed when we began: their numbers are something else by now."""
    streams = (sys.__stdin__, "input"), (sys.__stdout__, "output"), (sys.__stderr__, "error")
    for field, end in zip("AB", ends, strict=True):
        numbers = {0, 1} if isinstance(end, Stdio) else {end.read, end.write} if isinstance(end, Fd) else ()
        for number, (stream, name) in enumerate(streams):
            if number in numbers and stream is None:
                raise config_error(field, f"standard {name} is not open", "not_open")


def _tables(path: Path | None) -> dict[str, Any]:
    """The tables of the file; only those two may be there."""
    if path is None:
        return {}
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise config_error("--config", f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise config_error("--config", f"{path} is not TOML: {error}") from None
    if unknown := set(tables) - {"tls", "bridge"}:
        raise config_error(
            "--config", f"{path}: there is no table [{min(unknown)}]; there are [tls] and [bridge]"
        )
    return tables


def _merged(kind: type[T], path: Path | None, table: str, psk: str | None = None, **given: Any) -> T:
    with in_file(table):
        base = kind.from_toml(path, table=table) if path is not None else None
    kept = {name: getattr(base, name) for name in base.model_fields_set} if base is not None else {}
    given = {name: value for name, value in given.items() if value is not None}
    is_psk = isinstance(given.get("credentials", kept.get("credentials")), PskCredentials)
    with naming(psk=psk if is_psk else None):
        return kind.from_mapping({**kept, **given})


def _rule(text: str) -> PeerRules:
    kind, colon, value = text.partition(":")
    if not colon or kind not in PeerRules.model_fields:
        raise config_error(
            "--allow", f"{text!r} is not one of {', '.join(PeerRules.model_fields)}, a colon, a value"
        )
    with naming():
        return PeerRules.from_mapping({kind: (value,)})


def _more(certs: list[Path] | None, keys: list[Path] | None) -> tuple[Credentials, ...] | None:
    if len(certs or ()) != len(keys or ()):
        raise config_error("--more-key", "--more-cert and --more-key belong together, in the same order")
    if not certs or not keys:
        return None
    with naming(more=True):
        return tuple(Credentials.certificate(*pair) for pair in zip(certs, keys, strict=True))


def _credentials(
    cert: Path | None,
    key: Path | None,
    pkcs12: Path | None,
    ocsp_response: Path | None,
    identity: str | None,
    psk_file: Path | None,
) -> Credentials | None:
    if ocsp_response is not None and cert is None and pkcs12 is None:
        raise config_error("--ocsp-response", "a response is about a certificate: give --cert or --pkcs12")
    if pkcs12 is not None:
        if any(one is not None for one in (cert, key, identity, psk_file)):
            raise config_error(
                "--pkcs12", "a PKCS#12 file has both certificate and key: give nothing beside it"
            )
        with naming():
            return Credentials.pkcs12(pkcs12, os.environ.get(PASSWORD_VARIABLE), ocsp_response=ocsp_response)
    if cert is not None or key is not None:
        if cert is None or key is None:
            raise config_error("--key" if key is None else "--cert", "--cert and --key belong together")
        if identity is not None or psk_file is not None:
            given = "--psk-file" if identity is None else "--psk-identity"
            raise config_error(given, "a certificate and a pre-shared key exclude each other")
        with naming():
            password = os.environ.get(PASSWORD_VARIABLE)
            return Credentials.certificate(cert, key, password=password, ocsp_response=ocsp_response)
    if identity is None and psk_file is None:
        return None
    secret: bytes | str | None = os.environ.get(PSK_VARIABLE)
    if psk_file is not None:
        try:
            secret = psk_file.read_bytes()
        except OSError as error:
            raise config_error("--psk-file", f"cannot read {psk_file}: {error.strerror}") from None
        try:
            secret = key_in(secret)
        except ValueError as error:
            raise config_error("--psk-file", f"{psk_file}: {error}") from None
    if not secret:
        raise config_error("--psk-file", f"a pre-shared key comes from --psk-file or from {PSK_VARIABLE}")
    with naming(psk="--psk-file"):
        try:
            return Credentials.psk(identity or "", secret)
        except ConfigError as error:
            if psk_file is None and error.field == "key":
                raise config_error(PSK_VARIABLE, error.message, error.reason) from None
            raise
