"""What certificates and keys are given as: bytes, text, the path of a file. Pins and keys as text.

A file's content keeps its path, so that a reload reads it again. Not here: what it means
(:mod:`sapper.tls.config`, and native code, which parses it).
"""

from __future__ import annotations

import base64
import binascii
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, SecretBytes, SerializeAsAny, Strict

from sapper import _arguments, _native
from sapper._files import read_whole
from sapper._mistakes import WrongTypeError

__all__ = ["FileBytes", "Material", "PskBytes", "key_in"]

#: PEM or DER: the bytes themselves, PEM text, or the path of a file.
Material = bytes | str | PathLike[str]


class FileBytes(bytes):
    """The content of a file, with its path: a reload reads it again. Equal to the same bytes without."""

    path: Path

    @classmethod
    def read(cls, path: Path) -> Self | bytes:
        """Reads a file; what a pipe gives has no path, since it gives it once.

        Raises:
            ValueError: It cannot be read.
        """
        try:
            content, regular = read_whole(_arguments.said_path(path, None))
        except OSError as error:
            raise ValueError(f"cannot read {_told(path)}: {error.strerror}") from None
        if not regular:
            return content
        self = cls(content)
        self.path = path.absolute()
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _file_bytes, (bytes(self), self.path)


def _file_bytes(content: bytes, path: Path) -> FileBytes:
    self = FileBytes(content)
    self.path = path
    return self


class PskBytes(bytes):
    """A pre-shared key, with how it was said. Equal to the same bytes without.

    Attributes:
        said: The option that it was given by: ``"identities"``, or ``"key"`` or ``"key_file"`` beside
            ``identity``.
        path: The file that it was read from, which a reload reads again.
    """

    said: Literal["identities", "key", "key_file"] = "identities"
    path: Path | None = None

    @classmethod
    def of_file(cls, path: Path) -> PskBytes:
        """Reads a file that a person named.

        Raises:
            ValueError: It cannot be read, or holds half a byte.
        """
        content = read_secret(path, "no file that can be read")
        try:
            self = cls(key_in(content))
        except ValueError as error:
            raise ValueError(f"{_told(path)}: {error}") from None
        self.said, self.path = "key_file", getattr(content, "path", None)
        return self


def _told(path: Path) -> str:
    """A path in an error, which is text though the path's bytes need not be."""
    return str(path).encode(errors="backslashreplace").decode()


def read_material(value: object) -> bytes:
    """Bytes and PEM text as they are, a path by what the file holds."""
    if isinstance(value, SecretBytes):
        value = value.get_secret_value()
    if isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str) and "-----BEGIN" in value:
        return _arguments.text(value, None).encode()
    if isinstance(value, str | PathLike):
        return FileBytes.read(Path(value))
    raise WrongTypeError(f"must be bytes, PEM text or the path of a file, not {type(value).__name__}")


def read_secret(value: object, otherwise: str = "neither PEM text nor a file that can be read") -> bytes:
    """The same of a key. A name without a dot is not repeated in an error: it may be the key itself.

    Args:
        value: The key, or where it is.
        otherwise: What such a name is not, where it cannot be read.
    """
    try:
        return read_material(value)
    except ValueError as error:
        if isinstance(value, str | PathLike) and "." not in Path(value).name:
            why = str(error).rpartition(": ")[2]
            raise ValueError(f"is {otherwise}: {why}") from None
        raise


def _read_secret_bytes(value: object) -> SecretBytes:
    return SecretBytes(read_secret(value))


def read_psk(value: object) -> SecretBytes:
    """Bytes as they are, text as hexadecimal."""
    if isinstance(value, SecretBytes):
        return value
    if isinstance(value, str):
        try:
            value = bytes.fromhex(value)
        except ValueError:
            raise ValueError("a key given as text must be hexadecimal") from None
    if not isinstance(value, bytes | bytearray | memoryview):
        raise WrongTypeError(f"must be bytes or hexadecimal text, not {type(value).__name__}")
    return SecretBytes(value if isinstance(value, bytes) else bytes(value))


def read_pin(value: object) -> object:
    """A SHA-256: 32 bytes, 64 hexadecimal digits, or base64."""
    if isinstance(value, str):
        text = value.removeprefix("sha256/").removeprefix("sha256:").replace(":", "")
        try:
            value = bytes.fromhex(text) if len(text) == 64 else base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            raise ValueError("a pin is a SHA-256 as 64 hexadecimal digits or as base64") from None
    if isinstance(value, bytes) and len(value) != 32:
        raise ValueError("a pin is the SHA-256 of a public key: 32 bytes")
    return value


def key_in(content: bytes) -> bytes:
    """The pre-shared key in a file: hexadecimal digits, otherwise the key itself.

    Raises:
        ValueError: Nothing but hexadecimal digits, and an odd number of them: one was lost.
    """
    digits = b"".join(content.split())
    if digits.strip(b"0123456789ABCDEFabcdef"):
        return content
    if len(digits) % 2:
        raise ValueError(f"{len(digits)} hexadecimal digits are no whole number of bytes")
    return bytes.fromhex(digits.decode("ascii"))


def _as_bytes(value: object) -> object:
    return _arguments.text(value, None).encode() if isinstance(value, str) else value


def _read_if_given(value: object) -> bytes | None:
    return None if value is None else read_material(value)


def as_list(value: object) -> object:
    return (value,) if isinstance(value, str | bytes) else value


def _read_roots(value: object) -> object:
    return value if value is None or value == "system" else read_material(value)


def native_material(content: bytes) -> _native.Material:
    return bytes(content), getattr(content, "path", None)


# What a plain validator made is dumped as what it is: by itself pydantic would dump it twice.
# Nothing that only looks like a truth value is taken for one.
Flag = Annotated[bool, Strict()]
Names = Annotated[tuple[str, ...], BeforeValidator(as_list)]
Content = Annotated[bytes, PlainValidator(read_material), SerializeAsAny()]
Public = Annotated[bytes, PlainValidator(read_material), SerializeAsAny(), Field(repr=False)]
Response = Annotated[bytes | None, PlainValidator(_read_if_given), SerializeAsAny(), Field(repr=False)]
Secret = Annotated[SecretBytes, PlainValidator(_read_secret_bytes), SerializeAsAny()]
PskKey = Annotated[SecretBytes, PlainValidator(read_psk), SerializeAsAny()]
Pin = Annotated[bytes, BeforeValidator(read_pin)]
Word = Annotated[bytes, BeforeValidator(_as_bytes)]
Roots = Annotated[
    Literal["system"] | bytes | None, PlainValidator(_read_roots), SerializeAsAny(), Field(repr=False)
]
