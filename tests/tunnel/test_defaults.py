"""A tunnel without options: what it has then, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sapper._options import Options
from sapper.tunnel import ClientOptions, ServerOptions, Service
from sapper.tunnel._defaults import ClientDefaults, CommonDefaults, ServerDefaults, one_service


@pytest.mark.parametrize(
    ("plain", "model"), [(ServerDefaults, ServerOptions), (ClientDefaults, ClientOptions)]
)
def test_defaults_are_those_of_the_model(plain: type[CommonDefaults], model: type[Options]) -> None:
    def values(names: list[str], options: object) -> dict[str, object]:
        found = {name: getattr(options, name) for name in names}
        return {name: value._native() if name.endswith("limits") else value for name, value in found.items()}

    made = plain()
    names = [one.name for one in fields(made)]
    assert sorted(names) == sorted(model.model_fields)
    assert values(names, made) == values(names, model())
    assert made._common() == model()._common()  # type: ignore[attr-defined]


def test_one_service_is_that_of_the_model() -> None:
    assert one_service(None, 3000, None) == Service(port=3000)._native(first=True)
    assert one_service("host", 3000, None) == Service(host="host", port=3000)._native(first=True)
    assert one_service(None, None, "/path") == Service(path=Path("/path"))._native(first=True)


def test_a_tunnel_without_options_loads_no_models() -> None:
    program = """
import sys
from sapper.tunnel import TunnelClient, TunnelServer
TunnelServer()
TunnelClient("localhost", 9000, 3000)
assert not {"pydantic", "sapper.tls", "rich"} & set(sys.modules), sorted(sys.modules)
import sapper.tunnel, sapper.tls
for module in (sapper.tunnel, sapper.tls):
    for name in module.__all__:
        assert getattr(module, name) is not None
    try:
        module.nothing
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError(module)
assert "pydantic" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
