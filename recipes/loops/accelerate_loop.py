"""The counter task in an Accelerate loop of two micro-batches a step.

python recipes/loops/accelerate_loop.py outputs/tiny_policy/counter-seed0 outputs/accelerate_loop 120
accelerate launch recipes/loops/accelerate_loop.py outputs/tiny_policy/counter-seed0 outputs/accelerate_loop 120

Several processes on a CPU: ``ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2`` instead of ``accelerate launch``,
which starts only one there.
"""

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from lightning_gym import EmbeddedGym, GymLoop, SamplingProfile, VLLMEngine, WindowSettings
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import grpo

model_dir, run_dir, max_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
accelerator = Accelerator(gradient_accumulation_steps=2)
policy = AutoModelForCausalLM.from_pretrained(model_dir).train()
model, optimizer = accelerator.prepare(policy, torch.optim.Adam(policy.parameters(), lr=2.5e-4, betas=(0.9, 0.99)))
with GymLoop(
    model,
    f"{model_dir}/train.jsonl",
    engine=VLLMEngine(max_model_len=256),
    gym=EmbeddedGym(["counter"]),
    window=WindowSettings(prompts_per_step=8, group_size=8),
    accelerator=accelerator,
    sampling=SamplingProfile(max_output_tokens=48),
    run_dir=run_dir,
) as gym:
    for window in gym.windows(max_steps):
        for batch in window:
            with accelerator.accumulate(model):
                loss, _ = grpo(token_logprobs(model, batch), batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"step {gym.step} reward {gym.metrics['rollout/reward_mean']:.3f}")
accelerator.end_training()
