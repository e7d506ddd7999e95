"""Files of TLS: what is read from them, and what is said of those that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from featserve.errors import DefinitionError
from featserve.tls import Pem, advice, read_pem
from tests.certificates import Authority, Shown


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def shown(authority: Authority) -> Shown:
    return authority.issue()


def test_files_are_read_as_they_are(authority: Authority, shown: Shown) -> None:
    """What the files hold goes to gRPC unchanged, what is not named is not there, and no key is shown."""
    pem = read_pem(shown.certificate, shown.key, authority.path)
    assert pem == Pem(*(path.read_bytes() for path in (shown.certificate, shown.key, authority.path)))
    assert "PRIVATE" not in repr(pem)
    assert read_pem(None, None, authority.path) == Pem(ca=authority.path.read_bytes())
    assert read_pem(None, None, None) == Pem()


def test_text_around_certificates_is_let_be(authority: Authority, shown: Shown) -> None:
    """A bundle may have comments, in any encoding."""
    authority.path.write_bytes("# Főtanúsítvány\n".encode("iso-8859-2") + authority.path.read_bytes())
    assert read_pem(shown.certificate, shown.key, authority.path).ca == authority.path.read_bytes()


def test_a_wrong_file_is_named(authority: Authority, shown: Shown, tmp_path: Path) -> None:
    """Whatever is wrong, the error has the path of the file and what should be in it."""
    junk, empty, locked = tmp_path / "junk.pem", tmp_path / "empty.pem", tmp_path / "locked.key"
    junk.write_bytes(b"\xff\x00junk")
    empty.touch()
    key = serialization.load_pem_private_key(shown.key.read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    other = authority.issue("other")
    wrong: list[tuple[tuple[Path | None, Path | None, Path | None], str]] = [
        ((tmp_path / "missing.pem", shown.key, None), "cannot read .*/missing.pem: No such file or directory"),
        ((shown.certificate, tmp_path, None), f"cannot read {tmp_path}: Is a directory"),
        ((junk, shown.key, None), f"{junk}: no certificate in PEM"),
        ((shown.key, shown.key, None), f"{shown.key}: no certificate in PEM"),
        ((shown.certificate, junk, None), f"{junk}: not a key, in PEM and without a password, that belongs to"),
        ((shown.certificate, other.key, None), f"{other.key}: not a key, .* that belongs to {shown.certificate}"),
        ((shown.certificate, locked, None), f"{locked}: not a key, in PEM and without a password"),
        ((None, None, empty), f"{empty}: no certificate in PEM"),
        ((shown.certificate, shown.key, shown.key), f"{shown.key}: no certificate in PEM"),
    ]
    for files, complaint in wrong:
        with pytest.raises(DefinitionError, match=complaint):
            read_pem(*files)


def test_advice_is_only_on_connections() -> None:
    """What fails for another reason gets no advice on TLS."""
    assert advice("failed to connect to all addresses; last error: ipv4:127.0.0.1:1: Socket closed").startswith("; so")
    assert advice("failed to connect to all addresses; last error: Connection refused") == ""
    assert advice("Socket closed") == ""
