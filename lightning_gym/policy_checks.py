"""What a policy must be like for its logprobs to mean what losses assume; checked before a rollout is paid for."""

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from lightning_gym.errors import ConfigError
from lightning_gym.lm_head import embedding_rows
from lightning_gym.rollout import SamplingProfile


def check_no_dropout(model: nn.Module) -> None:
    """Refuse a policy with dropout: each of its forwards would be of another policy than the one that sampled.

    Raises:
        ConfigError: names the first module that would, and its probability.
    """
    for name, module in model.named_modules():
        probability = module.p if isinstance(module, _DropoutNd) else _attention_dropout(module)
        if module.training and probability > 0:
            raise ConfigError(
                f"{name or type(model).__name__} ({type(module).__name__}) has dropout {probability:g} and is in "
                "training mode: every forward would be of another policy than the one that sampled, and ratios would "
                "be noise. Load the model with its dropout settings at 0 (attention_dropout=0.0, lora_dropout=0.0, ...)"
            )


def check_vocabulary(model: nn.Module, num_ids: int) -> None:
    """Refuse a tokenizer that knows ids which the model has no embedding for.

    A model with more rows than the tokenizer has ids is fine: vocabularies are padded.

    Args:
        model: a transformers model.
        num_ids: the tokenizer's largest id, plus 1.

    Raises:
        ConfigError: says both sizes.
    """
    rows = embedding_rows(model)
    if rows is not None and num_ids > rows:
        raise ConfigError(
            f"the tokenizer has ids up to {num_ids - 1}, and the model's embedding has {rows} rows: they are of "
            "different models, or tokens were added without model.resize_token_embeddings(len(tokenizer))"
        )


def check_adapters(model: nn.Module) -> None:
    """Refuse a PEFT model whose adapters are more than a delta that is added to weights of the base.

    The engine holds one tensor where the trainer holds a base and an adapter.

    Raises:
        ConfigError: another method than LoRA, or one of LoRA's variants (DoRA); names it.
    """
    for config in getattr(model, "peft_config", {}).values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise ConfigError(f"the policy's adapter is of the kind {kind}; only LORA can be merged into the engine")
    for name, module in model.named_modules():
        variants: dict[str, Any] = getattr(module, "lora_variant", None) or {}
        if variants:
            kind = type(next(iter(variants.values()))).__name__
            raise ConfigError(
                f"{name} has a variant of LoRA ({kind}) that is no sum of base and delta, so that the engine cannot "
                "hold it as one weight; make the adapter without it (use_dora=False, ...)"
            )


def check_sampling(profile: SamplingProfile, *, corrected: bool) -> None:
    """Refuse to train on tokens of a truncated distribution, unless their ratio to the trainer's enters the loss.

    Args:
        profile: of training rollouts.
        corrected: whether a correction for the difference of sampler and trainer is on.

    Raises:
        ConfigError: `top_p` or `top_k` truncates, and nothing corrects for it.
    """
    if (profile.top_p != 1.0 or profile.top_k != -1) and not corrected:
        raise ConfigError(
            f"sampling has top_p={profile.top_p}, top_k={profile.top_k}: tokens would come from a truncated "
            "distribution that the trainer does not compute; train with top_p=1 and top_k=-1, or switch a correction "
            "on, such as PolicyModule(correction='token_tis')"
        )


def check_lag(max_lag: int, *, corrected: bool) -> None:
    """Refuse to train on tokens of older weights, unless their ratio to the current ones enters the loss.

    Args:
        max_lag: of `lightning_gym.comparison.WindowSettings`.
        corrected: whether a correction for the difference of sampler and trainer is on.

    Raises:
        ConfigError: rollouts are played ahead, and nothing corrects for it.
    """
    if max_lag > 0 and not corrected:
        raise ConfigError(
            f"max_lag is {max_lag}: tokens are sampled by weights that the optimizer has moved on from, and no "
            "correction is on. PolicyModule has one of its own accord unless correction='none' switches it off; a "
            "module of yours applies one of lightning_gym.corrections and names it in its attribute `correction`, and "
            "a loop says GymLoop(corrected=True)"
        )


def _attention_dropout(module: nn.Module) -> float:
    value = getattr(module, "attention_dropout", 0.0)
    return value if isinstance(value, float) else 0.0
