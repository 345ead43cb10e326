"""doctor: what a model's tokenizer and chat template do to a conversation, and what that means for alignment here."""

import contextlib
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_gym.errors import ConfigError
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.template_traits import Outcome, Trait, template_traits

_USER, _ASSISTANT = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}
_WIDTH = 118


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What `examine` found."""

    model: str
    traits: tuple[Trait, ...]

    @property
    def trainable(self) -> bool:
        """Whether nothing found makes training impossible."""
        return all(trait.outcome != "impossible" for trait in self.traits)

    def __getitem__(self, name: str) -> Trait:
        """The trait of that name."""
        return next(trait for trait in self.traits if trait.name == name)


def examine(path: Path) -> Diagnosis:
    """Examine the tokenizer and chat template of a model directory. Loads no weights.

    Raises:
        ConfigError: there is no such directory, no tokenizer in it, or no chat template.
    """
    tokenizer = _tokenizer(path)
    try:
        chat = ChatFormat(path)
    except ConfigError as error:
        effect = "the policy cannot learn to end a turn that has no end"
        ends = (Trait(name="turn end", found=str(error), outcome="impossible", effect=effect),)
        turn_end_id = None
    else:
        ends, turn_end_id = (_turn_end(chat, tokenizer), _continuation(chat)), chat.turn_end_id
    traits = (*ends, *template_traits(tokenizer), _vocabulary(path, tokenizer, turn_end_id))
    return Diagnosis(model=str(path), traits=traits)


def diagnosis_table(diagnosis: Diagnosis) -> str:
    """For reading: a trait, what was found, and below it what that does."""
    lines = [diagnosis.model, ""]
    width = max(len(trait.name) for trait in diagnosis.traits) + 2
    for trait in diagnosis.traits:
        rest = [trait.found, f"{trait.outcome}: {trait.effect}"]
        for label, text in zip((trait.name, ""), rest, strict=True):
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent=label.ljust(width), subsequent_indent=" " * width, break_on_hyphens=False
            )
    return "\n".join([*lines, "", "trainable" if diagnosis.trainable else "NOT trainable: see `impossible` above"])


def diagnosis_json(diagnosis: Diagnosis) -> str:
    """For programs: ``{"model", "trainable", "traits": [{"name", "found", "outcome", "effect"}]}``."""
    report = {"model": diagnosis.model, "trainable": diagnosis.trainable}
    return json.dumps(report | {"traits": [asdict(trait) for trait in diagnosis.traits]}, ensure_ascii=False, indent=2)


def _turn_end(chat: ChatFormat, tokenizer: Any) -> Trait:
    same = chat.turn_end_id == tokenizer.eos_token_id
    eos = "the tokenizer's eos_token" if same else f"not the tokenizer's eos_token, {tokenizer.eos_token}"
    return Trait(
        name="turn end",
        found=f"{chat.turn_end_text} ({chat.turn_end_id}), {eos}",
        outcome="exact",
        effect="sampling stops at it, it trains, and where the token limit came first the template's own is supplied",
    )


def _continuation(chat: ChatFormat) -> Trait:
    tail = chat.render_after([chat.prepare(message) for message in (_USER, _ASSISTANT, _USER)], 1)
    if tail is not None and tail.startswith(chat.turn_end_text):
        effect = "a later prompt is the earlier one, the sampled ids, and this"
        return Trait(name="continuation", found=f"{tail!r} follows a turn", outcome="spliced", effect=effect)
    effect = "every later turn is rendered whole; each call of a rollout is a sequence of its own"
    found = "what follows an earlier turn cannot be told from the template's text"
    return Trait(name="continuation", found=found, outcome="new segment", effect=effect)


def _vocabulary(path: Path, tokenizer: Any, turn_end_id: int | None) -> Trait:
    largest = max(tokenizer.get_vocab().values())
    rows = _vocabulary_size(path)
    known = "an unknown number of" if rows is None else rows
    found = f"the tokenizer's largest id is {largest}, the model has {known} rows"
    outcome: Outcome = "exact"
    if rows is None:
        effect = f"not checked: {path} has no config.json with a vocab_size"
    elif turn_end_id is not None and turn_end_id >= rows:
        outcome, effect = "impossible", "the model has no row for the turn end: take the tokenizer that belongs to it"
    elif largest >= rows:
        outcome, effect = "refused", f"a prompt that spells one of the ids from {rows} on cannot be fed"
    elif largest + 1 < rows:
        effect = f"{rows - largest - 1} rows stand for no token; sampling one is possible, and it is an id like others"
    else:
        effect = "nothing to align"
    return Trait(name="vocabulary", found=found, outcome=outcome, effect=effect)


def _vocabulary_size(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return None


def _tokenizer(path: Path) -> Any:
    if not path.is_dir():
        raise ConfigError(f"there is no directory {path}; expected that of a transformers model, with its tokenizer")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason: Sequence[str] = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{path} holds no tokenizer that can be loaded ({reason[0]}); expected tokenizer.json and "
            "tokenizer_config.json, as `save_pretrained` writes them"
        ) from error
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{path} has no chat template; add `chat_template.jinja` to the directory or set `chat_template` in its "
            "tokenizer_config.json"
        )
    return tokenizer
