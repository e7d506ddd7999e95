"""Structured logs: one JSON object a line on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON: time, level, logger, message, what ``extra`` held, and the traceback if any."""

    def __init__(self, always: Mapping[str, object]) -> None:
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._always,
        }
        entry |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _is_news(record: logging.LogRecord) -> bool:
    """Say whether it is none of what grpcio calls an error where a caller left as its answer was being sent.

    That it does where it learns of the failed sending before it learns that the call has ended.
    """
    return not record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")


def configure(**always: object) -> None:
    """Send the logs of this process to standard error as JSON lines, from level INFO up; ``always`` is in each."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(always))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
