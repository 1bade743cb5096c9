"""What a program may do wrong with a server or a client and how it hears of that; objects that are over."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import ApiMisuseError, BindError, ConfigError, ConnectError, CredentialsRejected
from sapper.tunnel import ClientOptions, Limits, ServerOptions, Service, TunnelClient, TunnelServer, events
from sapper.tunnel.config import ClientConfig, ServerConfig
from support.tunnels import CREDENTIALS, LATEST, allow, asked, client, echo, is_let_in, listens, server, until
from support.tunnels import Service as Running


def wrong(call: Any, *args: Any, **values: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call(*args, **values)
    return caught.value


def test_what_is_looked_for_is_named() -> None:
    ours = TunnelServer()
    for tunnel in ("x", -1, True, 2**64):
        assert wrong(ours.visitors, tunnel).field == "tunnel"
    assert wrong(ours.visitors, most=-1).field == "most"
    assert wrong(ours.off, [], print).field == "name"


# -- without a filter nothing listens beyond loopback ----------------------------------------------------


BEYOND = [{"host": "0.0.0.0"}, {"visitor_host": "::"}, {"asked_hosts": ("127.0.0.2", "0.0.0.0")}]


@pytest.mark.parametrize("beyond", BEYOND)
def test_nothing_beyond_loopback_without_a_filter(beyond: dict[str, Any]) -> None:
    (field,) = beyond
    options = ServerOptions(**beyond)
    assert wrong(TunnelServer, options=options).field == field
    TunnelServer(options=options, danger_allow_anonymous=True)
    kept = TunnelServer(allow, options=options)
    assert wrong(setattr, kept, "connection_filter", None).field == field
    assert kept.connection_filter is allow, "it has the one that it had"


async def test_nor_while_it_runs(leak_check: None) -> None:
    open_to_all = TunnelServer(options=ServerOptions(asked_hosts=("127.0.0.2", "::1")))
    await open_to_all.start(0)
    try:
        beyond = ServerOptions(asked_hosts=("0.0.0.0",))
        with pytest.raises(ConfigError) as caught:
            await open_to_all.reload(beyond)
        assert caught.value.field == "asked_hosts"
        open_to_all.connection_filter = allow
        await open_to_all.reload(beyond)
        assert wrong(setattr, open_to_all, "connection_filter", None).field == "connection_filter"
        assert open_to_all.connection_filter is allow
    finally:
        await open_to_all.stop()


# -- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looks_true", ["false", 1, None])
def test_a_flag_is_true_or_false(looks_true: Any) -> None:
    assert wrong(TunnelServer, danger_allow_anonymous=looks_true).field == "danger_allow_anonymous"
    assert wrong(ClientOptions, reconnect=looks_true).field == "reconnect"


async def test_options_of_another_kind(leak_check: None) -> None:
    bad: Any
    for bad in ({}, {"host": "localhost"}, ClientOptions()):
        error = wrong(TunnelServer, options=bad)
        assert (error.field, error.reason) == ("options", "wrong_type")
    for bad in ({}, ServerOptions(), CREDENTIALS):
        error = wrong(TunnelClient, "localhost", 9000, 3000, options=bad)
        assert (error.field, error.reason) == ("options", "wrong_type")
    async with server() as ours:
        with pytest.raises(ConfigError) as caught:
            await ours.reload({})  # type: ignore[arg-type]
        assert caught.value.field == "options"


def test_fields_have_the_names_that_were_typed(tmp_path: Path) -> None:
    assert wrong(TunnelClient, "h", 9000, 3000, ca=tmp_path / "none").field == "ca"
    assert wrong(TunnelClient, "h", 9000, local_service_path="").field == "local_service_path"
    for text in ("3000@70000", "3000@1-70000", "3000@0"):
        assert wrong(Service.parse, text).field == "public_port"
    for port in ("x", [1, 2, 3], [1], True, 1.5, 0, (2, 1)):
        assert wrong(Service, port=1, public_port=port).field == "public_port"
    assert Service.from_mapping({"port": 1, "public_port": [1, 2]}).public_port == (1, 2)
    assert wrong(Service.parse, "unix:").field == "path"
    assert wrong(Service.parse, "3000@1.2.3.999:80").field == "public_host"
    assert wrong(ClientConfig, server="h:1", service="unix:").field == "service"
    given: Any = {"server": "h:1", "services": [{"port": 1, "public_port": 70_000}]}
    assert wrong(ClientConfig, **given).field == "services.0.public_port"
    assert wrong(ServerConfig, asked_hosts=["::1", "x"]).field == "asked_hosts.1"
    assert wrong(Service, port=1, public_host="\ud800").field == "public_host"


def test_a_path_that_no_unix_socket_can_have() -> None:
    for most, path in ((True, f"/{'x' * 106}"), (False, f"/{'x' * 107}"), (False, f"/{'ü' * 54}")):
        if most:
            assert Service(path=Path(path)).address == f"unix:{path}"
            TunnelClient("h", 9000, local_service_path=path)
            continue
        assert wrong(Service, path=path).field == "path"
        assert wrong(TunnelClient, "h", 9000, local_service_path=path).field == "local_service_path"
        error = wrong(ClientConfig, server="h:1", service=f"unix:{path}")
        assert (error.field, error.reason) == ("service", "out_of_range")


async def test_services_whose_names_do_not_fit_a_hello(leak_check: None) -> None:
    # Each quotation mark is two bytes of JSON.
    for sign, fits in (("n", True), ('"', False)):
        services = [Service(port=1, name=f"{sign * 125}{number}") for number in range(256)]
        tunnel = TunnelClient("127.0.0.1", 9, services=services)
        if fits:
            await tunnel.start()
            await tunnel.stop()
            continue
        with pytest.raises(ConfigError, match="shorter names") as caught:
            await tunnel.start()
        assert (caught.value.field, caught.value.reason) == ("services", "out_of_range")


async def test_a_token_that_cannot_be_read(tmp_path: Path, leak_check: None) -> None:
    token = tmp_path / "token"
    assert wrong(ServerConfig(token_file=token).server).field == "token_file"
    token.write_text(" \n")
    assert "is empty" in str(wrong(ServerConfig(token_file=token).server))
    token.write_text("knock")
    config = ServerConfig(port=0, token_file=token, host="127.0.0.1", deny_visitors=("127.0.0.9",))
    running = config.server()
    await running.start(0)
    try:
        async with Running(echo) as service:
            said = {"token": "knock"}
            async with client(running.port or 0, service.port, credentials=said) as exposed:
                other = config.model_copy(
                    update={"token_file": tmp_path / "other", "deny_visitors": ()},
                )
                with pytest.raises(ConfigError) as caught:
                    await other.reload(running)
                assert caught.value.field == "token_file"
                assert not await is_let_in(exposed.assigned_port or 0, "127.0.0.9"), "all is as it was"
            async with client(running.port or 0, service.port, credentials=said):
                pass
    finally:
        await running.stop()


async def test_leases_that_cannot_be_written(tmp_path: Path, leak_check: None) -> None:
    options = ServerOptions(host="127.0.0.1", lease_file=tmp_path / "none" / "leases")
    lost = TunnelServer(allow, options=options)
    with pytest.raises(ConfigError) as caught:
        await lost.start(0)
    assert caught.value.field == "lease_file"
    (tmp_path / "none").mkdir()
    await lost.start(0)
    await lost.stop()
    assert json.loads((tmp_path / "none" / "leases").read_text())["leases"] == []


@pytest.mark.parametrize("value", [True, "5", float("nan")], ids=str)
def test_numbers_of_seconds_are_numbers(value: Any) -> None:
    both = ("handshake_timeout", "grace")
    for kind, own in (
        (ServerOptions, ("filter_timeout", "lease_time", "linger")),
        (ClientOptions, ("dial_timeout",)),
    ):
        for name in both + own:
            assert wrong(kind, **{name: value}).field == name
    assert wrong(ServerOptions, visitor_rate=value).field == "visitor_rate"
    assert wrong(Limits, visits_per_second=value).field == "visits_per_second"
    assert wrong(ClientOptions, reconnect_delay=(value, 9)).field == "reconnect_delay.0"
    assert ServerOptions(grace=5, visitor_rate=2).grace == 5


@pytest.mark.parametrize("name", ["allow_visitors", "deny_visitors"])
def test_lists_of_visitors_are_text(name: str) -> None:
    for odd in ("\udcff", "\ud800"):
        assert wrong(ServerOptions, **{name: ["127.0.0.1", odd]}).field == f"{name}.1"
    assert wrong(ServerOptions, asked_hosts=["fe80::1%\udcff"]).field == "asked_hosts.0"


def test_paths_can_be_asked_for() -> None:
    for odd in ("/\ud800", "/\0"):
        assert wrong(ServerOptions, lease_file=odd).field == "lease_file"
        assert wrong(Service, path=odd).field == "path"
        assert wrong(TunnelClient, "localhost", 9000, local_service_path=odd).field == "local_service_path"
    # What is replaced in it would take the other bytes along.
    assert wrong(ServerOptions, lease_file="/\udcff/{port}").field == "lease_file"
    several = [Service(port=80), Service(path=Path("/\udcff"))]
    assert wrong(TunnelClient, "localhost", 9000, services=several).field == "services.1.name"


async def test_paths_of_any_bytes(tmp_path: Path, leak_check: None) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"here")
        writer.close()
        await writer.wait_closed()

    path = tmp_path / "\udcff"
    leases = tmp_path / "leases\udcff"
    running = TunnelServer(options=ServerOptions(lease_file=leases))
    service = await asyncio.start_unix_server(answer, path)
    port = await running.start(0)
    try:
        ways: list[dict[str, Any]] = [
            {"local_service_path": path},
            {"services": [Service(port=1), Service(path=path, name="named")]},
        ]
        for way in ways:
            async with asyncio.timeout(20), TunnelClient("127.0.0.1", port, **way) as exposed:
                reader, writer = await asyncio.open_connection("127.0.0.1", exposed.assigned_ports[-1])
                assert await reader.read() == b"here"
                writer.close()
                await writer.wait_closed()
    finally:
        await running.stop()
        service.close()
        await service.wait_closed()
    assert leases.exists()


@pytest.mark.parametrize("pause", [0, float("inf")], ids=str)
def test_pauses_have_an_end_and_are_some(pause: float) -> None:
    assert wrong(ClientOptions, reconnect_delay=(pause, pause)).field == "reconnect_delay.0"


@pytest.mark.parametrize("longest", [30.0, 31.0])
async def test_pauses_longer_than_a_server_waits_for_are_told(
    longest: float, caplog: pytest.LogCaptureFixture, leak_check: None
) -> None:
    for given in ({"reconnect_delay": (1.0, longest)}, {"reconnect": False}):
        waits = TunnelClient("127.0.0.1", 1, 1, options=ClientOptions(**given))
        with caplog.at_level(logging.WARNING, "sapper"):
            await waits.start()
            await asyncio.wait_for(waits.stop(), LATEST)
    assert [record.args for record in caplog.records] == [(31.0, 30.0)] * (longest > 30)


def test_names_can_be_written_down() -> None:
    assert wrong(ClientOptions, lease="\ud800").field == "lease"
    for name in ("\ud800", "two\nlines", "x" * 129):
        assert wrong(Service, port=80, name=name).field == "name"


def test_events_have_names() -> None:
    for name in ("nope", 5, ["error"], None):
        assert wrong(TunnelServer().on, name, print).field == "name"


def test_without_a_loop_it_is_said_what_is_needed() -> None:
    for one in (TunnelServer(), TunnelClient("localhost", 9000, 3000)):
        with pytest.raises(ApiMisuseError) as caught:
            one.events()
        assert "_sync" not in str(caught.value)


# -- filters ---------------------------------------------------------------------------------------------


async def test_a_filter_that_gives_no_answer_is_told_in_the_log(
    caplog: pytest.LogCaptureFixture, leak_check: None
) -> None:
    never = asyncio.Event()
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    async def slow(credentials: dict[str, Any]) -> bool:
        if "fails" in credentials:
            raise ValueError("a defect")
        return await never.wait()

    with caplog.at_level(logging.WARNING, "sapper"):
        async with server(connection_filter=slow, options={"filter_timeout": 0.1}) as ours:
            for said in ({"is": "slow"}, {"fails": True}):
                once = ClientOptions(reconnect=False)
                refused = TunnelClient("127.0.0.1", ours.port or 0, 1, said, options=once)
                with pytest.raises(ConnectError, match="could not decide"):
                    await asyncio.wait_for(refused.connect(), LATEST)
            await until(lambda: len(caplog.records) == 2, "both words of the log")
    slowly, failed = caplog.records
    assert "gave no answer within 0.1 s" in slowly.message
    assert slowly.exc_info is None
    assert failed.exc_info is not None
    assert failures == []


async def test_the_visitor_filter_sees_the_whole_tunnel(leak_check: None) -> None:
    seen: dict[events.ClientTunnel, int] = {}

    def look(tunnel: events.ClientTunnel, visitor: str) -> bool:
        del visitor
        seen[tunnel] = seen.get(tunnel, 0) + 1
        return True

    async with Running(echo) as service, server(visitor_filter=look) as ours:
        services = [Service(port=service.port), Service(port=service.port, name="two")]
        exposed = TunnelClient(
            "127.0.0.1", ours.port or 0, authentication_credentials=CREDENTIALS, services=services
        )
        async with exposed:
            first, second = exposed.assigned_ports
            for port in (second, second, first):
                assert await asked(port, b"x") == b"x"
        whole = (events.PublicService("", first), events.PublicService("two", second))
        assert [tunnel.services for tunnel in seen] == [whole, whole]
        assert {
            tunnel.tunnel_address.port: count for tunnel, count in seen.items() if tunnel.tunnel_address
        } == {
            second: 2,
            first: 1,
        }, "it keys a dict, and says where the visitor came in"
        assert all(tunnel.authentication_credentials == CREDENTIALS for tunnel in seen)


# -- those that are over, and those that failed to begin ------------------------------------------------


async def test_what_has_ended_has_no_more_events(leak_check: None) -> None:
    async with Running(echo) as service, server() as ours, client(ours.port or 0, service.port) as exposed:
        await exposed.stop()
        await ours.stop()
        for one in (ours, exposed):
            async with asyncio.timeout(LATEST):
                assert [event async for event in one.events()] == []
            with pytest.raises(ApiMisuseError):
                async with one:
                    pass


async def test_a_second_start_changes_nothing(leak_check: None) -> None:
    async with server() as ours:
        with pytest.raises(ApiMisuseError):
            await ours.start(1)
        await ours.reload(ServerOptions(host="127.0.0.1", max_services=3))
        ours.visitor_filter = lambda tunnel, visitor: True


async def test_one_that_failed_to_start_is_started_again(leak_check: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ours = TunnelServer(allow, options=ServerOptions(host="127.0.0.1"))
        with pytest.raises(BindError):
            await ours.start(port)
        failed: object = ours.error
        assert isinstance(failed, BindError)
        await asyncio.wait_for(ours.wait_closed(), LATEST)
    heard = ours.events()
    async with Running(echo) as service:
        assert await ours.start(port) == port
        assert ours.error is None
        try:
            assert isinstance(await asyncio.wait_for(anext(heard), LATEST), events.MainServerStart)
            ours.connection_filter = lambda credentials: "second" in credentials
            said = {"id": "allowed-client"}
            exposed = TunnelClient("127.0.0.1", ours.port or 0, service.port, said)
            with pytest.raises(CredentialsRejected):
                await exposed.connect()
            ours.connection_filter = allow
            async with exposed:
                assert await asked(exposed.assigned_port or 0, b"x") == b"x"
            with pytest.raises(ApiMisuseError):
                await exposed.start()
            with pytest.raises(ApiMisuseError):
                await ours.start(port)
        finally:
            await ours.stop()
    with pytest.raises(ApiMisuseError):
        await ours.start(port)


async def test_who_drops_one_ends_it(leak_check: None) -> None:
    async with Running(echo) as service:
        server = [TunnelServer(allow, options=ServerOptions(host="127.0.0.1"))]
        port = await server[0].start(0)
        client = [TunnelClient("127.0.0.1", port, service.port, CREDENTIALS)]
        await client[0].connect()
        left, gone = client[0].events(), server[0].events()
        with pytest.warns(ResourceWarning, match="unclosed TunnelClient"):
            _drop(client)
        await asyncio.wait_for(_all(left), LATEST)
        await until(lambda: server[0].status() == (), "the client's end")
        with pytest.warns(ResourceWarning, match=r"unclosed .*TunnelServer"):
            _drop(server)
        await asyncio.wait_for(_all(gone), LATEST)
        await until(lambda: not listens(port), "the server's end")


def test_who_drops_its_loop_as_well(leak_check: None) -> None:
    async def start() -> TunnelServer:
        server = TunnelServer(allow, options=ServerOptions(host="127.0.0.1"))
        await server.start(0)
        return server

    server = [asyncio.run(start())]
    port = server[0].port or 0
    assert listens(port)
    with pytest.warns(ResourceWarning, match=r"unclosed .*TunnelServer"):
        _drop(server)

    async def ends() -> None:
        await until(lambda: not listens(port), "its end")

    asyncio.run(ends())


def _drop(owner: list[Any]) -> None:
    owner.clear()
    gc.collect()


async def _all(heard: Any) -> list[events.TunnelEvent]:
    return [event async for event in heard]


def test_pauses_do_not_begin_above_the_longest() -> None:
    assert wrong(ClientOptions, reconnect_delay=(5, 1)).field == "reconnect_delay"
    ClientOptions(reconnect_delay=(5, 5))


def test_a_host_is_not_empty() -> None:
    for field in ("tunnel_server_host", "local_service_host", "server_hostname"):
        values: dict[str, Any] = {
            "tunnel_server_host": "localhost",
            "tunnel_server_port": 1,
            "local_service_port": 1,
            "tls": True,
            field: "",
        }
        assert wrong(TunnelClient, **values).field == field
    for name in ("host", "visitor_host"):
        assert wrong(ServerOptions, **{name: ""}).field == name
    assert wrong(Service, port=1, host="").field == "host"


def nested(depth: int) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for _ in range(depth):
        said = {"in": said}
    return said


@pytest.mark.parametrize("said", [[1], "text", object(), nested(100_000), {1: "a", "1": "b"}])
def test_credentials_are_a_mapping(said: Any) -> None:
    error = wrong(TunnelClient, "localhost", 1, 1, said)
    assert error.field == "authentication_credentials"
