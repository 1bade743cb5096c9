"""The module declares that it needs no GIL; where a free-threaded interpreter is found, it runs there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import needs

SCRIPT = """
import sys, threading, socket
import sapper.tls as tls
assert not sys._is_gil_enabled(), "importing sapper turned the GIL on"

def work():
    for _ in range(25):
        nets, inner = socket.socketpair(), [socket.socketpair(), socket.socketpair()]
        credentials = tls.Credentials.psk(identity="x", key=b"k" * 32)
        ends = [
            tls.create_bridge(socket=nets[n], sink=inner[n][1], credentials=credentials, server_side=bool(n))
            for n in range(2)
        ]
        for end in ends:
            end.start()
        inner[0][0].sendall(b"through two bridges")
        assert inner[1][0].recv(19, socket.MSG_WAITALL) == b"through two bridges"
        for end in ends:
            end.stop()
            end.wait_closed_sync(20)
        for pair in inner:
            pair[0].close()

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("done without the GIL")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_built_and_run_without_the_gil(tmp_path: Path) -> None:
    interpreter = needs.python("3.13t")
    environment = tmp_path / "venv"
    subprocess.run([interpreter, "-m", "venv", environment], check=True)
    dist = tmp_path / "dist"
    # The same target folder: what does not know of Python (OpenSSL, the data plane) is not built again.
    maturin = Path(sys.executable).parent / "maturin"
    subprocess.run(
        [maturin, "build", "--release", "--interpreter", interpreter, "--out", dist],
        cwd=needs.ROOT,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYO3_")},
    )
    (wheel,) = dist.glob("*.whl")
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    done = subprocess.run([python, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "done without the GIL" in done.stdout
