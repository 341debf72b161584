"""Pure functions for the messages of TokenizerService, ModelService and DraftService."""

from collections.abc import Mapping, Sequence
from datetime import UTC

from redraft.v1 import draft_pb2, model_pb2, tokenizer_pb2
from redraft_client import types as t
from redraft_client._codec import chat, checked_field, parse_enum


def build_tokenizer_input(
    source: str | Sequence[t.Message], add_special_tokens: bool | None
) -> tokenizer_pb2.TokenizerInput:
    with checked_field("input"):
        if isinstance(source, str):
            return tokenizer_pb2.TokenizerInput(text=source, add_special_tokens=add_special_tokens)
        return tokenizer_pb2.TokenizerInput(chat=chat(source), add_special_tokens=add_special_tokens)


def build_tokenize(
    source: str | Sequence[t.Message], model: str, add_special_tokens: bool | None, token_texts: bool
) -> tokenizer_pb2.TokenizeRequest:
    return tokenizer_pb2.TokenizeRequest(
        model=model, input=build_tokenizer_input(source, add_special_tokens), token_texts=token_texts
    )


def build_count_tokens(
    source: str | Sequence[t.Message], model: str, add_special_tokens: bool | None
) -> tokenizer_pb2.CountTokensRequest:
    return tokenizer_pb2.CountTokensRequest(model=model, input=build_tokenizer_input(source, add_special_tokens))


def build_detokenize(
    token_ids: Sequence[int], model: str, include_special_tokens: bool
) -> tokenizer_pb2.DetokenizeRequest:
    with checked_field("token_ids"):
        return tokenizer_pb2.DetokenizeRequest(
            model=model, token_ids=token_ids, include_special_tokens=include_special_tokens
        )


def build_split(shares: Mapping[str, float]) -> draft_pb2.SetTrafficSplitRequest:
    with checked_field("shares"):
        return draft_pb2.SetTrafficSplitRequest(
            shares=[draft_pb2.DraftShare(version=v, share=share) for v, share in shares.items()]
        )


def parse_tokens(response: tokenizer_pb2.TokenizeResponse) -> t.Tokens:
    return t.Tokens(tuple(response.token_ids), tuple(response.token_texts))


def parse_count(response: tokenizer_pb2.CountTokensResponse) -> t.TokenCount:
    return t.TokenCount(response.token_count, response.context_length)


def parse_model(model: model_pb2.Model) -> t.ModelInfo:
    return t.ModelInfo(
        id=model.id,
        revision=model.revision,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        target_fingerprint=model.target_fingerprint,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        eos_token_ids=tuple(model.eos_token_ids),
        has_chat_template=model.has_chat_template,
        quantization=model.quantization,
        proposer=model.speculation.proposer,
        max_draft_tokens=model.speculation.max_draft_tokens,
        draft_version=model.speculation.draft_version,
    )


def parse_draft(draft: draft_pb2.Draft) -> t.Draft:
    return t.Draft(
        version=draft.version,
        parent_version=draft.parent_version,
        state=parse_enum(t.DraftState, draft_pb2.DraftState, draft.state) or t.DraftState.UNKNOWN,
        target_fingerprint=draft.target_fingerprint,
        tokenizer_fingerprint=draft.tokenizer_fingerprint,
        create_time=draft.create_time.ToDatetime(UTC) if draft.HasField("create_time") else None,
        expected_acceptance=draft.expected_acceptance if draft.HasField("expected_acceptance") else None,
        realised_acceptance=draft.realised_acceptance if draft.HasField("realised_acceptance") else None,
        draft_tokens=draft.draft_tokens,
        share=draft.share,
        refusal_reason=draft.refusal_reason,
    )


def parse_swap(
    response: draft_pb2.ActivateDraftResponse | draft_pb2.RollbackDraftResponse,
) -> t.DraftSwap:
    return t.DraftSwap(
        active=parse_draft(response.active),
        previous=parse_draft(response.previous) if response.HasField("previous") else None,
    )
