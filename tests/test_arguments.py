"""A value of a type that an option never has: a ConfigError that names the option, whatever takes it."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from typing import Any

import pytest

from sapper import tls
from sapper.errors import ConfigError
from sapper.tls.proxy_options import ProxyOptions
from sapper.tls.stream_options import ClientOptions, ServerOptions, SessionOptions
from sapper.tunnel import TunnelClient, TunnelServer
from support.bridges import PSK


class Nothing:
    """Of no type that any option has."""


def _names(call: Callable[..., Any], *without: str) -> list[str]:
    parameters = inspect.signature(call).parameters.values()
    return [
        one.name
        for one in parameters
        if one.name not in ("self", *without) and one.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def _refused(name: str, error: ConfigError) -> None:
    assert error.field is not None
    assert error.field.split(".")[0] == name, error
    assert "Nothing" in error.message or error.reason in ("wrong_type", "unused", None), error


WRONG = (Nothing(), b"bytes", 1j)


@pytest.mark.parametrize("name", ["host", "port", *ClientOptions.__annotations__])
async def test_connect(leak_check: None, name: str) -> None:
    for wrong in WRONG:
        if name == "early_data" and isinstance(wrong, bytes):
            continue
        arguments: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "credentials": PSK, name: wrong}
        with pytest.raises(ConfigError) as caught:
            await tls.connect(**arguments)
        _refused(name, caught.value)


@pytest.mark.parametrize("name", ["stream", "credentials", "initial_data", *ServerOptions.__annotations__])
async def test_start_server(leak_check: None, name: str) -> None:
    ours, theirs = socket.socketpair()
    arguments: dict[str, Any] = {"stream": ours, "credentials": PSK, name: Nothing()}
    with ours, theirs, pytest.raises(ConfigError) as caught:
        await tls.start_server(**arguments)
    _refused(name, caught.value)


@pytest.mark.parametrize("name", [*_names(tls.listen), *SessionOptions.__annotations__])
async def test_listen(leak_check: None, name: str) -> None:
    wrong: Any
    for wrong in (*WRONG, True) if name.startswith(("max_", "backlog", "unix_mode")) else WRONG:
        arguments: dict[str, Any] = {"address": ("127.0.0.1", 0), "credentials": PSK, name: wrong}
        with pytest.raises(ConfigError) as caught:
            tls.listen(**arguments)
        _refused(name, caught.value)


@pytest.mark.parametrize("host", [b"x", "\udc80", "a\0b", "two words"])
async def test_the_host_of_a_listener(leak_check: None, host: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        tls.listen((host, 0), credentials=PSK)
    assert caught.value.field == "address"


@pytest.mark.parametrize("name", _names(tls.create_bridge))
def test_create_bridge(leak_check: None, name: str) -> None:
    for wrong in WRONG:
        if name == "initial_data" and isinstance(wrong, bytes):
            continue
        ours, theirs = socket.socketpair()
        arguments: dict[str, Any] = {"socket": ours, "sink": "null:", "credentials": PSK, name: wrong}
        with ours, theirs, pytest.raises(ConfigError) as caught:
            tls.create_bridge(**arguments)
        _refused(name, caught.value)


@pytest.mark.parametrize("name", ["options", "on_event", *ProxyOptions.model_fields])
async def test_a_proxy(leak_check: None, name: str) -> None:
    ends: dict[str, Any] = {"listen": "127.0.0.1:0", "to": "127.0.0.1:1"}
    wrong: Any
    for wrong in (*WRONG, True) if name.endswith("_timeout") else WRONG:
        arguments: dict[str, Any] = {name: wrong} if name == "options" else {**ends, name: wrong}
        with pytest.raises(ConfigError) as caught:
            tls.Proxy(**arguments)
        _refused(name, caught.value)


@pytest.mark.parametrize("name", _names(TunnelServer.__init__))
def test_a_tunnels_server(leak_check: None, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TunnelServer(**{name: Nothing()})  # type: ignore[arg-type]
    _refused(name, caught.value)


@pytest.mark.parametrize("name", _names(TunnelClient.__init__))
def test_a_tunnels_client(leak_check: None, name: str) -> None:
    base: dict[str, Any] = {"tunnel_server_host": "127.0.0.1", "tunnel_server_port": 1}
    if not name.startswith(("local_service", "services")):
        base["local_service_port"] = 1
    if name == "local_service_host":
        base["local_service_port"] = 1
    if name == "server_hostname":
        base["tls"] = True
    with pytest.raises(ConfigError) as caught:
        TunnelClient(**{**base, name: Nothing()})
    _refused(name, caught.value)
