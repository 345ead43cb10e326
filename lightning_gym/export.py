"""Export: the policy in a Lightning checkpoint as the directory of a transformers model.

A checkpoint holds tensors under the names of the module that wrapped the model, and nothing of the tokenizer. What is
needed beside the tensors, `GymCallback` writes into the checkpoint (`policy_record`): which attribute the policy was,
where its config and tokenizer lie, and how its adapter is scaled.
"""

import json
import math
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_gym.errors import ConfigError
from lightning_gym.model_dir import check_model_dir, companions, full_disk_named

RECORD = "lightning_gym_policy"
"""The checkpoint's key of a `policy_record`."""
_PEFT_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


def policy_record(model: nn.Module, *, attribute: str, model_path: Path) -> dict[str, Any]:
    """What a checkpoint has to say of its policy to be exported; plain Python.

    Args:
        model: the policy.
        attribute: of the LightningModule that holds it; dots reach deeper.
        model_path: directory with its config and tokenizer.
    """
    adapters: Any = getattr(model, "peft_config", {})
    plain = {name: json.loads(json.dumps(config.to_dict(), default=_plain)) for name, config in adapters.items()}
    return {"attribute": attribute, "model_path": str(model_path), "adapters": plain}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The policy of a checkpoint."""

    path: Path
    model_path: Path
    """Directory with config and tokenizer, or a name that transformers finds them by."""
    tensors: Mapping[str, Tensor]
    """By the name under the policy's attribute."""
    adapter: Mapping[str, Any] | None
    """PEFT's configuration of the LoRA adapter, if there is one."""
    adapter_name: str = "default"

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by Hugging Face name, an adapter's deltas added."""
        if self.adapter is None:
            return dict(self.tensors)
        rank, alpha = self.adapter["r"], self.adapter["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if self.adapter.get("use_rslora") else rank)
        merged: dict[str, Tensor] = {}
        for raw, tensor in self.tensors.items():
            if ".lora_" in raw:
                continue
            layer = raw.removesuffix(".base_layer.weight")
            down, up = (self.tensors.get(f"{layer}.lora_{part}.{self.adapter_name}.weight") for part in "AB")
            if layer != raw and down is not None and up is not None:
                tensor = tensor + scale * (up.to(tensor) @ down.to(tensor))  # noqa: PLW2901  the merged one
            merged[raw.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")] = tensor
        return merged

    @property
    def adapter_weights(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names of PEFT's ``adapter_model.safetensors``."""
        name = f".{self.adapter_name}.weight"
        return {f"{raw.removesuffix(name)}.weight": tensor for raw, tensor in self.tensors.items() if ".lora_" in raw}

    def model(self) -> nn.Module:
        """The policy, in the dtype of the checkpoint.

        Raises:
            ConfigError: the tensors are not those of the model that config.json describes.
        """
        weights = self.weights
        config = AutoConfig.from_pretrained(self.model_path)
        dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        expected = model.state_dict()
        wrong = [name for name, tensor in weights.items() if name in expected and expected[name].shape != tensor.shape]
        missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
        if wrong or missing or unexpected:
            raise ConfigError(
                f"the policy in {self.path} is not the model of {self.model_path}/config.json: missing "
                f"{missing[:3] or 'nothing'}, unexpected {unexpected[:3] or 'nothing'}, of another shape "
                f"{wrong[:3] or 'nothing'}. Name the directory that it was trained from: --model-path DIR"
            )
        model.load_state_dict(weights)
        model.config.name_or_path = str(self.model_path)  # where an engine finds config and tokenizer
        return model


def read_checkpoint(path: Path, *, model_path: str | Path | None = None, attribute: str | None = None) -> Checkpoint:
    """The policy of a Lightning checkpoint.

    Args:
        path: of the file.
        model_path: directory with config and tokenizer; ``None``: the one that the run was started with.
        attribute: of the LightningModule that holds the policy; ``None``: as `GymCallback` recorded, else ``"model"``.

    Raises:
        ConfigError: it is no such file, has no policy under that attribute, or an adapter that cannot be merged here.
    """
    if path.is_dir():
        raise ConfigError(
            f"{path} is a directory: a sharded checkpoint, or no checkpoint. Merge it into a file first (python -m "
            f"lightning.pytorch.utilities.consolidate_checkpoint {path})"
        )
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint {path} (looked from {Path.cwd()})")
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state: Mapping[str, Tensor] = checkpoint["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} cannot be read as a checkpoint of Lightning's Trainer: {reason}") from error
    record: Mapping[str, Any] = checkpoint.get(RECORD, {})
    prefix = f"{attribute or record.get('attribute', 'model')}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not tensors:
        found = sorted({name.partition(".")[0] for name in state})
        raise ConfigError(f"{path} has no tensors under {prefix!r}; it has {found}. Name the policy's: --policy NAME")
    where = model_path or record.get("model_path")
    if where is None:
        raise ConfigError(f"{path} does not say which model it started from; name its directory: --model-path DIR")
    if Path(where).is_dir() or Path(where).is_absolute() or str(where).startswith("."):
        check_model_dir(Path(where), weights=False)
    name, adapter = _one_adapter(path, tensors, record.get("adapters", {}))
    return Checkpoint(path=path, model_path=Path(where), tensors=tensors, adapter=adapter, adapter_name=name)


def _one_adapter(
    path: Path, tensors: Mapping[str, Tensor], adapters: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Mapping[str, Any] | None]:
    if not any(".lora_" in name or ".base_layer." in name for name in tensors):
        return "default", None
    if len(adapters) != 1:
        raise ConfigError(
            f"{path} holds a LoRA model and the configurations of {len(adapters)} adapters; expected one, which "
            "GymCallback records. Merge it with peft (merge_and_unload) before the checkpoint is saved"
        )
    ((name, adapter),) = adapters.items()
    odd = [key for key in _UNSUPPORTED if adapter.get(key)]
    if odd or any(".lora_embedding_" in raw for raw in tensors):
        raise ConfigError(
            f"{path}: an adapter with {', '.join(odd) or 'embeddings'} is not merged here; load the checkpoint and use "
            "peft's merge_and_unload"
        )
    return name, adapter


def export(checkpoint: Checkpoint, target: Path, *, adapter: bool = False) -> None:
    """Write a directory that transformers and vLLM load; nothing is left there if it fails.

    Args:
        checkpoint: from `read_checkpoint`.
        target: must not exist, or be empty.
        adapter: write the LoRA adapter alone, as PEFT does, instead of the model with it merged.

    Raises:
        ConfigError: something is at `target`, the tensors are not those of the config, or there is no adapter.
        OutOfSpaceError: the disk is full.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; name a new directory, nothing is overwritten")
    if adapter and checkpoint.adapter is None:
        raise ConfigError(f"{checkpoint.path} has no LoRA adapter; leave --adapter out to export the model")
    model = None if adapter else checkpoint.model()
    with full_disk_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that it appears whole or not at all.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            folder = Path(scratch) / target.name
            folder.mkdir()
            _write(checkpoint, folder, model)
            if target.exists():
                target.rmdir()
            folder.rename(target)


def _write(checkpoint: Checkpoint, folder: Path, model: Any) -> None:
    if model is None:
        from safetensors.torch import save_file

        weights = {name: tensor.contiguous() for name, tensor in checkpoint.adapter_weights.items()}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps({**(checkpoint.adapter or {}), "inference_mode": True}, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n")
    else:
        model.save_pretrained(folder)
    if checkpoint.model_path.is_dir():
        for path in companions(checkpoint.model_path):  # as they are: written anew, a tokenizer may come out another
            shutil.copy2(path, folder / path.name)
    else:
        AutoTokenizer.from_pretrained(str(checkpoint.model_path)).save_pretrained(folder)
