"""``sapper bridge``: joins any two endpoints. Its work is done by :mod:`sapper.cli._run`."""

from __future__ import annotations

import asyncio
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sapper._files import read_whole
from sapper._mistakes import unused
from sapper._options import config_error
from sapper.cli._names import in_file, naming
from sapper.cli._run import Report, run
from sapper.cli._tls import TlsFlags, TypedTls, with_tls
from sapper.cli._tls_options import Role
from sapper.endpoint import Endpoint, Fd, Stdio, Tls, TlsListen, parse
from sapper.pump import Framing, PumpOptions, TapOptions, Upgrade
from sapper.tls import TlsConfig

__all__ = ["bridge"]

_WITH_TLS = "TLS (for tls: and tls-listen: endpoints)"
_PACKETS = "Packets"
_WAITING = "Waiting"
_OUTPUT = "Output"


def _tls_option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_WITH_TLS)


def _packet_option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_PACKETS)


def _waiting_option(text: str, least: float | None = None) -> Any:
    return typer.Option(help=text, rich_help_panel=_WAITING, min=least)


@with_tls
def bridge(
    first: Annotated[
        str, typer.Argument(metavar="A", help="An endpoint: tls://host:443, tun:name, stdio:, …")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="The other endpoint.")],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with the tables \\[tls] and \\[bridge]; options given here come first."),
    ] = None,
    *,
    tls: Annotated[TypedTls, TlsFlags(_WITH_TLS)],
    server_name: Annotated[str | None, _tls_option("Name to check, where it is not the host.")] = None,
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
    drain: Annotated[
        float | None, _waiting_option("Seconds that Ctrl-C gives to deliver (2).", least=0)
    ] = None,
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
    for name, said in (("--tap-filter", tap_filter), ("--tap-max-bytes", tap_max_bytes)):
        if tap is None and said is not None:
            raise unused(name, "belongs to --tap, which is not given")
    with naming():
        tap_options = TapOptions(path=tap, filter=tap_filter, max_bytes=tap_max_bytes) if tap else None
    _must_be_open(ends)
    if quiet and as_json:
        raise unused("--quiet", "programs are told everything: leave it away, or --json")
    if quiet and stats:
        raise unused("--quiet", "figures are asked for: leave it away, or --stats")
    options, in_file = _options(
        config if "bridge" in tables else None,
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
        close_timeout=drain,
        upgrade=upgrade,
        tap=tap_options,
    )
    tls_config, words = _tls(tls, config if "tls" in tables else None, ends)
    out = sys.stderr if any(isinstance(end, Stdio) for end in ends) else sys.stdout
    report = Report(out if as_json else None, quiet=quiet, interval=stats)
    places = tuple(metrics or ())
    running = run(
        ends, tls_config, server_name, options, options.close_timeout, report, places, words, in_file
    )
    code = asyncio.run(running)
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
        tables = tomllib.loads(read_whole(path)[0].decode())
    except OSError as error:
        raise config_error("--config", f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise config_error("--config", f"{path} is nested too deep") from None
    except ValueError as error:
        raise config_error("--config", f"{path} is not TOML: {error}") from None
    if unknown := set(tables) - {"tls", "bridge"}:
        raise config_error(
            "--config", f"{path}: there is no table [{min(unknown)}]; there are [tls] and [bridge]"
        )
    return tables


def _options(path: Path | None, **given: Any) -> tuple[PumpOptions, set[str]]:
    """The options of what was typed and of what a file says, and the names of those that it alone says."""
    with in_file("bridge"):
        base = PumpOptions.from_toml(path, table="bridge") if path is not None else None
    kept = {name: getattr(base, name) for name in base.model_fields_set} if base is not None else {}
    typed = {name: value for name, value in given.items() if value is not None}
    with naming():
        return PumpOptions.from_mapping({**kept, **typed}), kept.keys() - typed.keys()


def _tls(
    typed: TypedTls, path: Path | None, ends: tuple[Endpoint, Endpoint]
) -> tuple[TlsConfig | None, dict[str, str]]:
    """The configuration of what was typed and of what a file says, and the words for its options."""
    with in_file("tls"):
        base = TlsConfig.from_toml(path, table="tls") if path is not None else None
    words = typed.words()
    roles: set[Role] = {"client" for end in ends if isinstance(end, Tls)}
    roles |= {"server" for end in ends if isinstance(end, TlsListen)}
    if not roles and typed.says_anything:
        raise unused(typed.first, "needs a tls: or tls-listen: endpoint")
    if not typed or not roles:
        if base is not None and roles:
            typed.fit(base, roles, base)
        # A key of a file has no other name here.
        return base, words | {"key": "--config"} if base and base.credentials.kind == "psk" else words
    typed.fit_roles(roles, base)
    made = typed.config(base)
    typed.fit(made, roles, base)
    return made, words
