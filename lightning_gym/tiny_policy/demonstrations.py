"""A teacher that errs with a known probability makes a policy whose starting reward is known before it is measured.

Each teacher plays its environment in process, so that tool results are the environment's own words, and computes the
probability that such a demonstration is rewarded. A policy that imitates it well starts there: the skill is inside,
right at every decision more often than wrong, and reinforcement learning has only to sharpen it. A fault in grouping,
sign, rewards or weight sync then shows as a curve that stays at the start, or sinks below it.
"""

import functools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lightning_gym.gym.environments import Counter, ReverseString

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]
"""One chat message as OpenAI's chat schema has it."""


class Teacher(Protocol):
    """Who writes the demonstrations of one environment."""

    environment: type
    """The environment's class: ``environment(row)`` is one episode, ``environment.row(rng)`` one dataset row."""

    @property
    def error_probability(self) -> float:
        """Per decision."""
        ...

    def demonstrate(self, row: Mapping[str, Any], rng: random.Random) -> list[Message]:
        """One whole conversation, from the row's prompt to the last assistant message."""
        ...

    def expected_reward(self, row: Mapping[str, Any]) -> float:
        """The exact probability that a demonstration of this row is rewarded."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterTeacher:
    """Adds what the prompt says, then reads the counter; every number it adds may be another one."""

    environment = Counter

    error_probability: float = 0.35
    """Per increment: the number is replaced by one of the other digits 1..9, each as likely."""
    parallel_probability: float = 0.7
    """All increments in one assistant turn, else one a turn; drawn once a demonstration."""

    def demonstrate(self, row: Mapping[str, Any], rng: random.Random) -> list[Message]:
        environment = Counter(row)
        increments = [("increment_counter", {"count": self._number(n, rng)}) for n in _increments(row)]
        parallel = rng.random() < self.parallel_probability
        turns = [increments] if parallel else [[increment] for increment in increments]
        messages = _prompt(row)
        for turn in [*turns, [("get_counter_value", {})]]:
            messages.append({"role": "assistant", "content": None, "tool_calls": [_call(*call) for call in turn]})
            messages += [{"role": "tool", "content": environment.call_tool(*call)} for call in turn]
        count = json.loads(messages[-1]["content"])["count"]
        return [*messages, {"role": "assistant", "content": str(count)}]

    def expected_reward(self, row: Mapping[str, Any]) -> float:
        """P(the numbers added sum to the right total): wrong numbers may cancel, which is worth up to 0.015."""
        error_of_sum = {0: 1.0}
        for number in _increments(row):
            others = _other_digits(number)
            errors = {0: 1 - self.error_probability} | {
                other - number: self.error_probability / len(others) for other in others
            }
            total: dict[int, float] = {}
            for (a, p), (b, q) in ((x, y) for x in error_of_sum.items() for y in errors.items()):
                total[a + b] = total.get(a + b, 0.0) + p * q
            error_of_sum = total
        return error_of_sum[0]

    def _number(self, right: int, rng: random.Random) -> int:
        return rng.choice(_other_digits(right)) if rng.random() < self.error_probability else right


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseStringTeacher:
    """Says the letters in reverse; every letter may be another one."""

    environment = ReverseString

    error_probability: float = 0.18
    """Per letter: it is replaced by one of the other 25, each as likely."""

    def demonstrate(self, row: Mapping[str, Any], rng: random.Random) -> list[Message]:
        letters = [self._letter(letter, rng) for letter in row["expected"].split()]
        return [*_prompt(row), {"role": "assistant", "content": " ".join(letters)}]

    def expected_reward(self, row: Mapping[str, Any]) -> float:
        """P(every letter is right): substitutions cannot cancel."""
        return (1 - self.error_probability) ** len(row["expected"].split())

    def _letter(self, right: str, rng: random.Random) -> str:
        if rng.random() >= self.error_probability:
            return right
        return rng.choice([letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter != right])


TEACHERS: Mapping[str, type[CounterTeacher] | type[ReverseStringTeacher]] = {
    "counter": CounterTeacher,
    "reverse_string": ReverseStringTeacher,
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as the policy lives it.

    Example: a prompt of 3 tokens, a turn of 2, a tool result of 2, a turn of 1 (which is its end)::

        token_ids = [1, 10, 7, 20, 2, 30, 7, 2]
        loss_mask = [0,  0, 0,  1, 1,  0, 0, 1]
    """

    token_ids: list[int]
    loss_mask: list[bool]
    """Aligned with `token_ids`; True where the policy is the one who says it, the turn end included."""


class Encoder:
    r"""Conversation -> token ids, cut where the policy's generations begin and end.

    Rendering a whole conversation and tokenizing it once could merge the last character of ``assistant\n`` with the
    first one of the answer. A policy never sees such a token: its generation starts after the prompt, and what
    follows starts after its ``<|im_end|>``. So each piece is tokenized alone.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        # A pool of thousands of demonstrations has a few hundred distinct pieces.
        self._ids = functools.cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What the policy is asked to continue at the start of a conversation."""
        return list(self._ids(self._render(messages, add_generation_prompt=True)))

    def continuation(self, messages: Sequence[Message]) -> list[int]:
        """What comes after a turn of the policy, up to where it speaks again."""
        return list(self._ids("\n" + self._render(messages, add_generation_prompt=True)))

    def turn(self, message: Message) -> list[int]:
        """What the policy says, its ``<|im_end|>`` included."""
        text = self._render([message], add_generation_prompt=False)
        return list(self._ids(text.removeprefix("<|im_start|>assistant\n").removesuffix("\n")))

    def conversation(self, messages: Sequence[Message]) -> Encoded:
        """A whole conversation that ends with an assistant turn."""
        token_ids: list[int] = []
        loss_mask: list[bool] = []
        heard: list[Message] = []
        for message in messages:
            if message["role"] != "assistant":
                heard.append(message)
                continue
            asked = self.continuation(heard) if token_ids else self.prompt(heard)
            said = self.turn(message)
            token_ids += asked + said
            loss_mask += [False] * len(asked) + [True] * len(said)
            heard = []
        return Encoded(token_ids, loss_mask)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        text: Any = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    return [{"role": m["role"], "content": m["content"]} for m in row["responses_create_params"]["input"]]


def _increments(row: Mapping[str, Any]) -> list[int]:
    return [int(number) for number in re.findall(r"add (\d+)", _prompt(row)[-1]["content"])]


def _other_digits(number: int) -> list[int]:
    return [other for other in range(1, 10) if other != number]


def _call(name: str, arguments: dict[str, Any]) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
