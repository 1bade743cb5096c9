"""What each module exports is exactly what it says, and every public thing is documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import sapper

MODULES = [
    "sapper",
    *(f"sapper.{one.name}" for one in pkgutil.iter_modules(sapper.__path__)),
    "sapper.tls.config",
    "sapper.tls.credentials",
    "sapper.tls.lookup",
    "sapper.tls.material",
    "sapper.tls.reload",
    "sapper.tls.bridge",
    "sapper.tls.proxy",
    "sapper.tls.proxy_options",
    "sapper.tls.byte_stream",
    "sapper.tls.clients",
    "sapper.tls.handshake",
    "sapper.tls.listener",
    "sapper.tls.session",
    "sapper.tls.stream",
    "sapper.tls.stream_options",
    "sapper.tls.transport",
    "sapper.tunnel.client",
    "sapper.tunnel.events",
    "sapper.tunnel.hearing",
    "sapper.tunnel.options",
    "sapper.tunnel.server",
    "sapper.tunnel.status",
]
PUBLIC = [name for name in MODULES if "._" not in name]


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_exact(name: str) -> None:
    module = importlib.import_module(name)
    listed = list(module.__all__)
    assert listed == sorted(set(listed), key=listed.index), "no name twice"
    own = {
        one
        for one, value in vars(module).items()
        if not one.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == name
    }
    hidden = own - set(listed)
    # Helpers that other modules of the package import by name.
    assert hidden <= SHARED.get(name, set()), hidden
    for one in listed:
        assert hasattr(module, one)


SHARED = {
    "sapper.tls.credentials": {"Unpicklable", "not_pickled"},
    "sapper.tls.bridge": {"asked", "side", "with_protocol"},
    "sapper.tls.config": {"asks_clients"},
    "sapper.tls.material": {
        "as_list",
        "native_material",
        "read_material",
        "read_pin",
        "read_psk",
        "read_secret",
    },
    "sapper.tls.proxy_options": {"listen_values", "systemd_name"},
    "sapper.tls.session": {"describe_certificate", "extra_info"},
    "sapper.tls.stream": {"shake"},
    "sapper.tls.stream_options": {"check_connecting", "known", "pump_options"},
    "sapper.endpoint": {"check_host", "split_address", "join_address", "secure_url"},
    "sapper.pump_options": {"check_policy", "options_from", "swap_values", "tap_values"},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_thing_is_documented(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    assert module.__doc__
    for one in module.__all__:
        value = getattr(module, one)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{one}"
        if inspect.isclass(value) and value.__module__.startswith("sapper"):
            for member, what in vars(value).items():
                if not member.startswith("_") and (inspect.isfunction(what) or isinstance(what, property)):
                    assert inspect.getdoc(getattr(value, member)), f"{name}.{one}.{member}"


def test_the_top_level_is_small() -> None:
    assert sapper.__all__ == ["ErrorKind", "SapperError", "__version__"]
