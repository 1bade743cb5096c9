"""Options as typed models: a mistake names its field, also in a TOML file, also deep inside."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest

from sapper._options import Options
from sapper.errors import ConfigError
from sapper.pump import PumpOptions, TapOptions
from sapper.tls import TlsConfig
from sapper.tls.proxy_options import ProxyOptions
from sapper.tunnel.options import ServerOptions, VisitorLimits


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"direction": "both"}, "direction"),
        ({"framing": "ipv5"}, "framing"),
        ({"max_packet": 0}, "max_packet"),
        ({"max_packet": 65_536}, "max_packet"),
        ({"records_per_write": 0}, "records_per_write"),
        ({"connect_timeout": 0}, "connect_timeout"),
        ({"idle_timeout": -1}, "idle_timeout"),
        ({"close_timeout": "soon"}, "close_timeout"),
        ({"tap": {}}, "tap.path"),
        ({"tap": {"path": "x", "snap_len": 1}}, "tap.snap_len"),
        ({"resyncs": True}, "resyncs"),
    ],
)
def test_a_mistake_names_its_field(values: dict[str, object], field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        PumpOptions.from_mapping(values)
    assert caught.value.field == field
    assert caught.value.message


def test_options_are_frozen() -> None:
    options = PumpOptions()
    with pytest.raises(pydantic.ValidationError):
        options.framing = "ip"


def test_options_come_from_a_table_of_a_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text('[my.bridge]\nframing = "ipv6"\nidle_timeout = 5\ntap = { path = "out.pcapng" }\n')
    options = PumpOptions.from_toml(file, table="my.bridge")
    assert options == PumpOptions(
        framing="ipv6", idle_timeout=5, tap=TapOptions(path=tmp_path / "out.pcapng")
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("framing = [", "not TOML"),
        ("[other]\n", r"no table \[bridge\]"),
        ("bridge = 1\n", "not a table"),
        ('[bridge]\nframing = "no"\n', "framing"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        PumpOptions.from_toml(file, table="bridge")


def test_a_missing_file_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read") as caught:
        PumpOptions.from_toml(tmp_path / "none.toml")
    assert caught.value.errno == 2


def documented(model: type[Options]) -> set[str]:
    """The attributes of a class, its bases' too, that have a docstring below them."""
    names = set()
    for kind in model.__mro__[: model.__mro__.index(Options)]:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        names |= {
            field.target.id
            for field, below in itertools.pairwise(tree.body)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        }
    return names


def kinds_of(model: type[Options]) -> Iterator[type[Options]]:
    for kind in model.__subclasses__():
        yield kind
        yield from kinds_of(kind)


def test_every_option_is_documented() -> None:
    public = re.compile(r"sapper\..*\.[A-Z]\w*")
    kinds = [kind for kind in kinds_of(Options) if public.fullmatch(f"{kind.__module__}.{kind.__name__}")]
    assert {PumpOptions, TlsConfig, ProxyOptions, ServerOptions, VisitorLimits} <= set(kinds)
    undocumented: set[str] = set()
    for kind in kinds:
        # Of the credentials: which of its kinds a table means.
        names = set(kind.model_fields) - documented(kind) - {"kind"}
        undocumented |= {f"{kind.__name__}.{name}" for name in names}
    assert undocumented == set()
