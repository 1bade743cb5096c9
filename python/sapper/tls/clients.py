"""Other libraries' clients over our TLS: aiohttp, redis-py, asyncpg. Each needs its library.

- :func:`aiohttp_connector`: for ``aiohttp.ClientSession(connector=…)``.
- :func:`redis_connection`: for ``redis.asyncio.ConnectionPool(connection_class=…)``.
- :func:`postgres_loop`: for ``asyncpg.connect(loop=…, ssl=False)``.

What credentials say of roots, pins, client certificates and names counts; the libraries' own TLS options
are not used.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any, cast

from sapper._options import config_error
from sapper.errors import CertificateError, TlsError
from sapper.tls.config import Credentials, TlsConfig
from sapper.tls.transport import create_connection, open_connection

if TYPE_CHECKING:
    import aiohttp
    from redis.asyncio.connection import Connection

__all__ = ["aiohttp_connector", "postgres_loop", "redis_connection"]


def aiohttp_connector(
    credentials: Credentials | TlsConfig | None = None, **options: Any
) -> aiohttp.TCPConnector:
    """A connector whose ``https`` runs on our TLS; names, proxies, limits and pooling stay aiohttp's.

    Args:
        credentials: As for :func:`sapper.tls.connect`.
        options: Of ``aiohttp.TCPConnector``. ``ssl=`` is not among them.
    """
    import aiohttp

    config = TlsConfig.of(credentials)

    async def under_tls(
        transport: Any, factory: Any, req: Any, hostname: str, times: Any, client_error: Any
    ) -> Any:
        """TLS over a connection, its failures told in aiohttp's words."""
        try:
            async with asyncio.timeout(times.sock_connect):
                return await create_connection(
                    factory, stream=transport, credentials=config, server_hostname=hostname
                )
        except CertificateError as error:
            raise aiohttp.ClientConnectorCertificateError(req.connection_key, error) from error
        except TlsError as error:
            told = ssl.SSLError(1, str(error))
            raise aiohttp.ClientConnectorSSLError(req.connection_key, told) from error
        except TimeoutError:
            raise
        except OSError as error:
            raise client_error(req.connection_key, error) from error
        finally:
            transport.abort()  # ours, or of no use to anybody

    class Connector(aiohttp.TCPConnector):
        """Where aiohttp would put Python's TLS over a connection, it puts ours."""

        async def _wrap_create_connection(  # type: ignore[override]
            self,
            factory: Any,
            *args: Any,
            req: Any,
            timeout: Any,  # noqa: ASYNC109 - aiohttp's name
            ssl: Any = None,
            server_hostname: str | None = None,
            client_error: Any = aiohttp.ClientConnectorError,
            **kwargs: Any,
        ) -> Any:
            connect: Any = super()._wrap_create_connection
            kwargs |= {"req": req, "timeout": timeout, "client_error": client_error}
            if not ssl:
                return await connect(factory, *args, **kwargs)
            transport, _ = await connect(_Silent, *args, **kwargs)
            hostname = server_hostname or req.host
            return await under_tls(transport, factory, req, hostname, timeout, client_error)

        async def _start_tls_connection(
            self,
            underlying_transport: Any,
            req: Any,
            timeout: Any,  # noqa: ASYNC109 - aiohttp's name
            client_error: Any = aiohttp.ClientConnectorError,
        ) -> Any:
            hostname = req.server_hostname or req.host
            return await under_tls(underlying_transport, self._factory, req, hostname, timeout, client_error)

    if "ssl" in options:
        raise TypeError("ssl= is what credentials are for")
    return Connector(**options)


class _Silent(asyncio.Protocol):
    """Of a connection that is made for another owner: nothing is read from it meanwhile."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).pause_reading()


def redis_connection(
    credentials: Credentials | TlsConfig | None = None, *, server_hostname: str | None = None
) -> type[Connection]:
    """A ``connection_class`` of redis-py's asyncio client.

    Args:
        credentials: As for :func:`sapper.tls.connect`.
        server_hostname: Name to check in the server's certificate; ``None`` is the host.
    """
    from redis.asyncio.connection import Connection

    config = TlsConfig.of(credentials)

    class TlsConnection(Connection):
        """A connection of redis-py over our TLS."""

        async def _connect(self) -> None:
            async with asyncio.timeout(self.socket_connect_timeout):
                self._reader, self._writer = await open_connection(
                    self.host, self.port, credentials=config, server_hostname=server_hostname
                )

    return TlsConnection


def postgres_loop(
    credentials: Credentials | TlsConfig | None = None,
    *,
    server_hostname: str | None = None,
    direct: bool = False,
) -> asyncio.AbstractEventLoop:
    """The running loop, whose connections are PostgreSQL's under our TLS: for asyncpg with ``ssl=False``.

    A password that is sent over such a connection is protected by TLS; channel binding (SCRAM-PLUS) is not
    used, since asyncpg does not know it.

    Args:
        credentials: As for :func:`sapper.tls.connect`.
        server_hostname: Name to check in the server's certificate; ``None`` is the host.
        direct: Begin with TLS at once (PostgreSQL 17 and newer) rather than ask for it. The protocol
            ``postgresql`` is offered.

    Raises:
        ApiMisuseError: There is no running event loop.
    """
    config = TlsConfig.of(credentials)
    loop = asyncio.get_running_loop()
    return _PostgresLoop(loop, config, server_hostname, direct)  # type: ignore[return-value]


class _PostgresLoop:
    """A loop in every respect but its connections, which are under TLS in PostgreSQL's way."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, config: TlsConfig, server_hostname: str | None, direct: bool
    ) -> None:
        self._loop = loop
        self._config = config
        self._server_hostname = server_hostname
        self._direct = direct

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def create_connection(self, protocol_factory: Any, host: str, port: int) -> Any:
        return await create_connection(
            protocol_factory,
            host,
            port,
            credentials=self._config,
            server_hostname=self._server_hostname or host,
            upgrade="postgres-direct" if self._direct else "postgres",
        )

    async def create_unix_connection(self, protocol_factory: Any, path: str) -> Any:
        raise config_error("host", f"PostgreSQL has no TLS on Unix sockets ({path})")
