"""``sapper tunnel serve`` and ``sapper expose``: the two ends of a tunnel on the command line."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
import shlex
import signal
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from sapper._options import config_error
from sapper.cli._names import naming
from sapper.cli._output import EXIT_CODES, error_values, write_json
from sapper.errors import SapperError

if TYPE_CHECKING:
    from sapper.tls import Credentials
    from sapper.tunnel import TunnelClient, TunnelServer
    from sapper.tunnel.events import TunnelEvent
    from sapper.tunnel.hearing import TunnelEvents

__all__ = ["TOKEN_VARIABLE", "expose", "tunnel"]

#: Where a client's token is read from: a command line is seen by every user of the machine.
TOKEN_VARIABLE = "SAPPER_TUNNEL_TOKEN"  # noqa: S105 - a name

tunnel = typer.Typer(no_args_is_help=True, help="The tunnel's server.")

_Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output, one for each event.")]


@tunnel.callback()
def _tunnel() -> None:
    """The tunnel's server."""


@tunnel.command(epilog=EXIT_CODES)
def serve(
    port: Annotated[int, typer.Option(help="The main port.", min=0, max=65_535)] = 9000,
    host: Annotated[str | None, typer.Option(help="Where it listens; every address without it.")] = None,
    visitor_host: Annotated[
        str | None, typer.Option(help="Where public ports listen; as the main port without it.")
    ] = None,
    public_ports: Annotated[
        str | None, typer.Option(help="Public ports: 20000-20999, or one.", metavar="FIRST-LAST")
    ] = None,
    cert: Annotated[Path | None, typer.Option(help="TLS at the main port: certificate chain.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    visitor_cert: Annotated[Path | None, typer.Option(help="TLS at public ports: certificate chain.")] = None,
    visitor_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
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
    state: Annotated[
        Path | None,
        typer.Option(help="Folder of the token and the leases; ~/.local/state/sapper without it."),
    ] = None,
    danger_allow_anonymous: Annotated[
        bool, typer.Option("--danger-allow-anonymous", help="No token: everybody may expose a service.")
    ] = False,
    drain: Annotated[float, typer.Option(help="Seconds that Ctrl-C gives to open streams.", min=0)] = 5.0,
    as_json: _Json = False,
) -> None:
    """Give clients public ports. The first start makes a token, and prints the client's command."""
    from sapper.tunnel import ServerOptions, TunnelServer

    folder = state if state is not None else _state_folder()
    token = None if danger_allow_anonymous else _token(folder)
    given: dict[str, Any] = {
        "host": host,
        "visitor_host": visitor_host,
        "lease_file": folder / "tunnel-leases.json",
        "allow_visitors": None if allow is None else tuple(allow),
        "deny_visitors": tuple(deny or ()),
    }
    if visitor_rate is not None:
        given["visitor_rate"] = visitor_rate
    if visitor_burst is not None:
        if visitor_rate is None:
            raise config_error("visitor-burst", "belongs to --visitor-rate, which is not given")
        given["visitor_burst"] = visitor_burst
    if public_ports is not None:
        given["public_ports"] = _range(public_ports)
    _folder(folder)

    def knows_the_token(credentials: Mapping[str, Any]) -> bool:
        said = credentials.get("token")
        return (
            token is not None and isinstance(said, str) and hmac.compare_digest(said.encode(), token.encode())
        )

    server = TunnelServer(
        None if token is None else knows_the_token,
        tls=_credentials(cert, key, "cert"),
        visitor_tls=_credentials(visitor_cert, visitor_key, "visitor-cert"),
        options=ServerOptions(**given),
        danger_allow_anonymous=danger_allow_anonymous,
    )
    with naming():
        _finish(asyncio.run(_serve(server, port, token, cert is not None, drain, as_json)))


def expose(
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="3000, host:3000, or unix:/path.")],
    to: Annotated[str, typer.Option(help="The server: host:9000.", metavar="HOST:PORT")],
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the server's token; without it {TOKEN_VARIABLE}.")
    ] = None,
    credentials: Annotated[
        Path | None, typer.Option(help="File with a JSON object to say instead of a token.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="TLS to the server.")] = False,
    ca: Annotated[
        Path | None, typer.Option(help="Whom to believe about its certificate; asks for TLS.")
    ] = None,
    server_name: Annotated[str | None, typer.Option(help="Name to check, where it is not the host.")] = None,
    danger_accept_any_certificate: Annotated[
        bool, typer.Option("--danger-accept-any-certificate", help="Believe any server.")
    ] = False,
    lease: Annotated[
        str | None, typer.Option(help="Name whose public port this client gets, at a server of sapper's.")
    ] = None,
    send_proxy: Annotated[
        Literal["v1", "v2"] | None,
        typer.Option(help="Tell the service who visits, in a PROXY header of that version."),
    ] = None,
    reconnect: Annotated[bool, typer.Option(help="Connect again when the connection is gone.")] = True,
    drain: Annotated[float, typer.Option(help="Seconds that Ctrl-C gives to open streams.", min=0)] = 5.0,
    as_json: _Json = False,
) -> None:
    """Expose a service of this machine at a public port of a server."""
    from sapper.tunnel import ClientOptions, TunnelClient

    host, port = _address(to, "to")
    where: dict[str, Any] = {}
    if service.startswith("unix:"):
        where["local_service_path"] = service.removeprefix("unix:")
    elif service.isascii() and service.isdigit():
        where["local_service_port"] = int(service)
    else:
        name, number = _address(service, "SERVICE")
        where |= {"local_service_host": name, "local_service_port": number}
    client = TunnelClient(
        host,
        port,
        authentication_credentials=_said(token_file, credentials),
        tls=tls,
        ca=ca,
        server_hostname=server_name,
        danger_accept_any_certificate=danger_accept_any_certificate,
        options=ClientOptions(reconnect=reconnect, lease=lease, send_proxy=send_proxy),
        **where,
    )
    _finish(asyncio.run(_expose(client, host, drain, as_json)))


async def _serve(
    server: TunnelServer, port: int, token: str | None, secure: bool, drain: float, as_json: bool
) -> SapperError | None:
    events = server.events()
    port = await server.start(port)
    _stop_at_signals(server, drain)
    if not as_json and token is not None:
        console = Console(stderr=True, highlight=False)
        ask_tls = " --tls" if secure else ""
        command = f"{TOKEN_VARIABLE}={shlex.quote(token)} sapper expose 3000 --to HOST:{port}{ask_tls}"
        console.print(f"A client exposes its port 3000 with:\n  {escape(command)}", soft_wrap=True)
    await _tell(events, as_json)
    return server.error


async def _expose(client: TunnelClient, host: str, drain: float, as_json: bool) -> SapperError | None:
    events = client.events()
    await client.start()
    _stop_at_signals(client, drain)
    await _tell(events, as_json, host)
    return client.error


def _stop_at_signals(ended: TunnelServer | TunnelClient, drain: float) -> None:
    """The first Ctrl-C (or SIGTERM) lets open streams end, the second ends at once."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def stop() -> None:
        tasks.append(loop.create_task(ended.stop(0.0 if tasks else drain)))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)


async def _tell(events: TunnelEvents, as_json: bool, host: str | None = None) -> None:
    console = Console(stderr=True, highlight=False)
    async for event in events:
        if as_json:
            write_json({"event": event.name, **_values(event)})
        elif (line := _line(event, host)) is not None:
            console.print(escape(line), soft_wrap=True)


def _line(event: TunnelEvent, host: str | None) -> str | None:
    from sapper.tunnel import events

    match event:
        case events.MainServerStart(port=port, secure=secure):
            return f"listening at port {port}{' with TLS' if secure else ''}"
        case events.TunnelCreated(client_tunnel=one):
            address = one.tunnel_address
            return f"client {one.id} ({one.client_address}): public port {address.port if address else '-'}"
        case events.ClientDisconnected(client_tunnel=one):
            return f"client {one.id} ({one.client_address}): gone"
        case events.ClientError(client_tunnel=one, err=err):
            return f"client {one.id} ({one.client_address}): {err}"
        case events.AuthenticationAcknowledged(assigned_port=port):
            return f"exposed at {_joined(host or '', port)}"
        case events.TunnelError(err=err):
            return f"tunnel: {err}"
        case events.TunnelReconnectQueued(timeout=pause):
            return f"connecting again in {pause:.1f} s"
        case events.ServiceError(err=err):
            return f"service: {err}"
        case _:
            return None


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _values(event: TunnelEvent) -> dict[str, Any]:
    """An event for programs, without credentials."""

    def plain(value: Any) -> Any:
        if isinstance(value, SapperError):
            return error_values(value)
        if is_dataclass(value):
            return {one.name: plain(getattr(value, one.name)) for one in fields(value) if one.repr}
        return value

    found = plain(event)
    return found if isinstance(found, dict) else {}


def _finish(error: SapperError | None) -> None:
    if error is not None:
        raise error


def _credentials(cert: Path | None, key: Path | None, name: str) -> Credentials | None:
    from sapper.tls import Credentials

    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise config_error(name, "certificate and key go together")
    return Credentials.certificate(cert, key)


def _address(text: str, name: str) -> tuple[str, int]:
    from sapper.endpoint import split_address

    try:
        return split_address(text)
    except ValueError as error:
        raise config_error(name, str(error)) from None


def _range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise config_error("public-ports", f"{text!r} is no range: write FIRST-LAST") from None


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sapper"


def _folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise config_error("state", f"cannot make {folder}: {error.strerror}") from None


def _token(folder: Path) -> str:
    """The server's token; the first start makes it."""
    path = folder / "tunnel-token"
    _folder(folder)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(path, "state")
    except OSError as error:
        raise config_error("state", f"cannot write {path}: {error.strerror}") from None
    token = secrets.token_urlsafe(24)
    with os.fdopen(descriptor, "w") as out:
        out.write(token + "\n")
    return token


def _read(path: Path, name: str) -> str:
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise config_error(name, f"cannot read {path}: {error}") from None
    if not text:
        raise config_error(name, f"{path} is empty")
    return text


def _said(token_file: Path | None, credentials: Path | None) -> dict[str, Any]:
    """What the client says of itself."""
    if credentials is not None:
        if token_file is not None:
            raise config_error("credentials", "and --token-file do not go together")
        try:
            said = json.loads(_read(credentials, "credentials"))
        except ValueError as error:
            raise config_error("credentials", f"{credentials} is not JSON: {error}") from None
        if not isinstance(said, dict):
            raise config_error("credentials", f"{credentials} holds no JSON object")
        return said
    token = _read(token_file, "token-file") if token_file is not None else os.environ.get(TOKEN_VARIABLE)
    return {} if not token else {"token": token}
