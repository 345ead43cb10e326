"""Collections: what is tried again, what is left out, and when enough has failed to stop.

The Gym is a real server in this process that plays by calling the ledger's own door: it serves calls as an endpoint
would and returns what it is told to.
"""

import asyncio
import json
import logging
import re
import time
from collections import Counter
from dataclasses import replace

import pytest
from aiohttp import web

from lightning_gym.collect import Collection, Collector, Stragglers, rollout_seed
from lightning_gym.errors import CollectionError, ConfigError
from lightning_gym.gym import wire
from lightning_gym.gym.client import GymClient
from lightning_gym.policy.conversation import Conversation
from lightning_gym.policy.ledger import Ledger, Served
from lightning_gym.rollout import (
    Call,
    Failure,
    FailureKind,
    Misaligned,
    Misalignment,
    Rollout,
    SamplingProfile,
    SpliceBreak,
)
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
    return Served(call=one, told=Conversation(messages=(), tools=b"", template_kwargs=b""))


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


def test_what_was_left_out_and_how_each_agent_fared_is_counted():
    def one(group, attempt, **fields):
        base = rollout(group, failure=fields.pop("failure", None), reward=attempt)
        return replace(base, rollout_id=f"{group}.{attempt}", attempt=attempt, **fields)

    calls = [call(0), call(1)]
    rollouts = [
        one(0, 0, calls=calls, metrics={"steps": 2.0}, reward_components={"format": 1.0, "right": 0.0}, ids_lost=True),
        one(0, 1, calls=calls[:1], metrics={"steps": 4.0}, reward_components={"format": 0.5}, context_overflow=True),
        one(0, 2, failure=FailureKind.TIMEOUT),
        one(1, 0, agent="b", calls=calls, truncated=True, unconfirmed_calls=3),
        one(1, 1, agent="b", calls=calls, invalid_tool_calls=2),
        one(1, 2, agent="b", masked=True),
    ]
    assert Collection(rollouts=rollouts, seconds=0.0).metrics() == {
        "rollout/unconfirmed_calls": 3.0,
        "rollout/ids_lost": 1.0,
        "rollout/invalid_tool_calls": 2.0,
        "rollout/context_overflow_frac": 0.25,
        "rollout/reward_component/format": 0.75,
        "rollout/reward_component/right": 0.0,
        "rollout/dropped/a": 1.0,
        "rollout/calls_mean/a": 1.5,
        "rollout/truncated_frac/a": 0.0,
        "env/a/steps": 3.0,
        "rollout/dropped/b": 1.0,
        "rollout/calls_mean/b": 2.0,
        "rollout/truncated_frac/b": 0.5,
    }


def test_a_collection_without_rollouts_has_counts_of_zero():
    assert set(Collection(rollouts=[], seconds=0.0).metrics().values()) == {0.0}


# -- Collector


def collect(answers, *, num_tasks=1, group_size=2, serve=call, forge=lambda _g, _a: False, **options):
    """Collect against a Gym that answers a rollout's n-th try with ``answers(group, attempt, try)``.

    An answer is a reward (the rollout is played), further fields of a result, an HTTP status, ``"hang"``, or the
    seconds after which a rollout of reward 1 is over, in a list.
    """
    ledger = Ledger()
    seen = []
    on_group, on_entry = options.pop("on_group", None), options.pop("on_entry", lambda _entry: None)

    async def run(request):
        params = (await request.json())["responses_create_params"]
        rollout_id = json.loads(params["metadata"]["extra_body"])[wire.ROLLOUT_ID]
        seen.append(rollout_id)
        group, attempt, again = map(int, rollout_id.split(".")[-3:])
        entry = ledger.get(rollout_id)
        one = serve(tokens=(group + 10, attempt + 10, again + 10))
        entry.served.append(served(one))
        on_entry(entry)
        if again == 0 and group == 7:
            entry.breaks.append(SpliceBreak(kind="branch", call_index=1, detail=""))
        answer = answers(group, attempt, again)
        if answer == "hang":
            await asyncio.sleep(30)
        if isinstance(answer, list):
            await asyncio.sleep(answer[0])
            answer = 1.0
        fields = answer if isinstance(answer, dict) else {"reward": answer}
        if isinstance(answer, int):
            return web.Response(status=answer, text=f"status {answer} of {group}.{attempt}.{again}")
        if forge(group, attempt):
            one = call(tokens=(99,))
        item = {"type": "message", wire.PROMPT_TOKEN_IDS: one.prompt_ids, wire.GENERATION_TOKEN_IDS: one.token_ids}
        response = {"output": [item | {wire.GENERATION_LOG_PROBS: one.logprobs}]}
        body = {"response": response, "reward": 1.0, "responses_create_params": {"input": "x"}}
        return web.json_response(body | fields)

    async def play():
        app = web.Application()
        app.router.add_post("/run", run)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = GymClient(
            "http://unused",
            rollout_timeout_s=options.pop("timeout", 10),
            max_concurrency=options.pop("max_concurrency", 512),
        )
        client.agents = {"agent": f"http://127.0.0.1:{runner.addresses[0][1]}"}
        client._servers = options.pop("servers", {})
        rows = [{"responses_create_params": {"input": "x"}}] * num_tasks
        first_group = options.pop("first_group", 0)
        dealt = [
            DealtTask(group_id=first_group + i, task=task) for i, task in enumerate(read_tasks(rows, agent="agent"))
        ]
        collector = Collector(client, ledger, run_id="run", **options)
        try:
            return await collector.collect(
                dealt, group_size=group_size, profile_name="train", profile=SamplingProfile(), on_group=on_group
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


def test_a_crash_that_an_agent_reports_while_a_server_behind_it_is_gone_is_tried_again():
    crashing_once = lambda _group, _attempt, again: 500 if again == 0 else 1.0  # noqa: E731
    collection, seen, _ = collect(crashing_once, servers={"resources": "http://127.0.0.1:9"})
    assert [rollout.reward for rollout in collection.rollouts] == [1.0, 1.0]
    assert len(seen) == 4
    never = collect(lambda *_: 500, servers={"resources": "http://127.0.0.1:9"}, max_failed_frac=1.0)[0].rollouts[0]
    assert never.failure.kind is FailureKind.INFRA
    assert "no answer from resources" in never.failure.message


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


def test_the_most_frequent_failure_is_told_too():
    with pytest.raises(CollectionError) as caught:
        collect(
            lambda _g, a, _t: {"_ng_failure_class": "skipped", "error_message": "no disk"} if a else 422,
            group_size=3,
            max_failed_frac=0.7,
        )
    message = str(caught.value)
    assert message.startswith("3 of 3 rollouts failed (2 environment, 1 ") or "(3 environment)" in message
    assert "2 of them: Gym reports `skipped`: no disk; the last one: " in message


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


def test_a_failed_rollout_names_itself_its_call_and_how_it_is_misaligned():
    collection, _, _ = collect(lambda *_: 1.0, group_size=3, forge=lambda _g, a: a == 1, max_failed_frac=0.5)
    failure = collection.rollouts[1].failure
    assert isinstance(failure, Misaligned)
    assert collection.misalignments == Counter({Misalignment.NOT_SERVED: 1})
    assert failure.message.startswith("rollout run.0.train.0.1.0: call 0 came back with 2 prompt ids")


def test_a_masked_rollout_has_a_reward_and_neither_trains_nor_counts_for_its_group():
    collection, _, _ = collect(lambda _g, a, _t: {"mask_sample": a == 0, "reward": a}, group_size=3)
    assert [(r.masked, r.reward, r.failure) for r in collection.rollouts] == [
        (True, 0.0, None),
        (False, 1.0, None),
        (False, 2.0, None),
    ]
    assert collection.survivors == collection.rollouts[1:]
    collection, _, _ = collect(lambda _g, a, _t: {"mask_sample": a == 0}, group_size=2)
    assert collection.survivors == []


def test_a_transient_failure_that_gym_reports_is_tried_again():
    collection, seen, _ = collect(lambda _g, a, t: {"_ng_failure_class": "transient"} if a == t == 0 else 1.0)
    assert [r.failure for r in collection.rollouts] == [None, None]
    assert len(seen) == 3


def test_each_group_is_handed_on_as_soon_as_its_last_attempt_is_over():
    handed, at = [], []

    def on_group(rollouts):
        handed.append([(r.group_id, r.attempt) for r in rollouts])
        at.append(time.monotonic())

    start = time.monotonic()
    collect(lambda g, a, _t: [0.6] if (g, a) == (0, 1) else [0.05], num_tasks=2, on_group=on_group)
    assert handed == [[(1, 0), (1, 1)], [(0, 0), (0, 1)]]
    assert at[0] - start < 0.5 < at[1] - start


def test_the_last_attempts_of_a_group_are_cut_when_the_others_are_long_over():
    start = time.monotonic()
    collection, seen, _ = collect(
        lambda g, a, _t: "hang" if (g, a) == (0, 2) else [0.1],
        num_tasks=2,
        group_size=4,
        stragglers=Stragglers(max_frac=0.25, factor=3.0),
        max_failed_frac=0.0,
    )
    assert time.monotonic() - start < 5
    (cut,) = [r for r in collection.rollouts if r.failure]
    assert (cut.group_id, cut.attempt, cut.failure.kind) == (0, 2, FailureKind.STRAGGLER)
    assert cut.rollout_id in seen
    assert re.fullmatch(r"cut: the others of its group took at most 0\.\d s", cut.failure.message)
    assert len(collection.survivors) == 7


def test_a_straggler_that_is_over_in_time_is_kept_and_failures_are_no_quorum():
    stragglers = Stragglers(max_frac=0.5, factor=20.0)
    collection, _, _ = collect(lambda _g, a, _t: [0.3] if a == 0 else [0.05], stragglers=stragglers)
    assert [r.failure for r in collection.rollouts] == [None, None]
    collection, _, _ = collect(
        lambda _g, a, _t: [0.4] if a == 0 else 422,
        group_size=2,
        stragglers=Stragglers(max_frac=0.5, factor=1.0),
        max_failed_frac=0.5,
    )
    assert collection.rollouts[0].failure is None


@pytest.mark.parametrize("options", [{"max_frac": 0.0}, {"max_frac": 1.0}, {"factor": 0.5}])
def test_a_straggler_policy_without_sense_is_refused(options):
    with pytest.raises(ConfigError, match="expected a max_frac between 0 and 1 and a factor of at least 1"):
        Stragglers(**options)


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


def test_who_waits_for_whom_is_logged_with_the_oldest_rollout(caplog):
    """One rollout hangs in Gym, one in the policy, and one gets no slot."""
    caplog.set_level(logging.INFO, logger="lightning_gym.collect")

    def started(entry):
        entry.calls_started = 1 + (len(entered) == 1)
        entered.append(entry)

    entered = []
    collect(
        lambda *_: [0.5],
        group_size=3,
        heartbeat_s=0.2,
        max_concurrency=2,
        on_entry=started,
    )
    lines = [record.getMessage() for record in caplog.records if " rollouts wait: " in record.getMessage()]
    assert re.fullmatch(
        r"3 rollouts wait: 1 for agent agent, 1 for the policy, 1 for a free slot; the oldest is "
        r"run\.0\.train\.0\.[01]\.0, 0 s, 1 calls served, waits for (agent agent|the policy)",
        lines[0],
    )


def test_seeds_depend_on_run_group_and_attempt_and_on_nothing_else():
    seeds = {rollout_seed(run, group, attempt) for run in range(4) for group in range(5) for attempt in range(6)}
    assert len(seeds) == 4 * 5 * 6
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert rollout_seed(0, 1, 2) == rollout_seed(0, 1, 2) == 603432347784401458
