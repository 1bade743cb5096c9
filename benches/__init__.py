"""Benches: every speed claim of the README is a row here, measured beside its peers in one run.

`make bench`, or `python -m benches --only packets-receive --quick`. The harness imports nothing of
Sapper: the pumps under test are programs of their own, ours as well as the peers.
"""
