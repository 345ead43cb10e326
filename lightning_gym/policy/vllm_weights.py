# pyright: reportPrivateUsage=false
"""vLLM's weights: loaded from this process, computed with where they lie, shown by name, loaded again.

Every touch of what is not public API names the version it was read in, the symbol, and the reason. Checked against
vLLM 0.25.1 and 0.32.0. Where a symbol can be missing it is looked up, not assumed.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lightning_gym.errors import WeightSyncError
from lightning_gym.policy.engine import LoRA

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.lora.request import LoRARequest

LOADER = "lightning_gym"
"""Name of the registered weight loader."""
_ADAPTER_ID = 1

_WeightsFactory = Callable[[], Iterable[tuple[str, torch.Tensor]]]
_weights_being_loaded: _WeightsFactory | None = None


class _LiveLinear:
    """A linear layer's product with the tensor that its weight has in memory."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.data.as_subclass(torch.Tensor)

    def __call__(self, x: torch.Tensor, _weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)

    def reads(self, weight: torch.Tensor) -> bool:
        """Whether it multiplies by this very memory."""
        return self.weight.data_ptr() == weight.data_ptr()


def keep_cpu_weights_live() -> None:
    """Make vLLM's CPU build compute with the tensors it was given, before an engine is built.

    0.32 ``model_executor/layers/utils.py: dispatch_cpu_unquantized_gemm`` packs every linear weight into a private
    copy and leaves ``empty(0)`` behind, so that later writes to the weight change nothing. Replaced by ``F.linear`` on
    a plain view of the same storage; the view also skips the ``__torch_function__`` of vLLM's parameter class, which
    costs an eighth of a decode step of a tiny model.
    0.32 ``v1/sample/sampler.py: batched_count_greater_than`` is compiled by inductor at the first request with
    logprobs: 13 s, and a dead engine where there is no C++ compiler.
    """
    import vllm.model_executor.layers.utils as layer_utils
    from vllm.v1.sample import sampler

    packed = layer_utils.dispatch_cpu_unquantized_gemm
    if getattr(packed, "keeps_weights_live", False):
        return

    def live(layer: torch.nn.Module, remove_weight: bool) -> None:  # noqa: FBT001  vLLM's signature
        weight = layer.weight
        if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.ndim != 2:
            packed(layer, remove_weight)
            return
        setattr(layer, "cpu_linear", _LiveLinear(weight))  # noqa: B010  a Module's types

    live.keeps_weights_live = True  # type: ignore[attr-defined]
    layer_utils.dispatch_cpu_unquantized_gemm = live
    sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)


def register_loader() -> None:
    """Register a loader that takes the trainer's tensors instead of a checkpoint (public API of vLLM's loaders)."""
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import BaseModelLoader, get_model_loader, register_model_loader

    class TrainerWeightsLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """Nothing to download: the weights are in this process."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            if _weights_being_loaded is None:
                raise RuntimeError("this loader works only inside `loading_from`")
            model.load_weights(iter(_weights_being_loaded()))  # type: ignore[operator]  every vLLM model has it

    try:
        get_model_loader(LoadConfig(load_format=LOADER))
    except ValueError:
        register_model_loader(LOADER)(TrainerWeightsLoader)


@contextlib.contextmanager
def loading_from(weights: _WeightsFactory) -> Generator[None]:
    """Let the registered loader read from `weights`: vLLM builds loaders itself, so the way in is a module global."""
    global _weights_being_loaded  # noqa: PLW0603  see above
    _weights_being_loaded = weights
    try:
        yield
    finally:
        _weights_being_loaded = None


def driver_model(engine: "LLMEngine") -> torch.nn.Module:
    """The module the engine computes with. 0.16 to 0.32: uni-process executor -> driver worker -> model runner."""
    executor = engine.model_executor
    if executor is None:
        raise RuntimeError("the engine runs in another process; VLLM_ENABLE_V1_MULTIPROCESSING=0 was not honoured")
    return executor.driver_worker.worker.model_runner.get_model()  # type: ignore[attr-defined]  not on the base class


class WeightViews:
    """The engine's tensors by Hugging Face name, worked out once and verified by address at every look.

    vLLM fuses q/k/v and gate/up by rows (``packed_modules_mapping`` on the model class, ``output_partition_sizes`` on
    the layer) and pads the vocabulary (``org_vocab_size``). Row slices are contiguous, so a view of each part exists.
    """

    def __init__(self, engine: "LLMEngine") -> None:
        self._engine = engine
        self._views: Mapping[str, torch.Tensor] | None = None
        self._places: list[tuple[dict[str, Any], str, dict[str, Any]]] = []
        """Where each parameter is found: its module's parameters, its name among them, the module's attributes."""
        self._found: tuple[list[int], list[Any]] = ([], [])

    def look(self) -> Mapping[str, torch.Tensor]:
        """The same mapping as long as every layer computes with the tensors in it.

        Raises:
            WeightSyncError: there are no such views of this engine's weights.
        """
        if self._views is None or self._find() != self._found:
            if (reason := _views_refusal(self._engine)) is not None:
                raise WeightSyncError(reason)
            self._views, self._places = None, []  # a walk that fails half-way leaves nothing to trust
            views = MappingProxyType(dict(self._walk()))
            self._views, self._found = views, self._find()
        return self._views

    def _find(self) -> tuple[list[int], list[Any]]:
        """Where the parameters lie, and which objects multiply by them on CPU."""
        with torch._C.DisableTorchFunctionSubclass():  # vLLM's parameter class costs microseconds a call
            addresses = [parameters[name].data_ptr() for parameters, name, _ in self._places]
        return addresses, [attributes.get("cpu_linear") for _, _, attributes in self._places]

    def _walk(self) -> Iterable[tuple[str, torch.Tensor]]:
        model = driver_model(self._engine)
        parts_of: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        seen: set[tuple[int, torch.Size]] = set()
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                tensor = parameter.data.as_subclass(torch.Tensor)
                linear = module.__dict__.get("cpu_linear") if name == "weight" else None
                if linear is not None and not (isinstance(linear, _LiveLinear) and linear.reads(tensor)):
                    raise WeightSyncError(f"vLLM computes {module_name} with a private copy of its {name}")
                self._places.append((module._parameters, name, module.__dict__))
                key = (tensor.data_ptr(), tensor.shape)
                if key in seen:  # tied: the same storage under a second name
                    continue
                seen.add(key)
                module_name = module_name.removesuffix(".base_layer")  # noqa: PLW2901  where vLLM has room for a LoRA
                parent, _, leaf = module_name.rpartition(".")
                if len(parts := parts_of.get(leaf, [])) > 1:
                    sizes: list[int] = list(module.output_partition_sizes)  # type: ignore[arg-type]  linear layers have it
                    for part, view in zip(parts, tensor.split(sizes), strict=True):
                        yield f"{parent}.{part}.{name}", view
                    continue
                if name == "weight" and hasattr(module, "org_vocab_size"):
                    tensor = tensor[: module.org_vocab_size]  # type: ignore[misc]
                yield f"{module_name}.{name}", tensor


def load_adapter(engine: "LLMEngine", adapter: Mapping[str, LoRA]) -> "LoRARequest | None":
    """Put an adapter into the engine's one slot; what every request has to ask for from then on, if it has layers.

    0.32 ``lora/model_manager.py: LoRAModelManager`` of the driver's model runner: vLLM's own way in,
    ``LLMEngine.add_lora``, reads adapters from files. An id that is there already is not looked for on disk
    (``LRUCacheWorkerLoRAManager.add_adapter``). A slot is emptied as well as left, because CPU kernels add what is in
    it to requests for no adapter too.

    Raises:
        WeightSyncError: vLLM has no such layer, or none that takes an adapter.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.request import LoRARequest

    executor: Any = engine.model_executor
    manager: Any = executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    packed: Mapping[str, list[str]] = manager.packed_modules
    known = {part for name in manager.modules for part in packed.get(name, [name])}
    if strangers := sorted(adapter.keys() - known):
        raise WeightSyncError(f"vLLM takes no adapter for {', '.join(strangers[:8])}")
    layers = {
        name: LoRALayerWeights(name, len(part.a), len(part.a), part.a, part.b.clone(), part.scaling)  # scales `b`
        for name, part in adapter.items()
    }
    manager.remove_adapter(_ADAPTER_ID)
    if not layers:
        for module in manager.modules.values():
            module.reset_lora(0)
        return None
    manager.add_adapter(LoRAModel(_ADAPTER_ID, max(layer.rank for layer in layers.values()), layers))
    manager.activate_adapter(_ADAPTER_ID)
    return LoRARequest("policy", _ADAPTER_ID, "in this process")


def _views_refusal(engine: "LLMEngine") -> str | None:
    """Why the weights in memory are not the checkpoint's tensors, or row slices; ``None`` if they are."""
    config = engine.vllm_config
    if config.model_config.quantization is not None:
        return f"vLLM holds the weights quantised ({config.model_config.quantization})"
    if config.parallel_config.world_size > 1:
        return f"vLLM holds a shard of the weights on each of {config.parallel_config.world_size} ranks"
    model = driver_model(engine)
    for name, module in model.named_modules():
        # 0.25 to 0.32 ``layers/fused_moe``: every expert layer has ``FusedMoE`` or ``MoERunner`` among its classes.
        if any("FusedMoE" in base.__name__ or "MoERunner" in base.__name__ for base in type(module).__mro__):
            return f"vLLM holds the experts of {name} in one tensor of its own layout"
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    kinds = ("renaming", "regex", "substr", "prefix")
    if mapper is not None and any(getattr(mapper, f"orig_to_new_{kind}", None) for kind in kinds):
        return f"{type(model).__name__} has other names for its tensors than the checkpoint"
    return None


def reload_weights(engine: "LLMEngine", weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load a checkpoint's tensors layer by layer, processed as at the start, into the storage the engine has.

    0.16 to 0.32 ``Worker.reload_weights(weights_iterator)``. What ``model.load_weights`` says it loaded is only logged
    there, so it is listened to on the way: a tensor that is missing would be left as it was.

    Raises:
        WeightSyncError: tensors were not loaded, or vLLM refused one.
    """
    model: Any = driver_model(engine)
    load_weights: Callable[..., set[str] | None] = model.load_weights
    loaded: set[str] = set()
    model.load_weights = lambda *args, **kwargs: loaded.update(result := load_weights(*args, **kwargs) or ()) or result
    try:
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    except Exception as error:
        raise WeightSyncError(
            f"vLLM could not reload its weights, and is unusable after half of it: {error}"
        ) from error
    finally:
        del model.load_weights
    for module in model.modules():
        if isinstance(vars(module).get("cpu_linear"), _LiveLinear):
            module.cpu_linear = _LiveLinear(module.weight)  # processing bound it to the tensor that was loaded from
    tied = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in loaded}
    missing = sorted(name for name, parameter in model.named_parameters() if id(parameter) not in tied)
    if missing:
        raise WeightSyncError(
            f"{len(missing)} of vLLM's tensors were not in the weights to load: {', '.join(missing[:8])}"
        )
