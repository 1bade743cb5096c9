"""Fixtures of the tests of guests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.wasi import guest


@pytest.fixture(scope="session")
def p2() -> Any:
    """The probe of WASI 0.2, compiled."""
    path = guest("probe_p2")
    import sapper_wasi

    return sapper_wasi.Guest(path)


@pytest.fixture(scope="session")
def p3() -> Any:
    """The probe of WASI 0.3, compiled."""
    path = guest("probe_p3")
    import sapper_wasi

    return sapper_wasi.Guest(path)


@pytest.fixture
def lines() -> Callable[..., list[str]]:
    """Runs a probe and gives the lines that it says."""

    def run(program: Any, *args: object, **options: Any) -> list[str]:
        import sapper_wasi

        done = sapper_wasi.run(program, args=[str(one) for one in args], timeout=30.0, **options)
        assert done.exit_code == 0, done
        return (done.stdout or b"").decode().splitlines()

    return run
