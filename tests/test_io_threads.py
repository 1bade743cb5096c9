"""The I/O threads as their process sees them: their settings, and the processor time they take."""

import os
import subprocess
import sys

import pytest

ECHOES = """
import resource, socket, time
from sapper import tls

def spent():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

near, far = socket.socketpair()
out, end = socket.socketpair()
key = tls.Credentials.psk(identity="x", key=bytes(range(32)))
server = tls.create_bridge(socket=near, sink=out, credentials=key, server_side=True)
server.start()
other, plain = socket.socketpair()
client = tls.create_bridge(socket=far, sink=other, credentials=key)
client.start()
for _ in range(2000):
    plain.sendall(b"x")
    assert end.recv(1) == b"x"
    end.sendall(b"y")
    assert plain.recv(1) == b"y"
before = spent()
time.sleep(1.5)
print(spent() - before)
plain.shutdown(socket.SHUT_WR)
end.shutdown(socket.SHUT_WR)
client.wait_closed_sync()
server.wait_closed_sync()
"""


def run(program: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("linger", ["0", "200", "10000"])
def test_threads_that_were_busy_sleep_when_nothing_comes(linger: str) -> None:
    done = run(ECHOES, SAPPER_IO_LINGER_US=linger)
    assert done.returncode == 0, done.stderr
    # One thread that went on looking would take all of the 1.5 s.
    assert float(done.stdout) < 0.5


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("SAPPER_IO_LINGER_US", "-1", "from 0 to 10000"),
        ("SAPPER_IO_LINGER_US", "10001", "from 0 to 10000"),
        ("SAPPER_IO_LINGER_US", "", "from 0 to 10000"),
        ("SAPPER_IO_LINGER_US", "1.5", "from 0 to 10000"),
        ("SAPPER_IO_THREADS", "0", "from 1 to 256"),
        ("SAPPER_IO_THREADS", "257", "from 1 to 256"),
        ("SAPPER_IO_THREADS", "two", "from 1 to 256"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str, allowed: str) -> None:
    done = run(ECHOES, **{name: value})
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert "ConfigError" in last
    assert name in last
    assert allowed in last
