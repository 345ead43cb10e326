"""A request that is asked again gets the same answer; one that is asked anew gets a new one."""

import asyncio
import gc

import pytest

from lightning_gym.policy import retries
from lightning_gym.policy.retries import ClientGoneError, PendingAnswers


class Maker:
    """Makes numbered answers when told to."""

    def __init__(self):
        self.made = 0
        self.cancelled = 0
        self.ready = asyncio.Event()

    async def make(self):
        self.made += 1
        number = self.made
        try:
            await self.ready.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return number


async def never():
    await asyncio.Event().wait()


async def at_once():
    """A connection that closes as soon as it is looked at."""


def ignored(answer):
    """For tests that do not look at what was delivered."""


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_a_retry_of_a_lost_request_gets_the_answer_that_was_being_made():
    async def scenario():
        answers, maker = PendingAnswers(ignored), Maker()
        with pytest.raises(ClientGoneError):
            await answers.answer("same", maker.make, at_once)
        again = asyncio.create_task(answers.answer("same", maker.make, never))
        await asyncio.sleep(0)
        maker.ready.set()
        assert await again == 1
        assert (maker.made, len(answers)) == (1, 0)

    run(scenario())


def test_an_answer_finished_for_a_closed_connection_is_kept_for_the_retry():
    async def scenario():
        answers, maker = PendingAnswers(ignored), Maker()
        with pytest.raises(ClientGoneError):
            await answers.answer("same", maker.make, at_once)
        maker.ready.set()
        await asyncio.sleep(0.01)
        assert await answers.answer("same", maker.make, never) == 1
        assert maker.made == 1

    run(scenario())


def test_two_connections_that_ask_the_same_at_once_share_one_answer():
    async def scenario():
        answers, maker = PendingAnswers(ignored), Maker()
        both = [asyncio.create_task(answers.answer("same", maker.make, never)) for _ in range(2)]
        await asyncio.sleep(0.01)
        maker.ready.set()
        assert await asyncio.gather(*both) == [1, 1]

    run(scenario())


def test_the_same_request_after_a_delivered_answer_is_a_new_call():
    async def scenario():
        answers, maker = PendingAnswers(ignored), Maker()
        maker.ready.set()
        assert await answers.answer("same", maker.make, never) == 1
        assert await answers.answer("same", maker.make, never) == 2

    run(scenario())


def test_other_requests_have_other_answers():
    async def scenario():
        answers, maker = PendingAnswers(ignored), Maker()
        both = [asyncio.create_task(answers.answer(key, maker.make, never)) for key in "ab"]
        await asyncio.sleep(0.01)
        maker.ready.set()
        assert await asyncio.gather(*both) == [1, 2]

    run(scenario())


def test_an_answer_that_nobody_asks_for_again_is_given_up_after_the_grace(monkeypatch):
    monkeypatch.setattr(retries, "GRACE_S", 0.05)

    async def scenario():
        answers, maker = PendingAnswers(ignored), Maker()
        with pytest.raises(ClientGoneError):
            await answers.answer("same", maker.make, at_once)
        assert (maker.cancelled, len(answers)) == (0, 1)
        await asyncio.sleep(0.15)
        assert (maker.cancelled, len(answers)) == (1, 0)

    run(scenario())


def test_an_error_reaches_everybody_who_waits():
    async def scenario():
        answers = PendingAnswers(ignored)

        async def fail():
            await asyncio.sleep(0.01)
            raise ValueError("no")

        both = await asyncio.gather(*(answers.answer("same", fail, never) for _ in range(2)), return_exceptions=True)
        assert [str(error) for error in both] == ["no", "no"]
        assert len(answers) == 0

    run(scenario())


def test_an_answer_is_delivered_once_however_many_wait_and_not_at_all_when_nobody_asks_again(monkeypatch):
    monkeypatch.setattr(retries, "GRACE_S", 0.05)

    async def scenario():
        delivered = []
        answers, maker = PendingAnswers(delivered.append), Maker()
        both = [asyncio.create_task(answers.answer("same", maker.make, never)) for _ in range(2)]
        await asyncio.sleep(0.01)
        maker.ready.set()
        await asyncio.gather(*both)
        assert delivered == [1]
        with pytest.raises(ClientGoneError):
            await answers.answer("same", maker.make, at_once)
        await asyncio.sleep(0.15)
        assert (maker.made, maker.cancelled, delivered, len(answers)) == (2, 0, [1], 0)

    run(scenario())


def test_an_error_that_nobody_asked_for_again_is_no_noise(monkeypatch):
    monkeypatch.setattr(retries, "GRACE_S", 0.05)

    async def scenario():
        noise = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: noise.append(context))
        answers = PendingAnswers(ignored)

        async def fail():
            raise ValueError("no")

        with pytest.raises(ClientGoneError):
            await answers.answer("same", fail, at_once)
        await asyncio.sleep(0.15)
        gc.collect()
        assert (noise, len(answers)) == ([], 0)

    run(scenario())
