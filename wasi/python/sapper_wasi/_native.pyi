# What crosses, and as what. The module converts; nothing is decided there.

from pathlib import Path
from typing import Literal, TypeAlias, TypedDict, final

from sapper._native import TlsDict
from sapper.errors import SapperError

__version__: str

class RunDict(TypedDict):
    args: list[str]
    env: list[tuple[str, str]]
    stdin: bytes | None
    stdout: str
    stderr: str
    capture: int
    dirs: list[tuple[Path, str, bool]]
    allow_net: list[str]
    tls: list[tuple[str, TlsConfig]]
    handshake_timeout: float
    timeout: float | None
    fuel: int | None
    memory: int

Report: TypeAlias = tuple[
    Literal["exited", "trapped", "cancelled", "stopped"],
    int | None,
    str | SapperError | None,
    bytes | None,
    bytes | None,
    int | None,
]

@final
class TlsConfig:
    def __new__(cls, options: TlsDict) -> TlsConfig: ...
    def reload(self) -> bool: ...

def take_log(
    last: bool,
) -> tuple[list[tuple[bool, str, str, dict[str, str], int, str, int, str, float]], int]: ...

@final
class LogWaits:
    def __new__(cls) -> LogWaits: ...
    def fileno(self) -> int: ...
    def clear(self) -> None: ...

@final
class Guest:
    def __new__(cls, bytes: bytes) -> Guest: ...
    @property
    def wasi(self) -> str: ...

@final
class Run:
    def __new__(cls, guest: Guest, options: RunDict) -> Run: ...
    def fileno(self) -> int: ...
    def cancel(self) -> None: ...
    def wait(self, log: LogWaits) -> bool: ...
    def report(self) -> Report | None: ...
