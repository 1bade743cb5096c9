"""Ours, without any I/O: a handshake between two engines in memory, the bound of setting a pair up."""

from __future__ import annotations

import json
import time

from benches.bridge_work import parse_work
from benches.ours.bridges import config
from sapper.testing import handshake_pair_seconds


def main() -> None:
    """Prints the time of one handshake, both ends together."""
    work = parse_work(__doc__)
    client, server = config(work, server=False), config(work, server=True)
    handshake_pair_seconds(client, server, 20)
    began = time.process_time()
    seconds = handshake_pair_seconds(client, server, work.count)
    print(json.dumps({"seconds": seconds, "cpu_seconds": (time.process_time() - began) / work.count}))


if __name__ == "__main__":
    main()
