"""Errors as gRPC states them: one table from class to code, and the details that a program can read.

The details are google.rpc.Status with ErrorInfo and BadRequest, in the ``grpc-status-details-bin`` trailer.
"""

from __future__ import annotations

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from featserve import errors
from featserve._proto import errors_pb2 as pb

DOMAIN = "featserve"
DETAILS_KEY = "grpc-status-details-bin"

# The nearest class on an error's way to the root counts.
CODES: dict[type[errors.FeatserveError], int] = {
    errors.FeatserveError: 13,  # INTERNAL
    errors.CallerError: 3,  # INVALID_ARGUMENT
    errors.DefinitionError: 9,  # FAILED_PRECONDITION
    errors.RegistryConflict: 9,
    errors.UnknownName: 5,  # NOT_FOUND
    errors.SchemaMismatch: 9,
    errors.Overloaded: 8,  # RESOURCE_EXHAUSTED
    errors.DeadlineExceeded: 4,  # DEADLINE_EXCEEDED
    errors.Unavailable: 14,  # UNAVAILABLE
    errors.StoreError: 13,
    errors.StoreLocked: 9,
    errors.StoreFull: 8,
    errors.CorruptRow: 15,  # DATA_LOSS
}


def code_of(error: errors.FeatserveError) -> int:
    """Return the number of the gRPC status code for an error."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def encode_error(error: errors.FeatserveError) -> pb.ErrorStatus:
    """Return the google.rpc.Status of an error: an ErrorInfo and, where fields are at fault, a BadRequest."""
    status = pb.ErrorStatus(code=code_of(error), message=str(error))
    info = pb.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    status.details.append(_any("google.rpc.ErrorInfo", info))
    if error.violations:
        bad = pb.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        status.details.append(_any("google.rpc.BadRequest", bad))
    return status


def _any(name: str, message: Message) -> AnyMessage:
    return AnyMessage(type_url=f"type.googleapis.com/{name}", value=message.SerializeToString())
