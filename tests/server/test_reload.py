"""How a running server takes what is newly applied: no request fails, and clients follow."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

import featserve
from featserve._proto import serving_pb2 as pb
from featserve.errors import InvalidRequest, UnknownName
from tests.server.messages import wide
from tests.serving import DEFINITIONS, TRANSPORTS, Project, Server, until

pytest_plugins = ["tests.served"]

KEYS = {"user_id": [1, 2], "country": ["de", "fr"], "zip": ["1", "2"]}


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


def test_a_client_asks_as_the_new_version_says(following: Server) -> None:
    """A client that knew a version sends what the next one asks for, and may stay with the old one by its number."""
    device = {"serial": [b"x", b"y"], "made": [datetime.now(UTC)] * 2, "model": [1, 2], "real": [True, False]}
    following.apply('first = FeatureService("changing", [activity["score"], weather])')
    with following.client() as client:
        assert client.get("changing", KEYS).values.shape == (2, 3)
        following.apply('second = FeatureService("changing", [activity["score"], health], version=2)')
        assert client.get("changing", {"user_id": [1, 2]} | device).values.shape == (2, 2)
        with pytest.raises(InvalidRequest, match="missing key column 'serial'"):
            client.get("changing", KEYS)
        assert client.get("changing@1", KEYS).values.shape == (2, 3)


def test_sighup_takes_what_was_applied_at_once(transport: str, tmp_path: Path) -> None:
    """A server of an empty project starts and says so; on SIGHUP it takes what was applied since."""
    project = Project(tmp_path)
    project.configure(server={"port": 0, "registry_poll_seconds": 86_400} | TRANSPORTS[transport])
    with Server(project) as server, server.client() as client:
        (warning,) = [event["message"] for event in server.events() if event["level"] == "warning"]
        assert "nothing is applied: run `featserve apply`" in warning
        assert client.list_services() == []
        with pytest.raises(UnknownName, match="there are none"):
            client.get("wide", {"user_id": [1]})
        project.apply(DEFINITIONS)
        assert client.list_services() == []
        server.signal(signal.SIGHUP)
        until("the new definitions are served", client.list_services)
        assert client.get("wide", {"user_id": [1]}).view_status.tolist() == [[featserve.Status.NOT_FOUND]]
        server.signal(signal.SIGHUP)  # with nothing new
        assert server.stop() == 0


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
