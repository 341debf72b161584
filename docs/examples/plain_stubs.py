"""Calls a redraft server with nothing but grpcio and the generated stubs.

    python docs/examples/plain_stubs.py [HOST:PORT] [PROMPT]

The stubs come with the package `redraft`; for another language generate them from proto/.
"""

import sys

import grpc

from redraft.v1 import generation_pb2 as pb
from redraft.v1.generation_pb2_grpc import GenerationServiceStub


def main(address: str = "127.0.0.1:50051", prompt: str = "Why is the sky blue?") -> None:
    generation = pb.Generation(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=prompt)]),
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingParams(max_new_tokens=64),
    )
    with grpc.insecure_channel(address) as channel:
        stub = GenerationServiceStub(channel)
        request = pb.StreamGenerateRequest(generation=generation)
        for response in stub.StreamGenerate(request, timeout=60):  # the deadline, in seconds
            for delta in response.deltas:
                sys.stdout.write(delta.text)
            if response.HasField("completion"):  # only in the last message
                stats = response.completion.speculation
                sys.stdout.write(f"\n{stats.accepted_tokens} of {stats.draft_tokens} drafted tokens accepted\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
