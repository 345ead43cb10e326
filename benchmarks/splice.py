"""What a turn's prompt costs, spliced or rendered and tokenized anew, beside decoding the request that asks for it."""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.table import Measurement
from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.conversation import conversation, said_by
from lightning_gym.policy.ledger import Served, shared_ids
from lightning_gym.policy.splice import Spliced, Splicer
from lightning_gym.rollout import Call
from lightning_gym.template_families import FAMILIES, save_family

TURNS = (4, 16, 64, 256)
REPEATS = {4: 201, 16: 101, 64: 31, 256: 9}
FAMILY_NAMES = ("qwen3", "llama3")
FIRST_PROMPT_TOKENS = 256
CALL = '<tool_call>\n{{"name": "increment_counter", "arguments": {{"count": {}}}}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name.replace('_', ' ')}, and nothing else",
            "parameters": {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]},
        },
    }
    for name in ("increment_counter", "get_counter_value")
]


class TimedChat(ChatFormat):
    """A chat format that says how long it tokenized."""

    tokenized_s = 0.0

    def encode(self, text: str) -> list[int]:
        """As the base class."""
        start = time.perf_counter()
        ids = super().encode(text)
        self.tokenized_s += time.perf_counter() - start
        return ids


@dataclass
class Rollout:
    """A rollout as the endpoint holds it, and the messages as Gym would send them next."""

    chat: TimedChat
    messages: list[dict[str, Any]]
    served: list[Served] = field(default_factory=list)

    def raw(self) -> str:
        """The next request."""
        return json.dumps({"model": "policy", "messages": self.messages, "tools": TOOLS, "temperature": 1.0})

    def splice(self, request: Mapping[str, Any]) -> Spliced:
        """What the endpoint does with a decoded request before the engine gets it."""
        known = self.served[-1].told if self.served else None
        return Splicer(self.chat).splice(request, conversation(request, self.chat, known), self.served)

    def turn(self, number: int) -> None:
        """Serve a call and let a tool answer it."""
        request = json.loads(self.raw())
        spliced = self.splice(request)
        assert (spliced.broke, spliced.continues is None) == (None, number == 0)
        ids = [*self.chat.encode(CALL.format(number)), self.chat.turn_end_id]
        logprobs = [-random.random() for _ in ids]
        call_id = f"call{number:05}"
        function = {"name": "increment_counter", "arguments": json.dumps({"count": number})}
        tool_calls = [{"id": call_id, "type": "function", "function": function}]
        message = {"role": "assistant", "content": None, "tool_calls": tool_calls}
        bundle = (spliced.prompt_ids, ids, logprobs)
        call = Call(
            index=number,
            prompt_ids=shared_ids(spliced.prompt_ids, spliced.continues),
            token_ids=ids,
            logprobs=logprobs,
            finish_reason="stop",
            weight_version=0,
        )
        known = self.served[-1].told if self.served else None
        said = conversation(request, self.chat, known)
        self.served.append(Served(call=call, told=said.answered(said_by(message, self.chat))))
        self.messages += [
            message | dict(zip(wire.TOKEN_BUNDLE, bundle, strict=True)),
            {"role": "tool", "content": json.dumps({"success": True, "count": number}), "tool_call_id": call_id},
        ]


def measure() -> Measurement:
    """Play one rollout a template to 256 turns and stop to measure at 4, 16, 64 and 256."""
    rows: list[dict[str, Any]] = []
    for name in FAMILY_NAMES:
        with tempfile.TemporaryDirectory() as directory:
            chat = TimedChat(save_family(FAMILIES[name], Path(directory)))
        rollout = Rollout(chat, [{"role": "user", "content": _words(chat, FIRST_PROMPT_TOKENS)}])
        for number in range(max(TURNS)):
            rollout.turn(number)
            if number + 1 in TURNS:
                rows.append({"template": name} | _row(rollout, number + 1))
    repeats = ", ".join(f"{count} at {turns}" for turns, count in REPEATS.items())
    return Measurement(
        name="splice",
        what="The prompt of a turn after so many earlier ones, each of a tool call and its result, with a first "
        f"message of {FIRST_PROMPT_TOKENS} tokens and two tools. The request is as Gym sends it: every assistant "
        "message carries the ids of its prompt and of its tokens, and their logprobs. `rest` is all of the splice that "
        "is not tokenization (reading, comparing, rendering, joining ids); `whole` is rendering and tokenizing "
        f"everything. Arms in turn, medians of {repeats} turns.",
        rows=rows,
    )


def _words(chat: ChatFormat, num_tokens: int) -> str:
    """A text of so many tokens."""
    text = ""
    while len(chat.encode(text)) < num_tokens:
        text += f"add {random.randrange(10**6)}, then "
    return text


def _row(rollout: Rollout, turns: int) -> dict[str, Any]:
    raw, chat = rollout.raw(), rollout.chat
    seconds: dict[str, list[float]] = {arm: [] for arm in ("json.loads", "tokenize", "rest", "whole")}
    for _ in range(REPEATS[turns]):
        start = time.perf_counter()
        request = json.loads(raw)
        decoded = time.perf_counter()
        chat.tokenized_s = 0.0
        spliced = rollout.splice(request)
        done = time.perf_counter()
        seconds["json.loads"].append(decoded - start)
        seconds["tokenize"].append(chat.tokenized_s)
        seconds["rest"].append(done - decoded - chat.tokenized_s)
        start = time.perf_counter()
        whole = chat.encode(chat.render(request["messages"], request["tools"]))
        seconds["whole"].append(time.perf_counter() - start)
    return _summary(turns, raw, spliced, whole, {arm: statistics.median(s) * 1e3 for arm, s in seconds.items()})


def _summary(turns: int, raw: str, spliced: Spliced, whole: Sequence[int], ms: Mapping[str, float]) -> dict[str, Any]:
    assert spliced.broke is None
    splice = ms["tokenize"] + ms["rest"]
    return {
        "turns": turns,
        "request kB": len(raw) / 1e3,
        "prompt tokens": len(spliced.prompt_ids),
        "tokenized": spliced.num_encoded,
        "tokenize ms": ms["tokenize"],
        "rest ms": ms["rest"],
        "json.loads ms": ms["json.loads"],
        "rest / json.loads": ms["rest"] / ms["json.loads"],
        "whole, tokens": len(whole),
        "whole ms": ms["whole"],
        "whole / splice": ms["whole"] / splice,
    }
