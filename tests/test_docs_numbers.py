"""The numbers in the texts are those of the code: defaults of options, sizes, limits, deadlines."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import sapper.tls as tls
from sapper import _life, pump, pump_options
from sapper.pump import PumpOptions, TapOptions
from support.needs import ROOT

DOCS, NET, PROTO = ROOT / "docs", ROOT / "crates/sapper-net/src", ROOT / "crates/sapper-proto/src"

WORDS = {4: "four", 6: "six", 8: "eight", 16: "sixteen"}


def words_of(page: str) -> str:
    """A text without its line breaks."""
    path = ROOT / page if (ROOT / page).exists() else DOCS / page
    return re.sub(r"\s+", " ", path.read_text())


def rows(page: str, columns: int, section: str = "") -> list[list[str]]:
    """The rows of a page's tables, or of one section's, that have so many columns."""
    found = []
    text = (DOCS / page).read_text()
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if line.startswith("| ") and len(cells) == columns:
            found.append(cells)
    return found


# -- defaults of options ------------------------------------------------------------------------------


def said(value: object) -> set[str]:
    """How a text may put a default."""
    if value is None or value == () or value == "":
        return {"none"}
    if isinstance(value, bool):
        return {"on", f"`{value}`"} if value else {"off", f"`{value}`"}
    if isinstance(value, str):
        return {f'`"{value}"`'}
    if isinstance(value, float):
        return {f"{value:g} s"}
    if isinstance(value, int):
        return {f"{value:,}"}
    return {f"`{value!r}`".replace("'", '"')}


#: Defaults that depend on something else, in words. Each has a test of its own where its part is tested.
IN_WORDS = {
    "socket": "",
    "sink": "",
    "credentials": "none: a client that checks its server",
    "server_hostname": "the host of `socket`",
    "sink_framing": "as in `framing`",
    "max_packet": f"{pump_options._largest('raw'):,} (`superframe`: {pump_options._largest('superframe'):,})",
    "options": "none",
    "sink_credentials": "none",
    "on_error": "none",
    "on_close": "none",
}


def test_defaults_of_a_bridge() -> None:
    fields = {name: field.default for name, field in PumpOptions.model_fields.items()}
    signature = inspect.signature(tls.create_bridge).parameters
    seen = set()
    for names, default, _ in rows("bridge.md", 3, "Options"):
        found = re.findall(r"`(\w+)`", names)
        if not found or found[0] not in {*fields, *signature}:
            continue
        seen |= set(found)
        name = found[0]
        if name in IN_WORDS:
            assert default == IN_WORDS[name], name
            continue
        value = fields.get(name, signature[name].default if name in signature else None)
        assert default in said(value), f"docs/bridge.md says {default} of {name}, the code {value!r}"
    assert seen >= set(fields)
    assert seen >= set(signature)


TLS_IN_WORDS = {
    "peer_rules": "everybody",
    "roots": "the credentials', else the system's",
    "client_auth": "required where roots of our own or pins are given, else off",
    "min_version": '`"TLSv1.2"`, `"TLSv1.3"`',
    "cipher_suites": "all good ones",
    "groups": "X25519MLKEM768, X25519, secp256r1, …",
    "ocsp": 'none: `"check"`, in legacy modes and where nobody is asked about certificates `"off"`',
}


def test_defaults_of_tls() -> None:
    fields = {
        name: field.get_default(call_default_factory=True)
        for name, field in tls.TlsConfig.model_fields.items()
    }
    assert (fields["min_version"], fields["max_version"]) == ("TLSv1.2", "TLSv1.3")
    empty = (None, (), "", tls.Credentials.none())
    seen = set()
    for names, default, _ in rows("tls.md", 3, "Options"):
        found = re.findall(r"`(\w+)`", names)
        if not found or found[0] not in fields:
            continue
        seen |= set(found)
        name = found[0]
        if name in TLS_IN_WORDS:
            assert default == TLS_IN_WORDS[name], name
            assert name == "min_version" or fields[name] in empty, (
                "the words describe what nothing given means"
            )
        elif fields[name] in empty:
            assert default == "none", name
        else:
            assert default in said(fields[name]), (
                f"docs/tls.md says {default} of {name}, the code {fields[name]!r}"
            )
    assert seen >= set(fields)


def test_signatures_have_the_defaults_that_the_page_shows() -> None:
    for method in ("certificate", "psk", "psks", "none"):
        page = re.search(
            rf"`Credentials\.{method}\((.*?)\)`",
            words_of("tls.md").replace("{identity: key, …}", "identities"),
        )
        assert page is not None, method
        parameters = inspect.signature(getattr(tls.Credentials, method)).parameters
        for part in page[1].split(", "):
            name, _, default = part.partition("=")
            assert name in parameters, f"{method} takes no {name}"
            if default:
                assert repr(parameters[name].default) == default.replace('"', "'"), f"{method}({part})"


# -- sizes, limits and deadlines of the native code ----------------------------------------------------


def constant(source: Path, name: str) -> Any:
    """The value of a constant; of a duration its milliseconds."""
    match = re.search(rf"\bconst {name}: [\w:]+ = ([^;]+);", source.read_text())
    assert match is not None, f"{source} has no constant {name}"
    text = re.sub(r"(?<=[0-9a-f])_(?=[0-9a-f])", "", match[1])
    text = re.sub(r"Duration::from_millis\((\d+)\)", r"\1", text)
    text = re.sub(r"Duration::from_secs\((\d+)\)", r"\1 * 1000", text)
    names = {other: constant(source, other) for other in re.findall(r"\b[A-Z][A-Z_0-9]+\b", text)}
    return eval(text, {"__builtins__": {}}, names)


def in_words(value: int) -> str:
    return WORDS.get(value, f"{value:,}")


HELLO = PROTO / "framing/superframe.rs"

NUMBERS: list[tuple[str, str, Path, str]] = [
    ("framing.md", "up to {:,} bytes; what is longer takes several", NET / "tls/mod.rs", "MAX_RECORD"),
    ("framing.md", "1,280 to {:,} |", HELLO, "LONGEST_PACKET"),
    ("framing.md", "big-endian: {:,} to 65,535", HELLO, "LEAST_MAX_PACKET"),
    ("framing.md", "newest version that this end speaks: {}", HELLO, "NEWEST_VERSION"),
    ("framing.md", "oldest version that this end speaks: {}", HELLO, "OLDEST_VERSION"),
    ("framing.md", "big-endian: {} + the packet's", PROTO / "packet/virtio.rs", "HEADER_LEN"),
    ("bridge.md", "| `records_per_write` | {} |", NET / "port/framed.rs", "DEFAULT_RECORDS_PER_WRITE"),
    ("ports.md", "up to {} packets in one arena", NET / "port/mod.rs", "BATCH_PACKETS"),
    ("ports.md", "any number of ports ({:,} at most)", NET / "switch.rs", "MOST_PORTS"),
    ("ports.md", "its turn of {} packets", NET / "switch/engine.rs", "TURN"),
    ("ports.md", "a queue of {w} batches", NET / "port/udp.rs", "QUEUE_BATCHES"),
    ("pump.md", "a turn of {w} rounds at most", NET / "pump/turns.rs", "ROUNDS"),
    ("pump.md", "are short: {k} KiB read", NET / "pump/turns.rs", "SHORT_READ"),
    ("pump.md", "read {} times while no other", NET / "pump/turns.rs", "ALONE"),
    ("pump.md", "reads {k} KiB at a time", NET / "pump/turns.rs", "ALONE_READ"),
    ("streams.md", "bytes wait gets {k} KiB in", NET / "stream/fd.rs", "MOST_NEAR_ALONE"),
    ("pump.md", "goes to its sink, for {} ms;", NET / "pump/mod.rs", "LAST_WORDS"),
    ("pump.md", "for {:,} ms where the sink takes", NET / "pump/mod.rs", "LAST_WORDS_OF_SLOW_SINKS"),
    ("bridge.md", "has it, or {:,} ms later", NET / "bridge/running.rs", "CONFIRMED"),
    ("streams.md", "have buffers of {k} KiB in", NET / "stream/fd.rs", "MOST_NEAR"),
    ("pump.md", "one batch of up to {} packets", NET / "port/mod.rs", "BATCH_PACKETS"),
    ("pump.md", "one read of up to {k} KB", NET / "buffer.rs", "BLOCK"),
    ("pump.md", "{:,} at most, in one task", NET / "switch.rs", "MOST_PORTS"),
    ("pump.md", "A turn is {} packets of one port", NET / "switch/engine.rs", "TURN"),
    ("pump.md", "silent for {} ms", NET / "bridge/running.rs", "SETTLE"),
    ("tls.md", "pre-shared keys below {} bytes", NET / "tls/credentials.rs", "MIN_PSK"),
    ("streams.md", "the next attempt after {} ms", NET / "stream/eyeballs.rs", "ATTEMPT_DELAY"),
    ("streams.md", "at most {} addresses", NET / "stream/eyeballs.rs", "MAX_ATTEMPTS"),
    ("streams.md", "at most {} at a time", NET / "stream/resolve.rs", "MAX_LOOKUPS"),
    ("streams.md", "anew every {} ms at the latest", NET / "stream/connect.rs", "MAX_FULL_PAUSE"),
    ("ARCHITECTURE.md", "a block of {k} KB", NET / "buffer.rs", "BLOCK"),
    ("ARCHITECTURE.md", "at most {w} (`SAPPER_IO_THREADS`)", NET / "runtime.rs", "MAX_DEFAULT_THREADS"),
    ("ARCHITECTURE.md", "needed again within {} µs", NET / "runtime/linger.rs", "WINDOW_US"),
    ("performance.md", "for {} µs at most, and", NET / "runtime/linger.rs", "WINDOW_US"),
    ("ARCHITECTURE.md", "After {w} rounds", NET / "pump/turns.rs", "ROUNDS"),
]  # fmt: skip


@pytest.mark.parametrize(("page", "text", "source", "name"), NUMBERS, ids=lambda one: str(one)[:40])
def test_a_number_is_the_codes(page: str, text: str, source: Path, name: str) -> None:
    value = constant(source, name)
    expected = text.replace("{w}", in_words(value)).replace("{k}", str(value // 1024))
    if expected == text:
        expected = text.format(value)
    assert expected in words_of(page), f"{page} does not say {expected!r}"


def test_a_tenth_of_a_second_is_said_of_idle_buffers() -> None:
    assert constant(NET / "pump/idle.rs", "IDLE_SWEEP") == 100
    for page in ("pump.md", "ARCHITECTURE.md"):
        assert "for a tenth of a second" in words_of(page)
    assert constant(NET / "port/tun/device.rs", "MTU_AGE") == 1000
    assert "when it is older than a second" in words_of("ports.md")


def test_the_largest_packets_of_the_framings() -> None:
    """The page's table against the code's limits, the binding's check and the option's."""
    longest = {
        "ip": constant(PROTO / "packet/ip.rs", "LONGEST"),
        "u16": 2**16 - 1,
        "u32": 2**32 - 1,
        "superframe": constant(HELLO, "LONGEST_PACKET"),
    }
    option = PumpOptions.model_fields["max_packet"].metadata
    (least,) = (one.ge for one in option if hasattr(one, "ge"))
    (most,) = (one.le for one in option if hasattr(one, "le"))
    assert f"(1..={most:_}).contains(&packets.max_packet)" in (NET / "bridge/check.rs").read_text()
    assert (least, most) == (1, 65_535)
    seen = {}
    for name, _, can, default, limit in rows("framing.md", 5):
        for one in re.findall(r"`(\w+)`", name):
            seen[one] = (can, default, limit)
    for name in ("ip", "ipv4", "ipv6", "u16", "u32", "superframe"):
        can, default, limit = seen.pop(name)
        carries = longest.get(name, longest["ip"] if name != "ipv4" else 65_535)
        assert can.startswith(f"{carries:,}"), name
        assert default == f"{pump_options._largest(name):,}", name  # type: ignore[arg-type]
        assert limit == f"{min(carries, most):,}", name
    assert set(seen) <= {"raw"}


def test_how_many_events_wait() -> None:
    assert f"{_life.EVENTS} events" in words_of("events-and-policy.md")


def test_defaults_of_a_tap() -> None:
    page = words_of("bridge.md")
    assert f"`snap_len` bytes of each ({TapOptions.model_fields['snap_len'].default:,})" in page
    for parameter in inspect.signature(pump.Pump.tap).parameters.values():
        if parameter.name in TapOptions.model_fields and parameter.default is not parameter.empty:
            assert parameter.default == TapOptions.model_fields[parameter.name].default
