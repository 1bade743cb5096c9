"""TLS as an anyio byte stream, on anyio's asyncio backend. Needs anyio.

:class:`TlsByteStream` wraps a :class:`~sapper.tls.TlsStream`: ``receive`` raises ``EndOfStream`` at the end,
``send_eof`` ends one direction, and the typed attributes are those of anyio's own TLS and socket streams.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSAttribute

from sapper.errors import BusyError, ClosedError, SapperError
from sapper.tls.stream import TlsStream

__all__ = ["TlsByteStream"]


class TlsByteStream(ByteStream):
    """A TLS connection with anyio's words. The stream is this object's from then on.

    Args:
        stream: The connection.
        server_side: Whether we are the server, which only the attribute of that name says.
    """

    def __init__(self, stream: TlsStream, *, server_side: bool = False) -> None:
        self._stream = stream
        self._server_side = server_side
        self._sending = False

    @property
    def stream(self) -> TlsStream:
        """The connection itself."""
        return self._stream

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        """Receives what is there, at least one byte. If cancelled, nothing is lost.

        Raises:
            anyio.EndOfStream: The peer ended its direction.
            anyio.ClosedResourceError: This end is closed.
            anyio.BrokenResourceError: The connection failed; the cause says how.
            anyio.BusyResourceError: Another task receives.
            ValueError: ``max_bytes`` is below 1.
        """
        await checkpoint()
        if max_bytes < 1:
            raise ValueError("max_bytes has to be 1 or more")
        try:
            data = await self._stream.read(max_bytes)
        except SapperError as error:
            raise _translated(error, "receiving from") from error
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        """Sends all of ``item``. If cancelled, it may go out all the same.

        Raises:
            anyio.ClosedResourceError: This end is closed, or its end was sent.
            anyio.BrokenResourceError: The connection failed; the cause says how.
            anyio.BusyResourceError: Another task sends.
        """
        await checkpoint()
        if self._sending:
            raise anyio.BusyResourceError("sending to")
        self._sending = True
        try:
            self._stream.write(item)
            await self._stream.drain()
        except SapperError as error:
            raise _translated(error, "sending to") from error
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Ends our direction; receiving goes on.

        Raises:
            anyio.ClosedResourceError: This end is closed.
            anyio.BusyResourceError: Another task sends.
        """
        await checkpoint()
        if self._sending:
            raise anyio.BusyResourceError("sending to")
        try:
            self._stream.write_eof()
        except SapperError as error:
            raise _translated(error, "sending to") from error

    async def aclose(self) -> None:
        """Says goodbye and closes; what was sent is delivered. If cancelled, it ends at once."""
        self._stream.close()
        try:
            await self._stream.wait_closed()
        except SapperError:
            pass  # what could not be delivered any more: closing is not where anyio tells that
        except asyncio.CancelledError:
            self._stream.abort()
            raise

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """Anyio's ``TLSAttribute`` and ``SocketAttribute``, but for the raw socket."""
        extra = self._stream.get_extra_info
        info = self._stream.info
        attributes: dict[Any, Callable[[], Any]] = {
            TLSAttribute.alpn_protocol: lambda: extra("ssl_object").selected_alpn_protocol(),
            TLSAttribute.cipher: lambda: extra("cipher"),
            TLSAttribute.peer_certificate: lambda: extra("peercert"),
            TLSAttribute.peer_certificate_binary: lambda: info.peer_certificate,
            TLSAttribute.server_side: lambda: self._server_side,
            TLSAttribute.ssl_object: lambda: extra("ssl_object"),
            TLSAttribute.standard_compatible: lambda: True,
            TLSAttribute.tls_version: lambda: info.version,
        }
        local, remote = extra("sockname"), extra("peername")
        if local is not None and remote is not None:
            attributes |= {
                SocketAttribute.family: lambda: socket.AddressFamily(extra("socket").family),
                SocketAttribute.local_address: lambda: local[:2],
                SocketAttribute.local_port: lambda: local[1],
                SocketAttribute.remote_address: lambda: remote[:2],
                SocketAttribute.remote_port: lambda: remote[1],
            }
        return attributes


def _translated(error: SapperError, action: str) -> Exception:
    if isinstance(error, BusyError):
        return anyio.BusyResourceError(action)
    return anyio.ClosedResourceError() if isinstance(error, ClosedError) else anyio.BrokenResourceError()
