"""TLS of a running server: who is let in, what the others are told, and how a renewed certificate is taken.

Over one process and over two workers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import featserve
from featserve.config import load_config
from featserve.errors import DefinitionError, FeatserveError, Unavailable
from featserve.server.app import run
from featserve.server.service import SERVICE_NAME
from tests.certificates import Authority, Shown
from tests.serving import PATIENCE_S, Project, Server

pytest_plugins = ["tests.served"]

CONNECTIONS = 8
"""Enough to meet both of two workers."""
OTHERS_CA = "certificate is of no CA that the credentials trust"
REFUSED = "so does a server with TLS refuse a client without, and one that asks for certificates"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"))


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one process", "two workers"])
def workers(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


def ask(server: Server, credentials: grpc.ChannelCredentials | None) -> Any:
    """Write and read through a client with connections of its own; return what was read."""
    with featserve.connect(
        server.address, timeout=PATIENCE_S, connections=CONNECTIONS, credentials=credentials
    ) as client:
        place = {"country": ["nl"], "zip": ["1"]}
        token = client.write("weather", place | {"temp": [7.0], "wind": [0.0]}, event_time=datetime.now(UTC)).token
        answers = [
            client.get("compact", place | {"user_id": [1]}, at_least=token).column("weather.temp").to_list()
            for _ in range(CONNECTIONS)
        ]
    return answers


def refusals(server: Server, *all_credentials: grpc.ChannelCredentials | None) -> list[FeatserveError]:
    """Return what each of these clients is told. They try again for seconds, so all at the same time."""

    def refused(credentials: grpc.ChannelCredentials | None) -> FeatserveError:
        with (
            featserve.connect(server.address, timeout=PATIENCE_S, credentials=credentials) as client,
            pytest.raises(FeatserveError) as caught,
        ):
            client.list_services()
        return caught.value

    with ThreadPoolExecutor(len(all_credentials)) as pool:
        return list(pool.map(refused, all_credentials))


def told(errors: list[FeatserveError], server: Server, *messages: str) -> bool:
    """Say whether all are Unavailable, name the server and say these things, each in its turn."""
    return all(
        type(error) is Unavailable and str(error).startswith(f"{server.address}: ") and message in str(error)
        for error, message in zip(errors, messages, strict=True)
    )


def test_who_trusts_the_certificate_is_served(ours: Authority, others: Authority, workers: int, tmp_path: Path) -> None:
    """Reads, writes, health and reflection go over TLS; plaintext and a client that trusts another CA are told why."""
    with Server(Project.make(tmp_path / "project", workers=workers, **ours.issue().settings)) as server:
        assert ask(server, ours.trusted()) == [[7.0]] * CONNECTIONS
        with grpc.secure_channel(server.address, ours.trusted()) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            assert SERVICE_NAME in ProtoReflectionDescriptorDatabase(channel).get_services()
        errors = refusals(server, None, others.trusted(), grpc.ssl_channel_credentials())
        assert told(errors, server, REFUSED, OTHERS_CA, OTHERS_CA), errors
        assert ask(server, ours.trusted()) == [[7.0]] * CONNECTIONS
        assert server.stop() == 0


def test_clients_show_a_certificate(ours: Authority, others: Authority, workers: int, tmp_path: Path) -> None:
    """With tls_client_ca a client without a certificate, or with one of another CA, is refused, and told why."""
    settings = ours.issue().settings | {"tls_client_ca": str(ours.path)}
    with Server(Project.make(tmp_path / "project", workers=workers, **settings)) as server:
        assert ask(server, ours.trusted(ours.issue("client"))) == [[7.0]] * CONNECTIONS
        errors = refusals(server, ours.trusted(), ours.trusted(others.issue("client")), None)
        assert told(errors, server, REFUSED, REFUSED, REFUSED), errors


def test_a_renewed_certificate_is_taken(ours: Authority, others: Authority, workers: int, tmp_path: Path) -> None:
    """New connections meet the certificate that the files hold, or the one from before while they are wrong."""
    shown = Shown(tmp_path / "server.pem", tmp_path / "server.key")
    ours.issue(to=shown)
    with (
        Server(Project.make(tmp_path / "project", workers=workers, **shown.settings)) as server,
        featserve.connect(server.address, timeout=PATIENCE_S, credentials=ours.trusted()) as connected,
    ):
        services = connected.list_services()
        others.issue(to=shown)
        assert ask(server, others.trusted()) == [[7.0]] * CONNECTIONS
        assert told(refusals(server, ours.trusted()), server, OTHERS_CA)
        shown.key.write_text("-----BEGIN")
        assert ask(server, others.trusted()) == [[7.0]] * CONNECTIONS
        (complaint,) = {event["message"] for event in server.events() if event["level"] == "error"}
        assert complaint.startswith(f"still serving with the certificate from before: {shown.key}: not a key, in PEM")
        shown.certificate.unlink()
        assert ask(server, others.trusted()) == [[7.0]] * CONNECTIONS
        ours.issue("elsewhere.example", to=shown)
        errors = refusals(server, ours.trusted())
        assert told(errors, server, "certificate is for other names: connect by one of those"), errors
        assert connected.list_services() == services
        taken = [event for event in server.events() if event["message"] == "took a renewed certificate"]
        assert {event["certificate"] for event in taken} == {str(shown.certificate)}


def test_tls_to_a_server_without(server: Server, ours: Authority) -> None:
    """A client that asks for TLS where there is none is told so."""
    (error,) = refusals(server, ours.trusted())
    assert told([error], server, "what listens there has no TLS: connect without credentials"), error


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_does_not_start_with_a_wrong_file(ours: Authority, workers: int, tmp_path: Path) -> None:
    """A file that is missing, or a key of another certificate, is named before there is a store, a port or a worker."""
    shown = ours.issue()
    wrong: list[tuple[dict[str, str], str]] = [
        ({"tls_key": str(ours.issue("other").key)}, f"other.key: not a key, .* that belongs to {shown.certificate}"),
        ({"tls_client_ca": "missing.pem"}, f"cannot read {tmp_path}/missing.pem: No such file or directory"),
        ({"transport": "native"}, "'native' has no TLS: choose 'grpcio' or 'auto'"),
    ]
    for settings, complaint in wrong:
        project = Project.make(tmp_path, workers=workers, **shown.settings | settings)
        with pytest.raises(DefinitionError, match=complaint):
            run(load_config(project.folder))
        assert not project.store.exists()
