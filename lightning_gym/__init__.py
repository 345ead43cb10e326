"""Train a language-model policy on NeMo Gym environments without leaving the Lightning `Trainer`.

A vLLM engine lives in the training process, answers Gym as a local OpenAI-compatible endpoint, gets the trainer's
weights in process after optimizer steps, and the rollouts that Gym plays come back as token-exact training batches.

- `AttachedGym`: NeMo Gym servers that somebody else started.
- `CollectSettings`: how a `GymLoop` plays rollouts.
- `EmbeddedGym`: a small Gym-compatible server for environments written here.
- `Environment`: what such an environment implements.
- `GymCallback`: decides whose turn it is, engine or trainer, from Lightning's hooks.
- `GymDataModule`: task rows in, windows of packed micro-batches out.
- `GymLoop`: the same for a loop written by hand: plain PyTorch, Fabric, Accelerate.
- `NemoGym`: NeMo Gym's own servers, started from Gym's own Python environment.
- `PolicyModule`: a `LightningModule` to start from, short enough to copy.
- `SamplingProfile`: how tokens are sampled.
- `VLLMEngine`: the colocated engine.
- `WindowSettings`: what an optimizer step of a `GymLoop` is made of.
- `write_report`: a run's curves and rollouts as one HTML file.

The names are looked up when first used (PEP 562): importing `lightning_gym` imports neither torch nor vllm nor
lightning, so each part costs only what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gym.callback import GymCallback
    from lightning_gym.colocation import CollectSettings
    from lightning_gym.comparison import WindowSettings
    from lightning_gym.datamodule import GymDataModule
    from lightning_gym.gym.embedded import EmbeddedGym
    from lightning_gym.gym.environments import Environment
    from lightning_gym.gym.servers import AttachedGym, NemoGym
    from lightning_gym.loop import GymLoop
    from lightning_gym.module import PolicyModule
    from lightning_gym.policy.vllm_engine import VLLMEngine
    from lightning_gym.rollout import SamplingProfile
    from lightning_gym.viewer.report import write_report

__all__ = [
    "AttachedGym",
    "CollectSettings",
    "EmbeddedGym",
    "Environment",
    "GymCallback",
    "GymDataModule",
    "GymLoop",
    "NemoGym",
    "PolicyModule",
    "SamplingProfile",
    "VLLMEngine",
    "WindowSettings",
    "write_report",
]

_MODULE_OF = {
    "AttachedGym": "lightning_gym.gym.servers",
    "CollectSettings": "lightning_gym.colocation",
    "EmbeddedGym": "lightning_gym.gym.embedded",
    "Environment": "lightning_gym.gym.environments",
    "GymCallback": "lightning_gym.callback",
    "GymDataModule": "lightning_gym.datamodule",
    "GymLoop": "lightning_gym.loop",
    "NemoGym": "lightning_gym.gym.servers",
    "PolicyModule": "lightning_gym.module",
    "SamplingProfile": "lightning_gym.rollout",
    "VLLMEngine": "lightning_gym.policy.vllm_engine",
    "WindowSettings": "lightning_gym.comparison",
    "write_report": "lightning_gym.viewer.report",
}
"""Public name -> the module that makes it. A new name goes here, into ``__all__`` and under ``TYPE_CHECKING``."""


def __getattr__(name: str) -> object:
    """Import the module behind a public name, once."""
    if name not in _MODULE_OF:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too, imported or not."""
    return sorted({*globals(), *__all__})
