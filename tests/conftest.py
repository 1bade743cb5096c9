"""Fixtures that every test may use, and the two hooks behind them: needs, and async tests.

``async def`` tests run under ``asyncio.run``. One that takes ``any_loop`` runs twice, on asyncio's own loop
and on uvloop.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from support import needs, netns, programs
from support.certs import Certificates

pytest_plugins = ["support.hearing"]

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker that :mod:`support.needs` reads, and hears Ctrl-C.

    Whoever is started in the background by a script does not, and nor would the commands that tests start.
    """
    config.addinivalue_line(
        "markers", "needs(what, ...): programs, rights or interpreters without which it skips"
    )
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by folder, and gives what talks to real machines longer."""
    for item in items:
        for folder in ("lab", "interop"):
            if folder in item.path.parts:
                item.add_marker(getattr(pytest.mark, folder))
                if item.get_closest_marker("timeout") is None:
                    item.add_marker(pytest.mark.timeout(180))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ends a test whose needs are not met before its fixtures are made."""
    for marker in item.iter_markers("needs"):
        needs.check(*marker.args)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs ``async def`` tests."""
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    kind = pyfuncitem.funcargs.get("any_loop", "asyncio")
    arguments: dict[str, Any] = {
        name: pyfuncitem.funcargs[name] for name in inspect.signature(function).parameters
    }
    with asyncio.Runner(loop_factory=LOOPS[str(kind)], debug=False) as runner:
        try:
            runner.run(function(**arguments))
        finally:
            runner.run(_let_go())
    return True


async def _let_go() -> None:
    """Ends the connections that the test's own servers still have: they end with their loop.

    An asyncio transport that hears of its peer's end a moment too late for that complains when it is
    collected, in the middle of another test.
    """
    for transport in list(getattr(asyncio.get_running_loop(), "_transports", {}).values()):
        if transport.get_extra_info("socket").fileno() >= 0:
            transport.abort()
    await asyncio.sleep(0)


@pytest.fixture(params=list(LOOPS))
def any_loop(request: pytest.FixtureRequest) -> str:
    """The name of the event loop under the test; a test that takes it runs once on each."""
    return str(request.param)


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Throw-away certificates, good ones and each kind of bad one."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def free_port() -> Callable[..., int]:
    """Gives ports that were free a moment ago."""
    return programs.free_port


@pytest.fixture
def run_program() -> Callable[..., Any]:
    """:func:`support.programs.run_program`."""
    return programs.run_program


@pytest.fixture
def two_namespaces() -> Iterator[tuple[netns.Namespace, netns.Namespace]]:
    """Two network namespaces joined by a cable."""
    with netns.two_namespaces() as pair:
        yield pair


@pytest.fixture
def leak_check() -> Iterator[None]:
    """Fails a test that leaves a descriptor, a thread or a native task behind."""
    from support import leaks

    leaks.warm_up()
    before = leaks.Snapshot.take()
    yield
    leaks.assert_nothing_left(before)


@pytest.fixture(scope="session")
def project() -> Path:
    """The folder of the checkout."""
    return needs.ROOT


@pytest.fixture(scope="session")
def tracked_files(project: Path) -> list[Path]:
    """Every file that belongs to the project, also where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [project / line for line in listed.stdout.splitlines() if (project / line).is_file()]
    skipped = {"target", ".venv", "dist", ".git"}
    return [p for p in project.rglob("*") if p.is_file() and not skipped & set(p.relative_to(project).parts)]
