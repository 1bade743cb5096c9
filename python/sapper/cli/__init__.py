"""The command line: one file per command; each parses, calls, renders, and holds no logic.

typer, because a command is then a typed function like the rest of the package, with click's parsing
and rich's tables underneath.
"""

from __future__ import annotations

import sys

import typer

from sapper.cli._output import EXIT_CODES, fail
from sapper.cli.bridge import bridge
from sapper.cli.demo import demo
from sapper.cli.proxy import app as proxy
from sapper.cli.tls import tls
from sapper.cli.tunnel import expose, tunnel
from sapper.cli.version import version
from sapper.cli.wasi import wasi
from sapper.errors import SapperError

__all__ = ["app", "main"]

app = typer.Typer(
    name="sapper",
    help="Bridges and tunnels with a native data plane.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=EXIT_CODES)(bridge)
app.command(epilog=EXIT_CODES)(demo)
app.add_typer(proxy, name="proxy")
app.command(epilog=EXIT_CODES)(expose)
app.add_typer(tunnel, name="tunnel")
app.command()(version)
app.add_typer(tls)
app.add_typer(wasi)


def main() -> None:
    """Runs the command line; errors become a sentence on standard error and an exit code."""
    try:
        app(prog_name="sapper")
    except SapperError as error:
        sys.exit(fail(error, as_json="--json" in sys.argv))
    except KeyboardInterrupt:
        sys.exit(130)
