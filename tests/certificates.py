"""Certificates for tests: real ones, of authorities made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme

HERE = "127.0.0.1"


@dataclass(frozen=True)
class Shown:
    """The files of a certificate and its key."""

    certificate: Path
    key: Path

    @property
    def settings(self) -> dict[str, str]:
        """What [server] says of a server that shows it."""
        return {"tls_certificate": str(self.certificate), "tls_key": str(self.key)}


class Authority:
    """A certificate authority, whose own certificate is in the file ``path``."""

    def __init__(self, folder: Path) -> None:
        self._ca, self._folder = trustme.CA(key_type=trustme.KeyType.ECDSA), folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.path)

    def issue(self, name: str = HERE, *, to: Shown | None = None) -> Shown:
        """Issue a certificate for a host, in files of its own, or over those of another one."""
        shown = to or Shown(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        made = self._ca.issue_cert(name, key_type=trustme.KeyType.ECDSA)
        made.cert_chain_pems[0].write_to_path(shown.certificate)
        made.private_key_pem.write_to_path(shown.key)
        return shown

    def trusted(self, shown: Shown | None = None) -> grpc.ChannelCredentials:
        """Return the credentials of a client that trusts this authority, and shows a certificate."""
        pair = (None, None) if shown is None else (shown.key.read_bytes(), shown.certificate.read_bytes())
        return grpc.ssl_channel_credentials(self.path.read_bytes(), *pair)
