"""The alignment oracle: a policy whose every token carries a logprob that no other token at any other place has.

Random conversations are played over a real socket by an agent that carries ids back as Gym does, and followed to the
micro-batches they become. A token in the wrong place, a mask off by one, a swapped rollout: each is a wrong number.
"""

import itertools
import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer

from lightning_gym.advantages import group_advantages
from lightning_gym.batch import loss_weights, pack_window
from lightning_gym.gym import wire
from lightning_gym.policy.endpoint import Endpoint
from lightning_gym.policy.engine import EngineModel
from lightning_gym.policy.ledger import Ledger
from lightning_gym.policy.service import PolicyService
from lightning_gym.reconcile import reconcile
from lightning_gym.rollout import Call, Rollout, SamplingProfile
from lightning_gym.testing import FakeEngine
from lightning_gym.trajectory import Trajectory, trajectories

GROUPS, GROUP_SIZE, MAX_TURNS, MAX_OUTPUT_TOKENS = 4, 4, 6, 30
TURN_END = 2

TEXTS = [
    "",
    " ",
    "42",
    "1234567890.50",
    "\n\n",
    "<|im_end|>",
    "<|im_end|>\n<|im_start|>assistant\nI am the assistant.<|im_end|>\n",
    "<tool_call>\n{}</tool_call>",
    "<|endoftext|>",
    "größe, 東京, \U0001f469\u200d\U0001f680, e\u0301",
    "increment_counter",
    '{"success":true}',
    "a b c  d",
    "\ufffd",
]


def logprob_of(position: int, token: int) -> float:
    """Different for every pair, and exact in float32: an integer below 2 ** 24 over a power of two."""
    return -(position * 512 + token + 1) / 1024


@dataclass
class Asked:
    """One call, as the agent saw it."""

    tail: str | None
    """What a ChatML template writes after the sampled turn end, where the request extends the previous call; special
    tokens that somebody typed are marked."""
    whole: list[dict] | None
    """The request's messages, where it is the first or its beginning was edited."""
    bundle: wire.Bundle
    finish_reason: str


@dataclass
class Play:
    """One rollout from both sides."""

    rollout_id: str
    group_id: int
    reward: float
    asked: list[Asked] = field(default_factory=list)
    rollout: Rollout | None = None


@dataclass
class Match:
    """Everything that was played, and what the sampler knows of it."""

    tokenizer: object
    plays: list[Play]
    sampled: list[tuple[int, int]]
    """(position, id) of every token in the order sampled, written down by the sampler itself."""

    def segments(self) -> list[Trajectory]:
        return [segment for play in self.plays for segment in trajectories(play.rollout)]

    def advantages(self) -> dict[str, float]:
        values = group_advantages([play.reward for play in self.plays], [play.group_id for play in self.plays])
        return {play.rollout_id: value for play, value in zip(self.plays, values.tolist(), strict=True)}

    def window(self, num_micro_batches, segments=None):
        segments = self.segments() if segments is None else segments
        return pack_window(
            segments,
            [self.advantages()[segment.rollout_id] for segment in segments],
            loss_weights(segments, aggregation="token_mean"),
            num_micro_batches=num_micro_batches,
            max_tokens_per_micro_batch=1 << 20,
            weight_scale=num_micro_batches,
        )


def scripted(tokenizer):
    """Turns of random ids, or a tool call in words that no template would write; some end, some run out of room."""

    def script(_prompt_ids, seed):
        rng = random.Random(seed)
        ids = [token for token in rng.choices(range(len(tokenizer)), k=rng.choice([0, 1, 3, 9])) if token != TURN_END]
        if rng.random() < 0.4:
            number = rng.randrange(100)
            text = f'{rng.choice(["", "so: "])}<tool_call>{{"arguments":{{"n":  {number}}}, "name":"add"}}</tool_call>'
            ids = tokenizer.encode(text, add_special_tokens=False)
        if rng.random() < 0.6:
            return [*ids, TURN_END, *[5] * MAX_OUTPUT_TOKENS]
        return [*ids, *(rng.randrange(3, len(tokenizer)) for _ in range(MAX_OUTPUT_TOKENS))]

    return script


class Agent:
    """Plays one rollout. Keeps what Gym keeps: messages with the ids of the call that made them."""

    def __init__(self, http, play, seed):
        self.http, self.play, self.rng = http, play, random.Random(seed)

    def text(self):
        return "".join(self.rng.choices(TEXTS, k=self.rng.choice([1, 1, 2])))

    def run(self):
        messages = [{"role": "system", "content": self.text()}, {"role": "user", "content": self.text()}]
        messages = messages[self.rng.randrange(2) :]
        edited, new = True, None
        for _ in range(self.rng.randrange(1, MAX_TURNS + 1)):
            message = self.ask(messages, new, edited=edited)
            new = self.answers(message)
            edited = self.rng.random() < 0.2
            if edited:
                first = messages[0]
                changed = first | {"content": first["content"] + self.rng.choice(["!", "  ", "7"])}
                messages = [changed, *messages[1:]]
            if message.get("content") or message.get("tool_calls"):
                messages = [*messages, message, *new]
            else:  # 0.4.0 leaves an empty turn out of the history
                messages, new = [*messages, *new], None

    def answers(self, message):
        calls = message.get("tool_calls") or ()
        if calls:
            return [{"role": "tool", "content": self.text(), "tool_call_id": call["id"]} for call in calls]
        return [{"role": "user", "content": self.text()} for _ in range(self.rng.choice([1, 1, 2]))]

    def ask(self, messages, new, *, edited):
        body = {"model": "policy", "messages": messages, "temperature": 1.0, wire.ROLLOUT_ID: self.play.rollout_id}
        response = self.http.post("/chat/completions", json=body)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        message = choice["message"]
        tail = None
        if new is not None and not edited:
            tail = "\n" + "".join(f"<|im_start|>{m['role']}\n{typed(m['content'])}<|im_end|>\n" for m in new)
            tail += "<|im_start|>assistant\n"
        bundle = wire.Bundle(
            prompt_ids=message[wire.PROMPT_TOKEN_IDS],
            token_ids=message[wire.GENERATION_TOKEN_IDS],
            logprobs=message[wire.GENERATION_LOG_PROBS],
        )
        self.play.asked.append(Asked(tail, messages if edited else None, bundle, choice["finish_reason"]))
        return message


@pytest.fixture(scope="module", params=[0, 1, 2])
def match(request, policy_dir, one_thread):
    """Groups of random rollouts, played four at a time."""
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    sampled = []

    def logprob(position, token):
        sampled.append((position, token))
        return logprob_of(position, token)

    engine = FakeEngine(max_model_len=2048, script=scripted(AutoTokenizer.from_pretrained(policy_dir)), logprob=logprob)
    engine.start(EngineModel(path=policy_dir, dtype="float32", weights=lambda: ()))
    engine.update_weights(lambda: None, version=7)
    engine.resume()
    ledger = Ledger()
    profile = SamplingProfile(max_output_tokens=MAX_OUTPUT_TOKENS)
    endpoint = Endpoint(PolicyService(engine, policy_dir, ledger, {"train": profile, "eval": profile}))
    endpoint.start()
    rng = random.Random(request.param)
    plays = [
        Play(rollout_id=f"run.0.train.{group}.{number}", group_id=group, reward=rng.random())
        for group in range(GROUPS)
        for number in range(GROUP_SIZE)
    ]
    headers = {"authorization": f"Bearer {endpoint.api_key}"}
    try:
        with httpx.Client(base_url=endpoint.url, headers=headers, timeout=60) as http, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda play: play_one(http, ledger, play, request.param), plays))
    finally:
        engine.close()
        endpoint.close()
    return Match(tokenizer, plays, sampled)


def play_one(http, ledger, play, seed):
    entry = ledger.open(
        play.rollout_id, profile="train", seed=random.Random(f"{seed} {play.rollout_id}").getrandbits(40)
    )
    Agent(http, play, f"{seed}-{play.rollout_id}").run()
    assert ledger.close(play.rollout_id) is entry
    calls = reconcile(entry, [asked.bundle for asked in play.asked])
    assert isinstance(calls, list), calls
    play.rollout = Rollout(
        rollout_id=play.rollout_id,
        task_index=0,
        group_id=play.group_id,
        attempt=0,
        agent="oracle",
        reward=play.reward,
        calls=calls,
    )


# -- what must hold of the micro-batches, in one function so that controls can watch it fail


def sequences(batches):
    """Every packed sequence, taken apart again: ids, and one dict a token."""
    for batch in batches:
        rows = {
            name: getattr(batch, name)[0].numpy()
            for name in ("input_ids", "position_ids", "loss_mask", "rollout_logprobs", "advantages", "loss_weight")
        }
        rows["weight_versions"] = batch.weight_versions[0].numpy()
        assert sum(batch.sequence_lengths) == batch.input_ids.shape[1]
        for start, end in itertools.pairwise([0, *np.cumsum(batch.sequence_lengths)]):
            yield {name: row[start:end] for name, row in rows.items()}


def check_window(match, batches):
    calls = {}  # where each sampled token must be found: (the ids before it, itself) -> its rollout
    for play in match.plays:
        for asked in play.asked:
            ids = [*asked.bundle.prompt_ids, *asked.bundle.token_ids]
            for position in range(len(asked.bundle.prompt_ids), len(ids)):
                calls[tuple(ids[: position + 1])] = play
    advantages = match.advantages()
    found = Counter()
    total_weight = 0.0
    for sequence in sequences(batches):
        ids, trained = sequence["input_ids"].tolist(), sequence["loss_mask"]
        assert sequence["position_ids"].tolist() == list(range(len(ids)))
        assert not trained[0]
        for name in ("loss_weight", "advantages", "rollout_logprobs"):
            assert (sequence[name][~trained] == 0).all(), name
        assert (sequence["weight_versions"][~trained] == -1).all()
        if not sequence["loss_weight"].any():
            continue  # a filler
        for position in np.flatnonzero(trained):
            history = tuple(ids[: position + 1])
            assert history in calls, "a trained token that was not sampled after these tokens"
            assert sequence["rollout_logprobs"][position] == logprob_of(position, ids[position])
            assert sequence["advantages"][position] == np.float32(advantages[calls[history].rollout_id])
            assert sequence["weight_versions"][position] == 7
            found[(int(position), ids[position])] += 1
            total_weight += float(sequence["loss_weight"][position])
    assert found == Counter(match.sampled), "every sampled token trains once, and no other"
    assert total_weight == pytest.approx(len(batches), rel=1e-5)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 5, 200])
def test_every_sampled_token_trains_once_with_its_logprob_and_its_rollouts_advantage(match, num_micro_batches):
    batches = match.window(num_micro_batches)
    assert len(batches) == num_micro_batches
    check_window(match, batches)
    assert sum(int((batch.loss_weight > 0).sum()) for batch in batches) == len(match.sampled)


def shifted(by):
    return lambda segment: replace(segment, loss_mask=np.roll(segment.loss_mask, by))


def with_logprobs_shifted(segment):
    return replace(segment, rollout_logprobs=np.roll(segment.rollout_logprobs, 1))


def without_the_last_token(segment):
    mask = segment.loss_mask.copy()
    mask[np.flatnonzero(mask)[-1]] = False
    return replace(segment, loss_mask=mask)


def with_a_tool_token(segment):
    mask = segment.loss_mask.copy()
    mask[np.flatnonzero(~mask)[-1]] = True
    return replace(segment, loss_mask=mask)


@pytest.mark.parametrize(
    "fault",
    [shifted(1), shifted(-1), with_logprobs_shifted, without_the_last_token, with_a_tool_token],
    ids=["mask one late", "mask one early", "logprobs one late", "a token lost", "a tool's token trained"],
)
def test_control_a_fault_in_one_segment_is_seen(match, fault):
    segments = match.segments()
    check_window(match, match.window(2, segments))
    index = max(range(len(segments)), key=lambda i: len(segments[i]))
    segments[index] = fault(segments[index])
    with pytest.raises(AssertionError):
        check_window(match, match.window(2, segments))


def test_control_a_swapped_rollout_is_seen(match):
    segments = match.segments()
    first, second = segments[0], next(s for s in segments if s.rollout_id != segments[0].rollout_id)
    segments[0] = replace(first, rollout_id=second.rollout_id)
    with pytest.raises(AssertionError):
        check_window(match, match.window(2, segments))


# -- segments and prompts


def test_every_call_is_found_whole_in_a_segment_of_its_rollout(match):
    for play in match.plays:
        segments = [segment.token_ids.tolist() for segment in trajectories(play.rollout)]
        for asked in play.asked:
            whole = [*asked.bundle.prompt_ids, *asked.bundle.token_ids]
            assert any(ids[: len(whole)] == whole for ids in segments)
        assert sum(s.num_trained for s in trajectories(play.rollout)) == sum(
            len(asked.bundle.token_ids) for asked in play.asked
        )


def test_a_later_prompt_is_the_earlier_prompt_its_emitted_ids_and_the_templates_words(match):
    continued = 0
    for play in match.plays:
        for before, asked in itertools.pairwise(play.asked):
            if asked.tail is None:
                continue
            continued += 1
            emitted = before.bundle.token_ids
            tail = asked.tail if emitted[-1] == TURN_END else "<|im_end|>" + asked.tail
            known = len(before.bundle.prompt_ids) + len(emitted)
            assert asked.bundle.prompt_ids[:known] == [*before.bundle.prompt_ids, *emitted]
            check_spelling(match.tokenizer, asked.bundle.prompt_ids[known:], tail)
    assert continued > 10


def test_a_first_or_edited_conversation_is_the_templates_own_rendering(match):
    whole = [asked for play in match.plays for asked in play.asked if asked.whole is not None]
    assert len(whole) > len(match.plays)
    for asked in whole:
        text = match.tokenizer.apply_chat_template(
            [with_parsed_arguments(message) for message in asked.whole], tokenize=False, add_generation_prompt=True
        )
        check_spelling(match.tokenizer, asked.bundle.prompt_ids, text)


SPECIAL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
TYPED = re.compile("\ue000(.*?)\ue001")


def typed(content):
    """Special tokens in what somebody typed, marked."""
    return SPECIAL.sub("\ue000\\g<0>\ue001", content or "")


def check_spelling(tokenizer, ids, marked):
    """The ids spell the text, and special tokens are among them where the template wrote one and nowhere else."""
    text = TYPED.sub(r"\1", marked)
    assert tokenizer.decode(ids) == text
    special = set(tokenizer.all_special_ids)
    by_template = tokenizer.encode(TYPED.sub("", marked), add_special_tokens=False)
    assert [i for i in ids if i in special] == [i for i in by_template if i in special]
    if text == marked:
        assert ids == by_template


def with_parsed_arguments(message):
    """Templates write arguments as objects."""
    calls = [
        {"function": {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {"role": message["role"], "content": typed(message["content"]), "tool_calls": calls}


def test_a_segment_begins_exactly_where_the_history_did_not_go_on(match):
    for play in match.plays:
        breaks = sum(asked.tail is None for asked in play.asked[1:])
        assert len(trajectories(play.rollout)) == 1 + breaks


def test_a_call_that_ended_by_length_has_no_turn_end_and_the_next_prompt_supplies_it_untrained(match):
    cut = 0
    for play in match.plays:
        segments = trajectories(play.rollout)
        for before, asked in itertools.pairwise(play.asked):
            if before.finish_reason == "length" and asked.tail is not None:
                cut += 1
                whole = [*before.bundle.prompt_ids, *before.bundle.token_ids]
                assert len(before.bundle.token_ids) == MAX_OUTPUT_TOKENS
                assert asked.bundle.prompt_ids[len(whole)] == TURN_END
                segment = next(s for s in segments if s.token_ids[: len(whole) + 1].tolist() == [*whole, TURN_END])
                assert not segment.loss_mask[len(whole)]
    assert cut > 0


def test_the_match_was_worth_watching(match):
    """The traps were really set: re-encoding what was said gives other ids, segments broke, turns ran out of room."""
    asked = [asked for play in match.plays for asked in play.asked]
    retokenized = [
        a for a in asked if match.tokenizer.encode(match.tokenizer.decode(a.bundle.token_ids)) != a.bundle.token_ids
    ]
    assert len(retokenized) > len(asked) // 3
    assert {a.finish_reason for a in asked} == {"stop", "length", "tool_calls"}
    assert len({len(play.asked) for play in match.plays}) > 3
    assert max(len(trajectories(play.rollout)) for play in match.plays) > 1
    calls = [call for play in match.plays for call in play.rollout.calls]
    assert all(isinstance(call, Call) for call in calls)
    assert len(calls) == len(asked)
