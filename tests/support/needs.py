"""What a test needs of the machine, said by ``@pytest.mark.needs("openssl", "namespaces")``.

Where it is missing the test is skipped with the reason. Where CI runs, a missing program or right is a
failure instead: a suite that skips everything is green too. Other interpreters stay skips there.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent.parent
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

# Programs in sbin are not on every user's PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def program(name: str) -> str:
    """The path of a foreign program; ends the test (skip, or failure in CI) where it is missing."""
    path = shutil.which(name, path=SEARCH_PATH)
    return path if path is not None else lacking(f"the program {name} is not installed")


def lacking(reason: str) -> NoReturn:
    """Ends a test for lack of a program or a right."""
    if IN_CI:
        pytest.fail(f"{reason}, and where CI runs it has to be there", pytrace=False)
    pytest.skip(reason)


@functools.cache
def interpreter(version: str) -> str | None:
    """The path of a CPython of at least this version (``"3.13"``, ``"3.13t"``), where one is found."""
    found = subprocess.run(
        [ROOT / "tools" / "find-python.sh", version], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def python(version: str) -> str:
    """Like :func:`interpreter`, but ends the test as skipped where there is none, in CI too."""
    path = interpreter(version)
    if path is None:
        pytest.skip(f"no CPython {version} or newer is found")
    return path


def _root() -> str | None:
    return None if os.geteuid() == 0 else "it needs root"


def _tun() -> str | None:
    reason = _root()
    if reason is None and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        reason = "it needs /dev/net/tun"
    return reason


@functools.cache
def _namespaces() -> str | None:
    reason = _root()
    if reason is not None:
        return reason
    ip = shutil.which("ip", path=SEARCH_PATH)
    if ip is None:
        return "the program ip is not installed"
    name = f"sapper-probe-{os.getpid()}"
    made = subprocess.run([ip, "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run([ip, "netns", "delete", name], check=True)
    return None


_RIGHTS: dict[str, Callable[[], str | None]] = {"root": _root, "tun": _tun, "namespaces": _namespaces}


def check(*what: str) -> None:
    """Ends the test unless all of it is there: rights by word, ``python3.13``, else programs by name."""
    for word in what:
        if word in _RIGHTS:
            reason = _RIGHTS[word]()
            if reason is not None:
                lacking(reason)
        elif word.startswith("python"):
            python(word.removeprefix("python"))
        else:
            program(word)
