"""One directory a policy: the checkpoint, its dataset, and the record of what to expect from it.

``warm_start.json`` is the cache key as well: a directory whose settings and source agree with what is asked for is
returned as it is. Nothing heavy is imported before that is known.
"""

import hashlib
import inspect
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gym.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    from lightning_gym.tiny_policy.demonstrations import Encoded, Teacher
    from lightning_gym.tiny_policy.measure import Measurement

Row = Mapping[str, Any]

RECORD = "warm_start.json"
ENVIRONMENTS = ("counter", "reverse_string")


@dataclass(frozen=True, kw_only=True)
class TinyPolicy:
    """Everything that decides what the built directory holds."""

    environment: str
    """``"counter"`` (tool calls over several turns) or ``"reverse_string"`` (one turn of text)."""
    seed: int = 0
    """Of the rows, the demonstrations, the initial weights and the measurement."""
    error_probability: float | None = None
    """Per decision of the teacher; ``None`` takes the teacher's own, which starts a policy at 0.43 to 0.46."""
    num_layers: int = 2
    """Two are what copying from a prompt takes; a wide pair learns it in half the steps of four narrow ones."""
    hidden_size: int = 192
    head_dim: int = 32
    sft_steps: int = 300
    batch_size: int = 32
    """Demonstrations a step."""
    lr: float = 3e-3
    """Peak of the one-cycle schedule."""
    train_rows: int = 2048
    validation_rows: int = 256
    measured_rollouts: int = 1024
    """Sampled from the first rows of ``train.jsonl``; the standard error of the measured reward is 0.5 / sqrt of it."""

    def __post_init__(self) -> None:
        if self.environment not in ENVIRONMENTS:
            raise ConfigError(f"environment: expected one of {', '.join(ENVIRONMENTS)}, got {self.environment!r}")

    def ensure(self, out: str | os.PathLike[str]) -> Path:
        """Return ``out/<environment>-seed<seed>``, building it unless it is there and made from equal settings."""
        return build_once(Path(out) / f"{self.environment}-seed{self.seed}", self._key(), self._build)

    def _key(self) -> str:
        """Hash of the settings and of the source that turns them into a policy."""
        from lightning_gym import testing
        from lightning_gym.gym.environments import load_environment

        sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("[!_]*.py"))]
        parts = load_environment(self.environment), testing.tiny_tokenizer, testing.tiny_model
        sources += [inspect.getsource(part) for part in parts]
        return hashlib.sha256(json.dumps([asdict(self), testing.CHAT_TEMPLATE, *sources]).encode()).hexdigest()

    def _build(self, target: Path, key: str) -> None:
        from lightning_gym.testing import tiny_model
        from lightning_gym.tiny_policy.sft import DemonstrationData, ImitationModule, fit

        clock = _Clock()
        teacher = self._teacher()
        rows = self._rows(teacher, "train", self.train_rows)
        validation = self._rows(teacher, "validation", self.validation_rows)
        tokenizer = self._tokenizer(teacher, rows)
        demonstrations = self._demonstrations(teacher, rows, tokenizer)
        model = tiny_model(
            tokenizer,
            seed=self.seed,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            head_dim=self.head_dim,
            max_position_embeddings=512,
        )
        clock.lap("prepare")
        module = ImitationModule(model, lr=self.lr, num_steps=self.sft_steps)
        pad_token_id: Any = tokenizer.pad_token_id
        sft_loss_last = fit(
            module, DemonstrationData(demonstrations, batch_size=self.batch_size, pad_token_id=pad_token_id)
        )
        clock.lap("train")
        sampled, greedy = self._measure(teacher, model, tokenizer, rows, validation)
        clock.lap("measure")
        write_checkpoint(target, model, tokenizer)
        write_rows(target / "train.jsonl", rows)
        write_rows(target / "validation.jsonl", validation)
        record = {
            "key": key,
            "environment": self.environment,
            "seed": self.seed,
            "reward_predicted": _mean([teacher.expected_reward(row) for row in rows]),
            "reward_measured": sampled.reward,
            "rollouts_measured": sampled.rollouts,
            "reward_greedy": greedy.reward,
            "well_formed_frac": sampled.well_formed_frac,
            "error_probability": teacher.error_probability,
            "sft_steps": self.sft_steps,
            "sft_loss_last": sft_loss_last,
            "parameters": model.num_parameters(),
            "vocab_size": len(tokenizer),
            "tokens": {
                "prompt": sampled.prompt_tokens,
                "generated": sampled.generated_tokens,
                "total": sampled.total_tokens,
                "calls": sampled.calls,
            },
            "train_seconds": clock.seconds["train"],
            "seconds": clock.seconds,
            "settings": asdict(self),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "lightning")},
        }
        (target / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def _teacher(self) -> "Teacher":
        from lightning_gym.tiny_policy.demonstrations import TEACHERS

        teacher = TEACHERS[self.environment]
        return teacher() if self.error_probability is None else teacher(error_probability=self.error_probability)

    def _rows(self, teacher: "Teacher", split: str, num_rows: int) -> list[Row]:
        rng = random.Random(f"{self.environment} {split} {self.seed}")
        return [teacher.environment.row(rng) for _ in range(num_rows)]

    def _tokenizer(self, teacher: "Teacher", rows: Sequence[Row]) -> "PreTrainedTokenizerFast":
        """Trained on rendered demonstrations, so that their fixed text is worth few tokens.

        Always the same 256 demonstrations whatever the seed: policies of one environment share a vocabulary.
        """
        from lightning_gym.testing import tiny_tokenizer

        rng = random.Random(f"{self.environment} corpus")
        conversations = [teacher.demonstrate(teacher.environment.row(rng), rng) for _ in range(256)]
        template = tiny_tokenizer()  # renders text; its ids are not used
        texts: Any = template.apply_chat_template(conversations, tokenize=False)
        return tiny_tokenizer(texts)

    def _demonstrations(
        self, teacher: "Teacher", rows: Sequence[Row], tokenizer: "PreTrainedTokenizerFast"
    ) -> "list[Encoded]":
        """One a row and never the same errors twice: repeated ones would be learned by heart, not as a rate."""
        from lightning_gym.tiny_policy.demonstrations import Encoder

        encoder = Encoder(tokenizer)
        rng = random.Random(f"{self.environment} demonstrations {self.seed}")
        return [
            encoder.conversation(teacher.demonstrate(rng.choice(rows), rng))
            for _ in range(self.sft_steps * self.batch_size)
        ]

    def _measure(
        self,
        teacher: "Teacher",
        model: "Qwen3ForCausalLM",
        tokenizer: "PreTrainedTokenizerFast",
        rows: Sequence[Row],
        validation: Sequence[Row],
    ) -> tuple["Measurement", "Measurement"]:
        """Sampled on training rows, where the prediction is made; greedy on validation rows."""
        from lightning_gym.tiny_policy.measure import measure

        measured = [rows[index % len(rows)] for index in range(self.measured_rollouts)]
        sampled = measure(model, tokenizer, teacher.environment, measured, seed=self.seed)
        greedy = measure(model, tokenizer, teacher.environment, validation, temperature=0.0)
        return sampled, greedy


def build_once(target: Path, key: str, build: Callable[[Path, str], None]) -> Path:
    """Have `build` fill a directory, unless one with this key is there; returns `target`.

    Args:
        target: what is made, or replaced.
        key: of what goes into it, taken before the build: a source file that is edited meanwhile must not become the
            key of the result.
        build: is given an empty directory and the key, and writes its record last.
    """
    if (read_record(target) or {}).get("key") == key:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        # Built aside and moved in whole: an interrupted build leaves no directory that looks finished.
        built = Path(scratch) / target.name
        built.mkdir()
        build(built, key)
        shutil.rmtree(target, ignore_errors=True)
        built.replace(target)
    return target


def read_record(policy: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The ``warm_start.json`` of a built directory, or ``None`` where there is none."""
    path = Path(policy) / RECORD
    return json.loads(path.read_text()) if path.is_file() else None


def write_checkpoint(target: Path, model: "Qwen3ForCausalLM", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Save a model that samples from its own distribution, and its tokenizer."""
    from transformers import GenerationConfig

    from lightning_gym.template_families import save_quietly

    # Explicit, so that no library's own default (top_k 50, for one) comes between the weights and what is sampled.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    save_quietly(model, target)
    tokenizer.save_pretrained(target)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object a line, as Gym's datasets are."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now
