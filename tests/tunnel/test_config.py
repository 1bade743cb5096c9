"""Configuration files of both ends, and clients that run by one."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import ConfigError
from sapper.testing import throwaway_certificates
from sapper.tls import TlsConfig
from sapper.tunnel import TunnelServer, events
from sapper.tunnel.config import ClientConfig, ServerConfig, read_clients
from sapper.tunnel.fleet import Fleet
from support.tunnels import LATEST, Service, asked, client, echo, is_let_in, says, until, visit

SERVER = """
[tunnel]
port = 0
host = "127.0.0.1"
public_ports = [20000, 20999]
deny_visitors = ["127.0.0.9"]
token_file = "token"
clients = [{ id = "allowed-client" }]
lease_file = "leases.json"
[tunnel.tls]
credentials = { kind = "certificate", chain = "chain.pem", key = "key.pem" }
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def certificates(folder: Path) -> Any:
    made = throwaway_certificates()
    (folder / "chain.pem").write_bytes(made.server[0])
    (folder / "key.pem").write_bytes(made.server[1])
    (folder / "ca.pem").write_bytes(made.authority)
    return made


def wrong(call: Any, *arguments: Any, **values: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **values)
    return caught.value


def test_a_server_s_file(tmp_path: Path) -> None:
    certificates(tmp_path)
    write(tmp_path, "token", "knock-knock\n")
    config = ServerConfig.from_toml(write(tmp_path, "s.toml", SERVER), table="tunnel")
    assert isinstance(config.tls, TlsConfig)
    assert config.options().public_ports == (20_000, 20_999)
    assert config.lease_file == tmp_path / "leases.json", "paths are relative to the file"
    assert config.allows({"token": "knock-knock"})
    assert config.allows({"id": "allowed-client"})
    assert not config.allows({"id": "allowed-client", "more": 1})
    assert not config.allows({"token": "knock"})
    assert not config.allows({})
    assert "allowed-client" not in repr(config)


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ("prot = 1", "prot"),
        ('port = "9000"', "port"),
        ("public_ports = [2, 1]", "public_ports"),
        ('[tunnel.tls]\nroots = "nowhere.pem"', "tls.roots"),
        ("[tunnel.tls]\nrots = 1", "tls.rots"),
        ('token_file = "x"\ndanger_allow_anonymous = true', "token_file"),
        ("clients = [1]", "clients.0"),
        ("grace = -1", "grace"),
    ],
)
def test_a_mistake_of_a_server_s_file_is_named(table: str, field: str, tmp_path: Path) -> None:
    path = write(tmp_path, "s.toml", f"[tunnel]\n{table}\n")
    assert wrong(ServerConfig.from_toml, path, table="tunnel").field == field


def test_a_client_s_file(tmp_path: Path) -> None:
    text = """
[expose]
server = "[::1]:9000"
service = "unix:/run/x"
credentials = { id = "x", n = 1 }
lease = "l"
"""
    (config,) = read_clients(write(tmp_path, "c.toml", text)).values()
    assert config.place() == ("::1", 9000)
    assert config.where() == {"local_service_path": "/run/x"}
    assert config.said() == {"id": "x", "n": 1}
    assert config.lease == "l"
    assert "id" not in repr(config)


def test_several_tunnels_share_what_is_said_above_them(tmp_path: Path) -> None:
    certificates(tmp_path)
    text = """
[expose]
server = "tunnel.example:9000"
token_file = "token"
grace = 5
[expose.tls]
roots = "ca.pem"
[expose.tunnels.web]
service = 3000
[expose.tunnels.ssh]
service = "other:22"
grace = 7.5
"""
    configs = read_clients(write(tmp_path, "c.toml", text))
    assert list(configs) == ["web", "ssh"]
    assert configs["web"].where() == {"local_service_port": 3000}
    assert configs["ssh"].where() == {"local_service_host": "other", "local_service_port": 22}
    assert [one.grace for one in configs.values()] == [5, 7.5]
    assert all(one.token_file == tmp_path / "token" for one in configs.values())
    assert all(isinstance(one.tls, TlsConfig) for one in configs.values())


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ("service = 3000", "server"),
        ('server = "nowhere"\nservice = 3000', "server"),
        ('server = "h:1"\nservice = 70000', "service"),
        ('server = "h:1"\nservice = true', "service"),
        ('server = "h:1"\nservice = "h:x"', "service"),
        ('server = "h:1"\nservice = 1\ntls = 3', "tls"),
        ('server = "h:1"\nservice = 1\nsend_proxy = "v3"', "send_proxy"),
        ('server = "h:1"\nservice = 1\ntoken_file = "x"\ncredentials = {}', "credentials"),
        ('server = "h:1"\n[expose.tunnels.web]\nservice = 1\nlaese = "x"', "tunnels.web.laese"),
        ('server = "h:1"\n[expose.tunnels.web]\nservice = 1\n[expose.tunnels.web.tls]\npins = ["x"]', None),
        ("tunnels = 1", "tunnels"),
    ],
)
def test_a_mistake_of_a_client_s_file_is_named(table: str, field: str | None, tmp_path: Path) -> None:
    error = wrong(read_clients, write(tmp_path, "c.toml", f"[expose]\n{table}\n"))
    if field is None:
        assert (error.field or "").startswith("tunnels.web.tls.pins")
    else:
        assert error.field == field


def watched(**values: Any) -> dict[str, Any]:
    """A tunnel of the original's watcher."""
    return {
        "enabled": True,
        "name": "Tunnel 1",
        "localServicePort": 8081,
        "authenticationCredentials": {"username": "user", "password": "pass"},
        "tls": {"enabled": False},
        **values,
    }


@pytest.mark.parametrize("shared", [True, False])
def test_the_original_s_watcher(shared: bool, tmp_path: Path) -> None:
    made = throwaway_certificates()
    place = {"serverHost": "localhost", "serverPort": 9000}
    tunnels = [
        watched(),
        watched(name="Tunnel 2", enabled=False),
        watched(name="Tunnel 3", tls={"enabled": True, "ca": made.authority.decode()}),
        watched(name="Tunnel 4", tls={"enabled": True, "rejectUnauthorized": False}),
        watched(name="Tunnel 5", tls={"enabled": True}),
    ]
    said = {**place, "tunnels": tunnels} if shared else [{**place, **one} for one in tunnels]
    configs = read_clients(write(tmp_path, "config.json", json.dumps(said)))
    assert list(configs) == ["Tunnel 1", "Tunnel 3", "Tunnel 4", "Tunnel 5"]
    first = configs["Tunnel 1"]
    assert first.place() == ("localhost", 9000)
    assert first.where() == {"local_service_port": 8081}
    assert first.said() == {"username": "user", "password": "pass"}
    assert first.tls is False
    third, fourth = configs["Tunnel 3"].tls, configs["Tunnel 4"].tls
    assert isinstance(third, TlsConfig)
    assert isinstance(fourth, TlsConfig)
    assert third.roots is not None
    assert (third.danger_accept_any_certificate, fourth.danger_accept_any_certificate) == (False, True)
    assert configs["Tunnel 5"].tls is True


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"tunnels": [watched()]}, "tunnels.0.serverHost"),
        ({"serverHost": "h", "tunnels": [watched()]}, "tunnels.0.serverPort"),
        ({"serverHost": "h", "serverPort": "1", "tunnels": []}, "serverPort"),
        ([watched(serverHost="h", serverPort=1), watched(serverHost="h", serverPort=1)], "tunnels.1.name"),
        ([watched(serverHost="h", serverPort=1, tls={"enabled": 1})], "tunnels.0.tls.enabled"),
        ([watched(serverHost="h", serverPort=1, tls={"enabled": True, "ca": "x"})], "tunnels.0.tls.ca"),
        ([watched(serverHost="h", serverPort=1, port=1)], "tunnels.0.port"),
        ([watched(serverHost="h", serverPort=1, localServicePort=0)], "tunnels.0.localServicePort"),
        ({"serverHost": "a b", "serverPort": 1, "tunnels": [watched()]}, "serverHost"),
        ([watched(serverHost="a b", serverPort=1)], "tunnels.0.serverHost"),
        (
            [watched(serverHost="h", serverPort=1, authenticationCredentials={"x": float("nan")})],
            "tunnels.0.authenticationCredentials",
        ),
        ({}, "tunnels"),
        (3, None),
    ],
)
def test_a_mistake_of_the_watcher_s_file_is_named(said: Any, field: str | None, tmp_path: Path) -> None:
    assert wrong(read_clients, write(tmp_path, "config.json", json.dumps(said))).field == field


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot read" in str(wrong(read_clients, tmp_path / "none.toml"))
    assert "not JSON" in str(wrong(read_clients, write(tmp_path, "x.json", "{")))
    assert "not TOML" in str(wrong(read_clients, write(tmp_path, "x.toml", "[")))
    (tmp_path / "y.toml").write_bytes(b"\xff")
    assert "no text" in str(wrong(read_clients, tmp_path / "y.toml"))


# -- what runs by it -----------------------------------------------------------------------------------


async def test_a_server_by_its_file_and_by_another(tmp_path: Path, leak_check: None) -> None:
    made = certificates(tmp_path)
    write(tmp_path, "token", "knock")
    path = write(tmp_path, "s.toml", SERVER)
    config = ServerConfig.from_toml(path, table="tunnel")
    server = config.server()
    async with Service(echo) as service:
        await server.start(config.port)
        try:
            given: dict[str, Any] = {
                "host": "localhost",
                "ca": made.authority,
                "credentials": {"token": "knock"},
            }
            async with client(server.port or 0, service.port, **given) as exposed:
                public = exposed.assigned_port or 0
                assert 20_000 <= public <= 20_999
                assert not await is_let_in(public, "127.0.0.9")
                other = SERVER.replace("127.0.0.9", "127.0.0.8")
                await ServerConfig.from_toml(write(tmp_path, "s.toml", other), table="tunnel").reload(server)
                assert await is_let_in(public, "127.0.0.9")
                assert not await is_let_in(public, "127.0.0.8")
                moved = ServerConfig.from_toml(
                    write(tmp_path, "s.toml", other.replace("port = 0", "port = 1")), table="tunnel"
                )
                with pytest.raises(ConfigError, match="while the server runs") as caught:
                    await moved.reload(server)
                assert caught.value.field == "port"
        finally:
            await server.stop()


class Heard:
    """What the clients of a fleet say."""

    def __init__(self) -> None:
        self.all: list[tuple[str, events.TunnelEvent]] = []

    def __call__(self, name: str, event: events.TunnelEvent) -> None:
        self.all.append((name, event))

    def port(self, name: str) -> int | None:
        """The public port that a client heard of last."""
        ports = [
            event.assigned_port
            for one, event in self.all
            if one == name and isinstance(event, events.AuthenticationAcknowledged)
        ]
        return ports[-1] if ports else None


async def test_clients_of_one_file_are_told_together_to_do_otherwise(leak_check: None) -> None:
    server = ServerConfig(host="127.0.0.1", clients=({"id": "x"},)).server()
    await server.start(0)
    heard = Heard()

    def config(service: Service, **values: Any) -> ClientConfig:
        given = {"reconnect_delay": (0.05, 0.2), "credentials": {"id": "x"}, **values}
        return ClientConfig(server=f"127.0.0.1:{server.port}", service=service.port, **given)

    async with Service(echo) as one, Service(echo) as two:
        fleet = Fleet({"a": config(one, lease="a"), "b": config(one, lease="b")}, heard, drain=0.0)
        await fleet.start()
        over = asyncio.create_task(fleet.wait_closed())
        try:
            await until(lambda: heard.port("a") and heard.port("b"), "both public ports")
            a, b = heard.port("a") or 0, heard.port("b") or 0
            stream = await visit(a)
            stream[1].write(b"x")
            await stream[0].readexactly(1)
            # b is gone, c is new, a has another service.
            await fleet.reload({"a": config(two, lease="a"), "c": config(one, lease="c")})
            await until(lambda: heard.port("c"), "the new one's public port")
            assert set(fleet.clients) == {"a", "c"}
            there = {a, heard.port("c")}
            # Who ends says goodbye: nobody waits for it.
            await until(lambda: {one.port for one in server.status()} == there, "b's end")
            assert await asked(a, b"y", end=False) == b"y"
            assert two.connections == 1
            stream[1].write(b"z")
            async with asyncio.timeout(LATEST):
                assert await stream[0].readexactly(1) == b"z", "no stream is cut"
            stream[1].close()
            # Another lease is another port.
            await fleet.reload({"a": config(two, lease="b")})
            await until(lambda: heard.port("a") == b, "the port of the lease")
            assert not over.done()
        finally:
            await fleet.stop()
            async with asyncio.timeout(LATEST):
                await over
            await server.stop()
    assert fleet.error is None


async def test_a_configuration_that_cannot_be_used_changes_nothing(tmp_path: Path, leak_check: None) -> None:
    server = ServerConfig(host="127.0.0.1", clients=({"id": "x"},)).server()
    await server.start(0)
    heard = Heard()
    async with Service(echo) as service:
        config = ClientConfig(
            server=f"127.0.0.1:{server.port}", service=service.port, credentials={"id": "x"}
        )
        fleet = Fleet({"a": config}, heard)
        await fleet.start()
        try:
            await until(lambda: heard.port("a"), "the public port")
            bad = config.model_copy(update={"credentials": None, "token_file": tmp_path / "none"})
            with pytest.raises(ConfigError) as caught:
                await fleet.reload({"a": bad, "b": config})
            assert caught.value.field == "token_file"
            assert set(fleet.clients) == {"a"}
        finally:
            await fleet.stop()
            await server.stop()


async def test_a_server_that_runs_does_not_let_everybody_in(leak_check: None) -> None:
    server = ServerConfig(host="127.0.0.1", clients=({"id": "x"},)).server()
    await server.start(0)
    try:
        with pytest.raises(ConfigError) as caught:
            await ServerConfig(host="127.0.0.1", port=0, danger_allow_anonymous=True).reload(server)
        assert caught.value.field == "danger_allow_anonymous"
    finally:
        await server.stop()


def client_of(server: TunnelServer, service: Service, name: str) -> ClientConfig:
    said = {"id": name}
    return ClientConfig(server=f"127.0.0.1:{server.port}", service=service.port, credentials=said)


async def test_one_that_was_refused_for_good_is_tried_again(leak_check: None) -> None:
    server = ServerConfig(host="127.0.0.1", clients=({"id": "x"},)).server()
    await server.start(0)
    heard = Heard()
    async with Service(echo) as service:
        config = functools.partial(client_of, server, service)

        fleet = Fleet({"a": config("x"), "b": config("y")}, heard)
        await fleet.start()
        try:
            await until(lambda: heard.port("a") and fleet.error, "one's port, the other's end")
            assert set(fleet.clients) == {"a"}
            await fleet.reload({"a": config("x"), "b": config("x")})
            await until(lambda: heard.port("b"), "the other's port")
            assert fleet.error is None, "it works"
        finally:
            await fleet.stop()
            await server.stop()


async def test_one_that_is_not_wanted_any_more_has_not_failed(leak_check: None) -> None:
    server = ServerConfig(host="127.0.0.1", clients=({"id": "x"},)).server()
    await server.start(0)
    heard = Heard()
    async with Service(echo) as service:
        config = functools.partial(client_of, server, service)

        fleet = Fleet({"a": config("x"), "b": config("y"), "c": config("z")}, heard)
        await fleet.start()
        try:
            await until(lambda: heard.port("a") and len(fleet.clients) == 1, "one's port, the others' end")
            await fleet.reload({"a": config("x"), "c": config("z")})
            await until(lambda: fleet.failed and fleet.failed.said() == {"id": "z"}, "the other's second end")
            await fleet.reload({"a": config("x")})
        finally:
            await fleet.stop()
            async with asyncio.timeout(LATEST):
                await fleet.wait_closed()
            await server.stop()
    assert fleet.error is None
    assert fleet.failed is None


async def test_a_stop_is_heard_by_those_that_a_reload_ends(leak_check: None) -> None:
    server = ServerConfig(host="127.0.0.1", clients=({"id": "x"},)).server()
    await server.start(0)
    heard = Heard()
    async with Service(echo) as service:
        config = ClientConfig(
            server=f"127.0.0.1:{server.port}", service=service.port, credentials={"id": "x"}
        )
        fleet = Fleet({"a": config}, heard, drain=3_600.0)
        await fleet.start()
        try:
            await until(lambda: heard.port("a"), "the public port")
            _reader, writer = stream = await visit(heard.port("a") or 0)
            await says(stream, b"x")
            changing = asyncio.create_task(fleet.reload({}))
            await until(lambda: not fleet.clients, "the beginning of its end")
            await asyncio.wait_for(fleet.stop(), LATEST)
            await asyncio.wait_for(changing, LATEST)
            writer.transport.abort()
        finally:
            await server.stop()


def test_the_watcher_s_mistakes_name_no_class_of_ours(tmp_path: Path) -> None:
    error = wrong(read_clients, write(tmp_path, "list.json", "[1]"))
    assert (error.field, error.reason) == ("tunnels.0", "wrong_type")
    assert error.message == "must be a table"
