"""``sapper tunnel serve`` and ``sapper expose``: the two ends of a tunnel on the command line.

Their work is done by :mod:`sapper.cli._tunnel`, in a process without what is here: :mod:`sapper.cli._lean`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sapper._files import read_whole
from sapper._mistakes import shown, unused
from sapper._options import config_error
from sapper.cli._help import Command
from sapper.cli._names import Words, in_file
from sapper.cli._output import EXIT_CODES
from sapper.cli._tls import TlsFlags, TypedTls, with_tls
from sapper.errors import SapperError

if TYPE_CHECKING:
    from sapper.tunnel.config import ClientConfig, ServerConfig

__all__ = ["TOKEN_VARIABLE", "expose", "tunnel"]

#: Where a client's token is read from: a command line is seen by every user of the machine.
TOKEN_VARIABLE = "SAPPER_TUNNEL_TOKEN"  # noqa: S105 - a name

#: What is typed for an option of the API.
_SERVER_WORDS = (
    {
        name: f"--{name.replace('_', '-')}"
        for name in ("host", "port", "visitor_host", "public_ports", "visitor_rate", "visitor_burst")
    }
    | {"asked_ports": "--ask-ports", "asked_hosts": "--ask-host"}
    | {"lease_file": "--state", "address": "--metrics"}
)
_CLIENT_WORDS = {
    "server": "--to",
    "service": "SERVICE",
    "services": "SERVICE",
    "credentials": "--credentials",
    "token_file": "--token-file",
    "lease": "--lease",
    "address": "--metrics",
}

#: The file of leases of all servers of a user, in earlier versions.
_OLD_LEASES = "tunnel-leases.json"

_WITH_SERVER = "TLS to the server"
# --allow is about visitors' addresses.
_AT_MAIN_PORT = TlsFlags("TLS at the main port", role="server", renamed={"allow": "allow-client"})
_AT_PUBLIC_PORTS = TlsFlags("TLS at public ports", role="server", prefix="visitor")
_TO_SERVER = TlsFlags(_WITH_SERVER, role="client", renamed={"roots": "ca"})

tunnel = typer.Typer(no_args_is_help=True, help="The tunnel's server; [bold]sapper expose[/] is its client.")

_Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output, one for each event.")]
_Metrics = Annotated[
    list[str] | None,
    typer.Option(help="Answer /metrics and /status here: 127.0.0.1:9100, unix:/path; repeatable."),
]
_Drain = Annotated[float, typer.Option(help="Seconds that SIGTERM and Ctrl-C give to open streams.", min=0)]


@tunnel.callback()
def _tunnel() -> None:
    """The tunnel's server."""


@tunnel.command(cls=Command, epilog=EXIT_CODES)
@with_tls
def serve(
    *,
    port: Annotated[int | None, typer.Option(help="The main port: 9000.", min=0, max=65_535)] = None,
    host: Annotated[str | None, typer.Option(help="Where it listens; every address without it.")] = None,
    visitor_host: Annotated[
        str | None, typer.Option(help="Where public ports listen; as the main port without it.")
    ] = None,
    public_ports: Annotated[
        str | None, typer.Option(help="Public ports: 20000-20999, or one.", metavar="FIRST-LAST")
    ] = None,
    ask_ports: Annotated[
        list[str] | None,
        typer.Option(
            help="Public ports that a client may ask for; repeatable. Those of --public-ports without it.",
            metavar="FIRST-LAST",
        ),
    ] = None,
    ask_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a client may ask its public ports to listen; repeatable.", metavar="ADDRESS"
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Who may visit: an address, 10.0.0.0/8, 192.168.*, 10.0.0.5-9; repeatable. "
            "Everybody without it.",
            metavar="ADDRESSES",
        ),
    ] = None,
    deny: Annotated[
        list[str] | None, typer.Option(help="Who may not, in spite of --allow.", metavar="ADDRESSES")
    ] = None,
    visitor_rate: Annotated[
        float | None, typer.Option(help="Visits of one address a second; no limit without it.")
    ] = None,
    visitor_burst: Annotated[int | None, typer.Option(help="How many of them may come at once.")] = None,
    visitor_bytes_per_second: Annotated[
        int | None, typer.Option(help="Bytes a second of one address, in each direction.", min=1)
    ] = None,
    client_bytes_per_second: Annotated[
        int | None, typer.Option(help="The same of one client.", min=1)
    ] = None,
    service_bytes_per_second: Annotated[
        int | None, typer.Option(help="The same of one service.", min=1)
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Folder of the token and the leases; ~/.local/state/sapper without it."),
    ] = None,
    danger_allow_anonymous: Annotated[
        bool, typer.Option("--danger-allow-anonymous", help="No token: everybody may expose a service.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the table \\[tunnel]; what is given here comes first.")
    ] = None,
    drain: _Drain = 5.0,
    metrics: _Metrics = None,
    as_json: _Json = False,
    tls: Annotated[TypedTls, _AT_MAIN_PORT],
    visitor_tls: Annotated[TypedTls, _AT_PUBLIC_PORTS],
) -> None:
    """Give clients public ports. The first start makes a token, and prints the client's command.

    SIGHUP, or a change of the file, reads --config and certificates again; no stream is cut by that.
    SIGTERM and Ctrl-C drain, a second one ends at once.
    """
    from sapper.cli._lean import Work, launch
    from sapper.tunnel.config import secret

    folder = state if state is not None else _state_folder()
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "visitor_host": visitor_host,
        "allow_visitors": None if allow is None else tuple(allow),
        "deny_visitors": None if deny is None else tuple(deny),
        "visitor_rate": visitor_rate,
        "visitor_burst": visitor_burst,
        "public_ports": None if public_ports is None else _range(public_ports, "--public-ports"),
        "asked_ports": None if ask_ports is None else tuple(_range(one, "--ask-ports") for one in ask_ports),
        "asked_hosts": None if ask_host is None else tuple(ask_host),
        **_rates(visitor_bytes_per_second, client_bytes_per_second, service_bytes_per_second),
        "danger_allow_anonymous": danger_allow_anonymous or None,
    }
    if visitor_burst is not None and visitor_rate is None and config is None:
        raise unused("--visitor-burst", "belongs to --visitor-rate, which is not given")
    given = {name: value for name, value in given.items() if value is not None}
    typed = {name: one for name, one in (("tls", tls), ("visitor_tls", visitor_tls)) if one}
    # Of what is wrong with TLS as a whole.
    words = Words(_SERVER_WORDS | {name: str(one.first) for name, one in typed.items()}, "tunnel")

    # Where leases are, if nothing else is said; a server keeps its file, whatever it reads later.
    usual: list[Path | None] = []

    def read() -> ServerConfig:
        from sapper.tunnel.config import ServerConfig

        kept: dict[str, Any] = {}
        if config is not None:
            with in_file("tunnel"):
                _only(config, "tunnel")
                base = ServerConfig.from_toml(config, table="tunnel")
            kept |= {name: getattr(base, name) for name in base.model_fields_set}
            words.in_file = base.model_fields_set - given.keys()
        with words:
            own = {name: one.config(kept.get(name), f"tunnel.{name}") for name, one in typed.items()}
            said = _beside(kept, given) | own
            words.in_file -= said.keys()
            kept |= said
            # What it is counts, not whether somebody wrote it: `danger_allow_anonymous = false` says nothing.
            if not any(kept.get(name) for name in ("danger_allow_anonymous", "clients", "token_file")):
                if "clients" in kept:  # who takes the last one away does not ask for a token
                    text = "lets nobody in: leave it out, for the server's own token, or say who may come"
                    raise config_error("clients", text)
                kept["token_file"] = folder / "tunnel-token"
            if not usual:
                default = ServerConfig.model_fields["port"].default
                usual.append(_lease_file(folder, kept.get("host"), kept.get("port", default)))
            kept.setdefault("lease_file", usual[0])
            return ServerConfig(**kept)

    first = read()
    made = folder / "tunnel-token"
    if first.lease_file is not None and first.lease_file == usual[0]:
        _take_over(folder, first.lease_file)
    if first.token_file == made:
        _make_token(folder)
    elif first.lease_file is not None and first.lease_file.parent == folder:
        _folder(folder)
    launch(
        Work(
            first,
            read,
            lambda: (config,),
            told={"as_json": as_json},
            metrics=tuple(metrics or ()),
            drain=drain,
            words=words,
            token=secret(made, "--state") if first.token_file == made else None,
        )
    )


@tunnel.command(cls=Command, epilog=EXIT_CODES)
def status(
    address: Annotated[
        str,
        typer.Argument(metavar="ADDRESS", help="What --metrics of it says: 127.0.0.1:9100, unix:/path."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on asking, until Ctrl-C.")] = False,
    interval: Annotated[
        float | None, typer.Option(help="Seconds between two questions of --watch: 1.", min=0.1)
    ] = None,
) -> None:
    """Ask a running server, or client, for its tunnels: ports, visitors, bytes, rates, round trips."""
    from sapper.cli._tunnel_status import show_status

    if interval is not None and not watch:
        raise unused("--interval", "is for --watch: without it there is one question")
    show_status(address, as_json=as_json, watch=(interval or 1.0) if watch else None)


@with_tls
def expose(
    services: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SERVICE…",
            help="3000, host:3000, or unix:/path; web=3000 with a name; 3000@8080, 3000@8000-8099 or "
            "3000@203.0.113.5:8080 for a public port.",
        ),
    ] = None,
    *,
    to: Annotated[str | None, typer.Option(help="The server: host:9000.", metavar="HOST:PORT")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with the table \\[expose], or the JSON of W3PTUNL's watcher; what is given here "
            "comes first."
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the server's token; without it {TOKEN_VARIABLE}.")
    ] = None,
    credentials: Annotated[
        Path | None, typer.Option(help="File with a JSON object to say instead of a token.")
    ] = None,
    lease: Annotated[
        str | None, typer.Option(help="Name whose public port this client gets, at a server of sapper's.")
    ] = None,
    send_proxy: Annotated[
        Literal["v1", "v2"] | None,
        typer.Option(help="Tell the service who visits, in a PROXY header of that version."),
    ] = None,
    bytes_per_second: Annotated[
        int | None, typer.Option(help="Bytes a second in each direction, of all visitors.", min=1)
    ] = None,
    max_visitors: Annotated[int | None, typer.Option(help="Visitors at a time.", min=1)] = None,
    reconnect: Annotated[bool | None, typer.Option(help="Connect again when the connection is gone.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="What the public address begins with; without it https where the server says that visitors "
            "speak TLS, else http."
        ),
    ] = None,
    qr: Annotated[
        bool | None, typer.Option("--qr/--no-qr", help="The public address as a QR code; on a terminal.")
    ] = None,
    drain: _Drain = 5.0,
    metrics: _Metrics = None,
    as_json: _Json = False,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls", help="Speak TLS; so does each of the options below.", rich_help_panel=_WITH_SERVER
        ),
    ] = False,
    server_name: Annotated[
        str | None,
        typer.Option(help="Name to check, where it is not the host.", rich_help_panel=_WITH_SERVER),
    ] = None,
    typed: Annotated[TypedTls, _TO_SERVER],
) -> None:
    """Expose services of this machine, each at a public port of a server.

    SIGHUP, or a change of the file, reads --config again; no stream is cut by that. SIGTERM and Ctrl-C drain,
    a second one ends at once.
    """
    from sapper.cli._lean import Work, launch

    if config is None and (not services or to is None):
        name = "SERVICE" if not services else "--to"
        raise config_error(name, "say what to expose, and where: sapper expose 3000 --to host:9000")
    given: dict[str, Any] = {
        **_exposed(services or []),
        "server": to,
        "server_hostname": server_name,
        "lease": lease,
        "send_proxy": send_proxy,
        "reconnect": reconnect,
    }
    if limits := _given(bytes_per_second=bytes_per_second, visitors=max_visitors):
        from sapper.tunnel import Limits

        given["limits"] = Limits(**limits)
    given = {name: value for name, value in given.items() if value is not None}

    if scheme is not None and not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise config_error("--scheme", f"{shown(scheme)} is none: a letter, then letters, digits, +, . and -")
    if qr is not None and as_json:
        raise unused("--qr", "programs get it in any case: leave it away, or --json")
    files: list[Path | None] = [config, token_file]
    words = Words({**typed.words(), **_CLIENT_WORDS, "tls": typed.first or "--tls"}, "expose")

    def read() -> dict[str, ClientConfig]:
        from sapper.tunnel.config import WATCHED_NAMES, ClientConfig, is_watched, read_clients

        own = {**given, **_identity(token_file, credentials)}
        if tls or typed:
            own["tls"] = True
        if config is None:
            with words:
                made = ClientConfig(**_with_token(own | ({"tls": typed.config()} if typed else {})))
            return {"": made}
        watched = is_watched(config)
        words.table, words.file_words = (None, WATCHED_NAMES) if watched else ("expose", {})
        with in_file(words.table):
            if config.suffix == ".toml":
                _only(config, "expose")
            bases = read_clients(config)
        if services and len(bases) > 1:
            raise config_error("SERVICE", f"{config} has several tunnels: each has its own")
        words.in_file = set().union(*(one.model_fields_set for one in bases.values())) - own.keys()
        with words:
            several = {name: _merged(base, own, typed) for name, base in bases.items()}
        files[:] = [config, token_file, *(one.token_file for one in several.values())]
        return several

    first = read()
    told = {"as_json": as_json, "scheme": scheme, "qr": qr}
    places = tuple(metrics or ())
    launch(Work(first, read, lambda: files, told=told, metrics=places, drain=drain, words=words))


def _exposed(services: list[str]) -> dict[str, Any]:
    """One service as ever; several, or one that asks for something, as such."""
    from sapper.tunnel import Service

    try:
        found = tuple(Service.parse(one) for one in services)
    except SapperError as error:
        raise config_error("SERVICE", error.message) from None
    if len(found) == 1 and found[0].name is None and found[0].public_port is None:
        return {"service": services[0]}
    return {"services": found} if found else {}


def _rates(visitor: int | None, client: int | None, service: int | None) -> dict[str, Any]:
    from sapper.tunnel import Limits, VisitorLimits

    return {
        "visitor_limits": None if visitor is None else VisitorLimits(bytes_per_second=visitor),
        "client_limits": None if client is None else Limits(bytes_per_second=client),
        "service_limits": None if service is None else Limits(bytes_per_second=service),
    }


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _beside(kept: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given; of limits each takes the place of that one alone in the file's table."""
    found = dict(given)
    for name in given.keys() & kept.keys() & {"limits", "visitor_limits", "client_limits", "service_limits"}:
        both = (kept[name], given[name])
        values = {one: getattr(limits, one) for limits in both for one in limits.model_fields_set}
        found[name] = type(given[name])(**values)
    return found


def _range(text: str, name: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise config_error(name, f"{text!r} is no range: write FIRST-LAST") from None


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sapper"


def _folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise config_error("--state", f"cannot make {folder}: {error.strerror}") from None


def _lease_file(folder: Path, host: str | None, port: int) -> Path | None:
    """A file for each server of a user: two would not know of each other's ports.

    One whose port is another one each time could not find its leases again.
    """
    if not port:
        return None
    return folder / (f"tunnel-leases-{port}.json" if host is None else f"tunnel-leases-{host}-{port}.json")


def _take_over(folder: Path, own: Path) -> None:
    """Earlier versions kept leases of all servers in one file: the first server that starts has them."""
    if not own.exists():
        with contextlib.suppress(OSError):  # there is none
            (folder / _OLD_LEASES).rename(own)


def _make_token(folder: Path) -> None:
    """The server's token; the first start makes it."""
    path = folder / "tunnel-token"
    _folder(folder)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        from sapper.tunnel.config import secret

        secret(path, "--state")  # an empty one lets nobody in
        return
    except OSError as error:
        raise config_error("--state", f"cannot write {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as out:
        out.write(secrets.token_urlsafe(24) + "\n")


def _identity(token_file: Path | None, credentials: Path | None) -> dict[str, Any]:
    """What the client says of itself, as far as options say that."""
    from sapper.tunnel.config import secret

    if credentials is None:
        return {} if token_file is None else {"token_file": token_file}
    if token_file is not None:
        raise config_error("--credentials", "and --token-file do not go together")
    try:
        said = json.loads(secret(credentials, "--credentials"))
    except RecursionError:
        raise config_error("--credentials", f"{credentials} is nested too deep") from None
    except ValueError as error:
        raise config_error("--credentials", f"{credentials} is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise config_error("--credentials", f"{credentials} holds no JSON object")
    return {"credentials": said}


def _merged(base: ClientConfig, own: dict[str, Any], typed: TypedTls) -> ClientConfig:
    """What a file says of a client, and what is given in its place."""
    kept = {name: getattr(base, name) for name in base.model_fields_set}
    if own.keys() & {"token_file", "credentials"}:
        kept = {name: value for name, value in kept.items() if name not in ("token_file", "credentials")}
    if own.keys() & {"service", "services"}:
        kept = {name: value for name, value in kept.items() if name not in ("service", "services")}
    if own.get("reconnect") is False:  # how it would connect again is of no use then
        kept = {name: value for name, value in kept.items() if name not in ("reconnect_delay", "grace")}
    said = kept.get("tls", False)
    if typed:
        own = own | {"tls": typed.config(None if isinstance(said, bool) else said, "expose.tls")}
    elif own.get("tls") and said:
        own = own | {"tls": said}  # the file says how
    return type(base)(**_with_token(kept | _beside(kept, own)))


def _with_token(values: dict[str, Any]) -> dict[str, Any]:
    """The token of the environment, where nothing else is said."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token or values.get("token_file") is not None or values.get("credentials") is not None:
        return values
    try:
        token.encode()
    except UnicodeEncodeError:
        raise config_error(TOKEN_VARIABLE, "is not UTF-8", "not_text") from None
    return {**values, "credentials": {"token": token}}


def _only(path: Path, table: str) -> None:
    try:
        tables = tomllib.loads(read_whole(path)[0].decode())
    except (OSError, ValueError, RecursionError):
        return  # told by who reads it
    if unknown := set(tables) - {"tunnel", "expose"}:
        raise config_error(None, f"{path}: there is no table [{min(unknown)}]; there is [{table}]")
