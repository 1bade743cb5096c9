"""Rules of the tree that no linter knows: who may name pyo3, and how long a file may get."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Past 600 lines look for the second room; past this many there is one.
MOST_LINES = 750


def only_the_binding_names_pyo3() -> list[str]:
    """The data plane can be used and tested without Python."""
    found = []
    for crate in ("sapper-proto", "sapper-net", "sapper-wasi"):
        for source in sorted((ROOT / "crates" / crate).rglob("*")):
            if source.suffix in (".rs", ".toml") and re.search(r"\bpyo3\b", source.read_text()):
                found.append(f"{source.relative_to(ROOT)} names pyo3: only the bindings do")
    return found


def files_are_of_readable_length() -> list[str]:
    """A file is read from top to bottom in one go."""
    found = []
    for folder, suffix in (
        ("crates", ".rs"),
        ("python", ".py"),
        ("wasi", ".py"),
        ("tests", ".py"),
        ("benches", ".py"),
    ):
        for source in sorted((ROOT / folder).rglob(f"*{suffix}")):
            lines = source.read_text().count("\n")
            if lines > MOST_LINES:
                found.append(f"{source.relative_to(ROOT)} has {lines} lines: look for the second room in it")
    return found


def main() -> int:
    """Prints what breaks a rule; 1 when anything does."""
    found = [*only_the_binding_names_pyo3(), *files_are_of_readable_length()]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
