"""A tunnel whose two ends are processes, with a network between them that can be cut."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from support import needs
from support.programs import free_port
from support.tunnels import CREDENTIALS, LATEST, Cutter

PROGRAM = Path(__file__).parent / "tunnel_end.py"
# Apart from those that free_port gives to services.
PUBLIC_PORTS = (30_001, 32_000)


def more_descriptors() -> None:
    """As many as the system allows: ten thousand streams have two at each end."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


class End:
    """One end, as a process."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port

    @classmethod
    async def start(cls, role: str, *, namespace: str | None = None, **given: Any) -> Self:
        """Starts it, in a namespace if one is named, and waits until it has its port."""
        inside = [] if namespace is None else [needs.program("ip"), "netns", "exec", namespace]
        process = await asyncio.create_subprocess_exec(
            *inside, sys.executable, PROGRAM, role, json.dumps(given),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            preexec_fn=more_descriptors,
        )  # fmt: skip
        end = cls(process, 0)
        try:
            end.port = (await end._line())["port"]
        except BaseException:
            await end.kill()
            raise
        return end

    async def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), LATEST)
        assert line, f"it ended with {await self._process.wait()}"
        values: dict[str, Any] = json.loads(line)
        return values

    async def ask(self) -> dict[str, Any]:
        """What it does now: `tunnels`, `descriptors`, `threads`, `memory`."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        return await self._line()

    async def kill(self) -> None:
        """Without a word: SIGKILL."""
        if self._process.returncode is None:
            self._process.kill()
        await self._ended()

    def freeze(self) -> None:
        """It does nothing any more, and has all that it has."""
        self._process.send_signal(signal.SIGSTOP)
        # Each of its threads goes on until it has heard of it.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """It goes on."""
        self._process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """In order."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await self._ended()
        finally:
            if self._process.returncode is None:
                self._process.kill()

    async def _ended(self) -> None:
        await asyncio.wait_for(self._process.communicate(), LATEST)


class Tunnel:
    """Server, network and client in front of a service of this machine.

    Args:
        service: Its port.
        folder: Where the leases are kept.
        server: Options of the server.
        client: Options of the client.
    """

    def __init__(
        self,
        service: int,
        folder: Path,
        *,
        server: dict[str, Any] | None = None,
        client: dict[str, Any] | None = None,
    ) -> None:
        self._service = service
        self._options: dict[str, dict[str, Any]] = {
            "server": {
                "host": "127.0.0.1",
                "lease_file": str(folder / "leases.json"),
                "public_ports": PUBLIC_PORTS,
                **(server or {}),
            },
            "client": {"reconnect_delay": (0.05, 0.2), "lease": "one", **(client or {})},
        }
        self._ends: list[End] = []
        self._main = free_port()
        self.network = Cutter(self._main)
        self.public = 0

    async def __aenter__(self) -> Self:
        await self.network.__aenter__()
        try:
            await self.start_server()
            await self.start_client()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for end in reversed(self._ends):
            await end.stop()
        await self.network.__aexit__()

    async def start_server(self) -> None:
        """A first server, or one after another that was killed."""
        self.server = await End.start("server", port=self._main, options=self._options["server"])
        self._ends.append(self.server)

    async def start_client(self) -> None:
        """A first client, or one after another that was killed; its public port is the same."""
        self.client = await End.start(
            "client",
            port=self.network.port,
            service=self._service,
            credentials=CREDENTIALS,
            options=self._options["client"],
        )
        self._ends.append(self.client)
        assert self.public in (0, self.client.port), "another public port"
        self.public = self.client.port

    async def kill_server(self) -> None:
        """SIGKILL."""
        self._ends.remove(self.server)
        await self.server.kill()

    async def kill_client(self) -> None:
        """SIGKILL."""
        self._ends.remove(self.client)
        await self.client.kill()

    async def served(
        self, condition: Callable[[dict[str, Any]], bool] = lambda tunnel: True
    ) -> dict[str, Any]:
        """Waits until the client is connected, has its public port, and the condition holds for the server's
        status of it."""
        async with asyncio.timeout(LATEST):
            while True:
                for tunnel in (await self.server.ask())["tunnels"]:
                    if tunnel["connected"] and tunnel["port"] == self.public and condition(tunnel):
                        found: dict[str, Any] = tunnel
                        return found
                await asyncio.sleep(0.01)  # between two looks

    async def cut_for(self, seconds: float) -> None:
        """The link is cut, and comes back after so long."""
        resumes = (await self.served())["resumes"]
        self.network.refuses = True
        self.network.cut()
        await asyncio.sleep(seconds)  # the fault itself
        self.network.refuses = False
        await self.served(lambda tunnel: tunnel["resumes"] > resumes)
