"""``lightning-gym serve``: a model directory behind the endpoint, without training."""

import signal
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lightning_gym.errors import ConfigError
from lightning_gym.policy.endpoint import Endpoint
from lightning_gym.policy.engine import EngineModel
from lightning_gym.policy.ledger import Ledger
from lightning_gym.policy.parsers import BUILTIN
from lightning_gym.policy.service import PolicyService
from lightning_gym.policy.vllm_engine import VLLMEngine
from lightning_gym.rollout import SamplingProfile
from lightning_gym.weights import checkpoint_weights


def serve(
    model: Path,
    *,
    port: int,
    api_key: str | None,
    max_model_len: int,
    dtype: str,
    tool_parser: str | None = BUILTIN,
    reasoning_parser: str | None = BUILTIN,
) -> None:
    """Serve until SIGINT or SIGTERM; prints the address and the token when ready.

    Raises:
        ConfigError: the directory is not a model's, or the port is taken.
    """
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model} has no config.json; expected the directory of a transformers model")
    engine = VLLMEngine(max_model_len=max_model_len)
    profile = SamplingProfile()
    service = PolicyService(
        engine,
        model,
        Ledger(),
        {"train": profile, "eval": profile},
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
    )
    endpoint = Endpoint(service, port=port, api_key=api_key)
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        engine.start(EngineModel(path=model, dtype=dtype, device=device, weights=lambda: checkpoint_weights(policy)))
        engine.update_weights(lambda: None, version=0)
        engine.resume()
        endpoint.start()
        print(f"serving {model} at {endpoint.url}\nbearer token: {endpoint.api_key}", flush=True)  # noqa: T201  the command's answer
        _wait_for_signal()
    finally:
        endpoint.close()
        engine.close()


def _wait_for_signal() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
