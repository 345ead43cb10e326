# pyright: reportPrivateUsage=false
"""Every touch of vLLM that is not public API, each with the version it was read in, the symbol, and the reason.

Checked against vLLM 0.25.1 and 0.32.0. Where a symbol can be missing it is looked up, not assumed.
"""

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from vllm import LLMEngine

LOADER = "lightning_gym"
"""Name of the registered weight loader."""

_WeightsFactory = Callable[[], Iterable[tuple[str, torch.Tensor]]]
_weights_being_loaded: _WeightsFactory | None = None


def set_environment(device: str) -> None:
    """Set the variables vLLM reads at import or freezes when an engine is built; the user's own values win.

    Called inside `trainer_world_intact`, which takes them back.

    ``VLLM_ENABLE_V1_MULTIPROCESSING`` is not a choice: the CPU platform (0.32, ``platforms/cpu.py``) and
    ``LLMEngine.from_engine_args`` read it from the environment, and only ``0`` keeps the engine in this process.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if torch.distributed.is_initialized():
        # 0.32 v1/executor/uniproc_executor.py: ExecutorWithExternalLauncher reads these and takes LOCAL_RANK as the
        # device's index; Lightning's own launcher sets no RANK. Left behind, they would mislead the next Trainer.
        os.environ["RANK"] = str(torch.distributed.get_rank())
        os.environ["LOCAL_RANK"] = device.partition(":")[2] or "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device.startswith("cpu"):
        os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")


@contextlib.contextmanager
def trainer_world_intact() -> Generator[None]:
    """Put back what building an engine changes in the trainer's process.

    vLLM 0.32: ``set_random_seed`` seeds python, numpy and torch; ``init_device`` sets the float32 matmul precision;
    the CPU worker replaces ``torch.set_num_threads`` by a no-op and the CUDA worker sets one thread;
    ``LOCAL_WORLD_SIZE``, ``LD_PRELOAD`` and compiler settings are written to the environment.
    The process group is `vllm_process_groups`' business. On CPU, importing vLLM's worker also replaces
    ``torch.cuda`` stream classes by no-ops for good (``v1/worker/cpu/shm.py``): do not train on a GPU beside it.
    """
    rng = (random.getstate(), np.random.get_state(), torch.random.get_rng_state())  # noqa: NPY002  the state vLLM seeds
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    environment = dict(os.environ)
    precision = torch.get_float32_matmul_precision()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    triton_log = logging.getLogger("torch._library.triton")  # says at WARNING that a CPU has no Triton
    triton_level = triton_log.level
    triton_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between vLLM and torch, which no user of either can act on
            yield
    finally:
        triton_log.setLevel(triton_level)
        random.setstate(rng[0])
        np.random.set_state(rng[1])  # noqa: NPY002
        torch.random.set_rng_state(rng[2])
        if cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)


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
        plain = weight.data.as_subclass(torch.Tensor)
        setattr(layer, "cpu_linear", lambda x, _weight, bias: F.linear(x, plain, bias))  # noqa: B010  a Module's types

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


def weight_views(engine: "LLMEngine") -> dict[str, torch.Tensor]:
    """Hugging Face name -> plain tensor view of what the engine computes with.

    vLLM fuses q/k/v and gate/up by rows (``packed_modules_mapping`` on the model class, ``output_partition_sizes`` on
    the layer) and pads the vocabulary (``org_vocab_size``). Row slices are contiguous, so a view of each part exists.
    Holds for dense, unquantised models at tensor parallel size 1.
    """
    model = driver_model(engine)
    parts_of: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    views: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            tensor = parameter.data.as_subclass(torch.Tensor)
            key = (tensor.data_ptr(), tensor.shape)
            if key in seen:  # tied: the same storage under a second name
                continue
            seen.add(key)
            parent, _, leaf = module_name.rpartition(".")
            if leaf in parts_of and len(parts_of[leaf]) > 1:
                sizes: list[int] = list(module.output_partition_sizes)  # type: ignore[arg-type]  linear layers have it
                for part, view in zip(parts_of[leaf], tensor.split(sizes), strict=True):
                    views[f"{parent}.{part}.{name}"] = view
                continue
            if name == "weight" and hasattr(module, "org_vocab_size"):
                tensor = tensor[: module.org_vocab_size]  # type: ignore[misc]
            views[f"{module_name}.{name}"] = tensor
    return views


def shut_down(engine: "LLMEngine", *, owns_process_group: bool) -> None:
    """Free the engine without destroying the trainer's process groups.

    0.25 to 0.32 ``v1/engine/core.py: EngineCore.shutdown`` ends in ``cleanup_dist_env_and_memory``, which destroys the
    *default* process group, and ``InprocClient`` runs the same again from a finalizer at exit.
    """
    import vllm.v1.engine.core as core_module

    client: Any = engine.engine_core
    finalizer = getattr(client, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
    if owns_process_group:
        client.engine_core.shutdown()
        return
    original = core_module.cleanup_dist_env_and_memory
    core_module.cleanup_dist_env_and_memory = _destroy_only_vllm_groups
    try:
        client.engine_core.shutdown()
    finally:
        core_module.cleanup_dist_env_and_memory = original


def leave_no_groups(*, owns_process_group: bool) -> None:
    """After a build that failed half-way: 0.32 ``init_distributed_environment`` may have made groups by then."""
    _destroy_only_vllm_groups()
    if owns_process_group and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _destroy_only_vllm_groups(*_args: object, **_kwargs: object) -> None:
    """0.32 ``distributed/parallel_state.py: destroy_distributed_environment`` without its last step."""
    from vllm import envs
    from vllm.distributed import parallel_state

    if hasattr(envs, "disable_envs_cache"):
        envs.disable_envs_cache()
    parallel_state.destroy_model_parallel()
    world = getattr(parallel_state, "_WORLD", None)
    if world is not None:
        world.destroy()
    parallel_state._WORLD = None
    parallel_state._NODE_COUNT = None
