"""A tunnel without options: what it has then, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sapper._options import Options
from sapper.testing import throwaway_certificates
from sapper.tls import TlsConfig
from sapper.tunnel import ClientOptions, Limits, ServerOptions, Service, VisitorLimits
from sapper.tunnel._defaults import ClientDefaults, CommonDefaults, ServerDefaults, one_service
from sapper.tunnel.config import ClientConfig, ServerConfig


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


def test_a_configuration_without_models_is_the_same(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    limits = Limits(total_bytes=5, visits_per_second=2.0)
    for given in (
        {"danger_allow_anonymous": True},
        {
            "token_file": token,
            "clients": ({"id": 1},),
            "client_limits": limits,
            "asked_hosts": ("127.0.0.2",),
        },
        {"token_file": token, "lease_file": tmp_path / "leases", "visitor_limits": VisitorLimits(visitors=3)},
    ):
        config = ServerConfig(**given)
        plain = config.plain()
        assert plain is not None
        assert plain.server()._values() == config.server()._values()
        assert (plain.port, plain.tls, plain.visitor_tls) == (config.port, None, None)
        for said in ({}, {"id": 1}, {"token": "secret"}, {"token": "wrong"}, {"token": 7}):
            assert plain._allows(said) == config.allows(said)
        assert "secret" not in repr(plain)
    services = (
        Service(port=3000),
        Service(path=Path("/path"), name="two", limits=limits, public_port=(5, 6)),
    )
    for one in (
        {"service": 3000, "credentials": {"token": "secret"}},
        {"service": "host:3000", "token_file": token, "lease": "mine", "reconnect": False},
        {"service": "unix:/path", "limits": limits},
        {"services": services, "send_proxy": "v1"},
    ):
        client = ClientConfig(server="[::1]:9000", **one)
        light = client.plain()
        assert light is not None
        assert light.client()._values() == client.client()._values()
        assert (light.server, light.lease, light.tls) == (client.server, client.lease, client.tls)
        assert "secret" not in repr(light)
    assert ClientConfig(server="h:1", service=1, tls=True).plain() is None
    tls = TlsConfig(credentials=throwaway_certificates("localhost").server_credentials())
    assert ServerConfig(tls=tls).plain() is None


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
