"""The service: request bytes, metadata and a deadline in; answer bytes out, or an error of the tree.

Knows no transport. Each transport calls ``METHODS[name]`` and turns errors into statuses with ``status``. Reads are run
where they arrive; writes are run one at a time, in the transport's writer thread. A read that raises ``Behind`` is run
again once that is ``caught_up``. A transport that has several reads at once may ask for their answers together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from featserve._proto import serving_pb2 as pb
from featserve.batch import EntityKeys, Integers, Pushed, Written
from featserve.engine import NOTHING, Engine
from featserve.errors import AnswerTooLarge, DeadlineExceeded, FeatserveError, invalid
from featserve.matrix import FeatureMatrix
from featserve.plan import ReadPlan
from featserve.server.status import encode_error
from featserve.server.together import Share, Sharing
from featserve.stages import Stages
from featserve.turns import give_way, short_turns
from featserve.wire import (
    decode_keys,
    decode_request_columns,
    decode_rows,
    encode_events,
    encode_matrix,
    encode_schema,
    encode_stages,
    encode_view,
    parse,
    plain_integers,
)

WAITED = 0.9
"""The part of its deadline that a request waits for a write; the rest is for saying that it did not come."""
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["FeatureServingService"].full_name


class Record:
    """What one request came to, for who watches it: the service fills it in.

    ``stages``: where its time went; None where nobody asks. ``ages``: also look at how old the served values are.
    ``whole``: how many rows were read by ``plan``, where all were there and held no null, and their ages were not asked
    for; else ``matrix``: those rows, and ``missing``: what a share says of them. ``error``: one that was sent as an
    answer. What is never set costs nothing: it stays the class's own.
    """

    stages: Stages | None = None
    ages: bool = False
    plan: ReadPlan | None = None
    whole: int | None = None
    matrix: FeatureMatrix | None = None
    missing: tuple[bytes, bytes] | None = None
    now_us: int = 0
    view: str = ""
    written: Written | None = None
    source: str = ""
    pushed: Pushed | None = None
    error: FeatserveError | None = None


@dataclass(slots=True)
class Call:
    """What a transport knows of one call: its metadata, and the seconds that are left until its deadline, if any.

    ``record``: given by who watches the call; None where nobody does.
    """

    metadata: Iterable[tuple[str, str | bytes]] = ()
    remaining_s: float | None = None
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds on one request: rows, how far ahead of the clock a written time may be, and bytes of its answer."""

    max_rows: int
    max_future_skew_us: int
    max_answer_bytes: int = 1 << 31  # which is protobuf's own


class Service:
    """Answers the methods of FeatureServingService.

    ``clock_us`` gives the instant of a request, int64 microseconds since the Unix epoch.
    """

    def __init__(self, engine: Engine, limits: Limits, clock_us: Callable[[], int]) -> None:
        self.engine = engine
        self._limits = limits
        self._clock_us = clock_us
        self._sharing = Sharing(engine.plans, limits.max_rows)

    def get_features(self, data: bytes, call: Call) -> bytes:
        """Answer a GetFeaturesRequest; by what is known of others, where it asks for no more than they do."""
        begin(call)
        share, record = self._sharing_now().share(data), call.record
        if not isinstance(share, Share):
            return self._alone(share, call)
        if record is None:
            _, (answer,) = self.get_features_together(share)
            return answer
        record.plan = share.asked.plan
        matrix, (answer,) = self.get_features_together(share, record.stages, record.ages)
        if matrix is None or (matrix.valid is None and not record.ages):
            record.whole = share.rows
        else:
            record.matrix, record.missing, record.now_us = matrix, share.missing, share.now_us
        return answer

    def get_features_alone(self, data: bytes, call: Call) -> bytes:
        """Answer a GetFeaturesRequest that was not to be shared, or could not be answered so."""
        begin(call)
        return self._alone(parse(pb.GetFeaturesRequest, data), call)

    def _alone(self, request: pb.GetFeaturesRequest, call: Call) -> bytes:
        return self._fitting(self._features(request, call).SerializeToString())

    def shares(self, requests: Sequence[bytes]) -> list[Share]:
        """Return the GetFeaturesRequests among these that can be answered together; none of them has expired."""
        return self._sharing_now().shares(requests)

    def _sharing_now(self) -> Sharing:
        """Return the sharing by the plans that the engine has now."""
        if self._sharing.plans is not self.engine.plans:
            self._sharing = Sharing(self.engine.plans, self._limits.max_rows)
        return self._sharing

    def get_features_together(
        self, share: Share, stages: Stages | None = None, event_times: bool = False
    ) -> tuple[FeatureMatrix | None, list[bytes]]:
        """Answer requests for one service with one read; an error of it is nobody's in particular.

        Returns the features of all of them with the answers; None in their place where all are there and none is null,
        unless ``event_times`` are wanted, too. ``stages``: note in them what the time is spent on.
        """
        matrix, answers = share.answer(self.engine, self._clock_us(), stages, event_times)
        self._fitting(max(answers, key=len))
        return matrix, answers

    def stream_features(self, data: bytes, call: Call) -> bytes:
        """Answer one message of a StreamFeatures call; an error is an answer, too."""
        try:
            begin(call)
            answer = self._features(parse(pb.StreamFeaturesRequest, data).request, call)
            return self._fitting(pb.StreamFeaturesResponse(response=answer).SerializeToString())
        except FeatserveError as error:
            if call.record is not None:
                call.record.error = error
            return pb.StreamFeaturesResponse(error=encode_error(error)).SerializeToString()

    def _fitting(self, answer: bytes) -> bytes:
        """Return an answer that is within the limit. Raises AnswerTooLarge, so that it does not count as answered."""
        if len(answer) > self._limits.max_answer_bytes:
            raise AnswerTooLarge(
                f"the answer takes {len(answer):,} bytes; the most is {self._limits.max_answer_bytes:,} ([server] "
                "max_message_mb). Ask for fewer rows"
            )
        return answer

    def _features(self, request: pb.GetFeaturesRequest, call: Call) -> pb.GetFeaturesResponse:
        record = call.record
        stages = None if record is None else record.stages
        if request.include_stages and stages is None:
            stages = Stages()
        if stages is not None:
            stages.begin("plan")
        plan = self.engine.plans.service(request.service)
        if record is not None:
            record.plan = plan
        if stages is not None:
            stages.begin("keys")
        now_us = self._clock_us()
        if request.HasField("as_of_us"):
            if request.as_of_us > now_us:
                raise invalid("as_of_us", f"{request.as_of_us} is after the server's clock, {now_us}")
            now_us = request.as_of_us
        if request.at_least:
            self.engine.require(request.at_least, math.inf if call.remaining_s is None else WAITED * call.remaining_s)
        keys = self._keys(request, plan)
        columns = NOTHING
        if request.request_columns or plan.schema.request_columns:
            columns = decode_request_columns(request.request_columns, plan.schema.request_columns, keys.count)
        times = request.include_event_times
        matrix = self.engine.read(
            plan,
            keys,
            now_us,
            request_columns=columns,
            as_of=request.HasField("as_of_us"),
            event_times=times or (record is not None and record.ages),
            stages=stages,
        )
        if record is not None:
            if matrix.valid is None and not record.ages:
                record.whole = keys.count
            else:
                record.matrix, record.now_us = matrix, now_us
        if stages is not None:
            stages.begin("encode")
        answer = encode_matrix(matrix, include_schema=request.include_schema, include_event_times=times)
        if request.include_stages and stages is not None:
            stages.end()
            answer.stages.extend(encode_stages(stages.timed()))
        return answer

    def _keys(self, request: pb.GetFeaturesRequest, plan: ReadPlan) -> EntityKeys | Integers:
        """Return the keys of a request, as they came where nothing has to be made of them."""
        if plan.integer_key is not None:
            plain = plain_integers(request.keys, *plan.integer_key, self._limits.max_rows)
            if plain is not None:
                return plain
        return decode_keys(request.keys, plan.schema.keys, self._limits.max_rows)

    def describe_service(self, data: bytes, call: Call) -> bytes:
        """Answer a DescribeServiceRequest."""
        begin(call)
        request = parse(pb.DescribeServiceRequest, data)
        schema = self.engine.plans.service(request.service).schema
        return pb.DescribeServiceResponse(schema=encode_schema(schema)).SerializeToString()

    def list_services(self, data: bytes, call: Call) -> bytes:
        """Answer a ListServicesRequest."""
        begin(call)
        parse(pb.ListServicesRequest, data)
        snapshot = self.engine.plans.snapshot
        answer = pb.ListServicesResponse()
        for _, service in sorted(snapshot.services.items()):
            answer.services.add(
                name=service.name,
                version=service.version,
                hash=service.hash,
                promoted=snapshot.service(service.name).version == service.version,
                owner=service.owner,
                description=service.description,
                features=len(service.fields),
                keys=list(service.keys),
            )
        return answer.SerializeToString()

    def describe_view(self, data: bytes, call: Call) -> bytes:
        """Answer a DescribeViewRequest."""
        begin(call)
        plan = self.engine.plans.view(parse(pb.DescribeViewRequest, data).view)
        return encode_view(plan.view).SerializeToString()

    def write_rows(self, data: bytes, call: Call) -> bytes:
        """Answer a WriteRowsRequest: its rows are all written, or none."""
        begin(call)
        written = self._write(parse(pb.WriteRowsRequest, data), call.record)
        answer = pb.WriteRowsResponse(rows=written.rows, stored=written.stored, token=written.token)
        return answer.SerializeToString()

    @short_turns()
    def _write(self, request: pb.WriteRowsRequest, record: Record | None) -> Written:
        stages = None if record is None else record.stages
        if stages is not None:
            stages.begin("rows")
        plan = self.engine.plans.view(request.view)
        arrival = decode_rows(request, plan.columns, self._limits.max_rows)
        give_way()
        skew_us = self._limits.max_future_skew_us
        if stages is not None:
            stages.begin("store write")
        written = self.engine.write(plan, arrival, now_us=self._clock_us(), max_future_skew_us=skew_us)
        if record is not None:
            record.view, record.written = plan.view.id, written
        return written

    def describe_events(self, data: bytes, call: Call) -> bytes:
        """Answer a DescribeEventsRequest."""
        begin(call)
        plan = self.engine.plans.events(parse(pb.DescribeEventsRequest, data).source)
        return encode_events(plan.source).SerializeToString()

    def push_events(self, data: bytes, call: Call) -> bytes:
        """Answer a PushEventsRequest: its events are all counted, or none."""
        begin(call)
        pushed = self._push(parse(pb.PushEventsRequest, data), call.record)
        return pb.PushEventsResponse(**asdict(pushed)).SerializeToString()

    @short_turns()
    def _push(self, request: pb.PushEventsRequest, record: Record | None) -> Pushed:
        stages = None if record is None else record.stages
        if stages is not None:
            stages.begin("events")
        plan = self.engine.plans.events(request.source)
        arrival = decode_rows(request, plan.source.types, self._limits.max_rows)
        give_way()
        skew_us = self._limits.max_future_skew_us
        if stages is not None:
            stages.begin("store write")
        pushed = self.engine.push(plan, arrival, now_us=self._clock_us(), max_future_skew_us=skew_us)
        if record is not None:
            record.source, record.pushed = plan.source.name, pushed
        return pushed

    def stream_rows(self) -> WriteStream:
        """Start a StreamRows call."""
        return WriteStream(self._write, pb.StreamRowsRequest, pb.StreamRowsResponse())

    def stream_events(self) -> WriteStream:
        """Start a StreamEvents call."""
        return WriteStream(self._push, pb.StreamEventsRequest, pb.StreamEventsResponse())


class WriteStream:
    """One StreamRows or StreamEvents call: each message is written when it is added, and its answer to the totals."""

    def __init__(self, write: Callable[[Any, Record | None], Written | Pushed], kind: type[Any], totals: Any) -> None:
        self._write, self._kind, self._totals = write, kind, totals

    def add(self, data: bytes, call: Call) -> None:
        """Write one message; an error says how many before it were written."""
        try:
            begin(call)
            written = asdict(self._write(parse(self._kind, data).request, call.record))
        except FeatserveError as error:
            error.metadata["messages_written"] = str(self._totals.messages)
            raise
        self._totals.messages += 1
        self._totals.token = written.pop("token")
        for name, count in written.items():
            setattr(self._totals, name, getattr(self._totals, name) + count)

    def finish(self) -> bytes:
        """Return the answer."""
        answer: bytes = self._totals.SerializeToString()
        return answer


def begin(call: Call) -> None:
    """Begin the work of a call, or refuse it where its caller no longer waits."""
    if call.remaining_s is not None and call.remaining_s <= 0:
        raise DeadlineExceeded("the deadline passed before the request was begun; nothing was done")
    if call.record is not None and call.record.stages is not None:
        call.record.stages.begin("decode")


READS = {
    "GetFeatures": Service.get_features,
    "DescribeService": Service.describe_service,
    "ListServices": Service.list_services,
    "DescribeView": Service.describe_view,
    "DescribeEvents": Service.describe_events,
}
"""Methods of one request and one answer that only read."""

WRITES = {"WriteRows": Service.write_rows, "PushEvents": Service.push_events}
"""Methods of one request and one answer that write."""

WRITE_STREAMS = {"StreamRows": Service.stream_rows, "StreamEvents": Service.stream_events}
"""Methods of many requests, each of which is written, and one answer."""
