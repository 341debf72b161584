"""A scripted redraft server in this process, on loopback, for tests of the clients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2

from redraft.v1 import draft_pb2, generation_pb2, model_pb2, tokenizer_pb2
from redraft.v1 import generation_pb2 as pb

HANG = object()
"""In a scripted stream: wait until the call ends."""


class Failure(Exception):
    """A scripted answer that is a status in place of a response."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str = "no",
        details: tuple[Message, ...] = (),
        trailers: tuple[tuple[str, str | bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.trailers = trailers
        if details:
            status = status_pb2.Status(code=code.value[0], message=message)
            for detail in details:
                packed = any_pb2.Any()
                packed.Pack(detail)
                status.details.append(packed)
            self.trailers = (*trailers, ("grpc-status-details-bin", status.SerializeToString()))


class FakeServer:
    """`answers[method]` is a list, used up call by call; its last element stays.

    An element is a response, a Failure, or for StreamGenerate a list of responses, Failures and HANG.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[Any]] = {}
        self.requests: list[tuple[str, Any]] = []
        self.metadata: list[dict[str, Any]] = []
        self.time_remaining: list[float | None] = []
        self.call_ended = threading.Event()
        """Set when a stream's call ended, by cancellation or otherwise."""
        self.address = ""

    @property
    def last_request(self) -> Any:
        return self.requests[-1][1]

    def methods(self) -> list[str]:
        return [method for method, _ in self.requests]

    def _answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append((method, request))
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_remaining.append(context.time_remaining())
        queue = self.answers.get(method) or [Failure(grpc.StatusCode.UNIMPLEMENTED, f"no {method} here")]
        return queue.pop(0) if len(queue) > 1 else queue[0]

    def unary(self, method: str) -> Callable[[Any, grpc.ServicerContext], Any]:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            answer = self._answer(method, request, context)
            if answer is HANG:
                self._hang(context)
            _abort_on_failure(answer, context)
            return answer

        return handle

    def stream(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(self.call_ended.set)
        answers = self._answer("StreamGenerate", request, context)
        for answer in answers if isinstance(answers, list) else [answers]:
            if answer is HANG:
                self._hang(context)
                return
            _abort_on_failure(answer, context)
            yield answer

    def _hang(self, context: grpc.ServicerContext) -> None:
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait(timeout=20)


def _abort_on_failure(answer: Any, context: grpc.ServicerContext) -> None:
    if isinstance(answer, Failure):
        context.set_trailing_metadata(answer.trailers)
        context.abort(answer.code, answer.message)


@contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    """Serves on a free port of loopback while the block runs."""
    pool = futures.ThreadPoolExecutor(max_workers=4)
    server = grpc.server(pool)
    for module in (generation_pb2, tokenizer_pb2, model_pb2, draft_pb2, health_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            handlers = {method.name: _handler(fake, method) for method in service.methods}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield fake
    finally:
        server.stop(grace=None).wait()
        pool.shutdown()


def _handler(fake: FakeServer, method: Any) -> grpc.RpcMethodHandler[Any, Any]:
    codec: dict[str, Any] = {
        "request_deserializer": GetMessageClass(method.input_type).FromString,
        "response_serializer": GetMessageClass(method.output_type).SerializeToString,
    }
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(fake.stream, **codec)
    return grpc.unary_unary_rpc_method_handler(fake.unary(method.name), **codec)


def completion() -> pb.Completion:
    """Facts of a request of 5 tokens: 2 verify steps with a draft (3 + 0 accepted) of 4 tokens each."""
    return pb.Completion(
        model="demo",
        model_revision="r1",
        usage=pb.Usage(prompt_tokens=7, completion_tokens=6, cached_prompt_tokens=4),
        timings=pb.Timings(
            queue=Duration(nanos=1_000_000),
            time_to_first_token=Duration(nanos=20_000_000),
            prefill=Duration(nanos=19_000_000),
            decode=Duration(seconds=1, nanos=500_000_000),
            total=Duration(seconds=1, nanos=520_000_000),
        ),
        speculation=pb.SpeculationStats(
            draft_version="v7",
            spec_steps=2,
            draft_tokens=8,
            accepted_tokens=3,
            acceptance_histogram=[1, 0, 0, 1, 0],
            max_draft_tokens=4,
            expected_acceptance_sum=2.5,
            expected_acceptance_positions=5,
            verify_steps=3,
        ),
        seed=2**64 - 1,
        coupling=pb.COUPLING_DRAFTER_INVARIANT,
    )


def response() -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id="r-1",
        choices=[
            pb.Choice(
                index=0,
                text="Hello there",
                token_ids=[1, 2, 3, 4, 5, 6],
                logprobs=[
                    pb.TokenLogprob(
                        token_id=1,
                        text="Hel",
                        logprob=-0.5,
                        rank=1,
                        top=[pb.TopLogprob(token_id=1, text="Hel", logprob=-0.5)],
                    )
                ],
                finish_reason=pb.FINISH_REASON_STOP_SEQUENCE,
                matched_stop=pb.MatchedStop(sequence="\n"),
            )
        ],
        prompt_logprobs=[pb.TokenLogprob(token_id=9, text="x")],
        completion=completion(),
    )


def stream_responses() -> list[pb.StreamGenerateResponse]:
    """The same generation as `response`, in three messages."""
    whole = response()
    choice = whole.choices[0]
    return [
        pb.StreamGenerateResponse(
            request_id="r-1",
            prompt_logprobs=whole.prompt_logprobs,
            deltas=[pb.ChoiceDelta(index=0, text="Hello", token_ids=[1, 2, 3, 4], logprobs=choice.logprobs)],
        ),
        pb.StreamGenerateResponse(
            request_id="r-1",
            deltas=[
                pb.ChoiceDelta(
                    index=0,
                    text=" there",
                    token_ids=[5, 6],
                    finish_reason=choice.finish_reason,
                    matched_stop=choice.matched_stop,
                )
            ],
        ),
        pb.StreamGenerateResponse(request_id="r-1", completion=completion()),
    ]
