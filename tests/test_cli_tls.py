"""The command line against a server with TLS: every verb that asks a server, and what they say without it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from featserve.config import FILE
from tests.certificates import Authority
from tests.command_line import NOW, declare, run, serving, write_data

KEYS = ("user_id=1", "country=NZ", "zip=1010")


@pytest.mark.slow
def test_every_verb_takes_tls(tmp_path: Path) -> None:
    """Over mutual TLS, verbs that write and read do what they do without; without a certificate, they say why not."""
    declare(tmp_path)
    write_data(tmp_path)
    authority = Authority(tmp_path / "tls")
    shown, mine = authority.issue(), authority.issue("me")
    settings = shown.settings | {"tls_client_ca": "tls/ca.pem"}
    with (tmp_path / FILE).open("a") as file:
        file.write("[server]\n" + "".join(f'{name} = "{path}"\n' for name, path in settings.items()))
    run("apply", "-C", tmp_path)
    with serving(tmp_path) as (address, _):
        trusting = ("--ca", authority.path, "--cert", mine.certificate, "--key", mine.key)
        sent = run("materialize", "score", "area", "--to", address, *trusting, "-C", tmp_path).stdout
        assert re.search(r"score@1 +4 +3 ", sent)
        asked = ("--server", address, *trusting)
        assert "Auckland" in run("get", "fraud", *KEYS, "--as-of", NOW.isoformat(), *asked).stdout
        assert "fraud" in run("list", *asked).stdout
        assert "risk" in run("describe", "fraud", *asked).stdout
        loaded = ("--rounds", "1", "--round", "0.2", "--warm-up", "0", "--connections", "1")
        assert "Latencies are in microseconds" in run("load-test", "bulk", "user_id=1..9", *asked, *loaded).stdout
        refused = run("list", "--server", address, "--ca", authority.path, code=1).stderr
        assert "one that asks for certificates a client that has none" in " ".join(refused.split())


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    """A certificate without its key, TLS without a server and a file that is no CA are refused before any call."""
    certificate = Authority(tmp_path).issue().certificate
    junk = tmp_path / "junk.pem"
    junk.touch()
    server = ("--server", "127.0.0.1:1")
    assert "--cert FILE and --key FILE go together" in run("list", *server, "--cert", certificate, code=2).stderr
    assert "go with --server HOST:PORT" in run("list", "--tls", code=2).stderr
    assert "no certificate in PEM" in " ".join(run("list", *server, "--ca", junk, code=1).stderr.split())
