"""Errors as gRPC states them: one table from class to code, and the details that a program can read.

The details are google.rpc.Status with ErrorInfo and BadRequest, in the ``grpc-status-details-bin`` trailer.
"""

from __future__ import annotations

import logging

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from featserve import errors
from featserve._proto import errors_pb2 as pb

log = logging.getLogger("featserve.server")

DOMAIN = "featserve"
DETAILS_KEY = "grpc-status-details-bin"

# What an error may take. The message travels twice, in one place as three bytes for each byte that is not ASCII; the
# details as four bytes for three.
MESSAGE_BYTES = 900
DETAIL_BYTES = 160
VIOLATIONS = 8

# The nearest class on an error's way to the root counts.
CODES: dict[type[errors.FeatserveError], int] = {
    errors.FeatserveError: 13,  # INTERNAL
    errors.CallerError: 3,  # INVALID_ARGUMENT
    errors.DefinitionError: 9,  # FAILED_PRECONDITION
    errors.RegistryConflict: 9,
    errors.UnknownName: 5,  # NOT_FOUND
    errors.SchemaMismatch: 9,
    errors.AnswerTooLarge: 8,  # RESOURCE_EXHAUSTED, as gRPC says of a message over its limit
    errors.Overloaded: 8,
    errors.DeadlineExceeded: 4,  # DEADLINE_EXCEEDED
    errors.Unavailable: 14,  # UNAVAILABLE
    errors.NotBegun: 1,  # CANCELLED, as gRPC itself says of a call that it has not begun when it stops
    errors.StoreError: 13,
    errors.StoreLocked: 9,
    errors.StoreFull: 8,
    errors.CorruptRow: 15,  # DATA_LOSS
}


def code_of(error: errors.FeatserveError) -> int:
    """Return the number of the gRPC status code for an error."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def encode_error(error: errors.FeatserveError) -> pb.ErrorStatus:
    """Return the google.rpc.Status of an error: an ErrorInfo and, where fields are at fault, a BadRequest.

    Texts and lists are cut, so that all of it fits into the 8 KiB of metadata that gRPC clients take at least.
    """
    status = pb.ErrorStatus(code=code_of(error), message=cut(str(error), MESSAGE_BYTES))
    metadata = {key: cut(value, DETAIL_BYTES) for key, value in error.metadata.items()}
    status.details.append(
        _any("google.rpc.ErrorInfo", pb.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    )
    if error.violations:
        bad = pb.BadRequest()
        for violation in error.violations[:VIOLATIONS]:
            field, description = cut(violation.field, DETAIL_BYTES), cut(violation.description, DETAIL_BYTES)
            bad.field_violations.add(field=field, description=description)
        status.details.append(_any("google.rpc.BadRequest", bad))
    return status


def failed(error: Exception) -> pb.ErrorStatus:
    """Return the google.rpc.Status of whatever a request failed with; log what is our fault."""
    if not isinstance(error, errors.FeatserveError):
        log.error("a request failed: %s", error, exc_info=error)
        error = errors.ServingError(f"internal error: {error.__class__.__name__}")
    elif isinstance(error, errors.StoreError):
        log.error("%s", error)
    return encode_error(error)


def cut(text: str, most: int) -> str:
    """Return ``text``, or as much of its start as takes ``most`` bytes of UTF-8 with a mark of the cut."""
    raw = text.encode(errors="replace")
    return raw.decode() if len(raw) <= most else raw[: most - 3].decode(errors="ignore") + "…"


def _any(name: str, message: Message) -> AnyMessage:
    return AnyMessage(type_url=f"type.googleapis.com/{name}", value=message.SerializeToString())
