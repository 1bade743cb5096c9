"""A CDTunnel from end to end: our bridge against a far end made of CPython's ssl alone."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import sapper.tls as tls
from support import needs, traffic
from support.certs import Certificates
from support.programs import free_port, run_program

DEVICE = Path(__file__).parent / "peers" / "cdtunnel_device.py"
KEY = bytes(range(32))


def start(interpreter: str, granted: int, *credentials: Any) -> tuple[int, Any]:
    port = free_port()
    return port, run_program(interpreter, DEVICE, str(port), str(granted), *credentials, port=port)


async def converse(port: int, program: Any, credentials: tls.TlsConfig, granted: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with program as device, ours:
        errors: list[BaseException] = []
        bridge = tls.create_bridge(
            socket=f"tcp://127.0.0.1:{port}",
            sink=theirs,
            credentials=credentials,
            framing="ipv6",
            max_packet=8192,
            on_error=errors.append,
        )
        async with bridge:
            await bridge.handshake()
            parameters = await bridge.cdtunnel_handshake(16000)
            assert parameters.mtu == granted
            assert str(parameters.client_address) == "fd58:8c92:8961::2"
            assert str(parameters.server_address) == "fd58:8c92:8961::1"
            assert parameters.rsd_port == 56307
            bridge.start()

            ours.settimeout(20)
            sizes = [1 + (n * 37) % (granted - 48) for n in range(600)]
            here, there = str(parameters.client_address), str(parameters.server_address)
            sent = hashlib.sha256()
            # As many on their way at once as fit any socket's queue: an answer lost would be a failure.
            window = 8
            for first in range(0, len(sizes), window):
                expected = []
                for n in range(first, min(first + window, len(sizes))):
                    data = traffic.payload(sizes[n], n)
                    packet = traffic.udp_packet(here, there, data)
                    sent.update(packet)
                    ours.send(packet)
                    expected.append(
                        traffic.udp_packet(there, here, data, source_port=5000, destination_port=4000)
                    )
                for packet in expected:
                    assert ours.recv(65536) == packet
            # A packet is counted when it was handed over: its reader may be faster than the counter.
            async with asyncio.timeout(20):
                while (stats := bridge.stats()).decapsulate.packets < len(sizes):
                    await asyncio.sleep(0)
            assert stats.encapsulate.packets == stats.decapsulate.packets == len(sizes)
        assert device.wait() == 0
        facts = json.loads(device.output.splitlines()[-1])
        assert facts["request"] == {"type": "clientHandshakeRequest", "mtu": 16000}
        assert facts["packets"] == len(sizes)
        assert facts["punished"] == 0, "a record did not hold exactly one packet"
        assert facts["sha256"] == sent.hexdigest()
        assert errors == []


async def test_with_a_certificate(certs: Certificates, any_loop: str) -> None:
    # As with a pair record: a client certificate of ours, and nobody looks at the device's.
    port, program = start(sys.executable, 1280, "cert", certs.server.cert_path, certs.server.key_path)
    config = tls.TlsConfig(
        credentials=tls.Credentials.certificate(certs.client.cert, certs.client.key),
        danger_accept_any_certificate=True,
    )
    await converse(port, program, config, 1280)


@pytest.mark.parametrize("granted", [1280, 1420, 8000])
async def test_with_a_pre_shared_key(granted: int) -> None:
    port, program = start(needs.python("3.13"), granted, "psk", KEY.hex())
    config = tls.TlsConfig(credentials=tls.Credentials.psk(identity="", key=KEY), max_version="TLSv1.2")
    await converse(port, program, config, granted)
