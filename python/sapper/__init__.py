"""Bridges and tunnels with a native data plane. The parts are subpackages: sapper.tls first."""
