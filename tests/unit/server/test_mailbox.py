"""The mailbox: merges what is not taken, keeps order, and never makes the sender wait."""

from __future__ import annotations

import asyncio

import pytest

from redraft_server.engine.api import ChoiceDelta, EngineEvent, FinishReason, RequestFinished, SpeculationStats
from redraft_server.rpc.mailbox import MESSAGE_CHARS, MESSAGE_TOKENS, Mailbox, MailboxClosed

FINISHED = RequestFinished(1, 1, 0, None, SpeculationStats(), 0.0, None, 0.0, 0.0, 0.0)


def new_mailbox() -> tuple[Mailbox, list[RequestFinished]]:
    seen: list[RequestFinished] = []
    return Mailbox(asyncio.get_running_loop(), seen.append), seen


async def settle() -> None:
    """Let the loop run what `sink` has scheduled before."""
    done = asyncio.Event()
    asyncio.get_running_loop().call_soon(done.set)
    await done.wait()


async def send_from_thread(mailbox: Mailbox, *batches: list[EngineEvent]) -> None:
    def send() -> None:
        for batch in batches:
            mailbox.sink(batch)

    await asyncio.to_thread(send)
    await settle()


async def test_untaken_deltas_become_one_per_choice() -> None:
    mailbox, _ = new_mailbox()
    await send_from_thread(
        mailbox,
        [ChoiceDelta(1, "x", (1,)), ChoiceDelta(0, "a", (2,))],
        [ChoiceDelta(0, "b", (3, 4))],
        [ChoiceDelta(0, "", (), (), FinishReason.EOS, 0)],
    )
    assert mailbox.pending_messages == 1
    assert await mailbox.take() == [ChoiceDelta(0, "ab", (2, 3, 4), (), FinishReason.EOS, 0), ChoiceDelta(1, "x", (1,))]


async def test_messages_are_bounded_and_in_order() -> None:
    mailbox, seen = new_mailbox()
    steps = [[ChoiceDelta(0, chr(97 + i % 26) * 10, (i, i))] for i in range(3 * MESSAGE_TOKENS)]
    await send_from_thread(mailbox, *steps, [FINISHED])
    assert mailbox.pending_messages == 6
    assert (mailbox.is_finished, seen) == (True, [FINISHED])
    text, ids = "", []
    while isinstance(part := await mailbox.take(), list):
        (delta,) = part
        assert len(delta.token_ids) <= MESSAGE_TOKENS + 2
        text += delta.text
        ids += delta.token_ids
    assert part is FINISHED
    assert text == "".join(step[0].text for step in steps)
    assert ids == [i for i in range(3 * MESSAGE_TOKENS) for _ in range(2)]


async def test_long_texts_close_a_message_too() -> None:
    mailbox, _ = new_mailbox()
    await send_from_thread(mailbox, *([ChoiceDelta(0, "a" * (MESSAGE_CHARS // 2), (1,))] for _ in range(6)))
    assert mailbox.pending_messages == 3


async def test_take_waits_for_the_next_step() -> None:
    mailbox, _ = new_mailbox()
    taking = asyncio.ensure_future(mailbox.take())
    await settle()
    assert not taking.done()
    await send_from_thread(mailbox, [ChoiceDelta(0, "a")])
    assert await taking == [ChoiceDelta(0, "a")]


async def test_after_close_nothing_is_kept_but_the_end_is_still_noticed() -> None:
    mailbox, seen = new_mailbox()
    await send_from_thread(mailbox, [ChoiceDelta(0, "a")])
    mailbox.close()
    await send_from_thread(mailbox, [ChoiceDelta(0, "b")], [FINISHED])
    assert mailbox.pending_messages == 0
    assert seen == [FINISHED]
    with pytest.raises(MailboxClosed):
        await mailbox.take()


async def test_an_end_that_nobody_took_is_known() -> None:
    """It is what a request is counted by whose client left, or was too late, just then."""
    mailbox, _ = new_mailbox()
    assert mailbox.unread_finish is None
    await send_from_thread(mailbox, [ChoiceDelta(0, "a"), ChoiceDelta(1, "b")])
    assert mailbox.unread_finish is None
    await send_from_thread(mailbox, [ChoiceDelta(1, "", finish_reason=FinishReason.DEADLINE)], [FINISHED])
    assert mailbox.unread_finish is FinishReason.DEADLINE
    await mailbox.take()
    assert mailbox.unread_finish is None


async def test_close_wakes_a_waiting_reader() -> None:
    mailbox, _ = new_mailbox()
    taking = asyncio.ensure_future(mailbox.take())
    await settle()
    mailbox.close()
    with pytest.raises(MailboxClosed):
        await taking


def test_a_closed_loop_is_no_error_for_the_engine() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop, lambda _: None)
    loop.close()
    mailbox.sink([FINISHED])
