"""From the bytes of a ``/run`` result to trajectories, beside `json.loads` of the same bytes.

The ledger holds the calls as the endpoint writes them; ids, logprobs and text are random. "lists" is the
straightforward way: decode everything, compare lists, make arrays.
"""

import json
import math
import random
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from benchmarks.table import Measurement
from lightning_gym.gym import wire
from lightning_gym.gym.number_arrays import NumberArray
from lightning_gym.policy.conversation import Conversation
from lightning_gym.policy.ledger import Entry, Served, SharedIds
from lightning_gym.reconcile import finished
from lightning_gym.rollout import Call, Rollout
from lightning_gym.trajectory import Trajectory, trajectories

REPEATS = 15
SAMPLE_S = 0.005
"""A sample is as many runs in a row as fill about this."""
SHAPES = ((1, 1000), (4, 256), (16, 256), (64, 256))
"""Turns, and sampled tokens a turn."""
PROMPT_TOKENS, TOOL_TOKENS, VOCABULARY = 200, 40, 150_000
BASE = Rollout(rollout_id="bench", task_index=0, group_id=0, attempt=0, agent="bench")
NOTHING_SAID = Conversation(messages=(), tools=b"", template_kwargs=b"")


def measure() -> Measurement:
    """Time the ways in turn, shape by shape."""
    return Measurement(
        name="alignment",
        what=f"One rollout: prompt of {PROMPT_TOKENS} tokens, {TOOL_TOKENS} tokens of a tool between turns, the ids of "
        f"every call whole in the result, as Gym sends them. CPU time, {REPEATS} of each way in turn, medians; `over "
        "json.loads` is the median of the ratios. A token is one of the trajectory, prompt or sampled.",
        rows=[_row(turns, sampled) for turns, sampled in SHAPES],
    )


def _row(turns: int, sampled: int) -> dict[str, object]:
    content, entry = _played(turns, sampled)
    arms: dict[str, Callable[[], Any]] = {
        "json.loads": lambda: json.loads(content),
        "ours": lambda: _aligned(content, entry),
        "lists": lambda: _by_lists(content, entry),
    }
    (trajectory,) = arms["ours"]()
    assert np.array_equal(trajectory.token_ids, arms["lists"]()[0])
    at_once = max(1, round(SAMPLE_S / timeit.timeit(arms["json.loads"], number=1)))
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(REPEATS):
        for arm, run in arms.items():
            seconds[arm].append(timeit.timeit(run, timer=time.process_time, number=at_once) / at_once)
    median = {arm: statistics.median(values) for arm, values in seconds.items()}
    ratios = [ours / parse for ours, parse in zip(seconds["ours"], seconds["json.loads"], strict=True)]
    return {
        "turns x sampled": f"{turns} x {sampled}",
        "tokens": len(trajectory),
        "MB": len(content) / 1e6,
        "json.loads ms": median["json.loads"] * 1e3,
        "ours ms": median["ours"] * 1e3,
        "lists ms": median["lists"] * 1e3,
        "ours us/token": median["ours"] * 1e6 / len(trajectory),
        "over json.loads": statistics.median(ratios),
    }


def _played(turns: int, sampled: int) -> tuple[bytes, Entry]:
    """A result and the ledger's page of it."""
    rng = random.Random(0)
    entry = Entry(profile="train", seed=0)
    items: list[dict[str, Any]] = []
    prompt = _ids(rng, PROMPT_TOKENS)
    shared = SharedIds(list(prompt))
    for index in range(turns):
        token_ids = _ids(rng, sampled)
        logprobs = [float(np.float32(math.log(1 - rng.random()))) for _ in range(sampled)]
        call = Call(
            index=index,
            prompt_ids=shared,
            token_ids=token_ids,
            logprobs=NumberArray.of(logprobs),
            finish_reason="stop",
            weight_version=0,
        )
        entry.served.append(Served(call=call, told=NOTHING_SAID))
        bundle = dict(zip(wire.TOKEN_BUNDLE, (prompt, token_ids, logprobs), strict=True))
        items += (
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "word " * sampled, **bundle},
            {"type": "function_call_output", "call_id": "c", "output": "word " * TOOL_TOKENS},
        )
        prompt = [*prompt, *token_ids, *_ids(rng, TOOL_TOKENS)]
        shared = shared.grown_to(prompt)
    body = {"responses_create_params": {"input": "x " * PROMPT_TOKENS}, "response": {"output": items}, "reward": 1.0}
    return json.dumps(body, separators=(",", ":")).encode(), entry


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def _aligned(content: bytes, entry: Entry) -> list[Trajectory]:
    played = wire.read_run_response(wire.decode_run_response(content))
    return trajectories(finished(BASE, played, entry))


def _by_lists(content: bytes, entry: Entry) -> tuple[Any, Any, Any]:
    seen: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    items = msgspec.json.decode(content)["response"]["output"]
    for item, served in zip((i for i in items if wire.PROMPT_TOKEN_IDS in i), entry.served, strict=True):
        prompt, token_ids, back = (item[key] for key in wire.TOKEN_BUNDLE)
        assert (prompt, token_ids, back) == (
            list(served.call.prompt_ids),
            served.call.token_ids,
            list(served.call.logprobs),
        )
        assert prompt[: len(seen)] == seen
        new = len(prompt) - len(seen)
        mask += [False] * new + [True] * len(token_ids)
        logprobs += [0.0] * new + back
        seen = prompt + token_ids
    return np.array(seen), np.array(mask), np.array(logprobs, dtype=np.float32)
