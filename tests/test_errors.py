"""The catalogue of errors: every kind has its class, its codes, and survives what exceptions go through."""

from __future__ import annotations

import copy
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapper import _native, errors
from sapper.errors import ApiMisuseError, ConfigError, ErrorContext, ErrorKind, SapperError, error_class
from sapper.pump import PumpOptions
from sapper.tls import Credentials, TlsConfig, create_bridge
from support.certs import Certificates

CONTEXT = ErrorContext(
    field="sink",
    phase="transfer",
    direction="encapsulate",
    alert=48,
    alert_received=True,
    errno=32,
    reason="word",
)


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_has_a_class_and_codes(kind: ErrorKind) -> None:
    error = error_class(kind)("something happened", CONTEXT)
    assert error.kind is kind
    assert error.retryable is kind.retryable
    assert 1 < kind.exit_code < 126
    assert 400 <= kind.http_status < 600
    assert (error.field, error.phase, error.direction, error.reason) == (
        "sink",
        "transfer",
        "encapsulate",
        "word",
    )
    assert error.errno == 32
    assert str(error) == "sink: something happened"
    assert error.message == "something happened"
    assert type(error).__name__ in errors.__all__


@pytest.mark.parametrize("kind", ErrorKind)
def test_errors_can_be_pickled_and_copied(kind: ErrorKind) -> None:
    error = error_class(kind)("text", CONTEXT)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert (other.message, other.context) == ("text", CONTEXT)


def test_the_kinds_are_those_of_the_native_code() -> None:
    assert [(kind.value, kind.retryable) for kind in ErrorKind] == _native.error_kinds()


def test_each_class_is_also_what_python_calls_it() -> None:
    pairs = {
        errors.ConfigError: ValueError,
        errors.ApiMisuseError: RuntimeError,
        errors.ResourceError: OSError,
        errors.TransportError: ConnectionError,
        errors.DeadlineError: TimeoutError,
    }
    for kind in ErrorKind:
        found = error_class(kind)
        assert issubclass(found, SapperError)
        for ours, builtin in pairs.items():
            assert issubclass(found, builtin) == issubclass(found, (ours, *_also(builtin)))


def _also(builtin: type[Exception]) -> tuple[type[Exception], ...]:
    """Ours that Python counts among `builtin` too: connection and time-out errors are OSErrors."""
    return (errors.TransportError, errors.DeadlineError) if builtin is OSError else ()


def test_the_tree_of_the_docstring_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line)
        if match is None or match[2] not in errors.__all__:
            continue
        depth = len(match[1]) // 3
        path[depth:] = [match[2]]
        drawn[match[2]] = path[depth - 1] if depth else "Exception"
    real = {
        name: next(
            base.__name__ for base in one.__bases__ if issubclass(base, SapperError) or base is Exception
        )
        for name in errors.__all__
        if isinstance(one := getattr(errors, name), type) and issubclass(one, SapperError)
    }
    assert drawn == real


def test_alerts_have_names() -> None:
    assert errors.TlsError("x", ErrorContext(alert=48)).alert_name == "unknown_ca"
    assert errors.TlsError("x", ErrorContext(alert=250)).alert_name == "alert 250"
    assert errors.TlsError("x").alert_name is None


def test_a_remote_error_keeps_its_code_and_data() -> None:
    error = errors.RemoteError("no", code=7, data={"a": 1})
    other = pickle.loads(pickle.dumps(error))
    assert (other.code, other.data, other.message) == (7, {"a": 1}, "no")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_kind"):
        error_class("no_such_kind")


def test_reasons_of_the_docs_are_given(certs: Certificates) -> None:
    """Words that docs/errors.md promises, for what is most easily said wrong."""
    other = certs.client.key_path
    cases: list[tuple[Callable[[], object], str, str | None]] = [
        (lambda: PumpOptions(max_packet=0), "max_packet", "out_of_range"),
        (lambda: PumpOptions(max_packet=70_000), "max_packet", "out_of_range"),
        (lambda: PumpOptions(idle_timeout=-1.0), "idle_timeout", "out_of_range"),
        (lambda: PumpOptions(records_per_write=1_000), "records_per_write", "out_of_range"),
        (lambda: PumpOptions(tap={"path": "x", "snap_len": 1}), "tap.snap_len", "out_of_range"),  # type: ignore[arg-type]
        (lambda: PumpOptions(max_packet="5"), "max_packet", "wrong_type"),  # type: ignore[arg-type]
        (lambda: TlsConfig(ticket_lifetime=1e9), "ticket_lifetime", "out_of_range"),
        (lambda: TlsConfig(danger_early_data=-1), "danger_early_data", "out_of_range"),
        (lambda: Credentials.psk("x", 5), "key", "wrong_type"),  # type: ignore[arg-type]
        (lambda: Credentials.certificate(5, other), "chain", "wrong_type"),  # type: ignore[arg-type]
        (
            lambda: TlsConfig(credentials=Credentials.certificate(certs.server.cert_path, other)),
            "credentials.key",
            None,
        ),
    ]
    for make, field, reason in cases:
        with pytest.raises(ConfigError) as caught:
            make()
        assert (caught.value.field, caught.value.reason) == (field, reason), caught.value


async def test_reasons_of_the_docs_are_given_by_a_bridge(tmp_path: Path) -> None:
    given: dict[str, Any] = {"sink": "counter:", "credentials": Credentials.psk("x", bytes(16))}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        for framing in (None, "ipv4"):
            with pytest.raises(ConfigError) as wrong:
                create_bridge(socket=ours.fileno(), framing=framing, **given)
            assert (wrong.value.field, wrong.value.reason) == ("socket", "packets")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(ConfigError) as wrong:
            create_bridge(socket=ours, framing="ipv4", tap={"path": tmp_path / "t", "filter": "foo"}, **given)
        assert wrong.value.field == "tap.filter"
        async with create_bridge(socket=ours, framing="ipv4", **given) as bridge:
            with pytest.raises(ConfigError) as wrong:
                await bridge.tap(tmp_path / "t", filter="foo")
            assert wrong.value.field == "filter"
            with pytest.raises(ConfigError) as wrong:
                await bridge.export_keying_material("x" * 300, 16)
            assert (wrong.value.field, wrong.value.reason) == ("label", "out_of_range")
            bridge.start()
            with pytest.raises(ApiMisuseError) as again:
                bridge.start()
            assert again.value.reason == "started"
            await bridge.stop()
