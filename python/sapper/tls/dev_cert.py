"""A certificate for development, signed by an authority that stays on this machine.

The authority is made once and kept, so that it has to be trusted once. Whoever has its key can pretend to be
any server to whoever trusts it: it is readable by its owner only, and is not for sharing.

Not here: the certificates themselves (native), and certificates for production.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from sapper import _arguments, _native
from sapper._options import config_error
from sapper.errors import ConfigError, ErrorContext, ResourceLimit, SapperError

__all__ = ["DevCertificate", "authority_folder", "make_dev_certificate", "trust_steps"]

DAY = 86_400.0
#: The authority's; a new one has to be trusted anew.
AUTHORITY_DAYS = 3650
#: Apple's systems believe no certificate that is valid for longer, whoever signed it.
MOST_DAYS = 825
#: What ``localhost`` means besides its name.
LOOPBACK = ("127.0.0.1", "::1")
CERTIFICATE, KEY = "authority.pem", "authority.key"


@dataclass(frozen=True, slots=True)
class DevCertificate:
    """What was made, and where.

    Attributes:
        chain: The certificate with its authority's behind it, PEM.
        key: Its key, PEM.
        authority: The authority's certificate, which clients have to trust.
        authority_made: Whether the authority is new.
        names: Names and addresses in the certificate.
        expires: Its end.
    """

    chain: Path
    key: Path
    authority: Path
    authority_made: bool
    names: tuple[str, ...]
    expires: datetime.datetime


def authority_folder() -> Path:
    """Where the authority is kept unless somebody says otherwise: ``$XDG_DATA_HOME/sapper/dev-ca``."""
    given = os.environ.get("XDG_DATA_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".local" / "share"
    return base / "sapper" / "dev-ca"


def make_dev_certificate(
    names: Sequence[str] = ("localhost",),
    *,
    folder: str | PathLike[str] = ".",
    ca_dir: str | PathLike[str] | None = None,
    days: int = 397,
    new_authority: bool = False,
    overwrite: bool = False,
) -> DevCertificate:
    """Makes a certificate and a key for these names, and the authority where there is none yet.

    The files are called after the first name (``__1.pem`` for ``::1``) and are readable by their owner only.

    Args:
        names: DNS names (``*.`` in front for any one label) and addresses, IPv4 and IPv6; ``localhost``
            stands for both loopback addresses too.
        folder: Where the two files go.
        ca_dir: Where the authority is kept; ``None`` is :func:`authority_folder`.
        days: How long it is valid, 1 to 825.
        new_authority: Replaces the authority: certificates of the old one are not believed by who trusts
            the new one.
        overwrite: Replaces the two files where they are there.

    Raises:
        ConfigError: A name is none, a file is there already, a folder cannot be written, or the authority's
            files cannot be used. Nothing was made.
        ResourceLimit: The disk is full. Nothing was made.
    """
    if isinstance(names, str | bytes) or not isinstance(names, Sequence):
        raise _arguments.wrong_type("names", "a sequence of names", names)
    wanted = [_arguments.text(name, "names") for name in names]
    if any(name.lower() == "localhost" for name in wanted):
        wanted += LOOPBACK
    _arguments.whole(days, "days", 1, MOST_DAYS)
    target = _arguments.file_path(folder, "folder")
    home = _arguments.file_path(ca_dir, "ca_dir") if ca_dir is not None else authority_folder()
    stem = _stem(wanted[0]) if wanted else "none"
    chain, key = target / f"{stem}.pem", target / f"{stem}.key"
    if not overwrite:
        for path in (chain, key):
            if os.path.lexists(path):
                raise _exists(path)
    with _locked(home):
        authority, made = _authority(home, new_authority)
        (the_chain, the_key), kept, expires = _native.dev_issue(authority, wanted, days * DAY)
        files = [(key, the_key, overwrite, "folder"), (chain, the_chain, overwrite, "folder")]
        if made:
            pair = zip((CERTIFICATE, KEY), authority, strict=True)
            files = [(home / name, content, new_authority, "ca_dir") for name, content in pair] + files
        _write(files)
    end = datetime.datetime.fromtimestamp(expires, datetime.UTC)
    return DevCertificate(chain, key, home / CERTIFICATE, made, tuple(kept), end)


def trust_steps(authority: Path) -> dict[str, str]:
    """How to make programs believe the authority: a command or a sentence for each kind."""
    path = str(authority)
    return {
        "Debian, Ubuntu": f"sudo cp {path} /usr/local/share/ca-certificates/sapper-dev.crt"
        " && sudo update-ca-certificates",
        "Fedora, RHEL": f"sudo trust anchor --store {path}",
        "macOS": "sudo security add-trusted-cert -d -r trustRoot"
        f" -k /Library/Keychains/System.keychain {path}",
        "Windows": f"certutil -addstore -user Root {path}",
        "Firefox": "Settings, Privacy & Security, View Certificates, Authorities, Import: choose the file, "
        f"tick 'identify websites' ({path})",
        "curl": f"curl --cacert {path} https://localhost:8443/",
        "Python": f'ssl.create_default_context(cafile="{path}"), or SSL_CERT_FILE={path}',
        "Sapper": f'Credentials.none(roots="{path}"), or --roots {path}',
    }


def _stem(name: str) -> str:
    """A name that a file may have, and that tells whose it is: ``_wildcard.app.test``, ``2001_db8__1``."""
    bare = name.removeprefix("[").removesuffix("]")
    plain = "".join(char if char.isalnum() or char in ".-" else "_" for char in bare)
    return plain.replace("_.", "_wildcard.", 1) if name.startswith("*.") else plain or "none"


def _exists(path: Path) -> SapperError:
    return config_error("overwrite", f"{path} is there already, and is not replaced unless that is asked for")


def _failed(what: str, path: Path, error: OSError, field: str) -> SapperError:
    message = f"cannot {what} {path}: {error.strerror}"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
    return (ResourceLimit if full else ConfigError)(message, ErrorContext(field=field, errno=error.errno))


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One at a time: two that start at once would make two. Folders that it made go when it fails."""
    missing = [one for one in (home, *home.parents) if not one.exists()]
    try:
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _failed("use", home, error, "ca_dir") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else uses it by now
            for one in missing:
                one.rmdir()
        raise


def _authority(home: Path, anew: bool) -> tuple[tuple[bytes, bytes], bool]:
    """The authority's certificate and key, and whether they are new and not written yet."""
    certificate, key = home / CERTIFICATE, home / KEY
    there = [os.path.lexists(path) for path in (certificate, key)]
    if anew or not any(there):
        return _native.dev_authority(AUTHORITY_DAYS * DAY), True
    if not all(there):
        raise config_error("ca_dir", f"{home} holds half an authority: only one of {CERTIFICATE} and {KEY}")
    try:
        if stat.S_IMODE(key.stat().st_mode) & 0o077:
            raise config_error("ca_dir", f"others can read {key}: take that right away, or make a new one")
        return (certificate.read_bytes(), key.read_bytes()), False
    except OSError as error:
        raise _failed("read", home, error, "ca_dir") from error


def _write(files: Sequence[tuple[Path, bytes, bool, str]]) -> None:
    """Makes files for their owner only (path, content, whether to replace, whose folder): all or none."""
    # Beside their places, and moved there once all are whole: nobody ever reads half of one, or an old
    # one's rights, and a disk that is full, or a folder that is not ours, has cost nothing that was there.
    with contextlib.ExitStack() as temporary, contextlib.ExitStack() as placed:
        fresh = []
        for path, content, _, field in files:
            with _telling(path, field):
                fresh.append(_beside(path, content, temporary))
        for (path, _, replace, field), one in zip(files, fresh, strict=True):
            with _telling(path, field):
                if replace:
                    one.replace(path)
                else:
                    path.hardlink_to(one)  # unlike a move, it fails where there is something
                    placed.callback(path.unlink, missing_ok=True)
        placed.pop_all()


def _beside(path: Path, content: bytes, temporary: contextlib.ExitStack) -> Path:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    number = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    temporary.callback(fresh.unlink, missing_ok=True)
    with open(number, "wb") as file:
        file.write(content)
    return fresh


@contextlib.contextmanager
def _telling(path: Path, field: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise _failed("write", path, error, field) from error
