"""Rules of the tree that no linter knows: which crate may depend on what, and how long a file may get."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# `sapper-proto` is pure: no sockets, no async, no clock, no randomness of its own. So nothing that brings
# them may be below it.
IMPURE = re.compile(
    r"^(tokio|mio|async-.*|futures.*|socket2|libc|nix|rustix|rand|getrandom|fastrand|openssl.*|rustls.*|aws-lc-.*"
    r"|chrono|time|tun-rs|quinn-udp|pyo3.*|tracing.*)$"
)

# Past 600 lines look for the second room; past this many there is one.
MOST_LINES = 750


def proto_is_pure() -> list[str]:
    """Looks through everything that `sapper-proto` is built from."""
    tree = subprocess.run(
        ["cargo", "tree", "--package", "sapper-proto", "--edges", "normal", "--prefix", "none"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    crates = {line.split()[0] for line in tree.stdout.splitlines() if line.strip()}
    return [
        f"sapper-proto depends on {crate}: it has to stay pure" for crate in crates if IMPURE.match(crate)
    ]


def only_the_binding_names_pyo3() -> list[str]:
    """The data plane can be used and tested without Python."""
    found = []
    for crate in ("sapper-proto", "sapper-net"):
        for source in sorted((ROOT / "crates" / crate).rglob("*")):
            if source.suffix in (".rs", ".toml") and re.search(r"\bpyo3\b", source.read_text()):
                found.append(f"{source.relative_to(ROOT)} names pyo3: only sapper-py does")
    return found


def files_are_of_readable_length() -> list[str]:
    """A file is read from top to bottom in one go."""
    found = []
    for folder, suffix in (("crates", ".rs"), ("python", ".py"), ("tests", ".py"), ("benches", ".py")):
        for source in sorted((ROOT / folder).rglob(f"*{suffix}")):
            lines = source.read_text().count("\n")
            if lines > MOST_LINES:
                found.append(f"{source.relative_to(ROOT)} has {lines} lines: look for the second room in it")
    return found


def main() -> int:
    """Prints what breaks a rule; 1 when anything does."""
    found = [*proto_is_pure(), *only_the_binding_names_pyo3(), *files_are_of_readable_length()]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
