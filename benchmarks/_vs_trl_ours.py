"""Our arm of `benchmarks.vs_trl`: a Lightning Trainer on the embedded Gym, every completion over HTTP."""

import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from transformers import AutoModelForCausalLM

from benchmarks._vs_trl_workload import Workload, reward_of
from lightning_gym import EmbeddedGym, GymCallback, GymDataModule, PolicyModule, VLLMEngine
from lightning_gym.gym.environments import Environment
from lightning_gym.offline import stay_quiet


class Parity(Environment):
    """One turn, rewarded by the ids that were sampled."""

    name = "parity"

    def verify(self, response: Mapping[str, Any]) -> float:
        return reward_of([token for item in response["output"] for token in item.get("generation_token_ids", ())])


class _Stamps(L.Callback):
    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.at.append(time.perf_counter())


def main(folder: Path) -> None:
    """Train the workload and print what a step took."""
    stay_quiet(folder)
    workload = Workload.load(folder)
    num_prompts = len(workload.lengths)
    rows = [
        {
            "responses_create_params": {
                "input": [{"role": "user", "content": prompt}],
                "max_output_tokens": workload.lengths[number % num_prompts],
            },
            "agent_ref": Parity.agent_ref(),
        }
        for number, prompt in enumerate(workload.prompts())
    ]
    stamps = _Stamps()
    callback = GymCallback(
        engine=VLLMEngine(max_model_len=256, max_num_seqs=num_prompts * workload.group_size),
        gym=EmbeddedGym(["benchmarks._vs_trl_ours:Parity"]),
        model_path=folder,
        log_rollouts=False,
        run_dir=folder / "run",
    )
    trainer = L.Trainer(
        max_steps=workload.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[callback, stamps],
    )
    data = GymDataModule(rows, prompts_per_step=num_prompts, group_size=workload.group_size, shuffle=False)
    policy = PolicyModule(AutoModelForCausalLM.from_pretrained(folder), lr=workload.lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on loaders and cores
        trainer.fit(policy, datamodule=data)
    later = callback.history[1:]
    phases = ("sync", "collect", "prepare", "train")
    print(
        json.dumps(
            {
                "steps": [after - before for before, after in itertools.pairwise(stamps.at)],
                "tokens": later[-1]["batch/trained_tokens"],
                "phases": {phase: statistics.median(entry[f"time/{phase}_s"] for entry in later) for phase in phases},
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
