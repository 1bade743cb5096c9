"""Real programs through the tunnel: PostgreSQL, Redis, SMTP, git, curl, WebSocket, iperf3.

Each of them is in the middle of its work when the link is cut (nothing is lost), when the server is killed
and started again, and when the client is (both: a clear end, and service at the same public port). The
network between the two ends stops after so many bytes, so that "in the middle" is no matter of speed.
Marked `soak`: the same with a gigabyte and cuts of five seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support import needs
from support.certs import Certificates
from support.postgres import postgres_program, run_postgres
from support.programs import free_port, run_program
from support.tunnel_ends import Tunnel
from support.tunnels import LATEST, Service, until

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Scale:
    """How much work, how long the link is silent, and then how long it is cut."""

    silence: float
    cut: float
    megabytes: int
    deadline: float


QUICK = Scale(silence=0.0, cut=0.2, megabytes=48, deadline=30)
LONG = Scale(silence=5.0, cut=5.0, megabytes=1_000, deadline=240)
SCALES = [
    pytest.param(QUICK, id="quick"),
    pytest.param(LONG, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
]
at_both_scales = pytest.mark.parametrize("scale", SCALES)


async def _at_once() -> None:
    pass


@dataclass(frozen=True)
class Work:
    """What a program does through the tunnel.

    Attributes:
        command: By the public port.
        enough: Bytes on the link after which it is in the middle of it.
        check: Fails where something did not arrive; it is given what the program printed.
        prepare: Done before each run.
        environment: More of it.
        folder: Where it works.
        failed: Whether the program says that it failed, by its status and what it printed.
        arrived: Whether all that it said is there, which may be so only after its end.
        dials_again: Whether it may dial again and go on, so that a death between two requests is none to it.
        served: Waits until the service takes another, where it serves one at a time.
    """

    command: Callable[[int], list[str]]
    enough: int
    check: Callable[[bytes], None]
    prepare: Callable[[], None] = field(default=lambda: None)
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    failed: Callable[[int | None, bytes], bool] = lambda status, said: status != 0
    arrived: Callable[[], bool] = lambda: True
    dials_again: bool = False
    served: Callable[[], Awaitable[None]] = field(default=_at_once)


class Program:
    """A program at work; what it prints is read all the while, or it would wait for its reader instead of
    for the tunnel."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._printed = asyncio.create_task(process.communicate())

    @property
    def works(self) -> bool:
        return self._process.returncode is None

    async def ended(self, seconds: float) -> tuple[int | None, bytes]:
        """Waits for its end by itself: its status, and what it printed."""
        said, _ = await asyncio.wait_for(asyncio.shield(self._printed), seconds)
        return self._process.returncode, said

    async def kill(self) -> None:
        if self.works:
            self._process.kill()
        await self._printed


@contextlib.asynccontextmanager
async def working(work: Work, port: int) -> AsyncIterator[Program]:
    """The program at work; it does not outlive this."""
    work.prepare()
    await work.served()
    program = Program(
        await asyncio.create_subprocess_exec(
            *work.command(port),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **work.environment},
            cwd=work.folder,
        )
    )
    try:
        yield program
    finally:
        await program.kill()


async def whole(work: Work, tunnel: Tunnel, scale: Scale) -> None:
    """A run that nothing disturbs."""
    async with working(work, tunnel.public) as program:
        await worked(work, program, scale)


async def noticed(work: Work, program: Program) -> None:
    """It ends once its connection was reset: with a failure, or well where it dials again."""
    status, said = await program.ended(LATEST)
    if not work.failed(status, said):
        assert work.dials_again, "it did not notice: " + said[-2000:].decode(errors="replace")
        work.check(said)


async def worked(work: Work, program: Program, scale: Scale) -> None:
    """It ends well, and nothing of it is lost."""
    status, said = await program.ended(scale.deadline)
    assert not work.failed(status, said), said[-2000:]
    work.check(said)
    await until(work.arrived, "the rest of what it said")


async def all_three(work: Work, service: int, folder: Path, scale: Scale) -> None:
    """A cut, the server's death, the client's death; each in the middle of the program's work."""
    async with Tunnel(service, folder) as tunnel:
        async with working(work, tunnel.public) as program:
            await tunnel.network.stop_after(work.enough)
            assert program.works
            await asyncio.sleep(scale.silence)  # the fault itself
            await tunnel.cut_for(scale.cut)
            await worked(work, program, scale)

        async with working(work, tunnel.public) as program:
            await tunnel.network.stop_after(work.enough)
            await tunnel.kill_server()
            await noticed(work, program)
            tunnel.network.go_on()
            await tunnel.start_server()
            await tunnel.served()
            # Until then the client cannot know whether its session goes on.
            await until(lambda: connections(service) == 0, "the end of the service's connections")
        await whole(work, tunnel, scale)

        async with working(work, tunnel.public) as program:
            await tunnel.network.stop_after(work.enough)
            await tunnel.kill_client()
            await until(lambda: connections(service) == 0, "the end of the service's connections")
            assert program.works, "within the grace somebody may come back"
            tunnel.network.go_on()
            await tunnel.start_client()
            await noticed(work, program)
            await tunnel.served()
        await whole(work, tunnel, scale)


def connections(port: int) -> int:
    """How many connections of a local port are established."""
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, _, state = line.split()[1:4]
        found += state == "01" and int(local.rpartition(":")[2], 16) == port
    return found


# -- PostgreSQL ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres(certs: Certificates) -> Iterator[int]:
    with run_postgres(certs, tls=False) as port:
        yield port


def psql(port: int, statement: str) -> list[str]:
    where = f"host=127.0.0.1 port={port} user=client.test dbname=postgres sslmode=disable"
    return [needs.program("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", where, "-c", statement]


@at_both_scales
async def test_psql(postgres: int, scale: Scale, tmp_path: Path) -> None:
    rows = scale.megabytes * 4_000
    statement = f"COPY (SELECT n, md5(n::text) FROM generate_series(1, {rows}) n) TO STDOUT"
    expected = await asyncio.to_thread(_digest, psql(postgres, statement))

    def check(said: bytes) -> None:
        assert hashlib.sha256(said).digest() == expected

    work = Work(lambda port: psql(port, statement), rows * 10, check)
    await all_three(work, postgres, tmp_path, scale)


def _digest(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=True)
    return hashlib.sha256(done.stdout).digest()


@at_both_scales
async def test_pgbench(postgres: int, scale: Scale, tmp_path: Path) -> None:
    program = postgres_program("pgbench")
    where = ["-h", "127.0.0.1", "-U", "client.test"]
    each = 4 * scale.megabytes
    subprocess.run(
        [program, "-i", "-q", "-s", "2", *where, "-p", str(postgres), "postgres"],
        check=True, capture_output=True,
    )  # fmt: skip
    counted = psql(postgres, "SELECT count(*) FROM pgbench_history")

    def check(said: bytes) -> None:
        assert f"transactions actually processed: {4 * each}/{4 * each}".encode() in said
        # Each transaction wrote one row: none was lost, none was done twice.
        assert int(subprocess.run(counted, capture_output=True, check=True).stdout) == 4 * each

    def prepare() -> None:
        subprocess.run(psql(postgres, "TRUNCATE pgbench_history"), check=True, capture_output=True)

    def command(port: int) -> list[str]:
        return [program, "-n", "-c", "4", "-t", str(each), *where, "-p", str(port), "postgres"]

    work = Work(command, each * 1_000, check, prepare, {"PGSSLMODE": "disable"})
    await all_three(work, postgres, tmp_path, scale)


# -- Redis ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    needs.check("redis-server")
    port = free_port()
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    arguments += ["--dir", str(tmp_path_factory.mktemp("redis"))]
    with run_program("redis-server", *arguments, port=port):
        yield port


@at_both_scales
@pytest.mark.needs("redis-benchmark", "redis-cli")
async def test_redis_benchmark(redis: int, scale: Scale, tmp_path: Path) -> None:
    requests = 500 * scale.megabytes
    cli = [needs.program("redis-cli"), "-p", str(redis)]

    def prepare() -> None:
        subprocess.run([*cli, "flushall"], check=True, capture_output=True)

    def check(said: bytes) -> None:
        assert b"INCR: " in said
        counter = subprocess.run([*cli, "get", "counter:__rand_int__"], capture_output=True, check=True)
        assert int(counter.stdout) == requests, "requests were lost or came twice"

    def command(port: int) -> list[str]:
        benchmark = [needs.program("redis-benchmark"), "-h", "127.0.0.1", "-p", str(port)]
        return [*benchmark, "-q", "-n", str(requests), "-c", "20", "-t", "incr"]

    await all_three(Work(command, requests * 20, check, prepare), redis, tmp_path, scale)


# The client's own tests come with its source from the package index, always the same ones.
SUITE = "redis==6.4.0 --hash=sha256:b01bc7282b8444e28ec36b261df5375183bb47a07eb9c603f284e89cbc5ef010"
# One server without modules, nobody's certificates; asynchronous ones need a plugin that would change ours.
MARKS = "not onlycluster and not redismod and not ssl and not asyncio and not cp_integration"
QUICK_FILES = ["pipeline", "scripting", "encoding", "hash"]
FILES = [*QUICK_FILES, "pubsub", "commands", "lock", "function", "monitor"]
# These fail without a tunnel too: one wants a replica, the others another release of the server.
LEFT_OUT = ["acl_getuser_setuser", "acl_log", "xgroup_create_entriesread", "psync"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of redis-py's source, downloaded once for a checkout."""
    kept = needs.ROOT / ".venv" / "redis-suite"
    if not list(kept.glob("redis-*.tar.gz")):
        asked = tmp_path_factory.mktemp("asked") / "requirements.txt"
        asked.write_text(SUITE + "\n")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        exactly = ["--no-deps", "--no-binary", "redis", "--require-hashes"]
        done = subprocess.run(
            [*download, *exactly, "-r", asked, "-d", kept], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            needs.lacking(f"redis-py's source cannot be had: {done.stderr[-500:]}")
    folder = tmp_path_factory.mktemp("suite")
    with tarfile.open(next(kept.glob("redis-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


def redis_tests(port: int, files: list[str]) -> list[str]:
    """As they are; the first that fails ends them."""
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-m", MARKS]
    run += ["-p", "no:cacheprovider", "-p", "no:timeout"]
    run += [f"--redis-url=redis://127.0.0.1:{port}/9"]
    run += [f"--deselect=tests/test_commands.py::TestRedisCommands::test_{name}" for name in LEFT_OUT]
    return [*run, *(f"tests/test_{name}.py" for name in files)]


def most_passed(said: bytes, least: int) -> None:
    passed = re.search(rb"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) > least, "most of them were skipped"


@at_both_scales
async def test_the_redis_client_s_own_tests(redis: int, suite: Path, scale: Scale, tmp_path: Path) -> None:
    files, least = (QUICK_FILES, 40) if scale is QUICK else (FILES, 500)
    work = Work(
        lambda port: redis_tests(port, files),
        # In the first file, whose tests ask for no time.
        20_000,
        lambda said: most_passed(said, least),
        folder=suite,
        # It sends a command that found its connection gone again, three times in all.
        dials_again=True,
    )
    await all_three(work, redis, tmp_path, scale)


@pytest.mark.soak
async def test_the_redis_client_s_own_tests_over_a_link_that_is_cut_again_and_again(
    redis: int, suite: Path, tmp_path: Path
) -> None:
    cuts = 0
    work = Work(
        lambda port: redis_tests(port, FILES),
        0,
        lambda said: most_passed(said, 500),
        folder=suite,
    )
    async with Tunnel(redis, tmp_path) as tunnel, working(work, tunnel.public) as program:
        ending = asyncio.create_task(program.ended(LONG.deadline))
        while not ending.done():
            await asyncio.wait([ending], timeout=1.0)  # undisturbed for so long
            if not ending.done():
                await tunnel.cut_for(0.05)
                cuts += 1
        status, said = await ending
    assert status == 0, said[-4000:].decode(errors="replace")
    assert cuts > 0
    work.check(said)


# -- SMTP: the server speaks first ---------------------------------------------------------------------


class Mails:
    """Keeps what an aiosmtpd server is given."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []

    async def handle_DATA(self, server: object, session: object, envelope: object) -> str:
        content = getattr(envelope, "content", b"")
        self.digests.append(hashlib.sha256(content).digest())
        return "250 kept"


@at_both_scales
@pytest.mark.needs("curl")
async def test_smtp(scale: Scale, tmp_path: Path) -> None:
    smtp = pytest.importorskip("aiosmtpd.smtp")
    mails = Mails()
    lines = scale.megabytes * 1_000
    content = b"Subject: much\r\n\r\n" + b"".join(b"line %09d of a mail\r\n" % n for n in range(lines))
    (tmp_path / "mail").write_bytes(content)
    server = await asyncio.get_running_loop().create_server(
        lambda: smtp.SMTP(mails, data_size_limit=1 << 30, enable_SMTPUTF8=False), "127.0.0.1", 0
    )
    port = server.sockets[0].getsockname()[1]

    def command(port: int) -> list[str]:
        people = ["--mail-from", "a@example.test", "--mail-rcpt", "b@example.test"]
        return [
            needs.program("curl"),
            "-sS",
            f"smtp://127.0.0.1:{port}",
            *people,
            "-T",
            str(tmp_path / "mail"),
        ]

    def check(said: bytes) -> None:
        assert mails.digests == [hashlib.sha256(content).digest()]

    work = Work(command, len(content) // 2, check, prepare=mails.digests.clear)
    try:
        await all_three(work, port, tmp_path, scale)
    finally:
        server.close()


# -- git -----------------------------------------------------------------------------------------------


@at_both_scales
@pytest.mark.needs("git")
async def test_git_clone(scale: Scale, tmp_path: Path) -> None:
    git = needs.program("git")
    port, bare, clone = free_port(), tmp_path / "served" / "repository", tmp_path / "clone"
    bare.mkdir(parents=True)
    # The machine's own settings are none of the test's business.
    clean = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    environment = {**os.environ, **clean}
    subprocess.run([git, "init", "-q", "--bare", bare], check=True, env=environment)
    size = scale.megabytes * 100_000
    history = [b"blob\nmark :%d\ndata %d\n%s\n" % (n, size, os.urandom(size)) for n in (1, 2)]
    who = b"committer Ann <ann@example.test> 1700000000 +0000\n"
    history.append(b"commit refs/heads/main\nmark :3\n" + who + b"data 5\nfirst\nM 100644 :1 first\n")
    history.append(b"M 100644 :2 second\n\n")
    subprocess.run(
        [git, "-C", bare, "fast-import", "--quiet"], input=b"".join(history), check=True, env=environment
    )
    subprocess.run([git, "-C", bare, "symbolic-ref", "HEAD", "refs/heads/main"], check=True, env=environment)
    head = subprocess.check_output([git, "-C", bare, "rev-parse", "main"], env=environment)

    def command(port: int) -> list[str]:
        return [git, "clone", "-q", f"git://127.0.0.1:{port}/repository", str(clone)]

    def prepare() -> None:
        subprocess.run(["rm", "-rf", clone], check=True)

    def check(said: bytes) -> None:
        assert subprocess.check_output([git, "-C", clone, "rev-parse", "main"], env=environment) == head
        # Reads every object and compares it with its name.
        subprocess.run([git, "-C", clone, "fsck", "--full", "--strict"], check=True, env=environment)

    daemon = ["daemon", "--reuseaddr", "--export-all", f"--base-path={bare.parent}", "--listen=127.0.0.1"]
    with run_program(git, *daemon, f"--port={port}", env=clean, port=port):
        await all_three(Work(command, size // 2, check, prepare, clean), port, tmp_path, scale)


# -- HTTP ----------------------------------------------------------------------------------------------


@at_both_scales
@pytest.mark.needs("curl")
async def test_curl(scale: Scale, tmp_path: Path) -> None:
    port, size = free_port(), scale.megabytes << 20
    block, expected = os.urandom(1 << 20), hashlib.sha256()
    with open(tmp_path / "file", "wb") as file:
        for n in range(scale.megabytes):
            # No two places are alike: what came twice, or at the wrong place, would be seen.
            numbered = n.to_bytes(8, "big") + block[8:]
            expected.update(numbered)
            file.write(numbered)
    got = tmp_path / "got"

    def command(port: int) -> list[str]:
        return [needs.program("curl"), "-sS", "--fail", "-o", str(got), f"http://127.0.0.1:{port}/file"]

    def check(said: bytes) -> None:
        with open(got, "rb") as file:
            assert hashlib.file_digest(file, "sha256").digest() == expected.digest()

    arguments = ["-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with run_program(sys.executable, *arguments, port=port):
        await all_three(Work(command, size // 2, check), port, tmp_path, scale)


# -- WebSocket -----------------------------------------------------------------------------------------


@at_both_scales
async def test_websocket(scale: Scale, tmp_path: Path) -> None:
    web = pytest.importorskip("aiohttp.web")
    number = 10 * scale.megabytes

    async def echo(request: object) -> object:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            send: Callable[[object], Awaitable[None]] = (
                socket.send_str if isinstance(message.data, str) else socket.send_bytes
            )
            await send(message.data)
        return socket

    application = web.Application()
    application.router.add_get("/echo", echo)
    runner = web.AppRunner(application, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]

    def command(port: int) -> list[str]:
        return [sys.executable, str(HERE / "peers" / "websocket_talk.py"), str(port), str(number)]

    def check(said: bytes) -> None:
        assert said == b"%d messages came back\n" % number

    try:
        await all_three(Work(command, number * 10_000, check), port, tmp_path, scale)
    finally:
        await runner.cleanup()


# -- iperf3 --------------------------------------------------------------------------------------------


# What a connection of it begins with: whose it is.
IPERF3_COOKIE = 37


class Counted(Service):
    """A service that counts what each client says, to the end, though what is behind it stops to listen."""

    def __init__(self, port: int) -> None:
        super().__init__(self._pass_on)
        self._to = port
        self.said: list[int] = []

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, ahead = await asyncio.open_connection("127.0.0.1", self._to)
        back = asyncio.create_task(self._answers(behind, writer))
        at = len(self.said)
        self.said.append(0)
        try:
            while data := await reader.read(1 << 20):
                self.said[at] += len(data)
                with contextlib.suppress(ConnectionError):
                    ahead.write(data)
                    await ahead.drain()
            with contextlib.suppress(OSError):  # it may have left
                ahead.write_eof()
            await back
        finally:
            back.cancel()
            for one in (ahead, writer):
                one.transport.abort()

    @staticmethod
    async def _answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                writer.write(data)
                await writer.drain()
            writer.write_eof()


@at_both_scales
@pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
@pytest.mark.needs("iperf3")
async def test_iperf3(reverse: bool, scale: Scale, tmp_path: Path) -> None:
    port, size = free_port(), scale.megabytes << 20

    def command(port: int) -> list[str]:
        arguments = ["-c", "127.0.0.1", "-p", str(port), "-n", str(size), "-J", *(["-R"] if reverse else [])]
        return [needs.program("iperf3"), *arguments]

    def check(said: bytes) -> None:
        sent = json.loads(said)["end"]["sum_sent"]["bytes"]
        assert sent >= size
        if reverse:
            assert json.loads(said)["end"]["sum_received"]["bytes"] >= size
        else:
            expected.append(sent)

    # Its two connections have no order between them: what is on its way when the client says that it has
    # sent all is not counted by the server. So it is counted in front of that: not a byte less, none more.
    expected: list[int] = []
    counted = Counted(port)

    def arrived() -> bool:
        return reverse or IPERF3_COOKIE + expected[-1] in counted.said

    def failed(status: int | None, said: bytes) -> bool:
        return status != 0 or "error" in json.loads(said)  # with -J its status is 0 all the same

    runs = itertools.count(1)

    async def served() -> None:
        said = b"(?:Server listening.*){%d}" % next(runs)
        await asyncio.to_thread(server.wait_for, said, LATEST)

    with run_program("iperf3", "-s", "-B", "127.0.0.1", "-p", str(port), "--forceflush", port=port) as server:
        async with counted:
            work = Work(command, size // 2, check, served=served, failed=failed, arrived=arrived)
            await all_three(work, counted.port, tmp_path, scale)
