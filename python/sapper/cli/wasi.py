"""``sapper wasi run``: a WebAssembly guest with what it is given, by the distribution ``sapper-wasi``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sapper._options import config_error, read_toml
from sapper.cli._help import Command
from sapper.cli._output import EXIT_CODES, write_json
from sapper.errors import SapperError
from sapper.tls import TlsConfig

if TYPE_CHECKING:
    from sapper_wasi import Result

__all__ = ["wasi"]

wasi = typer.Typer(name="wasi", help="WebAssembly guests, with TLS by the host.", no_args_is_help=True)

#: What is typed for an option of the API.
_OPTIONS = {
    "guest": "GUEST",
    "env": "--env",
    "dirs": "--dir",
    "allow_net": "--allow-net",
    "tls": "--tls",
    "handshake_timeout": "--handshake-timeout",
    "timeout": "--timeout",
    "fuel": "--fuel",
    "memory": "--memory",
}


@wasi.callback()
def _group() -> None:
    """WebAssembly guests, with TLS by the host."""


@wasi.command("run", cls=Command, epilog=EXIT_CODES)
def run(
    guest: Annotated[Path, typer.Argument(help="The component.", metavar="GUEST")],
    args: Annotated[
        list[str] | None, typer.Argument(help="Its arguments; behind -- where one begins with a dash.")
    ] = None,
    allow_net: Annotated[
        list[str] | None,
        typer.Option(
            help="Whom it may connect to: db.example.org:5432, *.example.org:443, 10.0.0.0/8:*; repeatable. "
            "Nobody without it.",
            metavar="HOST:PORT",
        ),
    ] = None,
    tls: Annotated[
        list[str] | None,
        typer.Option(
            help="TLS configuration, a TOML file, in it a table \\[tls] or the options alone; with a name "
            "(or *.name) in front for that server alone. Repeatable, the first that fits counts. The "
            "system's roots without it.",
            metavar="[NAME=]FILE",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="An environment variable; repeatable. None without it.", metavar="NAME=VALUE"),
    ] = None,
    folder: Annotated[
        list[str] | None,
        typer.Option(
            "--dir",
            help="A folder of this machine, its name there behind ::, and :rw where it may be changed. "
            "Repeatable; none without it.",
            metavar="HOST[::GUEST][:rw]",
        ),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for all of it.")] = None,
    handshake_timeout: Annotated[float, typer.Option(help="Seconds for each TLS handshake.")] = 10.0,
    fuel: Annotated[int | None, typer.Option(help="Instructions that it may run, roughly.")] = None,
    memory: Annotated[int, typer.Option(help="MiB of all its memories together.")] = 256,
    as_json: Annotated[
        bool, typer.Option("--json", help="Keep what it prints, and tell the end in one line of JSON.")
    ] = False,
) -> None:
    """Run a WebAssembly guest.

    It reads this program's standard input and writes its output; its exit code is this program's. It has
    no network, no folder and no environment but what is given to it here.
    """
    try:
        import sapper_wasi
    except ModuleNotFoundError as error:
        if error.name != "sapper_wasi":
            raise
        raise config_error(
            None, "guests need the host, a distribution of its own: pip install sapper-wasi", "not_installed"
        ) from None
    output = "capture" if as_json else "inherit"
    given: dict[str, Any] = {
        "args": tuple(args or ()),
        "env": dict(_variable(text) for text in env or ()),
        "dirs": tuple(_dir(text) for text in folder or ()),
        "allow_net": tuple(allow_net or ()),
        "tls": _tls(tls) if tls else None,
        "stdin": "inherit",
        "stdout": output,
        "stderr": output,
        "timeout": timeout,
        "handshake_timeout": handshake_timeout,
        "fuel": fuel,
        "memory": memory << 20,
    }
    try:
        done: Result = sapper_wasi.run(guest, **given)
    except SapperError as error:
        first = (error.field or "").split(".")[0]
        raise type(error)(
            error.message, replace(error.context, field=_OPTIONS.get(first, error.field))
        ) from None
    if as_json:
        write_json(
            {
                "exit_code": done.exit_code,
                "stdout": (done.stdout or b"").decode("utf-8", "replace"),
                "stderr": (done.stderr or b"").decode("utf-8", "replace"),
                "fuel": done.fuel,
            }
        )
    raise typer.Exit(done.exit_code)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise config_error("--env", f"{text!r} is not NAME=VALUE")
    return name, value


def _dir(text: str) -> dict[str, Any]:
    rest, writable = (text.removesuffix(":rw"), True) if text.endswith(":rw") else (text, False)
    host, _, guest = rest.partition("::")
    if not host:
        raise config_error("--dir", f"{text!r} is not HOST[::GUEST][:rw]")
    return {"host": host, "guest": guest or host, "writable": writable}


def _tls_file(path: Path) -> TlsConfig:
    """The options in a table [tls], as other commands have them in a file, or those of the whole file."""
    document = read_toml(path)  # once: it may be a pipe
    table = "tls" if "tls" in document else None
    if table is not None and (others := document.keys() - {table}):
        raise config_error(min(others), "stands beside the table [tls], which has all options of TLS")
    return TlsConfig._of_document(path, document, table)


def _tls(given: list[str]) -> dict[str, TlsConfig]:
    configurations: dict[str, TlsConfig] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals:
            name, file = "*", text
        if name in configurations:
            raise config_error("--tls", f"{name} has two configurations")
        try:
            configurations[name] = _tls_file(Path(file))
        except SapperError as error:
            what = f"{file}: {error.field}: {error.message}" if error.field else error.message
            raise type(error)(what, replace(error.context, field="--tls")) from None
    # A configuration for all names counts where no other does, wherever it stands.
    if "*" in configurations:
        configurations["*"] = configurations.pop("*")
    return configurations
