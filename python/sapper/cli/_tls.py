"""The options of TLS of a command: :class:`TlsFlags` says which, :func:`with_tls` reads them.

A command has one parameter for each end that speaks TLS::

    @with_tls
    def bridge(..., *, tls: Annotated[TypedTls, TlsFlags("TLS")]) -> None:
        config = tls.config()

Not here: the list of options (:mod:`sapper.cli._tls_options`), and what they mean
(:class:`~sapper.tls.TlsConfig`).
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from sapper._mistakes import config_error, unused
from sapper.cli._names import Words, naming, of_file
from sapper.cli._tls_options import PASSWORD, PSK, TLS_OPTIONS, Role, TlsOption, option, tls_words, variable

if TYPE_CHECKING:
    from sapper.tls import Credentials, PeerRules, TlsConfig

__all__ = ["TlsFlags", "TypedTls", "with_tls"]


#: What is documented to hold where an option is left away, or turns off what is off: typed, it asks for
#: nothing, and is never refused.
_USUAL: Mapping[str, tuple[object, ...]] = {
    "client-auth": ("off",),
    "ocsp": ("check", "off"),
    "min-tls": ("1.2",),
    "max-tls": ("1.3",),
    "ticket-lifetime": (21_600.0,),
}


class TlsFlags:
    """Which options of TLS a command has, and what they are called there."""

    def __init__(
        self,
        panel: str,
        *,
        prefix: str = "",
        role: Role | None = None,
        renamed: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Says which.

        Args:
            panel: Their heading in the help.
            prefix: Stands in front of their names.
            role: Which end we are; without it the endpoints decide: :meth:`TypedTls.fit`.
            renamed: Those that are called otherwise, by their usual names.
            texts: What the help says of them here, by their usual names.
        """
        self.prefix = prefix
        self.role = role
        self._panel = panel
        self._renamed = renamed or {}
        self._texts = texts or {}

    def option(self, name: str) -> str:
        """An option as it is typed here, by its usual name."""
        return option(name, self.prefix, self._renamed)

    def variable(self, name: str) -> str:
        """A variable of the environment."""
        return variable(name, self.prefix)

    def words(self) -> dict[str, str]:
        """What is typed here for an option of the API."""
        return tls_words(self.prefix, self._renamed)

    @property
    def offered(self) -> list[TlsOption]:
        """Those that the end has a use for."""
        return [one for one in TLS_OPTIONS if one.role is None or self.role in (None, one.role)]

    def parameters(self) -> Iterator[tuple[str, inspect.Parameter]]:
        """The command's parameters, by the options' usual names."""
        for one in self.offered:
            text = self._texts.get(one.name, one.text).format(
                **{name: self.option(name) for name in ("roots", "pin")},
                password=self.variable(PASSWORD),
                psk=self.variable(PSK),
            )
            typed = self.option(one.name)
            read = typer.Option(typed, help=text, rich_help_panel=self._panel)
            yield (
                one.name,
                inspect.Parameter(
                    typed.removeprefix("--").replace("-", "_"),
                    inspect.Parameter.KEYWORD_ONLY,
                    default=False if one.kind is bool else None,
                    annotation=Annotated[one.kind, read],
                ),
            )


def with_tls(command: Callable[..., None]) -> Callable[..., None]:
    """A command with options of TLS in place of each parameter that is annotated with :class:`TlsFlags`."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    ends: dict[str, tuple[TlsFlags, dict[str, str]]] = {}
    for parameter in signature.parameters.values():
        marks = [mark for mark in get_args(parameter.annotation)[1:] if isinstance(mark, TlsFlags)]
        if not marks:
            parameters.append(parameter)
            continue
        made = dict(marks[0].parameters())
        parameters += made.values()
        ends[parameter.name] = marks[0], {name: one.name for name, one in made.items()}

    @functools.wraps(command)
    def called(**values: Any) -> None:
        for end, (flags, names) in ends.items():
            given = {name: values.pop(parameter) for name, parameter in names.items()}
            values[end] = TypedTls(flags, given)
        command(**values)

    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return called


class TypedTls:
    """What was typed of one end's TLS."""

    def __init__(self, flags: TlsFlags, values: Mapping[str, Any]) -> None:
        self._flags = flags
        #: By the usual names; nothing but what was typed.
        self._given = {
            name: value
            for name, value in values.items()
            if value is not None and value is not False and value != []
        }

    def __bool__(self) -> bool:
        return bool(self._given)

    @property
    def first(self) -> str | None:
        """The first of the list that was typed: what an error about all of it is called."""
        named = (one.name for one in TLS_OPTIONS if one.name in self._given and not self._is_usual(one.name))
        return next(map(self._option, named), next(iter(self.typed), None))

    @property
    def typed(self) -> list[str]:
        """Those that were typed, in the order of the help."""
        return [self._flags.option(one.name) for one in TLS_OPTIONS if one.name in self._given]

    def words(self) -> dict[str, str]:
        """What was typed here for an option of the API."""
        words = self._flags.words()
        psk = [self._option(name) for name in ("psk-identity", "psk-file") if name in self._given]
        if psk:
            words["credentials"] = psk[0]
            words["key"] = psk[-1] if "psk-file" in self._given else self._flags.variable(PSK)
        elif "pkcs12" in self._given:
            words["credentials"] = self._option("pkcs12")
        return words

    @property
    def says_anything(self) -> bool:
        """Whether something else was typed than what holds anyway."""
        return any(not self._is_usual(name) for name in self._given)

    def _is_usual(self, name: str) -> bool:
        return self._given[name] in _USUAL.get(name, ())

    def config(self, base: TlsConfig | None = None, table: str = "tls") -> TlsConfig:
        """The configuration of what was typed.

        Args:
            base: What a file says; what was typed comes first.
            table: The file's table for it.

        Raises:
            ConfigError: A value is wrong; its field is what was typed, or ``--config``.
        """
        from sapper.tls import TlsConfig

        kept = {name: getattr(base, name) for name in base.model_fields_set} if base is not None else {}
        given = self._values()
        words = Words(self.words(), table)
        words.in_file = kept.keys() - given.keys()
        with words:
            made = TlsConfig.from_mapping({**kept, **given})
        if self._flags.role == "server" and made.credentials.kind == "none":
            cert, key, *others = (self._option(name) for name in ("cert", "key", "pkcs12", "psk-identity"))
            raise config_error(cert, f"a server's TLS needs {cert} and {key}, {' or '.join(others)}")
        if self._flags.role is not None:
            self.fit(made, {self._flags.role})
        return made

    def fit(self, made: TlsConfig, roles: Collection[Role], base: TlsConfig | None = None) -> None:
        """Refuses what no end has a use for.

        Args:
            made: The configuration.
            roles: The ends that it is for.
            base: What a file's table ``[tls]`` says, which is for these ends alone.

        Raises:
            ConfigError: One was typed; its field is that one, or ``--config``.
        """
        from sapper.tls.config import asks_clients

        self.fit_roles(roles, base)
        if set(roles) == {"server"} and not asks_clients(made):
            why = f"is about clients' certificates, which nobody asks for: {self._option('client-auth')}"
            for one in TLS_OPTIONS:
                if one.name in ("roots", "pin", "allow", "crl", "danger-accept-any-certificate"):
                    self._refuse_either(one, why, base)

    def fit_roles(self, roles: Collection[Role], base: TlsConfig | None = None) -> None:
        """The same of what is for other ends, before anything is made of it."""
        for one in TLS_OPTIONS:
            if one.role is not None and roles and one.role not in roles:
                self._refuse_either(one, f"is for a {one.role}: it has no use here", base)

    def _refuse(self, wrong: bool, name: str, why: str) -> None:
        if wrong and name in self._given and not self._is_usual(name):
            raise unused(self._option(name), why)

    def _refuse_either(self, one: TlsOption, why: str, base: TlsConfig | None) -> None:
        self._refuse(True, one.name, why)
        if base is not None and one.name not in self._given and (said := _said(base, one)) is not None:
            raise of_file(unused(said, why), "tls")

    def _option(self, name: str) -> str:
        return self._flags.option(name)

    def _values(self) -> dict[str, Any]:
        """As TlsConfig takes them."""
        given = self._given
        own = {
            "credentials": self._credentials(),
            "more_credentials": self._more(),
            "roots": _roots(given.get("roots")),
            "peer_rules": [self._rule(text) for text in given["allow"]] if "allow" in given else None,
            "alpn": given["alpn"].split(",") if "alpn" in given else None,
            "resumption": False if "no-resumption" in given else None,
            "min_version": _version(given.get("min-tls")),
            "max_version": _version(given.get("max-tls")),
        }
        made_of_several = {"cert", "key", "pkcs12", "ocsp-response", "psk-identity", "psk-file", "more-key"}
        for one in TLS_OPTIONS:
            if one.name in given and one.name not in made_of_several and one.fields:
                own.setdefault(one.fields[0], given[one.name])
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in own.items()
            if value is not None
        }

    def _rule(self, text: str) -> PeerRules:
        from sapper.tls import PeerRules

        kind, colon, value = text.partition(":")
        if not colon or kind not in PeerRules.model_fields:
            words = ", ".join(PeerRules.model_fields)
            raise config_error(self._option("allow"), f"{text!r} is not one of {words}, a colon, a value")
        with naming(self.words()):
            return PeerRules.from_mapping({kind: (value,)})

    def _more(self) -> tuple[Credentials, ...] | None:
        from sapper.tls import Credentials

        certs, keys = self._given.get("more-cert", ()), self._given.get("more-key", ())
        names = [self._option(name) for name in ("more-cert", "more-key")]
        if len(certs) != len(keys):
            raise config_error(names[1], f"{' and '.join(names)} belong together, in the same order")
        words = dict(zip(("chain", "key"), names, strict=True))
        with naming(self.words() | words):
            made = [Credentials.certificate(*pair) for pair in zip(certs, keys, strict=True)]
        return tuple(made) or None

    def _credentials(self) -> Credentials | None:
        from sapper.tls import Credentials

        given = self._given
        cert, key, pkcs12 = (given.get(name) for name in ("cert", "key", "pkcs12"))
        staple = given.get("ocsp-response")
        psk = [name for name in ("psk-identity", "psk-file") if name in given]
        if cert is None and pkcs12 is None:
            self._refuse(
                True,
                "ocsp-response",
                f"a response is about a certificate: give {self._option('cert')} or {self._option('pkcs12')}",
            )
        password = os.environ.get(self._flags.variable(PASSWORD))
        if pkcs12 is not None:
            self._refuse(
                bool(cert or key or psk),
                "pkcs12",
                "a PKCS#12 file has both certificate and key: give nothing beside it",
            )
            with naming(self.words()):
                return Credentials.pkcs12(pkcs12, password, ocsp_response=staple)
        if cert is not None or key is not None:
            names = [self._option(name) for name in ("cert", "key")]
            if cert is None or key is None:
                missing = names[0] if cert is None else names[1]
                raise config_error(missing, f"{' and '.join(names)} belong together")
            if psk:
                self._refuse(True, psk[0], "a certificate and a pre-shared key exclude each other")
            with naming(self.words()):
                return Credentials.certificate(cert, key, password=password, ocsp_response=staple)
        return self._psk() if psk else None

    def _psk(self) -> Credentials:
        from sapper.tls import Credentials

        file, name, from_environment = (
            self._given.get("psk-file"),
            self._option("psk-file"),
            self._flags.variable(PSK),
        )
        secret = os.environ.get(from_environment) if file is None else _key_in(file, name)
        if file is not None and not secret:
            raise config_error(name, f"{file} holds no key")
        if not secret:
            raise config_error(name, f"a pre-shared key comes from {name} or from {from_environment}")
        with naming(self.words()):
            return Credentials.psk(self._given.get("psk-identity", ""), secret)


def _said(config: TlsConfig, one: TlsOption) -> str | None:
    """Where a configuration says what an option does, other than what holds anyway."""
    field = one.fields[0] if one.fields else ""
    for table, where in ((config, field), (config.credentials, f"credentials.{field}")):
        if (found := type(table).model_fields.get(field)) is not None:
            value = getattr(table, field)
            if value != found.default and value not in _USUAL.get(one.name, ()):
                return where
    return None


def _roots(typed: str | None) -> Path | str | None:
    return Path(typed) if typed not in (None, "system") else typed


def _version(typed: str | None) -> str | None:
    return typed and f"TLSv{typed}"


def _key_in(file: Path, name: str) -> bytes:
    from sapper.tls.material import PskBytes

    try:
        return PskBytes.of_file(file)
    except ValueError as error:
        raise config_error(name, str(error)) from None
