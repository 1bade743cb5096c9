# ruff: noqa: N818 - the names are those of the design: a ConnectionLost reads better than ...LostError
"""Every exception that Sapper raises, and the one table behind them.

::

    SapperError                                 .kind  .retryable  .context
    ├─ ConfigError (ValueError)                 before any I/O; names the field
    ├─ ApiMisuseError (RuntimeError)            a call that the object's state does not allow
    │  ├─ ClosedError                           the object is closed
    │  ├─ BusyError                             the same operation is already under way
    │  └─ NotStartedError                       it must be started first
    ├─ ResourceError (OSError)                  the system refused something local
    │  ├─ BindError                             a local address cannot be bound
    │  ├─ DeviceError                           a device or descriptor cannot be used
    │  ├─ PermissionRequired                    the process lacks a right
    │  └─ ResourceLimit                         descriptors, memory or a configured limit
    ├─ TransportError (ConnectionError)         the way to the peer
    │  ├─ ConnectError                          refused, or could not be made
    │  ├─ ConnectionLost                        an established connection broke
    │  └─ Unreachable                           no route; .reason says why
    ├─ DeadlineError (TimeoutError)             something took too long
    │  ├─ ConnectDeadline
    │  ├─ HandshakeDeadline
    │  ├─ IdleDeadline
    │  ├─ CloseDeadline
    │  └─ RpcDeadline
    ├─ ProtocolError
    │  ├─ LocalProtocolError                    we broke the protocol (a defect)
    │  ├─ RemoteProtocolError                   the peer broke it
    │  └─ IncompatiblePeer                      the peer speaks something else
    ├─ TlsError                                 .phase  .direction  .alert
    │  └─ CertificateError                      .reason: "expired", "wrong_name", …
    ├─ AuthenticationError
    │  ├─ CredentialsRejected                   the peer refused ours, or we its
    │  └─ UnknownPeer
    ├─ AuthorizationError
    │  ├─ AclDenied
    │  └─ PolicyDenied                          a rule or policy said no, or nothing in time
    ├─ RpcError
    │  ├─ RemoteError                           the peer's method failed; .code  .data
    │  └─ MethodNotFound
    └─ RegistryError
       ├─ NotFound
       ├─ Conflict
       └─ MigrationRequired

Input from a peer raises only Remote-, Incompatible-, Tls-, Authentication- errors. The end of a
stream, cancellation and dropped packets are no errors. Classes that stand for no kind of their own
(``ResourceError``, ``TransportError``, …) are there to be caught; nothing raises them.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

__all__ = [
    "AclDenied",
    "ApiMisuseError",
    "AuthenticationError",
    "AuthorizationError",
    "BindError",
    "BusyError",
    "CertificateError",
    "CloseDeadline",
    "ClosedError",
    "ConfigError",
    "Conflict",
    "ConnectDeadline",
    "ConnectError",
    "ConnectionLost",
    "CredentialsRejected",
    "DeadlineError",
    "DeviceError",
    "ErrorContext",
    "ErrorKind",
    "HandshakeDeadline",
    "IdleDeadline",
    "IncompatiblePeer",
    "LocalProtocolError",
    "MethodNotFound",
    "MigrationRequired",
    "NotFound",
    "NotStartedError",
    "PermissionRequired",
    "PolicyDenied",
    "ProtocolError",
    "RegistryError",
    "RemoteError",
    "RemoteProtocolError",
    "ResourceError",
    "ResourceLimit",
    "RpcDeadline",
    "RpcError",
    "SapperError",
    "TlsError",
    "TransportError",
    "UnknownPeer",
    "Unreachable",
    "error_class",
]

Phase = Literal["connect", "handshake", "transfer", "close"]
Direction = Literal["encapsulate", "decapsulate"]


class ErrorKind(StrEnum):
    """What went wrong, one word for all layers; the same words as in the native code."""

    CONFIG = "config"
    API_MISUSE = "api_misuse"
    CLOSED = "closed"
    BUSY = "busy"
    NOT_STARTED = "not_started"
    BIND = "bind"
    DEVICE = "device"
    PERMISSION_REQUIRED = "permission_required"
    RESOURCE_LIMIT = "resource_limit"
    CONNECT = "connect"
    CONNECTION_LOST = "connection_lost"
    UNREACHABLE = "unreachable"
    CONNECT_DEADLINE = "connect_deadline"
    HANDSHAKE_DEADLINE = "handshake_deadline"
    IDLE_DEADLINE = "idle_deadline"
    CLOSE_DEADLINE = "close_deadline"
    RPC_DEADLINE = "rpc_deadline"
    LOCAL_PROTOCOL = "local_protocol"
    REMOTE_PROTOCOL = "remote_protocol"
    INCOMPATIBLE_PEER = "incompatible_peer"
    TLS = "tls"
    CERTIFICATE = "certificate"
    CREDENTIALS_REJECTED = "credentials_rejected"
    UNKNOWN_PEER = "unknown_peer"
    ACL_DENIED = "acl_denied"
    POLICY_DENIED = "policy_denied"
    REMOTE_CALL = "remote_call"
    METHOD_NOT_FOUND = "method_not_found"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    MIGRATION_REQUIRED = "migration_required"

    @property
    def exit_code(self) -> int:
        """The command line's exit code: one number per branch of the tree."""
        return _FACTS[self].exit_code

    @property
    def http_status(self) -> int:
        """The status with which an HTTP interface answers."""
        return _FACTS[self].http_status

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later with nothing changed on this side."""
        return _FACTS[self].retryable


@dataclass(frozen=True, slots=True)
class _Facts:
    exit_code: int
    http_status: int
    retryable: bool


_FACTS: Mapping[ErrorKind, _Facts] = MappingProxyType(
    {
        ErrorKind.CONFIG: _Facts(2, 422, retryable=False),
        ErrorKind.API_MISUSE: _Facts(3, 409, retryable=False),
        ErrorKind.CLOSED: _Facts(3, 410, retryable=False),
        ErrorKind.BUSY: _Facts(3, 409, retryable=True),
        ErrorKind.NOT_STARTED: _Facts(3, 409, retryable=False),
        ErrorKind.BIND: _Facts(4, 503, retryable=True),
        ErrorKind.DEVICE: _Facts(4, 500, retryable=False),
        ErrorKind.PERMISSION_REQUIRED: _Facts(13, 500, retryable=False),
        ErrorKind.RESOURCE_LIMIT: _Facts(4, 503, retryable=True),
        ErrorKind.CONNECT: _Facts(5, 502, retryable=True),
        ErrorKind.CONNECTION_LOST: _Facts(5, 502, retryable=True),
        ErrorKind.UNREACHABLE: _Facts(5, 502, retryable=True),
        ErrorKind.CONNECT_DEADLINE: _Facts(6, 504, retryable=True),
        ErrorKind.HANDSHAKE_DEADLINE: _Facts(6, 504, retryable=True),
        ErrorKind.IDLE_DEADLINE: _Facts(6, 504, retryable=True),
        ErrorKind.CLOSE_DEADLINE: _Facts(6, 504, retryable=False),
        ErrorKind.RPC_DEADLINE: _Facts(6, 504, retryable=True),
        ErrorKind.LOCAL_PROTOCOL: _Facts(7, 500, retryable=False),
        ErrorKind.REMOTE_PROTOCOL: _Facts(7, 502, retryable=False),
        ErrorKind.INCOMPATIBLE_PEER: _Facts(7, 502, retryable=False),
        ErrorKind.TLS: _Facts(8, 502, retryable=False),
        ErrorKind.CERTIFICATE: _Facts(8, 502, retryable=False),
        ErrorKind.CREDENTIALS_REJECTED: _Facts(9, 401, retryable=False),
        ErrorKind.UNKNOWN_PEER: _Facts(9, 401, retryable=False),
        ErrorKind.ACL_DENIED: _Facts(10, 403, retryable=False),
        ErrorKind.POLICY_DENIED: _Facts(10, 403, retryable=False),
        ErrorKind.REMOTE_CALL: _Facts(11, 502, retryable=False),
        ErrorKind.METHOD_NOT_FOUND: _Facts(11, 501, retryable=False),
        ErrorKind.NOT_FOUND: _Facts(12, 404, retryable=False),
        ErrorKind.CONFLICT: _Facts(12, 409, retryable=False),
        ErrorKind.MIGRATION_REQUIRED: _Facts(12, 503, retryable=False),
    }
)


@dataclass(frozen=True, slots=True)
class ErrorContext:
    """Where an error happened and what the system or the peer said about it.

    Attributes:
        field: The option or argument to blame, by its name in the public API.
        phase: ``"connect"``, ``"handshake"``, ``"transfer"`` or ``"close"``.
        direction: ``"encapsulate"`` (to the network) or ``"decapsulate"`` (from it).
        alert: Number of the TLS alert that was sent or received (RFC 8446, section 6).
        alert_received: Whether the peer sent that alert; otherwise we did.
        errno: The system's error number.
        reason: A closed word for the reason within the kind: ``"expired"``, ``"forked"``, …
    """

    field: str | None = None
    phase: Phase | None = None
    direction: Direction | None = None
    alert: int | None = None
    alert_received: bool = False
    errno: int | None = None
    reason: str | None = None


_CLASSES: dict[ErrorKind, type[SapperError]] = {}
_NO_CONTEXT = ErrorContext()


class SapperError(Exception):
    """The root. Everything that Sapper raises on purpose is one of its subclasses.

    Attributes:
        kind: What went wrong, as a word for programs.
        context: Where, and what the system or the peer said.
        errno: The system's error number, where there is one.
    """

    kind: ClassVar[ErrorKind]
    context: ErrorContext
    errno: int | None

    def __init_subclass__(cls, *, kind: ErrorKind | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
            _CLASSES[kind] = cls

    def __init__(self, message: str = "", context: ErrorContext = _NO_CONTEXT) -> None:
        super().__init__(message)
        self.context = context
        self.errno = context.errno

    @property
    def message(self) -> str:
        """The sentence for people, without the field's name."""
        return str(self.args[0]) if self.args else ""

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later with nothing changed on this side."""
        return self.kind.retryable

    @property
    def field(self) -> str | None:
        """The option or argument to blame."""
        return self.context.field

    @property
    def phase(self) -> Phase | None:
        """The phase in which it happened."""
        return self.context.phase

    @property
    def direction(self) -> Direction | None:
        """The direction that broke."""
        return self.context.direction

    @property
    def reason(self) -> str | None:
        """The reason within the kind, as a word for programs."""
        return self.context.reason

    def __str__(self) -> str:
        return f"{self.context.field}: {self.message}" if self.context.field else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.context)


class ConfigError(SapperError, ValueError, kind=ErrorKind.CONFIG):
    """An option is wrong. Nothing was done yet and nothing was taken; :attr:`field` names the option."""


class ApiMisuseError(SapperError, RuntimeError, kind=ErrorKind.API_MISUSE):
    """A call that the object's state does not allow."""


class ClosedError(ApiMisuseError, kind=ErrorKind.CLOSED):
    """The object was closed before the call."""


class BusyError(ApiMisuseError, kind=ErrorKind.BUSY):
    """The same operation is already under way."""


class NotStartedError(ApiMisuseError, kind=ErrorKind.NOT_STARTED):
    """The object must be started first."""


class ResourceError(SapperError, OSError):
    """The system refused something local."""


class BindError(ResourceError, kind=ErrorKind.BIND):
    """A local address cannot be bound."""


class DeviceError(ResourceError, kind=ErrorKind.DEVICE):
    """A device or a descriptor cannot be used."""


class PermissionRequired(ResourceError, kind=ErrorKind.PERMISSION_REQUIRED):
    """The process lacks a right; the message names it."""


class ResourceLimit(ResourceError, kind=ErrorKind.RESOURCE_LIMIT):
    """The table of descriptors, memory or a configured limit is exhausted."""


class TransportError(SapperError, ConnectionError):
    """The way to the peer is not there, or no longer."""


class ConnectError(TransportError, kind=ErrorKind.CONNECT):
    """A connection was refused or could not be made."""


class ConnectionLost(TransportError, kind=ErrorKind.CONNECTION_LOST):
    """An established connection broke."""


class Unreachable(TransportError, kind=ErrorKind.UNREACHABLE):
    """No route, or no way to the peer; :attr:`why` says which."""

    @property
    def why(self) -> str | None:
        """The same as :attr:`reason`."""
        return self.context.reason


class DeadlineError(SapperError, TimeoutError):
    """Something took longer than it may."""


class ConnectDeadline(DeadlineError, kind=ErrorKind.CONNECT_DEADLINE):
    """Connecting took too long."""


class HandshakeDeadline(DeadlineError, kind=ErrorKind.HANDSHAKE_DEADLINE):
    """The handshake took too long."""


class IdleDeadline(DeadlineError, kind=ErrorKind.IDLE_DEADLINE):
    """Nothing moved for too long."""


class CloseDeadline(DeadlineError, kind=ErrorKind.CLOSE_DEADLINE):
    """An orderly close took too long; what was not delivered is lost."""


class RpcDeadline(DeadlineError, kind=ErrorKind.RPC_DEADLINE):
    """A remote call took too long."""


class ProtocolError(SapperError):
    """Somebody broke the protocol."""


class LocalProtocolError(ProtocolError, kind=ErrorKind.LOCAL_PROTOCOL):
    """We did: a defect of Sapper, worth a report."""


class RemoteProtocolError(ProtocolError, kind=ErrorKind.REMOTE_PROTOCOL):
    """The peer did."""


class IncompatiblePeer(ProtocolError, kind=ErrorKind.INCOMPATIBLE_PEER):
    """The peer speaks something else: plain text, another protocol, another version."""


class TlsError(SapperError, kind=ErrorKind.TLS):
    """TLS failed."""

    @property
    def alert(self) -> int | None:
        """Number of the TLS alert that was sent or received."""
        return self.context.alert

    @property
    def alert_name(self) -> str | None:
        """The alert's name as in RFC 8446, section 6: ``"handshake_failure"``."""
        if self.context.alert is None:
            return None
        try:
            return ssl.AlertDescription(self.context.alert).name.removeprefix("ALERT_DESCRIPTION_").lower()
        except ValueError:
            return f"alert {self.context.alert}"


class CertificateError(TlsError, kind=ErrorKind.CERTIFICATE):
    """The peer's certificate is not acceptable; :attr:`reason` says why: ``"expired"``."""


class AuthenticationError(SapperError):
    """Who the peer says it is, or who we say we are, was not believed."""


class CredentialsRejected(AuthenticationError, kind=ErrorKind.CREDENTIALS_REJECTED):
    """The peer refused our credentials, or we refused its."""


class UnknownPeer(AuthenticationError, kind=ErrorKind.UNKNOWN_PEER):
    """The peer's identity is not known."""


class AuthorizationError(SapperError):
    """The peer is known and may not."""


class AclDenied(AuthorizationError, kind=ErrorKind.ACL_DENIED):
    """An access list says no."""


class PolicyDenied(AuthorizationError, kind=ErrorKind.POLICY_DENIED):
    """A peer rule or a policy call-back said no, or the call-back failed or gave no answer in time."""


class RpcError(SapperError):
    """A remote call failed at the other end."""


@final
class RemoteError(RpcError, kind=ErrorKind.REMOTE_CALL):
    """The peer's method failed.

    Attributes:
        code: The peer's error code.
        data: What the peer sent along, already decoded.
    """

    code: int
    data: object

    def __init__(
        self, message: str = "", context: ErrorContext = _NO_CONTEXT, *, code: int = 0, data: object = None
    ) -> None:
        super().__init__(message, context)
        self.code = code
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_remote, (self.message, self.context, self.code, self.data)


def _rebuild_remote(message: str, context: ErrorContext, code: int, data: object) -> RemoteError:
    return RemoteError(message, context, code=code, data=data)


class MethodNotFound(RpcError, kind=ErrorKind.METHOD_NOT_FOUND):
    """The peer has no such method."""


class RegistryError(SapperError):
    """A store of records said no."""


class NotFound(RegistryError, kind=ErrorKind.NOT_FOUND):
    """No such record."""


class Conflict(RegistryError, kind=ErrorKind.CONFLICT):
    """The record exists already or was changed meanwhile."""


class MigrationRequired(RegistryError, kind=ErrorKind.MIGRATION_REQUIRED):
    """The store's schema is older than this program."""


def error_class(kind: ErrorKind | str) -> type[SapperError]:
    """The class that stands for a kind.

    Raises:
        ValueError: There is no such kind.
    """
    return _CLASSES[ErrorKind(kind)]
