"""``sapper proxy``: TLS in front of a service. Its work is done by :mod:`sapper.cli._serve`."""

from __future__ import annotations

import asyncio
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperGroup

from sapper._options import Options, config_error
from sapper.cli._help import Command
from sapper.cli._names import PASSWORD_VARIABLE, again, in_file, of_file
from sapper.cli._output import EXIT_CODES
from sapper.cli._serve import Journal, serve, show_status
from sapper.errors import ConfigError, SapperError
from sapper.pump import Upgrade
from sapper.tls import Credentials, PeerRules, ProxyOptions, TlsConfig

__all__ = ["app"]

T = TypeVar("T", bound=Options)

_CLIENTS = "TLS with clients"
_SERVICE = "The service"
_LIMITS = "Limits"
_RUNNING = "Running"

#: What is typed for an option of the API, with clients and with services.
_WITH_CLIENTS = {
    "chain": "--cert",
    "key": "--key",
    "password": PASSWORD_VARIABLE,
    "file": "--pkcs12",
    "credentials": "--cert",
    "roots": "--roots",
    "peer_rules": "--allow",
    "crls": "--crl",
    "alpn": "--alpn",
    "min_version": "--min-tls",
    "cipher_suites": "--cipher-suite",
    **dict.fromkeys(("dns", "uri", "email", "ip", "cn", "ou", "pin"), "--allow"),
}
_WITH_SERVICES = {
    "chain": "--upstream-cert",
    "key": "--upstream-key",
    "credentials": "--upstream-cert",
    "roots": "--upstream-roots",
    "pins": "--upstream-pin",
    "danger_accept_any_certificate": "--upstream-danger-accept-any-certificate",
}
_OF_PROXY = {
    "listen": "LISTEN",
    "to": "SERVICE",
    "tls": "--cert",
    "upstream_tls": "--upstream-roots",
    "routes": "--route",
    "names": "--route",
    "address": "--metrics",
}


class _RunByDefault(TyperGroup):
    """``sapper proxy LISTEN SERVICE`` is ``sapper proxy run LISTEN SERVICE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="TLS in front of a service, to one, or both; [bold]sapper proxy status[/] asks one that runs.",
    no_args_is_help=False,
)


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


@app.command(cls=Command, epilog=EXIT_CODES)
def run(
    listen: Annotated[
        str | None,
        typer.Argument(metavar="LISTEN", help="Where clients connect: :8443, unix:/path, systemd."),
    ] = None,
    service: Annotated[
        list[str] | None,
        typer.Argument(metavar="SERVICE...", help="Where they go: host:port, unix:/path, tls://host:port."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the table \\[proxy]; what is given here comes first.")
    ] = None,
    cert: Annotated[Path | None, _option(_CLIENTS, "Own certificate chain, PEM or DER.")] = None,
    key: Annotated[
        Path | None, _option(_CLIENTS, f"Its key. A password is read from {PASSWORD_VARIABLE}.")
    ] = None,
    pkcs12: Annotated[Path | None, _option(_CLIENTS, "Both in one PKCS#12 file.")] = None,
    roots: Annotated[
        Path | None, _option(_CLIENTS, "Ask clients for a certificate of one of these authorities.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        _option(_CLIENTS, "Only clients whose certificate has this: cn:NAME, ou, dns, uri, email, ip, pin."),
    ] = None,
    crl: Annotated[list[Path] | None, _option(_CLIENTS, "A revocation list for them; repeatable.")] = None,
    alpn: Annotated[str | None, _option(_CLIENTS, "Application protocols, comma-separated.")] = None,
    min_tls: Annotated[Literal["1.2", "1.3"] | None, _option(_CLIENTS, "Oldest version.")] = None,
    cipher_suite: Annotated[list[str] | None, _option(_CLIENTS, "A suite; repeatable, best first.")] = None,
    upgrade: Annotated[Upgrade | None, _option(_CLIENTS, "What they say in clear before TLS.")] = None,
    route: Annotated[
        list[str] | None,
        _option(_SERVICE, "NAME=SERVICE: clients that ask for this name (*.name) go there; repeatable."),
    ] = None,
    pass_through: Annotated[
        bool, _option(_SERVICE, "Hand clients' TLS on as it is, by name.", "--pass-through")
    ] = False,
    upstream_name: Annotated[str | None, _option(_SERVICE, "Name to check in its certificate.")] = None,
    upstream_upgrade: Annotated[
        Upgrade | None, _option(_SERVICE, "What is said to it in clear before TLS.")
    ] = None,
    upstream_roots: Annotated[
        Path | None, _option(_SERVICE, "Whom to believe about its certificate; default: the system.")
    ] = None,
    upstream_pin: Annotated[
        list[str] | None, _option(_SERVICE, "SHA-256 of a public key that it must have; repeatable.")
    ] = None,
    upstream_cert: Annotated[Path | None, _option(_SERVICE, "Our certificate for it.")] = None,
    upstream_key: Annotated[Path | None, _option(_SERVICE, "Its key.")] = None,
    upstream_danger_accept_any_certificate: Annotated[
        bool, _option(_SERVICE, "Believe anybody.", "--upstream-danger-accept-any-certificate")
    ] = False,
    send_proxy: Annotated[
        Literal["v1", "v2"] | None, _option(_SERVICE, "Tell it by a PROXY header who connected.")
    ] = None,
    proxy_from: Annotated[
        list[str] | None,
        _option(_SERVICE, "Networks (or unix) whose connections begin with a PROXY header; repeatable."),
    ] = None,
    transparent: Annotated[bool | None, _option(_SERVICE, "Listen for TPROXY.", "--transparent")] = None,
    keep_source: Annotated[
        bool, _option(_SERVICE, "Connect to it with the client's address.", "--keep-source")
    ] = False,
    max_connections: Annotated[int | None, _option(_LIMITS, "Open connections.", min=1)] = None,
    max_handshakes: Annotated[int | None, _option(_LIMITS, "Handshakes under way.", min=1)] = None,
    rate: Annotated[float | None, _option(_LIMITS, "New connections of one address a second.")] = None,
    burst: Annotated[int | None, _option(_LIMITS, "How many of them at once.", min=1)] = None,
    handshake_timeout: Annotated[float | None, _option(_LIMITS, "Seconds for a client's handshake.")] = None,
    connect_timeout: Annotated[float | None, _option(_LIMITS, "Seconds to reach the service.")] = None,
    idle_timeout: Annotated[float | None, _option(_LIMITS, "Seconds without a byte, then it ends.")] = None,
    drain: Annotated[
        float | None, _option(_LIMITS, "Seconds that SIGTERM and Ctrl-C give to open connections.", min=0)
    ] = None,
    metrics: Annotated[
        list[str] | None,
        _option(_RUNNING, "Answer /metrics and /status here: 127.0.0.1:9100, unix:/path; repeatable."),
    ] = None,
    log_connections: Annotated[
        bool | None, _option(_RUNNING, "Tell of every connection's end.", "--log-connections")
    ] = None,
    as_json: Annotated[bool, _option(_RUNNING, "JSON lines on standard output.", "--json")] = False,
    quiet: Annotated[bool, _option(_RUNNING, "Errors only.", "--quiet", "-q")] = False,
) -> None:
    """Put TLS in front of a service, or to one, or both.

    sapper proxy :8443 localhost:8080 --cert chain.pem --key key.pem

    With --cert clients speak TLS, with a tls:// service we do; both re-encrypt, neither is plain. SIGHUP
    reads certificates and --config again; SIGTERM and Ctrl-C drain, a second one ends at once. One that
    runs is asked by: sapper proxy status ADDRESS.
    """
    # What an error about TLS as a whole is called: by what was typed.
    words = _OF_PROXY | _WITH_CLIENTS
    if upstream_roots is None:
        typed = {
            "--upstream-cert": upstream_cert is not None,
            "--upstream-pin": upstream_pin is not None,
            "--upstream-danger-accept-any-certificate": upstream_danger_accept_any_certificate,
        }
        words |= {"upstream_tls": next((name for name, is_so in typed.items() if is_so), "--upstream-roots")}
    if cert is None and pkcs12 is not None:
        words |= dict.fromkeys(("tls", "credentials"), "--pkcs12")
    in_table: set[str] = set()

    def options() -> ProxyOptions:
        with_clients = _tls(
            _WITH_CLIENTS,
            credentials=_credentials(cert, key, pkcs12),
            roots=roots,
            peer_rules=tuple(map(_rule, allow)) if allow else None,
            crls=tuple(crl) if crl else None,
            alpn=tuple(alpn.split(",")) if alpn is not None else None,
            min_version=min_tls and f"TLSv{min_tls}",
            cipher_suites=tuple(cipher_suite) if cipher_suite else None,
        )
        if with_clients is not None and with_clients.credentials.kind == "none":
            raise config_error("--cert", "options of TLS with clients need --cert and --key, or --pkcs12")
        with_services = _tls(
            _WITH_SERVICES,
            credentials=_pair(upstream_cert, upstream_key),
            roots=upstream_roots,
            pins=tuple(upstream_pin) if upstream_pin else None,
            danger_accept_any_certificate=upstream_danger_accept_any_certificate or None,
        )
        common = {
            "send_proxy": send_proxy,
            "keep_source": keep_source or None,
            "upstream_upgrade": upstream_upgrade,
        }
        given = {
            "listen": listen,
            "to": tuple(service) if service else None,
            "routes": tuple(_route(text, pass_through, common) for text in route) if route else None,
            "tls": with_clients,
            "upgrade": upgrade,
            "upstream_tls": with_services,
            "pass_through": pass_through if service else None,
            "upstream_name": upstream_name,
            **(common if service else {}),
            "proxy_from": tuple(proxy_from) if proxy_from else None,
            "transparent": transparent,
            "max_connections": max_connections,
            "max_handshakes": max_handshakes,
            "rate": rate,
            "burst": burst,
            "handshake_timeout": handshake_timeout,
            "connect_timeout": connect_timeout,
            "idle_timeout": idle_timeout,
            "drain_timeout": drain,
            "log_connections": log_connections,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return _merged(config, given, words, in_table)

    if listen is None and config is None:
        raise config_error("LISTEN", "say where to listen and where to go: sapper proxy :8443 localhost:8080")
    journal = Journal(as_json=as_json, quiet=quiet)
    try:
        code = asyncio.run(serve(options(), options, tuple(metrics or ()), journal))
    except SapperError as error:
        raise _said(error, words, in_table) from None
    if code:
        raise typer.Exit(code)


@app.command(cls=Command)
def status(
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS", help="What --metrics of the proxy says: 127.0.0.1:9100, unix:/path."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Ask a running proxy for its counters and its open connections."""
    show_status(address, as_json=as_json)


def _named(error: SapperError, words: dict[str, str]) -> SapperError:
    """The same error in the words of the command line."""
    field = error.field
    if field is not None and not field.startswith("-") and not field.isupper():
        parts = field.split(".")
        last = parts[-1] if parts[0] in ("credentials", "peer_rules") else parts[0]
        field = words.get(last) or words.get(parts[0]) or f"--{parts[0].replace('_', '-')}"
    return again(error, error.message, field)


def _tls(words: dict[str, str], **given: Any) -> TlsConfig | None:
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    try:
        return TlsConfig(**given)
    except ConfigError as error:
        raise _named(error, words) from None


def _credentials(cert: Path | None, key: Path | None, pkcs12: Path | None) -> Credentials | None:
    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        if pkcs12 is not None:
            if cert is not None or key is not None:
                raise config_error("--pkcs12", "has both certificate and key: give nothing beside it")
            return Credentials.pkcs12(pkcs12, password)
        if (cert is None) != (key is None):
            raise config_error("--key" if key is None else "--cert", "--cert and --key belong together")
        return Credentials.certificate(cert, key, password=password) if cert and key else None
    except ConfigError as error:
        raise _named(error, _WITH_CLIENTS) from None


def _pair(cert: Path | None, key: Path | None) -> Credentials | None:
    if (cert is None) != (key is None):
        missing = "--upstream-key" if key is None else "--upstream-cert"
        raise config_error(missing, "--upstream-cert and --upstream-key belong together")
    try:
        return Credentials.certificate(cert, key) if cert and key else None
    except ConfigError as error:
        raise _named(error, _WITH_SERVICES) from None


def _rule(text: str) -> PeerRules:
    kind, colon, value = text.partition(":")
    if not colon or kind not in PeerRules.model_fields:
        words = ", ".join(PeerRules.model_fields)
        raise config_error("--allow", f"{text!r} is not one of {words}, a colon, a value")
    try:
        return PeerRules.from_mapping({kind: (value,)})
    except ConfigError as error:
        raise _named(error, _WITH_CLIENTS) from None


def _route(text: str, pass_through: bool, common: dict[str, Any]) -> dict[str, Any]:
    name, equals, service = text.partition("=")
    if not (name and equals and service):
        raise config_error("--route", f"{text!r} is not NAME=SERVICE")
    given = {name: value for name, value in common.items() if value is not None}
    return {"names": (name,), "to": (service,), "pass_through": pass_through, **given}


def _said(error: SapperError, words: dict[str, str], in_table: set[str]) -> SapperError:
    """An error of the whole, in the words of who said what is wrong: the file, or the command line."""
    name = (error.field or "").partition(".")[0]
    # What is found natively has the names of its own part.
    part = {"names": "routes", "address": "metrics"}.get(name, "tls" if name in _WITH_CLIENTS else name)
    if part in in_table:
        return of_file(error, "proxy")
    return _named(error, words)


def _merged(
    path: Path | None, given: dict[str, Any], words: dict[str, str], in_table: set[str]
) -> ProxyOptions:
    """All options; ``in_table`` is told which of them are the file's."""
    kept: dict[str, Any] = {}
    if path is not None:
        with in_file("proxy"):
            _only_proxy(path)
            base = ProxyOptions.from_toml(path, table="proxy")
        kept = {name: getattr(base, name) for name in base.model_fields_set}
    in_table.clear()
    in_table.update(kept.keys() - given.keys())
    try:
        return ProxyOptions(**{**kept, **given})
    except ConfigError as error:
        raise _said(error, words, in_table) from None


def _only_proxy(path: Path) -> None:
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return  # told by who reads it
    if unknown := set(tables) - {"proxy"}:
        raise config_error(None, f"{path}: there is no table [{min(unknown)}]; there is [proxy]")
