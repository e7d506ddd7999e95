"""Which transport a server has: grpcio, or pygrpc-native.

A third would be a class with the same three methods, and a name in the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

from featserve.config import ServerConfig
from featserve.errors import DefinitionError
from featserve.server.forward import Forward
from featserve.server.grpcio import GrpcioServer
from featserve.server.service import Service
from featserve.server.telemetry import Telemetry

NATIVE_PACKAGE = "pygrpc_native"
NATIVE_CONFORMS = False
"""Whether pygrpc-native passes every test that grpcio does: "auto" waits for that. The tests say what it fails."""


class Transport(Protocol):
    """A server of the service on one address."""

    async def start(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Listen; return the port. Raises ServingError where the address cannot be had."""

    async def drain(self, seconds: float) -> None:
        """Say NOT_SERVING, let calls in flight finish for up to ``seconds``, then end those that are left."""


def transport(config: ServerConfig) -> Callable[[Service, ServerConfig, Telemetry, Forward | None], Transport]:
    """Return the class of the configured transport; with TLS it is grpcio.

    Raises DefinitionError where it is not installed, or has no TLS.
    """
    if config.tls_certificate is not None:
        if config.transport == "native":
            raise DefinitionError(
                "[server] transport: 'native' has no TLS: choose 'grpcio' or 'auto', or leave TLS to a proxy and take "
                "tls_certificate and tls_key out"
            )
        return GrpcioServer
    installed = find_spec(NATIVE_PACKAGE) is not None
    if config.transport == "grpcio" or (config.transport == "auto" and not (installed and NATIVE_CONFORMS)):
        return GrpcioServer
    if not installed:
        raise DefinitionError(
            "[server] transport: 'native' needs pygrpc-native: pip install 'featserve[native]', or choose 'grpcio'"
        )
    from featserve.server.native import NativeServer

    return NativeServer
