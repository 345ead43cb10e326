"""The counter task in a Lightning Fabric loop.

python recipes/loops/fabric_loop.py outputs/tiny_policy/counter-seed0 outputs/fabric_loop 120
fabric run --devices 2 recipes/loops/fabric_loop.py outputs/tiny_policy/counter-seed0 outputs/fabric_loop 120
"""

import sys

import torch
from lightning.fabric import Fabric
from transformers import AutoModelForCausalLM

from lightning_gym import EmbeddedGym, GymLoop, SamplingProfile, VLLMEngine, WindowSettings
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import grpo

model_dir, run_dir, max_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
fabric = Fabric()
policy = AutoModelForCausalLM.from_pretrained(model_dir).train()
adamw = torch.optim.AdamW(policy.parameters(), lr=2.5e-4, betas=(0.9, 0.99), weight_decay=0.0)
model, optimizer = fabric.setup(policy, adamw)
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
            fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        fabric.print(f"step {gym.step} reward {gym.metrics['rollout/reward_mean']:.3f}")
