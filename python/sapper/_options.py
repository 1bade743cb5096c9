"""The base of every options model: frozen, typed, readable from TOML, mistakes told as ConfigError.

Not here: any option. A model says what its fields mean; this says how a wrong one is reported.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from sapper import _arguments
from sapper._files import read_whole
from sapper._mistakes import WrongTypeError, config_error, unused
from sapper.errors import ConfigError, ErrorContext

__all__ = ["Options", "config_error", "read_toml"]


def read_toml(path: Path, field: str | None = None) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        ConfigError: It cannot be read, or is no TOML; ``field`` is to blame.
    """
    try:
        return tomllib.loads(read_whole(path)[0].decode())
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", ErrorContext(field=field, errno=error.errno)
        ) from error
    except RecursionError:
        raise config_error(field, f"{path} is nested too deep") from None
    except ValueError as error:  # also bytes that are no text, and a path that holds a zero byte
        raise config_error(field, f"{path} is not TOML: {error}") from error


class Options(BaseModel):
    """A frozen set of options. Unknown names and wrong values raise ConfigError with ``.field`` set.

    The value itself is not repeated in the message: it may be a secret. What an option means is told in the
    docstring below it. Pydantic is not asked to read those: that takes a quarter of a command's start.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _first_mistake(error) from None
        for name, value in self.__dict__.items():
            _can_be_said(name, value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Looks at the names of a table inside of others before they are those of our arguments."""
        return core_schema.no_info_before_validator_function(cls._inner, handler(source))

    @staticmethod
    def _inner(given: object) -> object:
        return _named(given, None) if isinstance(given, Mapping) else given

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, checked like new ones (pydantic's own does not look at them)."""
        del deep  # nothing in it changes
        others = {} if update is None else _named(update, "update")
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | dict(others))

    def _needs(self, name: str, missing: str) -> None:
        """Refuses an option that has no use as things are. A default that is written down counts as left out.

        Args:
            name: The option.
            missing: Why it has none.

        Raises:
            ConfigError: It was said.
        """
        if getattr(self, name) != type(self).model_fields[name].default:
            raise unused(name, missing)

    def __iter__(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        """The options alone: what is derived from them and kept is none."""
        yield from ((name, getattr(self, name)) for name in type(self).model_fields)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self  # nothing in it changes

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Builds the options from a mapping with the same names.

        Raises:
            ConfigError: A name is unknown or a value wrong; ``field`` is its dotted path.
        """
        return cls(**_named(values, "values"))

    @classmethod
    def from_toml(cls, source: str | PathLike[str], *, table: str | None = None) -> Self:
        """Reads the options from a TOML file.

        Args:
            source: The file's path. Paths inside the file are relative to it.
            table: Dotted name of the table to read; ``None`` is the whole file.

        Raises:
            ConfigError: The file cannot be read, is no TOML, lacks the table, or a value is wrong;
                ``field`` is the dotted path of the mistake.
        """
        given: tuple[object, object] = (source, table)
        if not isinstance(given[0], str | PathLike) or isinstance(fspath(given[0]), bytes):
            raise config_error("source", f"must be a path, not {type(given[0]).__name__}", "wrong_type")
        if not isinstance(given[1], str | None):
            raise config_error("table", f"must be text, not {type(given[1]).__name__}", "wrong_type")
        path = Path(source)
        return cls._of_document(path, read_toml(path, table), table)

    @classmethod
    def _of_document(cls, path: Path, document: dict[str, Any], table: str | None) -> Self:
        """Reads the options from what a TOML file says."""
        values: Any = document
        for name in table.split(".") if table else ():
            values = values.get(name) if isinstance(values, dict) else None
            if values is None:
                raise config_error(table, f"{path} has no table [{table}]")
        if not isinstance(values, dict):
            raise config_error(table, f"{path}: {table} is not a table")
        return cls.from_mapping(cls._relative_to(path.parent, values))

    @classmethod
    def _relative_to(cls, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        """Makes the paths among ``values`` relative to the file's folder; models with paths override it."""
        del folder
        return values


def _named(given: object, field: str | None) -> Mapping[str, Any]:
    """Values by their names."""
    if not (isinstance(given, Mapping) and all(isinstance(name, str) for name in given)):
        raise config_error(field, "must be a mapping with text as keys", "wrong_type")
    return given


#: What pydantic calls a number, or a length, that is outside its bounds.
_OUTSIDE = re.compile("(greater|less)_than(_equal)?|finite_number|(.*_)?too_(short|long)")


def _reason(kind: str, error: object) -> str | None:
    if kind.endswith("_type") or isinstance(error, WrongTypeError):
        return "wrong_type"
    if kind == "string_unicode":
        return "not_text"
    return "out_of_range" if _OUTSIDE.fullmatch(kind) else None


#: Mistakes that pydantic tells in words of its own.
_WORDS = {
    "extra_forbidden": "there is no such option",
    "missing": "is required",
    "string_unicode": "holds a character that is none (a lone surrogate)",
}


def _can_be_said(name: str, value: object) -> None:
    """Refuses text and paths that native code cannot take: bytes of a command line need not be text."""
    if isinstance(value, str):
        if not value.isascii():
            # What is named by a path need not be UTF-8.
            if value.removeprefix("tls:").startswith("unix:"):
                _arguments.said_path(Path(value), name)
            else:
                _arguments.text(value, name)
    elif isinstance(value, Path):
        _arguments.said_path(value, name)
    elif isinstance(value, tuple):
        for number, one in enumerate(value):
            _can_be_said(name if len(value) == 1 else f"{name}.{number}", one)


def _first_mistake(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False, include_input=False, include_context=True)[0]
    inner = first.get("ctx", {}).get("error")
    where = [str(part) for part in first["loc"]]
    if isinstance(inner, ConfigError):
        if inner.field:
            where.append(inner.field)
        message, reason = inner.message, inner.reason
    else:
        message = first["msg"].removeprefix("Value error, ")
        kind_of_mistake: str = first["type"]
        reason = _reason(kind_of_mistake, inner)
        if first["type"] in ("model_type", "model_attributes_type"):
            # A class that nobody can make is not named.
            kind = str(first.get("ctx", {}).get("class_name", "_"))
            message = "must be a table" if kind.startswith("_") else f"must be a table or a {kind}"
        message = _WORDS.get(first["type"], message[:1].lower() + message[1:])
    return ConfigError(message, ErrorContext(field=".".join(where) or None, reason=reason))
