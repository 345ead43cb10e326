"""The counter task in a plain PyTorch loop.

python recipes/loops/plain_loop.py outputs/tiny_policy/counter-seed0 outputs/plain_loop 120
torchrun --nproc-per-node 2 recipes/loops/plain_loop.py outputs/tiny_policy/counter-seed0 outputs/plain_loop 120
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from lightning_gym import EmbeddedGym, GymLoop, SamplingProfile, VLLMEngine, WindowSettings
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import grpo

model_dir, run_dir, max_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(model_dir).train()
if "RANK" in os.environ:  # torchrun
    dist.init_process_group("gloo")
    atexit.register(dist.destroy_process_group)  # or gloo's threads may abort the process on its way out
    model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=2.5e-4, betas=(0.9, 0.99), weight_decay=0.0)
with GymLoop(
    model,
    f"{model_dir}/train.jsonl",
    engine=VLLMEngine(max_model_len=256),
    gym=EmbeddedGym(["counter"]),
    window=WindowSettings(prompts_per_step=8, group_size=8),
    sampling=SamplingProfile(max_output_tokens=48),
    run_dir=run_dir,
) as gym:
    for window in gym.windows(max_steps):
        for batch in window:
            loss, _ = grpo(token_logprobs(model, batch), batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if gym.ranks.rank == 0:
            print(f"step {gym.step} reward {gym.metrics['rollout/reward_mean']:.3f}")
