"""How a running server takes what is newly applied: no request fails, and clients follow."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial

import pytest

import featserve
from featserve._proto import serving_pb2 as pb
from featserve.errors import InvalidRequest
from tests.server.messages import wide
from tests.serving import DEFINITIONS, Server, until

pytest_plugins = ["tests.served"]

KEYS = {"user_id": [1, 2], "country": ["de", "fr"], "zip": ["1", "2"]}
NEXT_VERSION = """
ranking_2 = FeatureService("ranking", [activity["score"], weather], version=2)
"""
MORE_KEYS = """
ranking_3 = FeatureService("ranking", [activity["score"], health], version=3)
"""


def test_a_new_version_fails_no_request(following: Server) -> None:
    """While versions are applied under load, every request is answered, wholly by one version, in the end the last."""
    stop = threading.Event()
    before = errors(following)

    def ask() -> list[featserve.FeatureMatrix]:
        answers = []
        with following.client() as client:
            while not stop.is_set():
                answers.append(client.get("ranking", KEYS))
                assert client.get("ranking@1", KEYS).schema.version == 1
            answers.append(client.get("ranking", KEYS))
        return answers

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        for version in range(2, 7):
            chosen = "activity, weather" if version % 2 else 'activity["score"], weather'
            following.apply(f'next_{version} = FeatureService("ranking", [{chosen}], version={version})')
        stop.set()
        answers = [work.result() for work in asking]
    for matrices in answers:
        versions = [m.schema.version for m in matrices]
        assert versions == sorted(versions)
        assert versions[-1] == 6
        # Version 1 is of float64, whose tensor holds int32, too.
        widths = {1: 10} | {version: 9 if version % 2 else 3 for version in range(2, 7)}
        assert all(m.values.shape == (2, widths[m.schema.version]) for m in matrices)
    assert len({m.schema.version for matrices in answers for m in matrices}) > 2
    assert errors(following) == before


def test_sighup_takes_what_was_applied_at_once(start: Callable[..., Server]) -> None:
    """A server that looks at its registry once a day takes a new version on SIGHUP, and clients follow.

    A client that knew the old version sends what the new one asks for.
    """
    server = start(registry_poll_seconds=86_400)
    device = {"serial": [b"x", b"y"], "made": [datetime.now(UTC)] * 2, "model": [1, 2], "real": [True, False]}
    with server.client() as client:
        assert client.get("ranking", KEYS).schema.version == 1
        server.project.apply(DEFINITIONS + NEXT_VERSION + MORE_KEYS)
        assert client.get("ranking", KEYS).schema.version == 1
        server.signal(signal.SIGHUP)
        until("the server has taken it", lambda: client.describe("ranking").version == 3)
        # The client knew the old schema, and what to send has changed since.
        assert client.get("ranking", {"user_id": [1, 2]} | device).values.shape == (2, 2)
        with pytest.raises(InvalidRequest, match="missing key column 'serial'"):
            client.get("ranking", KEYS)
        assert client.get("ranking@2", KEYS).values.shape == (2, 3)
        server.signal(signal.SIGHUP)  # with nothing new
        assert client.get("ranking@1", KEYS).values.shape == (2, 10)


def test_a_lost_registry_stops_nothing(following: Server) -> None:
    """A registry that cannot be read is logged, and what was served goes on; once it is back it is followed again."""
    registry = following.project.folder / ".featserve" / "registry.db"
    whole = registry.read_bytes()
    with following.stub() as stub:
        for damage in (lambda: registry.write_bytes(b"no database" * 1_000), registry.unlink):
            damage()
            # The first of these may be about what was there before.
            until("the server notices", partial(failing, following, len(errors(following)) + 2))
            assert stub.GetFeatures(wide(1)).rows == 1
        registry.unlink(missing_ok=True)
        registry.write_bytes(whole)
        following.apply('back = FeatureService("back", [weather])')
        assert stub.DescribeService(pb.DescribeServiceRequest(service="back")).schema.width == 2
    assert all("still serving" in message for message in errors(following))


def failing(server: Server, times: int) -> bool:
    return len(errors(server)) >= times


def errors(server: Server) -> list[str]:
    return [event["message"] for event in server.events() if event["level"] == "error"]
