"""What to do next about an error, in options that the command at hand has.

A hint is made of parts; one that names options is left out where the command has none of them. Not here:
hints of one error alone, which it carries as a note.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sapper.errors import ErrorKind

__all__ = ["HINTS", "OF_REASON", "hint", "offered"]

#: A text, or one with ``{}`` and what it may be called: the first of those that the command has.
Part = str | tuple[str, ...]

#: By kind; kinds whose message says it already are left out.
HINTS: dict[ErrorKind, tuple[Part, ...]] = {
    ErrorKind.PERMISSION_REQUIRED: ("run it as root", "give the program the right that is missing"),
    ErrorKind.CONNECT: ("check that the peer listens there: the address, the port, a firewall between",),
    ErrorKind.CONNECT_DEADLINE: (
        "check the address",
        ("wait longer: {}", "--connect-timeout"),
    ),
    ErrorKind.UNREACHABLE: ("check the route and the address family",),
    ErrorKind.HANDSHAKE_DEADLINE: (
        ("check that a tunnel's server listens there, with TLS ({}) or without", "--tls"),
        "check that the peer speaks what this end does, TLS or none",
        ("wait longer with {}", "--handshake-timeout"),
    ),
    ErrorKind.CERTIFICATE: (
        ("name the authority with {}", "--roots", "--ca", "--upstream-roots"),
        ("name the server with {}", "--server-name", "--upstream-name"),
        ("give a pin with {}", "--pin"),
    ),
    ErrorKind.CREDENTIALS_REJECTED: (
        ("compare the token ({}, the variable SAPPER_TUNNEL_TOKEN) with the server's", "--token-file"),
        ("compare the certificate ({}) with what the peer expects", "--cert"),
        ("compare the pre-shared key ({})", "--psk-identity"),
    ),
    ErrorKind.INCOMPATIBLE_PEER: (
        "check that the peer speaks TLS on that port, and its versions and suites",
    ),
    ErrorKind.BIND: ("another program may listen there", "the address is not one of this machine"),
    ErrorKind.RESOURCE_LIMIT: ("raise the limit (ulimit -n)", "close something"),
    ErrorKind.LOCAL_PROTOCOL: ("this is a defect of sapper: please report it",),
}

#: In place of those, where the reason says more.
OF_REASON: dict[tuple[ErrorKind, str], tuple[Part, ...]] = {
    (ErrorKind.CONNECT, "name"): (
        "check how the host's name is spelt",
        "whether this machine can look names up",
    ),
    **dict.fromkeys(
        ((ErrorKind.CERTIFICATE, reason) for reason in ("expired", "not_yet_valid")),
        ("the certificate has to be renewed by whoever shows it", "this machine's clock is wrong"),
    ),
    (ErrorKind.CERTIFICATE, "revoked"): ("the certificate has to be replaced by whoever shows it",),
    (ErrorKind.CERTIFICATE, "wrong_name"): (
        ("name the server with {}", "--server-name", "--upstream-name"),
        ("give a pin with {}", "--pin"),
    ),
    # A tunnel's server answered: it has no such port, or nobody may come in now.
    (ErrorKind.CONNECT, "port_taken"): ("ask for another public port, or for none",),
    (ErrorKind.CONNECT, "no_port"): (),
    (ErrorKind.CONNECT, "too_many_clients"): (),
    (ErrorKind.CONNECT, "undecided"): (),
    (ErrorKind.CONNECT, "refused"): (),
    # What a guest may have (sapper wasi run) is no limit of the system.
    (ErrorKind.RESOURCE_LIMIT, "fuel"): (("give it more: {}", "--fuel"),),
    (ErrorKind.RESOURCE_LIMIT, "memory"): (("give it more: {}", "--memory"),),
    (ErrorKind.RESOURCE_LIMIT, "capture"): (("leave out {}: what it prints is not kept then", "--json"),),
}

#: Options that have nothing to do with an error of this reason: what a tunnel's server refuses has come to
#: it, through TLS where there is any.
_NOT_IT: dict[str, frozenset[str]] = {"refused": frozenset(("--cert", "--psk-identity"))}


def hint(kind: ErrorKind, options: Collection[str], reason: str | None = None) -> str | None:
    """What to do next, where the command has these options; ``None`` where there is nothing to say."""
    said = []
    options = set(options) - _NOT_IT.get(reason or "", frozenset())
    for part in OF_REASON.get((kind, reason or ""), HINTS.get(kind, ())):
        if isinstance(part, str):
            said.append(part)
        else:
            text, *names = part
            said += [text.format(name) for name in names if name in options][:1]
    return ", or ".join(said) or None


def offered(arguments: Sequence[str]) -> set[str]:
    """The options of the command that is called so, ``--help`` and the like included."""
    from typer.main import get_command

    from sapper.cli import app

    command = get_command(app)
    for word in arguments:
        inner = getattr(command, "commands", {}).get(word)
        if inner is None:
            break
        command = inner
    return {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
