"""The options of every verb that asks a running server: where it is, and how its certificate is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from featserve.client import Client, connect
from featserve.tls import Pem, read_pem

Verb = TypeVar("Verb", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Target:
    """A running server: ``address`` is HOST:PORT, ``tls`` None for plaintext."""

    address: str
    tls: Pem | None

    def connect(self) -> Client:
        """Return a client of it."""
        return connect(self.address, credentials=None if self.tls is None else self.tls.channel_credentials())


def address(text: str) -> str:
    """Return where a server listens, ``HOST:PORT``. gRPC would take a port over 65,535 for another one."""
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise click.BadParameter(f"{text!r} is not HOST:PORT, as in 127.0.0.1:7070")
    return text


def asks(option: str, what: str, *, required: bool = False) -> Callable[[Verb], Verb]:
    """Add the options of a running server to a verb, which gets them as ``target``, a Target or None.

    ``option``: the name of the one for its address. Any option of TLS asks for TLS.
    """
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    options = (
        click.option(option, "where", type=address, metavar="HOST:PORT", required=required, help=what),
        click.option("--tls", is_flag=True, help="Ask it over TLS."),
        click.option("--ca", type=file, help="Over TLS, trust these CAs instead of the public ones."),
        click.option("--cert", type=file, help="Over TLS, show it this certificate."),
        click.option("--key", "cert_key", type=file, help="The key of that certificate."),
    )

    def asking(verb: Verb) -> Verb:
        @wraps(verb)
        def made(
            *args: Any,
            where: str | None,
            tls: bool,
            ca: Path | None,
            cert: Path | None,
            cert_key: Path | None,
            **others: Any,
        ) -> Any:
            if (cert is None) != (cert_key is None):
                raise click.UsageError("--cert FILE and --key FILE go together.")
            secure = tls or ca is not None or cert is not None
            if secure and where is None:
                raise click.UsageError(f"--tls, --ca, --cert and --key go with {option} HOST:PORT.")
            target = None if where is None else Target(where, read_pem(cert, cert_key, ca) if secure else None)
            return verb(*args, target=target, **others)

        for each in reversed(options):
            made = each(made)
        return made  # type: ignore[return-value]

    return asking
