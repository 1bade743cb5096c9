"""Sapper digs tunnels and builds bridges: Python decides, native code moves every byte.

The parts are subpackages: :mod:`sapper.tls` (the TLS bridge), :mod:`sapper.pump` (two endpoints
without TLS), :mod:`sapper.endpoint` (endpoints by name), :mod:`sapper.errors` (everything that is
raised), :mod:`sapper.events`, :mod:`sapper.stats`. The command line is ``sapper --help``.
"""

from sapper._native import __version__
from sapper.errors import ErrorKind, SapperError

__all__ = ["ErrorKind", "SapperError", "__version__"]
