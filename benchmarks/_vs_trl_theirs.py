"""TRL's arms of `benchmarks.vs_trl`, run by TRL's own environment: GRPOTrainer, colocated vLLM or transformers.

No file of TRL or vLLM is changed; what is wrapped at run time is named where it is: vLLM's CPU build has to compute
with live weights (stock, the first weight sync raises), its engine is made float32 like its trainer, and lengths are
forced.
"""

import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.extras import profiling

from benchmarks._vs_trl_workload import Workload, reward_of


def main(folder: Path, arm: str) -> None:
    """Train the workload and print what a step took."""
    workload = Workload.load(folder)
    lengths = [length for length in workload.lengths for _ in range(workload.group_size)]
    if arm == "vllm":
        patch_vllm(lengths)
    spent: list[tuple[str, float]] = []
    log_metrics = profiling.ProfilingContext._log_metrics

    def keep(self: Any, duration: float) -> Any:
        spent.append((self.name.rpartition(".")[2], duration))
        return log_metrics(self, duration)

    profiling.ProfilingContext._log_metrics = keep
    generation: dict[str, Any] = {"ignore_eos": True} if arm == "vllm" else {"min_new_tokens": max(lengths)}
    is_ragged = len(set(lengths)) > 1
    if arm == "hf" and is_ragged:
        generation = {}
    prompts = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in workload.prompts()]
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        max_steps=workload.steps,
        learning_rate=workload.lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=len(lengths),
        num_generations=workload.group_size,
        max_completion_length=max(lengths),
        temperature=1.0,
        beta=0.0,
        shuffle_dataset=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": torch.float32},
        generation_kwargs=generation,
        **({"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256} if arm == "vllm" else {}),
    )
    stamps: list[tuple[float, int]] = []
    tokens: list[int] = []

    class Stamps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append((time.perf_counter(), len(spent)))

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [reward_of(ids) for ids in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[Stamps()],
    )
    if arm == "hf" and is_ragged:
        force_lengths(trainer.model, lengths, tokenizer.eos_token_id)
    trainer.train()
    steps, phases = [], dict[str, list[float]]()
    for (before, first), (after, last) in itertools.pairwise(stamps):
        steps.append(after - before)
        for name, duration in spent[first:last]:
            phases.setdefault(name, []).append(duration)
    print(
        json.dumps(
            {
                "steps": steps,
                "tokens": tokens[-1],
                "phases": {name: statistics.median(durations) for name, durations in phases.items()},
            }
        ),
        flush=True,
    )
    os._exit(0)  # vLLM's finalizers at exit complain about process groups


def patch_vllm(lengths: list[int]) -> None:
    """Live weights, a float32 engine, and a length for every request."""
    import trl.generation.vllm_generation as generation
    import vllm.model_executor.layers.utils as layers

    def live(layer: Any, remove_weight: bool) -> None:  # noqa: ARG001, FBT001  vLLM's signature
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = live

    class Engine(generation.LLM):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**(arguments | {"dtype": "float32"}))

        def generate(self, prompts: Any, sampling_params: Any = None, **arguments: Any) -> Any:
            assert len(prompts) == len(lengths), (len(prompts), len(lengths))
            forced = [sampling_params.clone() for _ in prompts]
            for params, length in zip(forced, lengths, strict=True):
                params.max_tokens = params.min_tokens = length
            return super().generate(prompts, sampling_params=forced, **arguments)

    generation.LLM = Engine


class EndsAt(LogitsProcessor):
    """Lets each row end with its length-th token, and not before."""

    def __init__(self, lengths: list[int], eos: int) -> None:
        self.lengths, self.eos, self.prompt = torch.tensor(lengths), eos, -1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.prompt < 0:
            self.prompt = input_ids.shape[1]
        ends = self.lengths == input_ids.shape[1] - self.prompt + 1
        scores[:, self.eos] = float("-inf")
        scores[ends] = float("-inf")
        scores[ends, self.eos] = 0.0
        return scores


def force_lengths(model: Any, lengths: list[int], eos: int) -> None:
    """Every ``generate`` of the model gets its rows' lengths."""
    generate = model.generate

    def forced(*arguments: Any, **options: Any) -> Any:
        return generate(*arguments, logits_processor=LogitsProcessorList([EndsAt(lengths, eos)]), **options)

    model.generate = forced


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
