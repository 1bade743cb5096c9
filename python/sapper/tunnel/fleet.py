"""Several clients of one configuration, run together and told together to do otherwise.

Not here: how a file is read (:mod:`sapper.tunnel.config`), nor who watches it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sapper.errors import ClosedError, SapperError
from sapper.tunnel.client import TunnelClient
from sapper.tunnel.events import TunnelEvent
from sapper.tunnel.hearing import TunnelEvents

if TYPE_CHECKING:
    from sapper.tunnel._plain import ClientPlan
    from sapper.tunnel.config import ClientConfig

__all__ = ["Fleet"]

#: Hears the name of a client and what happened to it.
Hearer = Callable[[str, TunnelEvent], None]


class Fleet:
    """The clients of a configuration, by name.

    Args:
        configs: What each does.
        hear: Called with each event.
        drain: Seconds that the streams of a client have to end when it is not wanted any more.
    """

    def __init__(
        self, configs: Mapping[str, ClientConfig | ClientPlan], hear: Hearer, *, drain: float = 5.0
    ) -> None:
        self._wanted: dict[str, ClientConfig | ClientPlan] = dict(configs)
        self._hear = hear
        self._drain = drain
        self._running: dict[str, TunnelClient] = {}
        self._does: dict[str, ClientConfig | ClientPlan] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._changing = asyncio.Lock()
        self._stopping = False
        #: Those that a reload ends.
        self._leaving: set[TunnelClient] = set()
        #: Those that have ended though nobody ended them: why, and what they did. Who is not wanted any more,
        #: or starts again, is none of them.
        self._over: dict[str, tuple[SapperError | None, ClientConfig | ClientPlan]] = {}

    @property
    def clients(self) -> Mapping[str, TunnelClient]:
        """Those that run."""
        return self._running

    @property
    def error(self) -> SapperError | None:
        """What ended the first of those that have failed."""
        return next((error for error, _ in self._over.values() if error is not None), None)

    @property
    def failed(self) -> ClientConfig | ClientPlan | None:
        """What that one did."""
        return next((did for error, did in self._over.values() if error is not None), None)

    async def start(self) -> None:
        """Starts them.

        Raises:
            ConfigError: A configuration cannot be used.
        """
        made = {name: config.client() for name, config in self._wanted.items()}
        async with self._changing:
            await self._start(made)

    async def wait_closed(self) -> None:
        """Waits until they were stopped, or all have ended by themselves."""
        while True:
            self._changed.clear()
            idle = not self._tasks and not self._changing.locked()
            if idle and (self._stopping or self._over):
                return
            await self._changed.wait()

    async def reload(self, configs: Mapping[str, ClientConfig | ClientPlan]) -> None:
        """Has them do otherwise from now on.

        Those that are gone from the configuration end, new ones start, and the others go on with their
        streams. One that is to have another server, or another lease, ends and starts anew; one that has
        ended by itself starts again.

        Raises:
            ConfigError: A configuration cannot be used; then nothing changes.
        """
        made = {name: config.client() for name, config in configs.items()}
        async with self._changing:
            self._wanted = dict(configs)
            self._over = {name: one for name, one in self._over.items() if name in configs}
            ending = [client for name, client in self._running.items() if name not in configs]
            start: dict[str, TunnelClient] = {}
            for name, client in made.items():
                running = self._running.get(name)
                if running is None:
                    start[name] = client
                    continue
                does, self._does[name] = self._does[name], configs[name]
                if (does.server, does.lease) != (configs[name].server, configs[name].lease):
                    ending.append(running)
                    start[name] = client
                else:
                    with contextlib.suppress(ClosedError):  # it has just ended
                        await running.reload(client)
            for name, client in list(self._running.items()):
                if client in ending:
                    del self._running[name], self._does[name]
            self._leaving.update(ending)
            try:
                await asyncio.gather(*(client.stop(self._drain) for client in ending))
            finally:
                self._leaving.difference_update(ending)
            if not self._stopping:
                await self._start(start)
        self._changed.set()

    async def stop(self, drain: float = 0.0) -> None:
        """Ends all of them. Again, it can only be sooner."""
        self._stopping = True
        await asyncio.gather(*(client.stop(drain) for client in [*self._running.values(), *self._leaving]))
        self._changed.set()

    async def _start(self, clients: Mapping[str, TunnelClient]) -> None:
        for name, client in clients.items():
            events = client.events()
            await client.start()
            self._over.pop(name, None)
            self._running[name], self._does[name] = client, self._wanted[name]
            task = asyncio.get_running_loop().create_task(self._one(name, client, events))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def _one(self, name: str, client: TunnelClient, events: TunnelEvents) -> None:
        async for event in events:
            self._hear(name, event)
        if self._running.get(name) is client:
            del self._running[name]
            did = self._does.pop(name)
            if not self._stopping or client.error is not None:
                self._over[name] = client.error, did
