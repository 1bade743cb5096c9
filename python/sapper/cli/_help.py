"""The help of a command: names of options are never cut, so that they can be copied from any terminal.

Not here: the help of groups, which have no options of their own.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from typer.core import TyperCommand

__all__ = ["Command"]

#: Names that are longer than this together with the kind of their values leave that to the text.
WIDE = 34


class Command(TyperCommand):
    """A command that shows its options in two columns, of which the first is as wide as it has to be."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints it; nothing goes to the formatter."""
        del formatter
        console = Console(highlight=False)
        console.print(f"\n[yellow]{escape(self.get_usage(ctx))}[/]\n")
        for paragraph in (self.help or "").split("\n\n"):
            console.print(" ".join(paragraph.split()) + "\n")
        for title in ("Arguments", "Options"):
            records = [
                record
                for param in self.get_params(ctx)
                if (param.param_type_name == "argument") == (title == "Arguments")
                and (record := param.get_help_record(ctx)) is not None
            ]
            if records:
                console.print(f"[bold]{title}[/]")
                console.print(Padding(_table(records), (0, 0, 1, 1)))
        if self.epilog:
            console.print(self.epilog)


def _table(records: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, overflow="ignore")
    table.add_column(overflow="fold")
    for said, help_text in records:
        name, _, kind = said.partition(" <") if len(said) > WIDE else (said, "", "")
        # What is added behind the text (a default, bounds) is no markup.
        text, _, more = help_text.rpartition("  [")
        shown = f"{text}  {escape(f'[{more}')}" if text else help_text
        table.add_row(f"[cyan]{escape(name)}[/]", (escape(f"<{kind}: ") if kind else "") + shown)
    return table
