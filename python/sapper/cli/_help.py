"""The help of a command: names of options are never cut, so that they can be copied from any terminal.

Not here: the help of groups, which have no options of their own.
"""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.core import TyperCommand

__all__ = ["Command"]

#: Names that are longer than this together with the kind of their values leave that to the text.
WIDE = 34
#: Where texts begin at the latest: longer names have a line of their own.
WIDEST = 36


class Command(TyperCommand):
    """A command that shows its options under their headings, names first, texts beside them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints it; nothing goes to the formatter."""
        del formatter
        console = Console(highlight=False)
        console.print(f"\n[yellow]{escape(self.get_usage(ctx))}[/]\n")
        for paragraph in (self.help or "").split("\n\n"):
            console.print(" ".join(paragraph.split()) + "\n")
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(record)
        for title in sorted(groups, key=lambda title: title != "Arguments"):
            console.print(f"[bold]{escape(title)}[/]")
            for line in _lines(groups[title], console):
                console.print(line)
            console.print()
        if self.epilog:
            console.print(self.epilog)


def _lines(records: list[tuple[str, str]], console: Console) -> list[Text]:
    rows = [_row(*record) for record in records]
    where = max((len(name) for name, _ in rows if len(name) <= WIDEST - 3), default=0) + 3
    lines = []
    for name, text in rows:
        told = list(Text.from_markup(text).wrap(console, console.width - where))
        for line in told:
            line.rstrip()
        first = Text(f" {name}", style="cyan")
        if len(first) >= where - 1:
            lines.append(first)
            first = Text()
        first.pad_right(where - len(first))
        lines += [first + (told[0] if told else Text())]
        lines += [Text(" " * where) + more for more in told[1:]]
    return lines


def _row(said: str, help_text: str) -> tuple[str, str]:
    said = re.sub(r"<list\[(\w+)\]>", lambda kind: f"<{kind[1].lower()}>", said)
    name, _, kind = said.partition(" <") if len(said) > WIDE else (said, "", "")
    # What is added behind the text (a default, bounds) is no markup.
    text, _, more = help_text.rpartition("  [")
    shown = f"{text}  {escape(f'[{more}')}" if text else help_text
    return name, (escape(f"<{kind}: ") if kind else "") + shown
