"""``sapper proxy``: TLS in front of a service. Its work is done by :mod:`sapper.cli._serve`."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from sapper._files import read_whole
from sapper._mistakes import unused
from sapper._options import config_error
from sapper.cli._help import Command
from sapper.cli._names import Words, in_file
from sapper.cli._output import EXIT_CODES
from sapper.cli._serve import Journal, serve, show_status
from sapper.cli._tls import TlsFlags, TypedTls, with_tls
from sapper.pump import Upgrade
from sapper.tls import ProxyOptions

__all__ = ["app"]

_CLIENTS = "TLS with clients"
_SERVICE = "The service"
_TO_SERVICES = "TLS to services that are tls://"
_LIMITS = "Limits"
_RUNNING = "Running"

_WITH_CLIENTS = TlsFlags(
    _CLIENTS,
    role="server",
    texts={"roots": "Ask clients for a certificate of one of the authorities in this file."},
)
_WITH_SERVICES = TlsFlags(
    _TO_SERVICES,
    prefix="upstream",
    role="client",
    texts={"roots": "Whom to believe: a file of certificates, or 'system', the default."},
)

#: What is typed for an option of the API that is called otherwise.
_WORDS = {
    "listen": "LISTEN",
    "to": "SERVICE",
    "routes": "--route",
    "names": "--route",
    "drain_timeout": "--drain",
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
@with_tls
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
    *,
    tls: Annotated[TypedTls, _WITH_CLIENTS],
    upgrade: Annotated[Upgrade | None, _option(_CLIENTS, "What they say in clear before TLS.")] = None,
    route: Annotated[
        list[str] | None,
        _option(_SERVICE, "NAME=SERVICE: clients that ask for this name (*.name) go there; repeatable."),
    ] = None,
    pass_through: Annotated[
        bool, _option(_SERVICE, "Hand clients' TLS on as it is, by name.", "--pass-through")
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
    upstream_tls: Annotated[TypedTls, _WITH_SERVICES],
    upstream_name: Annotated[str | None, _option(_TO_SERVICES, "Name to check in its certificate.")] = None,
    upstream_upgrade: Annotated[
        Upgrade | None, _option(_TO_SERVICES, "What is said to it in clear before TLS.")
    ] = None,
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
    words = Words(
        {name: f"--{name.replace('_', '-')}" for name in ProxyOptions.model_fields}
        | _WORDS
        | _in_table("tls", tls)
        | _in_table("upstream_tls", upstream_tls)
        # Of what is wrong with TLS as a whole.
        | {"tls": tls.first or "--cert", "upstream_tls": upstream_tls.first or "--upstream-roots"},
        "proxy",
    )

    def options() -> ProxyOptions:
        kept = _of_file(config) if config is not None else {}
        with_clients = tls.config(kept.get("tls"), "proxy.tls") if tls else None
        with_services = (
            upstream_tls.config(kept.get("upstream_tls"), "proxy.upstream_tls") if upstream_tls else None
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
        words.in_file = kept.keys() - given.keys()
        with words:
            return ProxyOptions(**{**kept, **given})

    if listen is None and config is None:
        raise config_error("LISTEN", "say where to listen and where to go: sapper proxy :8443 localhost:8080")
    if quiet and as_json:
        raise unused("--quiet", "programs are told everything: leave it away, or --json")
    of_a_way = {
        "--pass-through": pass_through,
        "--keep-source": keep_source,
        "--send-proxy": send_proxy,
        "--upstream-upgrade": upstream_upgrade,
    }
    if not service and not route and (name := next((one for one, said in of_a_way.items() if said), None)):
        raise unused(name, "belongs to a SERVICE or a --route, and none was typed")
    journal = Journal(as_json=as_json, quiet=quiet)
    with words:
        code = asyncio.run(serve(options(), options, tuple(metrics or ()), journal))
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


def _route(text: str, pass_through: bool, common: dict[str, Any]) -> dict[str, Any]:
    name, equals, service = text.partition("=")
    if not (name and equals and service):
        raise config_error("--route", f"{text!r} is not NAME=SERVICE")
    given = {name: value for name, value in common.items() if value is not None}
    return {"names": (name,), "to": (service,), "pass_through": pass_through, **given}


def _of_file(path: Path) -> dict[str, Any]:
    """What the file says."""
    with in_file("proxy"):
        _only_proxy(path)
        base = ProxyOptions.from_toml(path, table="proxy")
    return {name: getattr(base, name) for name in base.model_fields_set}


def _in_table(table: str, typed: TypedTls) -> dict[str, str]:
    """What is typed for the options of one side's TLS."""
    return {f"{table}.{field}": word for field, word in typed.words().items()}


def _only_proxy(path: Path) -> None:
    try:
        tables = tomllib.loads(read_whole(path)[0].decode())
    except (OSError, ValueError, RecursionError):
        return  # told by who reads it
    if unknown := set(tables) - {"proxy"}:
        raise config_error(None, f"{path}: there is no table [{min(unknown)}]; there is [proxy]")
