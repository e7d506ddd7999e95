"""TLS: from files of certificates and keys, in PEM, to the credentials that gRPC takes.

Comes in: paths. Goes out: credentials made of files that were checked, so that the file at fault is named here and not
in gRPC's log. Those of a server follow its files. Knows neither settings nor a command line.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from featserve.errors import DefinitionError

log = logging.getLogger("featserve.server")


@dataclass(frozen=True, slots=True)
class Pem:
    """What is in the files: a certificate, followed by those between it and its CA, its key, and the CAs to trust."""

    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    ca: bytes | None = None

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return a client's credentials; without ``ca`` they trust the public CAs that gRPC brings along."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


def read_pem(certificate: Path | None, key: Path | None, ca: Path | None) -> Pem:
    """Read a certificate with its key, both or neither, and a file of CAs; raises DefinitionError naming a wrong file.

    A key that has a password is refused, as nobody is there to type it.
    """
    found = Pem(_content(certificate), _content(key), _content(ca))
    for path in (certificate, ca):
        if path is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
            except OSError as error:
                raise DefinitionError(f"{path}: no certificate in PEM ({_reason(error)})") from None
    if certificate is not None and key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except OSError as error:
            raise DefinitionError(
                f"{key}: not a key, in PEM and without a password, that belongs to {certificate} ({_reason(error)})"
            ) from None
    return found


def _content(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise DefinitionError(f"cannot read {path}: {error.strerror}") from None


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror)


NO_TRUST = "the server's certificate is of no CA that the credentials trust"
REFUSED = (
    "so does a server with TLS refuse a client without, and one that asks for certificates a client that has none, or "
    "one of another CA"
)
ADVICE = {
    "WRONG_VERSION_NUMBER": "what listens there has no TLS: connect without credentials",
    "local issuer certificate": NO_TRUST,
    "self signed certificate": NO_TRUST,
    "Hostname Verification": "the server's certificate is for other names: connect by one of those",
    "Socket closed": REFUSED,
    "reset by peer": REFUSED,
}
"""What to make of gRPC's words on a connection that came to nothing."""


def advice(details: str) -> str:
    """Return, after "; ", what may be wrong with TLS where a call failed with ``details``; empty where nothing is."""
    if not details.startswith("failed to connect"):
        return ""
    return next((f"; {what}" for words, what in ADVICE.items() if words in details), "")


class Certificates:
    """A server's files: its certificate, the key of that, and with ``client_ca`` the CAs of all clients it lets in.

    They are looked at for each new connection, so that a renewed certificate needs no restart. Where they have changed
    and are wrong, that is logged, and what they were stays in use.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        """Read the files; raises DefinitionError naming a wrong one."""
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._seen = self._state()
        self._first = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials to listen with; a client that must show a certificate, and has none, is refused."""
        renewed: Any = self._renewed  # None means no change, which its type does not say
        return grpc.dynamic_ssl_server_credentials(self._first, renewed, self._client_ca is not None)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what a new connection is answered with, None where that has not changed; gRPC's threads call this."""
        # The state comes before the content: what changes in between is seen at the next connection.
        state = self._state()
        if state == self._seen:
            return None
        self._seen = state
        try:
            found = self._read()
        except DefinitionError as error:
            log.error("still serving with the certificate from before: %s", error)
            return None
        log.info("took a renewed certificate", extra={"certificate": str(self._certificate)})
        return found

    def _state(self) -> list[tuple[int, int, int] | None]:
        return [_version(path) for path in (self._certificate, self._key, self._client_ca) if path is not None]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pem = read_pem(self._certificate, self._key, self._client_ca)
        assert pem.key is not None and pem.certificate is not None
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.ca)


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
