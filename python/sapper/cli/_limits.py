"""How many descriptors a command that serves many may have."""

from __future__ import annotations

import contextlib
import resource

__all__ = ["raise_limit"]


def raise_limit() -> None:
    """Each connection takes one or two descriptors: as many as the system lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
