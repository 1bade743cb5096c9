"""A host for WebAssembly guests: WASI, and ``wasi:tls`` by Sapper's engines and configuration.

::

    done = sapper_wasi.run("https.wasm", args=["example.org", "443"], allow_net=["example.org:443"])

A guest is a component that exports ``wasi:cli/run``, of WASI 0.2 or 0.3. It has what :class:`RunOptions`
give it and nothing else. Its payload stays in native code: no byte of its connections is seen here.
"""

from sapper_wasi._native import __version__
from sapper_wasi._run import GuestTrapped, Result, run, run_async
from sapper_wasi.guest import Guest
from sapper_wasi.options import Dir, RunOptions

__all__ = [
    "Dir",
    "Guest",
    "GuestTrapped",
    "Result",
    "RunOptions",
    "__version__",
    "run",
    "run_async",
]
