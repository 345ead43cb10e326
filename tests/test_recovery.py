"""A Gym that is gone: started again where it is ours, waited for where it is somebody else's, and given up in time."""

import asyncio
import time

import pytest

from lightning_gym.errors import GymError
from lightning_gym.gym.recovery import Recovery


class Client:
    """Answers from the `back_after`-th look on."""

    def __init__(self, back_after, whole_after=0):
        self.back_after = back_after
        self.whole_after = whole_after
        self.looks_behind = 0
        self.looks = 0
        self.connected = []

    async def answers(self, _agent):
        self.looks += 1
        return self.looks > self.back_after

    async def silent(self):
        self.looks_behind += 1
        return ["resources"] if self.looks_behind <= self.whole_after else []

    async def connect(self, head_url=None):
        self.connected.append(head_url)
        if self.looks < self.back_after and head_url is None:
            raise GymError("not yet")


def waits(recovery, number=1):
    async def wait():
        return await asyncio.gather(*(recovery.wait_for("agent") for _ in range(number)))

    return asyncio.run(wait())


def test_a_gym_that_answers_is_not_waited_for():
    client = Client(back_after=0)
    assert waits(Recovery(client)) == [True]
    assert client.connected == []


def test_all_who_lost_it_wait_and_one_of_them_looks():
    client = Client(back_after=3)
    assert waits(Recovery(client), 20) == [True] * 20
    assert client.looks == 4
    assert client.connected == [None] * 3, "it may be back under other addresses"


def test_one_that_stays_away_is_given_up_once_for_all():
    client = Client(back_after=10**9)
    recovery = Recovery(client, away_s=0.3)
    start = time.monotonic()
    assert waits(recovery, 20) == [False] * 20
    assert 0.3 <= time.monotonic() - start < 2
    looks = client.looks
    assert waits(recovery) == [False], "the next one looks and does not wait again"
    assert client.looks == looks + 1


def test_one_that_comes_back_later_is_found_and_has_its_whole_time_again():
    client = Client(back_after=10**9)
    recovery = Recovery(client, away_s=0.5)
    assert waits(recovery) == [False]
    client.back_after = 0
    assert waits(recovery) == [True]
    client.back_after = client.looks + 2
    assert waits(recovery) == [True]


def test_a_server_that_the_agent_needs_is_waited_for_as_well():
    client = Client(back_after=0, whole_after=3)
    assert waits(Recovery(client)) == [True]
    assert client.looks_behind == 4


def test_a_server_that_stays_away_beside_an_agent_that_answers_is_given_up_and_the_agent_is_not():
    client = Client(back_after=0, whole_after=10**9)
    recovery = Recovery(client, away_s=0.3)
    assert waits(recovery) == [True]
    looks = client.looks_behind
    assert waits(recovery) == [True]
    assert client.looks_behind == looks + 1


def test_one_of_ours_is_started_again_and_found_at_its_new_address():
    client, urls = Client(back_after=0), [None, "http://second"]
    recovery = Recovery(client, lambda: urls.pop() if urls else None)
    assert waits(recovery, 5) == [True] * 5
    assert (client.connected, recovery.num_restarts) == (["http://second"], 1)


def test_one_that_ends_again_and_again_is_an_error():
    recovery = Recovery(Client(back_after=10**9), lambda: "http://again", max_restarts=2)
    with pytest.raises(GymError, match="ended by itself 3 times"):
        waits(recovery)
