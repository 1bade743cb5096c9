"""``sapper version``: what is installed, for people and for bug reports."""

from __future__ import annotations

import platform
import sys
from typing import Annotated

import typer

from sapper import __version__, _native
from sapper.cli._output import write_json

__all__ = ["version"]


def version(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Print the versions of Sapper, its native module and Python."""
    values = {
        "sapper": __version__,
        "native": _native.__version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "platform": platform.platform(),
    }
    if as_json:
        write_json(values)
        return
    for name, value in values.items():
        typer.echo(f"{name:15} {value}")
