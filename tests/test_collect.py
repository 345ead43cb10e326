"""Collections: what is tried again, what is left out, and when enough has failed to stop.

The Gym is a real server in this process that plays by calling the ledger's own door: it serves calls as an endpoint
would and returns what it is told to.
"""

import asyncio
import json
import logging
import time
from collections import Counter

import pytest
from aiohttp import web

from lightning_gym.collect import Collection, Collector, reconcile, rollout_seed
from lightning_gym.errors import CollectionError
from lightning_gym.gym import wire
from lightning_gym.gym.client import GymClient
from lightning_gym.policy.ledger import Entry, Ledger, Served
from lightning_gym.rollout import Call, Failure, FailureKind, Rollout, SamplingProfile, SpliceBreak
from lightning_gym.tasks import DealtTask, read_tasks


def call(index=0, *, prompt=(1, 2), tokens=(3, 4), finish_reason="stop"):
    return Call(
        index=index,
        prompt_ids=list(prompt),
        token_ids=list(tokens),
        logprobs=[-0.5] * len(tokens),
        finish_reason=finish_reason,
        weight_version=0,
    )


def served(one):
    return Served(call=one, messages=(), reply=(), context=())


def bundle(one):
    return wire.Bundle(prompt_ids=list(one.prompt_ids), token_ids=list(one.token_ids), logprobs=list(one.logprobs))


def entry_of(*calls):
    return Entry(profile="train", seed=0, served=[served(one) for one in calls])


# -- reconcile

FIRST, LOST, SECOND = call(0), call(1, tokens=(5, 6)), call(2, prompt=(1, 2, 3, 4, 9), tokens=(7,))


def test_what_came_back_is_the_served_calls_themselves_with_the_engines_own_logprobs():
    back = [bundle(FIRST), wire.Bundle(prompt_ids=[1, 2, 3, 4, 9], token_ids=[7], logprobs=[-99.0])]
    assert reconcile(entry_of(FIRST, SECOND), back) == [FIRST, SECOND]


def test_a_call_whose_answer_was_lost_is_left_out():
    assert reconcile(entry_of(FIRST, LOST, SECOND), [bundle(FIRST), bundle(SECOND)]) == [FIRST, SECOND]
    assert reconcile(entry_of(FIRST, LOST), [bundle(LOST)]) == [LOST]


def test_two_equal_calls_are_two():
    twin = call(1)
    assert reconcile(entry_of(FIRST, twin), [bundle(FIRST), bundle(twin)]) == [FIRST, twin]


@pytest.mark.parametrize(
    ("back", "position"),
    [
        ([wire.Bundle(prompt_ids=[1, 2], token_ids=[3, 5], logprobs=[-0.5, -0.5])], 0),
        ([wire.Bundle(prompt_ids=[1, 3], token_ids=[3, 4], logprobs=[-0.5, -0.5])], 0),
        ([bundle(FIRST), bundle(FIRST)], 1),
        ([bundle(SECOND), bundle(FIRST)], 1),
        ([bundle(FIRST), bundle(SECOND), bundle(LOST)], 2),
    ],
    ids=["foreign tokens", "foreign prompt", "twice", "out of order", "one too many"],
)
def test_what_was_not_served_like_that_is_misaligned_and_says_which_call(back, position):
    failure = reconcile(entry_of(FIRST, SECOND), back)
    assert failure.kind is FailureKind.MISALIGNED
    assert failure.message.startswith(f"call {position} came back with")
    assert failure.message.endswith("2 served")


def test_a_rollout_without_ids_is_a_failure_of_its_own():
    failure = reconcile(entry_of(FIRST), [])
    assert failure.kind is FailureKind.NO_TOKEN_IDS
    assert "(1 calls were served)" in failure.message


# -- Collection


def rollout(group_id, *, failure=None, reward=1.0):
    kind = None if failure is None else Failure(kind=failure, message="")
    return Rollout(
        rollout_id=f"{group_id}",
        task_index=0,
        group_id=group_id,
        attempt=0,
        agent="a",
        reward=None if failure else reward,
        failure=kind,
    )


def test_a_survivor_needs_another_one_in_its_group():
    infra, timeout = FailureKind.INFRA, FailureKind.TIMEOUT
    rollouts = [
        rollout(0), rollout(0), rollout(0, failure=infra),
        rollout(1), rollout(1, failure=infra), rollout(1, failure=timeout),
        rollout(2, failure=infra),
    ]  # fmt: skip
    collection = Collection(rollouts=rollouts, seconds=0.0)
    assert collection.survivors == rollouts[:2]
    assert collection.failures == Counter({infra: 3, timeout: 1})


# -- Collector


def collect(answers, *, num_tasks=1, group_size=2, serve=call, forge=lambda _g, _a: False, **options):
    """Collect against a Gym that answers a rollout's n-th try with ``answers(group, attempt, try)``.

    An answer is a reward (the rollout is played), an HTTP status, or ``"hang"``.
    """
    ledger = Ledger()
    seen = []

    async def run(request):
        params = (await request.json())["responses_create_params"]
        rollout_id = json.loads(params["metadata"]["extra_body"])[wire.ROLLOUT_ID]
        seen.append(rollout_id)
        group, attempt, again = map(int, rollout_id.split(".")[-3:])
        entry = ledger.get(rollout_id)
        one = serve(tokens=(group + 10, attempt + 10, again + 10))
        entry.served.append(served(one))
        if again == 0 and group == 7:
            entry.breaks.append(SpliceBreak(kind="branch", call_index=1, detail=""))
        answer = answers(group, attempt, again)
        if answer == "hang":
            await asyncio.sleep(30)
        if isinstance(answer, int):
            return web.Response(status=answer, text=f"status {answer} of {group}.{attempt}.{again}")
        if forge(group, attempt):
            one = call(tokens=(99,))
        item = {"type": "message", wire.PROMPT_TOKEN_IDS: one.prompt_ids, wire.GENERATION_TOKEN_IDS: one.token_ids}
        response = {"output": [item | {wire.GENERATION_LOG_PROBS: one.logprobs}]}
        return web.json_response({"response": response, "reward": answer, "responses_create_params": {"input": "x"}})

    async def play():
        app = web.Application()
        app.router.add_post("/run", run)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = GymClient("http://unused", rollout_timeout_s=options.pop("timeout", 10))
        client.agents = {"agent": f"http://127.0.0.1:{runner.addresses[0][1]}"}
        rows = [{"responses_create_params": {"input": "x"}}] * num_tasks
        first_group = options.pop("first_group", 0)
        dealt = [
            DealtTask(group_id=first_group + i, task=task) for i, task in enumerate(read_tasks(rows, agent="agent"))
        ]
        collector = Collector(client, ledger, run_id="run", **options)
        try:
            return await collector.collect(
                dealt, group_size=group_size, profile_name="train", profile=SamplingProfile()
            )
        finally:
            await client.close()
            await runner.cleanup()

    try:
        return asyncio.run(play()), seen, ledger
    finally:
        assert len(ledger) == 0


def test_rollouts_come_group_by_group_with_their_calls_rewards_and_ids():
    collection, seen, _ = collect(lambda g, a, _t: g + a / 10, num_tasks=3, group_size=2, rank=4)
    assert [(r.group_id, r.attempt, r.reward) for r in collection.rollouts] == [
        (0, 0, 0.0), (0, 1, 0.1), (1, 0, 1.0), (1, 1, 1.1), (2, 0, 2.0), (2, 1, 2.1),
    ]  # fmt: skip
    assert [r.task_index for r in collection.rollouts] == [0, 0, 1, 1, 2, 2]
    for one in collection.rollouts:
        assert one.rollout_id == f"run.4.train.{one.group_id}.{one.attempt}.0"
        assert [list(c.token_ids) for c in one.calls] == [[one.group_id + 10, one.attempt + 10, 10]]
        assert one.agent == "agent"
        assert one.failure is None
    assert len(seen) == len(set(seen)) == 6
    assert collection.survivors == collection.rollouts


def test_only_what_another_try_could_change_is_tried_again_under_a_new_id():
    statuses = {0: 503, 1: 422, 2: 500}
    collection, seen, _ = collect(
        lambda g, a, t: statuses.get(g, 1.0) if a == 0 and t == 0 else 1.0, num_tasks=4, max_failed_frac=0.5
    )
    failed = {r.group_id: r.failure.kind for r in collection.rollouts if r.failure}
    assert failed == {1: FailureKind.ENVIRONMENT, 2: FailureKind.ENVIRONMENT}
    assert sorted(id_ for id_ in seen if not id_.endswith(".0")) == ["run.0.train.0.0.1"]
    (again,) = [r for r in collection.rollouts if r.rollout_id == "run.0.train.0.0.1"]
    assert [list(c.token_ids) for c in again.calls] == [[10, 10, 11]]


def test_a_timeout_is_not_tried_again():
    collection, seen, _ = collect(
        lambda _g, a, _t: "hang" if a == 0 else 1.0, group_size=3, timeout=0.3, max_failed_frac=0.5
    )
    assert [r.failure and r.failure.kind for r in collection.rollouts] == [FailureKind.TIMEOUT, None, None]
    assert len(seen) == 3


def test_tries_end_and_the_last_failure_stays():
    collection, seen, _ = collect(
        lambda _g, a, _t: 503 if a == 0 else 1.0, group_size=3, retries=2, max_failed_frac=0.5
    )
    (failed,) = [r for r in collection.rollouts if r.failure]
    assert failed.failure.kind is FailureKind.INFRA
    assert failed.failure.message == "HTTP 503: status 503 of 0.0.2"
    assert failed.reward is None
    assert failed.calls == ()
    assert len(seen) == 3 + 2


def test_too_many_failures_stop_the_collection_with_counts_and_the_innermost_cause():
    with pytest.raises(CollectionError) as caught:
        collect(lambda _g, a, _t: 422 if a < 2 else 1.0, group_size=4, max_failed_frac=0.25)
    message = str(caught.value)
    assert "2 of 4 rollouts failed (2 environment), more than max_failed_frac=0.25 allows" in message
    assert "the last one: HTTP 422: status 422 of 0." in message


def test_exactly_the_allowed_fraction_of_failures_is_allowed():
    collection, _, _ = collect(lambda _g, a, _t: 422 if a == 0 else 1.0, group_size=4, max_failed_frac=0.25)
    assert len(collection.survivors) == 3


def test_giving_up_does_not_wait_for_the_rest():
    start = time.monotonic()
    with pytest.raises(CollectionError):
        collect(lambda _g, a, _t: 422 if a == 0 else "hang", group_size=2, max_failed_frac=0.0)
    assert time.monotonic() - start < 5


def test_what_was_not_served_is_a_failed_rollout_that_keeps_its_words():
    """The second attempt comes back with ids that the ledger does not hold."""
    collection, _, _ = collect(lambda *_: 1.0, group_size=3, forge=lambda _g, a: a == 1, max_failed_frac=0.5)
    assert [r.failure and r.failure.kind for r in collection.rollouts] == [None, FailureKind.MISALIGNED, None]
    forged = collection.rollouts[1]
    assert forged.reward is None
    assert forged.calls == ()
    assert [item["type"] for item in forged.output] == ["message"]
    assert len(collection.survivors) == 2


def test_a_turn_that_ran_out_of_tokens_marks_the_rollout_truncated():
    collection, _, _ = collect(lambda *_: 1.0, serve=lambda **k: call(finish_reason="length", **k))
    assert all(r.truncated for r in collection.rollouts)
    collection, _, _ = collect(lambda *_: 1.0)
    assert not any(r.truncated for r in collection.rollouts)


def test_a_rollout_says_where_its_history_broke():
    collection, _, _ = collect(lambda *_: 1.0, num_tasks=2, group_size=2, first_group=6)
    assert [[b.kind for b in r.breaks] for r in collection.rollouts] == [[], [], ["branch"], ["branch"]]


def test_a_line_of_progress_is_logged_while_collecting(caplog):
    caplog.set_level(logging.INFO, logger="lightning_gym.collect")
    with pytest.raises(CollectionError):
        collect(
            lambda _g, a, _t: ("hang", 0.5, 422)[a], group_size=3, timeout=0.5, heartbeat_s=0.1, max_failed_frac=0.5
        )
    lines = [record.getMessage() for record in caplog.records if "collecting" in record.getMessage()]
    assert len(lines) >= 2
    assert "collecting: 2/3 rollouts after 0 s, 1 failed, reward 0.500" in lines


def test_seeds_depend_on_run_group_and_attempt_and_on_nothing_else():
    seeds = {rollout_seed(run, group, attempt) for run in range(4) for group in range(5) for attempt in range(6)}
    assert len(seeds) == 4 * 5 * 6
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert rollout_seed(0, 1, 2) == rollout_seed(0, 1, 2) == 603432347784401458
