"""Liger's Triton kernels in a policy: norms, rotary embedding and gated MLPs, fused."""

from torch import nn

from lightning_gym.errors import ConfigError


def use_liger(model: nn.Module) -> None:
    """Replace the layers that Liger has kernels for; logprobs stay with `lightning_gym.lm_head`.

    Liger patches the classes of transformers as well (0.8.5, ``transformers/monkey_patch.py``): models of the same type
    that are built later in the process have its layers too, and run on a GPU only.

    Raises:
        ConfigError: Liger is not installed, or has no kernels for this type of model.
    """
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]  an extra
            _apply_liger_kernel_to_instance,  # what transformers' own Trainer calls
        )
        from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
            MODEL_TYPE_TO_APPLY_LIGER_FN,
        )
    except ImportError as error:
        raise ConfigError(
            f"liger=True needs liger-kernel and Triton ({error}): pip install 'lightning-gym[liger]', or leave it out"
        ) from error
    model_type: str = model.config.model_type  # type: ignore[union-attr,assignment]  of every PreTrainedModel
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"Liger has no kernels for models of type {model_type!r}; leave liger=True out")
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
