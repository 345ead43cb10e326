"""The policy's weights as a stream of (name, full tensor), whatever wraps the module."""

from collections.abc import Iterator

from torch import Tensor, nn

_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, under its Hugging Face name.

    Tied weights come under their first name, as ``named_parameters`` has them.
    """
    for name, parameter in model.named_parameters():
        yield _plain(name), parameter.detach()


def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of the model holds: like `named_weights`, but tied weights under every name."""
    for name, tensor in model.state_dict().items():
        yield _plain(name), tensor


def _plain(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
