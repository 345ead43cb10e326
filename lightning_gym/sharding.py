"""A policy of which every rank holds a part: cut for training, and its tensors whole again, a bucket at a time.

Three kinds of parts are known. FSDP2 (`torch.distributed.fsdp.fully_shard`, which Lightning's `ModelParallelStrategy`
is for) leaves DTensors in the module. FSDP1 (`FullyShardedDataParallel`) and DeepSpeed's ZeRO-3 leave flat pieces,
which are whole inside a context of theirs. Gathering is collective: every rank walks the same list in the same order,
and no more than a bucket is whole at any time, never the state dict.

FSDP2 is tested on CPU with gloo, FSDP1 there as far as it runs without a GPU, ZeRO-3 against its documented attributes
only.
"""

import contextlib
import importlib
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Size, Tensor, nn

from lightning_gym.errors import ConfigError

BUCKET_BYTES = 256 << 20
"""Of whole tensors at a time: large enough for full bandwidth, small beside a model that needs sharding."""

_T = TypeVar("_T")


def shard(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """Cut a transformers model over the ranks of `mesh` with FSDP2, block by block; a model that is cut stays as it is.

    Blocks are the modules that the model names in ``_no_split_modules``, its decoder layers. What is outside of them
    (embedding, last norm, head) makes one more group, so tied weights stay tied.

    Args:
        model: on any device; each rank keeps its part, on the mesh's device.
        mesh: of one dimension: ``trainer.strategy.device_mesh["data_parallel"]`` in a Trainer,
            ``torch.distributed.device_mesh.init_device_mesh("cuda", (world_size,))`` elsewhere.
        options: of `torch.distributed.fsdp.fully_shard`: ``mp_policy``, ``offload_policy``, ...

    Returns:
        `model`.
    """
    from torch.distributed.fsdp import fully_shard

    if is_sharded(model):
        return model
    blocks = set[str]()
    for module in model.modules():  # PEFT's wrappers have none, the model inside has
        blocks.update(getattr(module, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds a part of the parameters only."""
    return any(_is_part(parameter) for parameter in model.parameters()) or bool(_flat_shapes(model))


def _is_part(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 gathered for the last forward: the root's parameters stay whole until a backward.

    Not between a forward and its backward.
    """
    for module in _modules_of(model, "FSDPModule"):
        module.reshard()


def whole_shapes(model: nn.Module) -> Callable[[nn.Parameter], Size]:
    """What finds the shape of the tensor of which a parameter is this rank's part."""
    flat = _flat_shapes(model)

    def shape(parameter: nn.Parameter) -> Size:
        found = flat.get(id(parameter)) or getattr(parameter, "ds_shape", None)
        return parameter.shape if found is None else Size(found)

    return shape


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's whole value, collective; any other tensor as it is."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def gather_into(target: Tensor, parameter: Tensor) -> Any:
    """Start filling `target` with the whole value of a DTensor that is cut evenly by rows; collective.

    Values cross in the dtype of `target`, and arrive where they are needed: nothing is staged.

    Returns:
        What to ``wait()`` for; ``None`` where it is cut otherwise: take `whole`.
    """
    if not hasattr(parameter, "full_tensor"):
        return None
    part: Any = parameter
    (first, *others), mesh = part.placements, part.device_mesh
    rows = parameter.shape[0] if parameter.ndim else 0
    even = not others and first.is_shard(0) and rows and rows % mesh.size() == 0
    if not even or not target.is_contiguous():
        return None
    local = part.to_local().detach().to(target.device, target.dtype).contiguous()
    # torch 2.13 renamed it
    gather = getattr(dist, "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor")
    return gather(target, local, group=mesh.get_group(), async_op=True)


def buckets(
    model: nn.Module, items: Iterable[_T], parameters: Callable[[_T], Sequence[nn.Parameter]]
) -> Generator[list[_T]]:
    """Every item once, in buckets; collective for FSDP1 and ZeRO-3, whose parameters are whole while theirs is out.

    DTensors stay cut: give them to `whole` or `gather_into`, on every rank.

    Args:
        model: the outermost of FSDP1's wrappers, or the module.
        items: each made from parameters of `model`.
        parameters: that an item is made from.

    Raises:
        ConfigError: FSDP1 has flattened the parameters for good (``use_orig_params=False``).
    """
    if units := _modules_of(model, "FullyShardedDataParallel"):
        yield from _by_unit(units, list(items), parameters)
        return
    for bucket in _by_size(items, parameters):
        held = [parameter for item in bucket for parameter in parameters(item)]
        with _zero_gathered([parameter for parameter in held if hasattr(parameter, "ds_id")]):
            yield bucket


def _by_size(items: Iterable[_T], parameters: Callable[[_T], Sequence[nn.Parameter]]) -> Generator[list[_T]]:
    bucket: list[_T] = []
    num_bytes = 0
    for item in items:
        size = sum(
            getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
            for parameter in parameters(item)
        )
        if bucket and num_bytes + size > BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(item)
        num_bytes += size
    if bucket:
        yield bucket


@contextlib.contextmanager
def _zero_gathered(parameters: Sequence[nn.Parameter]) -> Generator[None]:
    """DeepSpeed 0.16 ``zero.GatheredParameters``: whole inside, on every rank; changes would be dropped."""
    if not parameters:
        yield
        return
    gathered: Any = importlib.import_module("deepspeed").zero.GatheredParameters
    with gathered(parameters, modifier_rank=None):
        yield


def _by_unit(
    units: Sequence[Any], items: Sequence[_T], parameters: Callable[[_T], Sequence[nn.Parameter]]
) -> Generator[list[_T]]:
    """FSDP1's units, one whole at a time (``summon_full_params``); the root comes first, as its lazy set-up asks."""
    owner = {id(parameter): unit for unit in units for parameter, _ in _flat_parameters(unit)}
    for unit in [*units, None]:  # last: what no unit has flattened
        bucket = [item for item in items if _owner(owner, parameters(item)) is unit]
        if not bucket:
            continue
        if unit is None:
            yield bucket
            continue
        with type(unit).summon_full_params(unit, recurse=False, writeback=False):
            yield bucket


def _owner(owner: dict[int, Any], parameters: Sequence[nn.Parameter]) -> Any:
    found = {id(unit): unit for unit in (owner.get(id(parameter)) for parameter in parameters)}
    if len(found) > 1:
        raise ConfigError("an adapter and the layer that it adapts are in different FSDP units; wrap them in one")
    return next(iter(found.values()))


def _flat_shapes(model: nn.Module) -> dict[int, Size]:
    units = _modules_of(model, "FullyShardedDataParallel")
    return {id(parameter): shape for unit in units for parameter, shape in _flat_parameters(unit)}


def _flat_parameters(unit: Any) -> list[tuple[nn.Parameter, Size]]:
    """What a unit of FSDP1 has flattened: torch 2.13 ``FlatParameter._params``, ``_shapes``, as its docstring says."""
    handle = unit._handle  # noqa: SLF001  pyright: ignore
    if handle is None:
        return []
    if handle.flat_param._params is None:  # noqa: SLF001
        raise ConfigError(
            "FullyShardedDataParallel has replaced the parameters by a flat one, whose names and shapes are lost; pass "
            "use_orig_params=True, or use fully_shard"
        )
    return list(zip(handle.flat_param._params, handle.flat_param._shapes, strict=True))  # noqa: SLF001


def _modules_of(model: nn.Module, kind: str) -> list[Any]:
    """Modules of a class of `torch.distributed.fsdp`, root first; none where there is no process group."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    found: type[Any] = getattr(importlib.import_module("torch.distributed.fsdp"), kind)
    return [module for module in model.modules() if isinstance(module, found)]
