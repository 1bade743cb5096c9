"""The catalogue of errors: every kind has its class, its codes, and survives what exceptions go through."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from sapper import _native, errors
from sapper.errors import ErrorContext, ErrorKind, SapperError, error_class

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
