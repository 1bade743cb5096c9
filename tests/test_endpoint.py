"""Endpoints by name: what is written is read again, and what is wrong says what was expected."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import endpoint
from sapper.endpoint import Endpoint, parse
from sapper.errors import ConfigError

GOOD = {
    "tcp://device.test:443": endpoint.Tcp("device.test", 443),
    "tcp://[::1]:443": endpoint.Tcp("::1", 443),
    "tcp-listen://[::]:0": endpoint.TcpListen("::", 0),
    "tls://h:2?alpn=h2,http/1.1&server_name=other": endpoint.Tls("h", 2, ("h2", "http/1.1"), "other"),
    "tls-listen://0.0.0.0:443?alpn=h2": endpoint.TlsListen("0.0.0.0", 443, ("h2",)),
    "udp://192.0.2.1:5?bind=[::]:0": endpoint.Udp("192.0.2.1", 5, ("::", 0)),
    "unix:/run/a b": endpoint.Unix("/run/a b"),
    "unix-listen:@abstract": endpoint.UnixListen("@abstract"),
    "dgram:/x?bind=/y": endpoint.UnixDatagram("/x", "/y"),
    "seqpacket:/x": endpoint.Seqpacket("/x"),
    "tun:t0?mtu=1280&address=fd00::1/64&address=10.0.0.1/8": endpoint.Tun(
        "t0", 1280, ("fd00::1/64", "10.0.0.1/8")
    ),
    "tap:x?offload=off": endpoint.Tap("x", None, (), offload=False),
    "tun:": endpoint.Tun(),
    "fd:3": endpoint.Fd(3),
    "fd:3,4": endpoint.Fd(3, 4),
    "fd:5?header=vnet": endpoint.Fd(5, header="vnet"),
    "stdio:": endpoint.Stdio(),
    "file:/x?mode=w": endpoint.File("/x", "w"),
    "file:/a+b?mode=r+": endpoint.File("/a+b", "r+"),
    "null:": endpoint.Null(),
    "counter:": endpoint.Counter(),
}


@pytest.mark.parametrize("text", GOOD)
def test_what_is_written_is_read(text: str) -> None:
    assert parse(text) == GOOD[text]
    assert str(GOOD[text]) == text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("unix:///run/x", "unix:/run/x"),
        ("tcp-listen://:80", "tcp-listen://[::]:80"),
        ("tcp://h:1/", "tcp://h:1"),
        ("tun7", "tun:tun7"),
        ("utun3", "tun:utun3"),
        ("tap0", "tap:tap0"),
        ("file:/x?mode=r%2B", "file:/x?mode=r+"),
        ("dgram:/x?bind=/a%20b", "dgram:/x?bind=/a%20b"),
    ],
)
def test_other_ways_to_write_the_same(text: str, same: str) -> None:
    assert str(parse(text)) == same


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "begins with one of"),
        ("eth0", "begins with one of"),
        ("http://x:1", "begins with one of"),
        ("tcp:h:1", "tcp://host:port"),
        ("tcp://h", "not host:port"),
        ("tcp://http://h:80/", "write host:port, here h:80"),
        ("tcp://h:65536", "0 to 65535"),
        ("tcp://h:-1", "not host:port"),
        ("tcp://::1:5", "brackets"),
        ("tcp://[zz]:4", "no IPv6 address"),
        ("tcp://:4", "names no host"),
        ("tcp://h:1?x=1", "no options"),
        ("tcp://a\0b:1", "no host name"),
        ("tcp://a%00b:1", "no host name"),
        ("tcp://two words:1", "no host name"),
        ("tcp://h..x:1", "no host name"),
        ("tcp://" + "x" * 64 + ":1", "no host name"),
        ("tcp://300.1.1.1:1", "no IPv4 address"),
        ("tcp://h:0", "port 0"),
        ("tcp://\ud800:1", "surrogate"),
        ("unix:/" + "x" * 107, "1 to 107 bytes"),
        ("unix-listen:@" + "x" * 108, "1 to 107 bytes"),
        ("unix:@", "1 to 107 bytes"),
        ("unix:/\ud800", "lone surrogate"),
        ("dgram:/x?bind=/" + "x" * 107, "1 to 107 bytes"),
        ("udp://h:1?bind=name:1", "no address of this machine"),
        ("tls://h:1?server_name=", "needs a host"),
        ("fd:1,2?header=pi", "one descriptor"),
        ("tun:..", "15 characters"),
        ("tun:a?address=1.2.3.4%2f33", "prefix length"),
        ("tls://h:1?alpn=", "1 to 255"),
        ("tun:a-name-that-is-too-long", "15 characters"),
        ("tun:a/b", "15 characters"),
        ("tun:a?mtu=3", "68 to 65535"),
        ("tun:a?mtu=9&mtu=9", "68 to 65535"),
        ("tun:a?mtu=1280&mtu=1280", "given twice"),
        ("tun:a?address=1.2.3", "prefix length"),
        ("tun:a?address=1.2.3.4", "prefix length"),
        ("tap:a?address=fd00::1", "prefix length"),
        ("tun:a?nonsense=1", "its options are mtu, address, offload"),
        ("tun:a?mtu", "bad query field"),
        ("fd:x", "whole number"),
        ("fd:-1", "whole number"),
        ("fd:1,2,3", "fd:3,4"),
        ("fd:1?header=raw", "none of none, pi, utun, vnet"),
        ("unix:", "unix:/path"),
        ("file:/x?mode=rw", "none of r, w, a, r+"),
        ("null:x", "nothing may follow"),
        ("stdio:1", "nothing may follow"),
    ],
)
def test_what_is_wrong_names_the_field_and_says_what_was_expected(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + says.replace("+", r"\+")) as caught:
        parse(text, field="sink")
    assert caught.value.field == "sink"


def test_a_wrong_value_in_a_constructor_names_its_field() -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: endpoint.Tcp("", 1), "host"),
        (lambda: endpoint.Tcp("h", 70_000), "port"),
        (lambda: endpoint.Unix("a\0b"), "path"),
        (lambda: endpoint.Fd(-1), "read"),
        (lambda: endpoint.Fd(1, 2**31), "write"),
        (lambda: endpoint.Fd(1, 2, header="pi"), "header"),
        (lambda: endpoint.Tun("x" * 16), "name"),
        (lambda: endpoint.Tun("ä" * 8), "name"),
        (lambda: endpoint.Tun("a:b"), "name"),
        (lambda: endpoint.Tun("x", mtu=67), "mtu"),
        (lambda: endpoint.Tun("x", addresses=("nonsense",)), "addresses"),
        (lambda: endpoint.Tcp("a\0b", 1), "host"),
        (lambda: endpoint.Tcp("fe80::zz", 1), "host"),
        (lambda: endpoint.Tcp("a..b", 1), "host"),
        (lambda: endpoint.Tcp("256.1.1.1", 1), "host"),
        (lambda: endpoint.Tcp("\udc80", 1), "host"),
        (lambda: endpoint.Tcp("h", 0), "port"),
        (lambda: endpoint.Tcp("h", True), "port"),
        (lambda: endpoint.Tls("h", 1, alpn=("a,b",)), "alpn"),
        (lambda: endpoint.Tls("h", 1, server_name=""), "server_name"),
        (lambda: endpoint.Udp("h", 1, bind=("h", 1)), "bind"),
        (lambda: endpoint.Unix("x" * 108), "path"),
        (lambda: endpoint.UnixListen("@"), "path"),
        (lambda: endpoint.Seqpacket("ä" * 54), "path"),
        (lambda: endpoint.UnixDatagram("x", "y" * 108), "bind"),
        (lambda: endpoint.File("x", "rw"), "mode"),  # type: ignore[arg-type]
    ]
    for make, field in wrong:
        with pytest.raises(ConfigError) as caught:
            make()
        assert caught.value.field == field


hosts = st.one_of(
    st.from_regex(r"[a-z][a-z0-9-]{0,20}(\.[a-z0-9_-]{1,9}){0,2}\.?", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
)
ports = st.integers(1, 65535)
# Bytes that are no UTF-8 are in names of files, too; Python writes them as lone surrogates.
paths = (
    st.binary(min_size=1, max_size=100)
    .map(os.fsdecode)
    .filter(lambda text: "\0" not in text and not text.startswith("//") and text != "@")
)
protocols = st.lists(st.from_regex(r"[a-z0-9/.]{1,8}", fullmatch=True), max_size=3).map(tuple)
described = st.one_of(
    st.builds(endpoint.Tcp, hosts, ports),
    st.builds(endpoint.Tls, hosts, ports, protocols, st.none() | hosts),
    st.builds(
        endpoint.Udp, hosts, ports, st.none() | st.tuples(st.ip_addresses().map(str), st.integers(0, 65535))
    ),
    st.builds(endpoint.Unix, paths),
    st.builds(endpoint.UnixDatagram, paths, st.none() | paths),
    st.builds(endpoint.File, paths, st.sampled_from(["r", "w", "a", "r+"])),
    st.builds(endpoint.Fd, st.integers(0, 2**31 - 1), st.none() | st.integers(0, 2**31 - 1)),
)


@given(described)
def test_any_endpoint_survives_being_written_and_read(one: Endpoint) -> None:
    assert parse(str(one)) == one


#: Texts that come far: a scheme, then pieces that mean something there, in any order, and strange ones.
SIGNS = ["//", "/", ":", "?", "&", "=", "[", "]", "%", "%00", "%2F", "%5B", "%80", "@", ",", "+", "."]
VALUES = ["0", "443", "65536", "-1", "::1", "host", "fd00::1/64", "tun0", "h2", "on"]
OPTIONS = ["mtu", "address", "offload", "mode", "bind", "alpn", "header", "server_name"]
STRANGE = ["\u0663", "\0", "\ud800", "\udcff"]
pieces = st.one_of(
    st.sampled_from([*SIGNS, *VALUES, *(f"{name}=" for name in OPTIONS), *STRANGE]), st.text(max_size=4)
)
written = st.builds(
    lambda scheme, rest: f"{scheme}:{''.join(rest)}",
    st.sampled_from([*endpoint._SCHEMES, "nonsense"]),
    st.lists(pieces, max_size=10),
)


@st.composite
def spoiled(draw: st.DrawFn) -> str:
    """A good text with something put in the place of something else."""
    text = draw(st.sampled_from(list(GOOD)))
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(pieces) + text[at + draw(st.integers(0, 3)) :]


@settings(max_examples=2_000)
@given(st.one_of(st.text(), written, spoiled()))
def test_any_text_is_a_config_error_or_an_endpoint_that_says_itself(text: str) -> None:
    try:
        one = parse(text)
    except ConfigError:
        return
    assert isinstance(one, Endpoint)
    assert parse(str(one)) == one
