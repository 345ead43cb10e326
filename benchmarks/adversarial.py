"""Alignment under attack: what each way of making the next prompt does with histories that are not sent back as told.

Scripted agents play conversations over seven families of chat templates and do to their history what real agents do:
trim it, write tool calls anew, drop reasoning, ids or empty turns, ask twice, go back, compact. Every message carries
a word of its own, so that a prompt can be compared with what was asked, whatever made it. Each way sees the same
agents and samples the same ids:

* *ours*: the endpoint's service, its ledger and `lightning_gym.trajectory`;
* *EOS-count splice* and *last-EOS splice*: the emitted ids of the last message with ids, then the template's ids from
  the n-th end token on (n counted in the rendered history), or from the last end token inside the rendered history;
  the consumer asserts that turns are contiguous. They are given the turn end that the template writes, where those who
  describe them use the tokenizer's end-of-text token;
* *no splice*: the history is rendered and tokenized again; with that assertion, or, as some consumers do, without.

A turn is *exact* (continues what was emitted, and says what was asked), a *new segment* (rendered whole, and the
consumer knows), a *crash* (the assertion, or the algorithm's own; the rest of the rollout is lost), or *silent*:
trained as if it were exact, though a conversation was continued that nobody asked for, or ids were trained in a context
that they were not sampled in.
"""

import asyncio
import collections
import copy
import json
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.table import Measurement
from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.completion import message_of
from lightning_gym.policy.engine import Deliver, Generation, SamplingParams
from lightning_gym.policy.ledger import Ledger
from lightning_gym.policy.replies import json_reply
from lightning_gym.policy.service import PolicyService, call_seed
from lightning_gym.reconcile import reconcile
from lightning_gym.rollout import Call, Failure, Rollout, SamplingProfile
from lightning_gym.template_families import FAMILIES, Family, save_family
from lightning_gym.trajectory import Trajectory, trajectories

ROLLOUTS_PER_FAMILY = 60
MAX_TURNS = 8
MAX_MODEL_LEN = 1 << 16
_WORD = re.compile(r"[wt]\d+x")
_TEXTS = (
    "",
    "größe 東京 e\u0301",
    "a  b\n\n",
    ' {"n":  1} ',
    "\U0001f469\u200d\U0001f680",
    "1234567890.50",
    "\ttrim me \n",
)
_TRAPS = (
    *("trim", "rewrite_calls", "drop_reasoning", "drop_ids", "drop_empty", "ask_twice", "go_back", "compact"),
    *("new_system", "insert_assistant", "stale_ids", "end_token_in_text"),
)


def measure() -> Measurement:
    """All ways over all families; the counts are exact, not timed."""
    rows = [
        {
            "way": name,
            "turns": sum(found[kind] for kind in ("exact", "new segment", "crash", "silent")),
            **{kind: found[kind] for kind in ("exact", "new segment", "crash", "silent")},
            "silently misaligned tokens": found["silent tokens"],
            "rollouts lost": found["rollouts lost"],
        }
        for name, found in outcomes(ROLLOUTS_PER_FAMILY).items()
    ]
    total = ROLLOUTS_PER_FAMILY * len(FAMILIES)
    return Measurement(
        name="adversarial",
        what=f"{total} scripted rollouts over {len(FAMILIES)} chat-template families, {len(_TRAPS)} kinds of rewritten "
        "history; a way that crashes in a rollout plays no further turn of it.",
        rows=rows,
    )


def outcomes(rollouts_per_family: int) -> dict[str, collections.Counter[str]]:
    """What became of the turns, by way."""
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in _WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES.values():
            path = save_family(family, Path(folder) / family.name)
            chat = ChatFormat(path)
            for seed in range(rollouts_per_family):
                for name, play in _WAYS.items():
                    counts[name].update(play(family, chat, path, seed))
    return counts


# -- the policy: the same ids for the same seed, whoever asks


class Policy:
    """Samples turns that no template would write."""

    def __init__(self, family: Family, chat: ChatFormat) -> None:
        self._family = family
        self._chat = chat

    def sample(self, seed: int) -> tuple[list[int], str]:
        """Ids, and why they end."""
        rng = random.Random(seed)
        kind = rng.choice(("words", "words", "thought", "call", "call", "empty", "cut"))
        if kind == "empty":
            return [self._chat.turn_end_id], "stop"
        text = f"{rng.choice(_TEXTS)}w{rng.randrange(10**8)}x{rng.choice(_TEXTS)}"
        if kind == "thought":
            text = f"<think>\nt{rng.randrange(10**8)}x{rng.choice(_TEXTS)}\n</think>\n\n{text}"
        if kind == "call" and self._family.tools:
            arguments = f'{{"b":  {rng.randrange(99)}, "a" : "w{rng.randrange(10**8)}x ü"}}'
            text += f'\n<tool_call>{{"arguments":{arguments},"name":"look_up"}}\n</tool_call>'
        ids = [i for piece in _pieces(text, rng) for i in self._chat.encode(piece)]
        return (ids, "length") if kind == "cut" else ([*ids, self._chat.turn_end_id], "stop")


def _pieces(text: str, rng: random.Random) -> list[str]:
    """The text cut anywhere: tokens that a tokenizer would have merged."""
    cuts = sorted(rng.sample(range(1, len(text)), min(3, len(text) - 1)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


# -- the agent: what it sends depends on its seed and on the words it got, never on how prompts are made


@dataclass
class Agent:
    """Plays one conversation."""

    family: Family
    seed: int
    end_text: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    past: list[list[dict[str, Any]]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.family.name}-{self.seed}")
        self.trap = self.rng.choice((None, *_TRAPS))
        if self.family.tools:
            self.tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
        if self.family.system:
            self.messages.append({"role": "system", "content": self._text()})
        self.messages.append({"role": "user", "content": self._text()})

    def _text(self) -> str:
        text = f"{self.rng.choice(_TEXTS)}w{self.rng.randrange(10**8)}x{self.rng.choice(_TEXTS)}"
        return f"{text} {self.end_text} more" if self.trap == "end_token_in_text" and self.rng.random() < 0.5 else text

    def goes_on(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages of the next request, after the assistant said `message`."""
        self.past.append(list(self.messages))
        springs = self.rng.random() < 0.5
        if self.trap == "ask_twice" and springs:
            return self.messages
        if self.trap == "go_back" and springs:
            self.messages = list(self.rng.choice(self.past))
        self.messages = [*self.messages, self._kept(message, springs=springs)]
        calls = message.get("tool_calls")
        if calls and self.family.tools:
            self.messages += [{"role": "tool", "tool_call_id": c["id"], "content": self._text()} for c in calls]
        else:
            self.messages.append({"role": "user", "content": self._text()})
        if springs:
            self._rewrite()
        return self.messages

    def _kept(self, message: dict[str, Any], *, springs: bool) -> dict[str, Any]:
        kept = copy.deepcopy(message)
        if not springs:
            return kept
        if self.trap == "trim":
            kept["content"] = (kept["content"] or "").strip()
        elif self.trap == "rewrite_calls":
            for call in kept.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), sort_keys=True)
        elif self.trap == "drop_reasoning":
            kept.pop("reasoning", None)
            kept.pop("reasoning_content", None)
        elif self.trap == "drop_ids":
            for key in wire.TOKEN_BUNDLE:
                kept.pop(key, None)
        elif self.trap == "stale_ids":
            with_ids = [m for m in self.messages if wire.GENERATION_TOKEN_IDS in m]
            kept |= {key: with_ids[0][key] for key in wire.TOKEN_BUNDLE} if with_ids else {}
        return kept

    def _rewrite(self) -> None:
        """What an agent does to more than the last message."""
        start = 1 if self.family.system else 0
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if self.trap == "new_system" and self.family.system:
            self.messages[0] = {"role": "system", "content": self._text()}
        elif self.trap == "compact" and len(turns) > 1 and turns[-1] == len(self.messages) - 1:
            self.messages = [*self.messages[:start], {"role": "user", "content": self._text()}]
        elif self.trap == "insert_assistant" and turns and turns[-1] == len(self.messages) - 1:
            self.messages += [
                {"role": "assistant", "content": self._text()},
                {"role": "user", "content": self._text()},
            ]
        elif self.trap == "drop_empty":
            empty = [
                m for m in self.messages if m["role"] == "assistant" and not m["content"] and not m.get("tool_calls")
            ]
            if empty and self.family.name not in ("gemma", "mistral"):  # these refuse two user turns in a row
                self.messages = [m for m in self.messages if m is not empty[-1]]


# -- ways to make the next prompt


class Misfit(Exception):  # noqa: N818  the outcome of a way, not an accident
    """An assertion of the way, or of its consumer."""


Ids = list[int]
NextPrompt = Callable[[ChatFormat, Sequence[Mapping[str, Any]], Any], Ids]


def _rendered(chat: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any, *, prompt: bool = True) -> Ids:
    return chat.encode(chat.render(messages, tools, add_generation_prompt=prompt))


def no_splice(chat: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any) -> Ids:
    """Render and tokenize everything."""
    return _rendered(chat, messages, tools)


def eos_count_splice(chat: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any) -> Ids:
    """Emitted ids, then the rendering from its n-th end token on; n ends are in the rendered history."""
    found = _emitted(chat, messages, tools)
    if found is None:
        return _rendered(chat, messages, tools)
    emitted, history = found
    whole = _rendered(chat, messages, tools)
    ends = [i for i, token in enumerate(whole) if token == chat.turn_end_id]
    count = history.count(chat.turn_end_id)
    if not 0 < count <= len(ends):
        raise Misfit("the rendering has fewer end tokens than its history")
    return emitted + whole[ends[count - 1] :]


def last_eos_splice(chat: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any) -> Ids:
    """Emitted ids, then the rendering from the last end token inside the length of the rendered history on."""
    found = _emitted(chat, messages, tools)
    if found is None:
        return _rendered(chat, messages, tools)
    emitted, history = found
    whole = _rendered(chat, messages, tools)
    ends = [i for i, token in enumerate(whole[: len(history)]) if token == chat.turn_end_id]
    if not ends:
        raise Misfit("no end token in the rendered history")
    return emitted + whole[ends[-1] :]


def _emitted(chat: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[Ids, Ids] | None:
    """Ids of the last message that has any, its closing end token cut; and the rendering of the history with it."""
    with_ids = [i for i, message in enumerate(messages) if message.get(wire.GENERATION_TOKEN_IDS)]
    if not with_ids:
        return None
    last = messages[with_ids[-1]]
    emitted = [*last[wire.PROMPT_TOKEN_IDS], *last[wire.GENERATION_TOKEN_IDS]]
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    history = _rendered(chat, messages[: spoken[-1] + 1], tools, prompt=False)
    return (emitted[:-1] if emitted[-1] == chat.turn_end_id else emitted), history


# -- playing them


def end_to_end(next_prompt: NextPrompt, *, checked: bool) -> "Way":
    """A way whose consumer lays the calls of a rollout end to end."""

    def play(family: Family, chat: ChatFormat, _path: Path, seed: int) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        agent, policy = Agent(family, seed, chat.turn_end_text), Policy(family, chat)
        messages, seen = agent.messages, []
        for turn in range(MAX_TURNS):
            token_ids, reason = policy.sample(call_seed(seed, turn))
            try:
                prompt = next_prompt(chat, messages, agent.tools)
                contiguous = prompt[: len(seen)] == seen
                if checked and not contiguous:
                    raise Misfit("the prompt does not begin with what was emitted")
            except Misfit:
                return found + collections.Counter({"crash": 1, "rollouts lost": 1})
            right = contiguous and says_what_was_asked(chat, prompt, messages, agent.tools)
            found["exact" if right else "silent"] += 1
            found["silent tokens"] += 0 if right else len(token_ids)
            seen = [*prompt, *token_ids]
            logprobs = [-1.0] * len(token_ids)
            sampled = Generation(token_ids=token_ids, logprobs=logprobs, finish_reason=reason, weight_version=0)
            message = message_of(chat, turn, {"tools": agent.tools}, sampled) | {
                wire.PROMPT_TOKEN_IDS: prompt,
                wire.GENERATION_TOKEN_IDS: token_ids,
                wire.GENERATION_LOG_PROBS: logprobs,
            }
            messages = agent.goes_on(message)
        return found

    return play


def says_what_was_asked(chat: ChatFormat, prompt: Ids, messages: Sequence[Mapping[str, Any]], tools: Any) -> bool:
    """Whether a prompt holds what the template shows of the request, each word once, and no other message's.

    Turns that were sampled keep the context that they were sampled in: what the policy emitted may stay where the
    template would have dropped it (thoughts, words beside a tool call), and a system prompt that the template moves to
    the last turn may stand at its earlier places too. All of it only where the request has those messages.
    """
    found, fresh = chat.decode(prompt), chat.render(messages, tools)
    words, shown = _WORD.findall(found), set(_WORD.findall(fresh))
    emitted = chat.decode([i for message in messages for i in message.get(wire.GENERATION_TOKEN_IDS, ())])
    allowed = shown | set(_WORD.findall(json.dumps(messages) + emitted))
    repeated = {word for word, count in collections.Counter(words).items() if count > 1}
    movable = set(_WORD.findall(messages[0]["content"] if messages[0]["role"] == "system" else ""))
    return (
        shown <= set(words) <= allowed
        and repeated <= movable
        and prompt.count(chat.turn_end_id) == chat.encode(fresh).count(chat.turn_end_id)
    )


class Scripted:
    """An engine that samples by the seed alone, and writes down what it was fed."""

    weight_version = 0
    max_model_len = MAX_MODEL_LEN

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.fed: list[tuple[Ids, Ids]] = []

    def generate(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, deliver: Deliver) -> None:
        """Deliver at once."""
        token_ids, reason = self._policy.sample(sampling.seed)
        self.fed.append((list(prompt_ids), token_ids))
        logprobs = [-float(i + 1) for i in range(len(token_ids))]
        deliver(Generation(token_ids=token_ids, logprobs=logprobs, finish_reason=reason, weight_version=0))

    def abort(self, request_id: str) -> None:
        """Nothing is ever under way."""


def ours(family: Family, chat: ChatFormat, path: Path, seed: int) -> collections.Counter[str]:
    """The endpoint's service, the ledger, and the trajectories made from them."""
    return asyncio.run(_ours(family, chat, path, seed))


async def _ours(family: Family, chat: ChatFormat, path: Path, seed: int) -> collections.Counter[str]:
    engine, ledger, profile = Scripted(Policy(family, chat)), Ledger(), SamplingProfile()
    service = PolicyService(engine, path, ledger, {"train": profile, "eval": profile})  # type: ignore[arg-type]  the part of an engine that serving needs
    entry = ledger.open("r", profile="train", seed=seed)
    agent = Agent(family, seed, chat.turn_end_text)
    found: collections.Counter[str] = collections.Counter()
    messages, returned = agent.messages, []
    for _ in range(MAX_TURNS):
        body = {"messages": messages, "tools": agent.tools, wire.ROLLOUT_ID: "r"}
        answer = await service.chat_completions(json.loads(json.dumps(body)))
        answer.delivered()
        message = json.loads(json_reply(answer.body).body)["choices"][0]["message"]
        prompt, token_ids = message[wire.PROMPT_TOKEN_IDS], message[wire.GENERATION_TOKEN_IDS]
        right = says_what_was_asked(chat, prompt, messages, agent.tools)
        continued = any(prompt[: len(p) + len(t)] == [*p, *t] for p, t in engine.fed[:-1])
        found[("exact" if continued or len(engine.fed) == 1 else "new segment") if right else "silent"] += 1
        found["silent tokens"] += 0 if right else len(token_ids)
        returned.append(
            wire.Bundle(prompt_ids=prompt, token_ids=token_ids, logprobs=message[wire.GENERATION_LOG_PROBS])
        )
        messages = agent.goes_on(message)
    calls = reconcile(entry, returned)
    lost = isinstance(calls, Failure)
    found["rollouts lost"] += lost
    found["silent tokens"] += 0 if lost else _misplaced(calls, engine.fed)
    return found


def _misplaced(calls: Sequence[Call], fed: Sequence[tuple[Ids, Ids]]) -> int:
    """Trained tokens that do not stand after what the engine was fed when it sampled them, or not once."""
    rollout = Rollout(rollout_id="r", task_index=0, group_id=0, attempt=0, agent="", reward=0.0, calls=calls)
    wanted = collections.Counter(
        (*prompt, *token_ids[: i + 1]) for prompt, token_ids in fed for i in range(len(token_ids))
    )
    trained = collections.Counter(key for segment in trajectories(rollout) for key in _trained(segment))
    return (trained - wanted).total() + (wanted - trained).total()


def _trained(segment: Trajectory) -> list[tuple[int, ...]]:
    ids = segment.token_ids.tolist()
    return [tuple(ids[: at + 1]) for at in segment.loss_mask.nonzero()[0].tolist()]


Way = Callable[[Family, ChatFormat, Path, int], collections.Counter[str]]

_WAYS: dict[str, Way] = {
    "ours": ours,
    "EOS-count splice": end_to_end(eos_count_splice, checked=True),
    "last-EOS splice": end_to_end(last_eos_splice, checked=True),
    "no splice, asserted": end_to_end(no_splice, checked=True),
    "no splice, not asserted": end_to_end(no_splice, checked=False),
}
