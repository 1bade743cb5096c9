"""Every option and argument of both ends, given things of any type: it holds, or a ConfigError names it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import ClosedError, ConfigError
from sapper.tunnel import (
    ClientOptions,
    Limits,
    ServerOptions,
    Service,
    TunnelClient,
    TunnelServer,
    VisitorLimits,
)
from sapper.tunnel.config import ClientConfig, ServerConfig
from support.tunnels import LATEST, server


class Angry:
    """Does not answer."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


class Text(str):
    """Is text, and more."""

    __slots__ = ()


ENDLESS = float("inf")
HUGE = 10**400
THINGS: list[Any] = [
    *(None, True, False, 0, -1, 1.5, float("nan"), ENDLESS, HUGE, -HUGE, 2**64, 1j),
    *("", "x", "\ud800", "\0", Text("x"), b"x", b"\xff", memoryview(b"x"), Path("/\0"), Path("/x")),
    *((), [], [None], [[1]], [(1, 2)], ((1, 2), (1,)), [{1: 2}], [object()], [1, 2, 3], (1, 2), (HUGE, HUGE)),
    *(
        ["a", "b"],
        [b"x", b"y"],
        [float("nan")] * 2,
        [ENDLESS] * 2,
        range(3),
        iter([1]),
        set(),
        {1},
        frozenset(),
    ),
    *({}, {1: 2}, {None: None}, {"x": 1}, {(1,): 2}, {"\ud800": 1}, {"": 1}, {"visitors": "x"}, {"path": 1}),
    *(object(), object, Angry(), lambda: 0, ..., NotImplemented, Limits(), VisitorLimits(), Service(port=1)),
]
MODELS: dict[Any, dict[str, Any]] = {
    ServerOptions: {},
    ClientOptions: {},
    Limits: {},
    VisitorLimits: {},
    Service: {"port": 1},
    ServerConfig: {},
    ClientConfig: {"server": "localhost:1", "service": "3000"},
}
#: Two that do not go together: the other one may be to blame.
INSTEAD = {
    "path": ("port",),
    "services": ("service", "local_service_port"),
    "local_service_path": ("local_service_port",),
}


def blames(error: ConfigError, thing: object, *names: str) -> None:
    assert (error.field or "").split(".")[0] in names, (thing, error)


def held(make: Callable[..., Any], base: dict[str, Any], name: str) -> Iterator[Any]:
    """What is made of those things that may be."""
    others = INSTEAD.get(name, ())
    base = {one: value for one, value in base.items() if one not in others}
    for thing in THINGS:
        try:
            yield make(**{**base, name: thing})
        except ConfigError as error:
            blames(error, thing, name, *others)


CASES = [(model, name) for model in MODELS for name in model.model_fields]


@pytest.mark.parametrize(("model", "name"), CASES, ids=lambda one: getattr(one, "__name__", one))
async def test_an_option(model: Any, name: str, leak_check: None) -> None:
    good = list(held(model, MODELS[model], name))
    assert len(good) < len(THINGS)
    if name in ("host", "visitor_host"):
        return  # whoever has that name
    for options in good:
        end: TunnelServer | TunnelClient | None = None
        if model is ServerOptions:
            end = TunnelServer(options=options.model_copy(update={"lease_file": None}))
        elif model in (ClientOptions, Service):
            given = {"options": options} if model is ClientOptions else {"services": [options]}
            end = TunnelClient("127.0.0.1", 1, None if model is Service else 1, **given)
        try:
            if isinstance(end, TunnelServer):
                await end.start(0)
            elif end is not None:
                await end.start()
        except ConfigError as error:  # native code looks at addresses
            blames(error, options, name)
        else:
            if end is not None:
                await asyncio.wait_for(end.stop(), LATEST)


ENDS: list[tuple[Any, dict[str, Any]]] = [
    (TunnelServer, {}),
    (TunnelClient, {"tunnel_server_host": "localhost", "tunnel_server_port": 1, "local_service_port": 1}),
]


@pytest.mark.parametrize(("end", "base"), ENDS, ids=lambda one: getattr(one, "__name__", ""))
def test_an_argument(end: Any, base: dict[str, Any]) -> None:
    for name in inspect.signature(end).parameters:
        assert len(list(held(end, base, name))) < len(THINGS)


async def test_what_is_called_of_one_that_runs(leak_check: None) -> None:
    async with server() as ours:
        calls: dict[str, Callable[[Any], Any]] = {
            "options": ours.reload,
            "visitor_filter": lambda one: ours.reload(visitor_filter=one),
            "tls": lambda one: ours.reload(tls=one),
            "visitor_tls": lambda one: ours.reload(visitor_tls=one),
            "like": TunnelClient("localhost", 1, 1).reload,
            "most": lambda one: ours.visitors(most=one),
            "tunnel": ours.visitors,
            "drain": lambda one: TunnelServer().stop(drain=one),
            "port": lambda one: TunnelServer().start(one),
        }
        for name, call in calls.items():
            for thing in THINGS:
                if (name == "port" and thing == 0) or (name == "visitor_filter" and callable(thing)):
                    continue
                try:
                    done = call(thing)
                    if inspect.isawaitable(done):
                        await done
                except ConfigError as error:
                    blames(error, thing, name)
                except ClosedError:  # of one that does not run
                    continue


@pytest.mark.parametrize("model", MODELS, ids=lambda one: one.__name__)
def test_values_in_a_mapping(model: Any) -> None:
    whole = model(**MODELS[model])
    for thing in THINGS:
        for call, field in (
            (model.from_mapping, "values"),
            (lambda one: whole.model_copy(update=one), "update"),
            (model.from_toml, "source"),
        ):
            try:
                call(thing)
            except ConfigError as error:
                if not isinstance(thing, dict):
                    blames(error, thing, field, "", "service", "server", "port")
    for thing in THINGS:
        if not isinstance(thing, str):
            with pytest.raises(ConfigError):
                Service.parse(thing)
