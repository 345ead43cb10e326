"""One directory a policy: the checkpoint, the rows, and the record of what its teacher was rewarded with."""

import hashlib
import inspect
import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gym.errors import ConfigError
from lightning_gym.tiny_policy.build import RECORD, build_once, write_checkpoint, write_rows

if TYPE_CHECKING:
    from lightning_gym.gym_policy.demonstrations import Demonstration
    from lightning_gym.gym_policy.environments import GymEnvironment, Row

BLEND = ("example_session_state_mgmt", "example_multi_turn_gymnasium", "reasoning_gym")
"""Tools over several turns, a user over several turns, and one turn: one policy for all three."""
ENVIRONMENTS = (
    *BLEND,
    "example_tool_call_multireward",
    "math_advanced_calculations",
    "workplace_assistant",
    "blend",
)
"""What a policy can be built for; all but the last are environments of NeMo Gym's."""


@dataclass(frozen=True, kw_only=True)
class GymPolicy:
    """Everything that decides what the built directory holds."""

    environment: str
    """One of `ENVIRONMENTS`; ``"blend"`` is the three of `BLEND` at once."""
    seed: int = 0
    """Of the rows, the teacher's mistakes and the initial weights."""
    num_layers: int = 2
    hidden_size: int = 192
    sft_steps: int = 200
    batch_size: int = 16
    """Demonstrations a step."""
    lr: float = 3e-3
    """Peak of the one-cycle schedule."""
    max_position_embeddings: int = 2048

    def __post_init__(self) -> None:
        if self.environment not in ENVIRONMENTS:
            raise ConfigError(f"environment: expected one of {', '.join(ENVIRONMENTS)}, got {self.environment!r}")

    def ensure(self, out: str | os.PathLike[str], *, python: Path | None = None) -> Path:
        """Return ``out/<environment>-seed<seed>``, building it unless it is there and made from equal settings.

        Args:
            out: what the policy's directory is made in.
            python: Gym's interpreter; as for `lightning_gym.NemoGym` if ``None``.

        Raises:
            ConfigError: Gym's interpreter is missing.
            GymStartError: Gym did not come up.
        """
        from lightning_gym.gym.servers import gym_python

        def build(target: Path, key: str) -> None:
            self._build(target, key, gym_python(python))

        return build_once(Path(out) / f"{self.environment}-seed{self.seed}", self._key(), build)

    def _key(self) -> str:
        from lightning_gym import testing

        sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("[!_]*.py"))]
        sources += [inspect.getsource(part) for part in (testing.tiny_tokenizer, testing.tiny_model)]
        return hashlib.sha256(json.dumps([asdict(self), testing.CHAT_TEMPLATE, *sources]).encode()).hexdigest()

    def _build(self, target: Path, key: str, python: Path) -> None:
        from lightning_gym.gym_policy.demonstrations import play
        from lightning_gym.gym_policy.environments import GYM_ENVIRONMENTS, GymTree, rows_of
        from lightning_gym.testing import tiny_model, tiny_tokenizer
        from lightning_gym.tiny_policy.demonstrations import Encoder
        from lightning_gym.tiny_policy.sft import DemonstrationData, ImitationModule, fit

        tree = GymTree(python)
        names = BLEND if self.environment == "blend" else (self.environment,)
        environments = [GYM_ENVIRONMENTS[name] for name in names]
        rows = {environment.name: rows_of(environment, tree, self.seed) for environment in environments}
        plan = [
            (environment, row)
            for environment in environments
            for row in rows[environment.name]
            for _ in range(environment.demonstrations_per_row)
        ]
        with tempfile.TemporaryDirectory() as run_dir:
            played = play(plan, python=python, run_dir=Path(run_dir), seed=self.seed)
        template = tiny_tokenizer()  # renders text; its ids are not used
        texts: Any = template.apply_chat_template([one.messages for one in played], tokenize=False)
        tokenizer = tiny_tokenizer(texts, vocab_size=1024)
        encoder = Encoder(tokenizer)
        encoded = [encoder.conversation(one.messages) for one in played]
        rng = random.Random(f"demonstrations {self.seed}")
        model = tiny_model(
            tokenizer,
            seed=self.seed,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            max_position_embeddings=self.max_position_embeddings,
        )
        pad_token_id: Any = tokenizer.pad_token_id
        sft_loss_last = fit(
            ImitationModule(model, lr=self.lr, num_steps=self.sft_steps),
            DemonstrationData(
                rng.choices(encoded, k=self.sft_steps * self.batch_size),
                batch_size=self.batch_size,
                pad_token_id=pad_token_id,
            ),
        )
        rewards = _mean_rewards(plan, played)
        write_checkpoint(target, model, tokenizer)
        write_rows(target / "train.jsonl", [row for of_one in rows.values() for row in of_one])
        record = {
            "key": key,
            "environment": self.environment,
            "seed": self.seed,
            "reward_predicted": sum(rewards.values()) / len(rewards),
            "rewards": rewards,
            "demonstrations": len(played),
            "max_tokens": max(len(one.token_ids) for one in encoded),
            "sft_loss_last": sft_loss_last,
            "parameters": model.num_parameters(),
            "vocab_size": len(tokenizer),
            "settings": asdict(self),
        }
        (target / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _mean_rewards(
    plan: "Sequence[tuple[GymEnvironment, Row]]", played: "Sequence[Demonstration]"
) -> Mapping[str, float]:
    of: dict[str, list[float]] = {}
    for (environment, _), one in zip(plan, played, strict=True):
        of.setdefault(environment.name, []).append(one.reward)
    return {name: sum(rewards) / len(rewards) for name, rewards in of.items()}
