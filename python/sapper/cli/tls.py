"""``sapper tls``: what belongs to TLS and moves no bytes. Certificates for development."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from sapper.cli._help import Command
from sapper.cli._output import EXIT_CODES, write_json
from sapper.errors import SapperError
from sapper.tls.dev_cert import MOST_DAYS, make_dev_certificate, trust_steps

__all__ = ["tls"]

tls = typer.Typer(name="tls", help="Certificates for development.", no_args_is_help=True)

#: What is typed for an argument of the API.
_OPTIONS = {
    "names": "NAMES",
    "folder": "--out",
    "ca_dir": "--ca-dir",
    "days": "--days",
    "overwrite": "--force",
}


@tls.callback()
def _group() -> None:
    """Certificates for development."""


@tls.command("dev-cert", cls=Command, epilog=EXIT_CODES)
def dev_cert(
    names: Annotated[
        list[str], typer.Argument(help="DNS names (*.example.test too) and addresses, IPv4 and IPv6.")
    ],
    out: Annotated[Path, typer.Option(help="Where the certificate and its key go.")] = Path(),
    ca_dir: Annotated[
        Path | None,
        typer.Option(help="Where the authority is kept. Default: sapper/dev-ca in the user's data."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=MOST_DAYS, help="How long it is valid.")] = 397,
    new_ca: Annotated[
        bool, typer.Option("--new-ca", help="Replace the authority; it has to be trusted anew.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Make a certificate for a service under development, and say how to trust it.

    It is signed by a private authority that is made at the first call and kept on this machine. localhost
    stands for 127.0.0.1 and ::1 too. All files are readable by their owner only.
    """
    try:
        made = make_dev_certificate(
            names, folder=out, ca_dir=ca_dir, days=days, new_authority=new_ca, overwrite=force
        )
    except SapperError as error:
        field = _OPTIONS.get(error.field or "", error.field)
        raise type(error)(error.message, replace(error.context, field=field)) from None
    steps = trust_steps(made.authority.absolute())
    if as_json:
        write_json(
            {
                "certificate": str(made.chain.absolute()),
                "key": str(made.key.absolute()),
                "authority": str(made.authority.absolute()),
                "authority_made": made.authority_made,
                "names": list(made.names),
                "expires": made.expires.isoformat(),
                "trust": steps,
            }
        )
        return
    console = Console(stderr=True, highlight=False, emoji=False)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(f"[bold]certificate[/] {escape(str(made.chain))}")
    say(f"[bold]key[/]         {escape(str(made.key))}")
    say(f"[bold]for[/]         {escape(', '.join(made.names))}, until {made.expires:%Y-%m-%d}")
    new = ", new: whoever has its key can pretend to be anybody to those who trust it" * made.authority_made
    say(f"[bold]signed by[/]   {escape(str(made.authority))}{new}")
    say("\n[bold]Trust the authority[/], once, where programs have to believe the certificate:")
    for where, how in steps.items():
        say(f"  [bold]{where}[/]: {escape(how)}")
    say("\n[bold]Use it[/], for instance in front of a plain service on port 8080:")
    files = f"--cert {shlex.quote(str(made.chain))} --key {shlex.quote(str(made.key))}"
    say(escape(f"  sapper proxy localhost:8443 localhost:8080 {files}"))
    sys.stderr.flush()
