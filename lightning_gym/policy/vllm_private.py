# pyright: reportPrivateUsage=false
"""The process around vLLM: every touch that is not public API, with the version it was read in, symbol, and reason.

Those of its weights are in `lightning_gym.policy.vllm_weights`. Checked against vLLM 0.25.1 and 0.32.0. Where a symbol
can be missing it is looked up, not assumed.
"""

import contextlib
import logging
import os
import random
import types
import warnings
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_gym.errors import EngineStartError

if TYPE_CHECKING:
    from vllm import LLMEngine


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
    else:
        # 0.25.1 v1/worker/gpu/sample/sampler.py asks for FlashInfer's sampler in its constructor, and fails where the
        # package is missing; with processed logprobs, as here, it is never used (nor in 0.32).
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def check_head_dtype(engine: "LLMEngine", wanted: str | None) -> None:
    """Refuse an engine that computes its LM head in another dtype than it was asked to.

    0.32 ``config/model.py: ModelConfig.head_dtype`` takes it for generation; 0.25.1 warns and takes the model's dtype.

    Raises:
        EngineStartError: this vLLM does not.
    """
    if wanted is None:
        return
    config = engine.vllm_config.model_config
    found = str(getattr(config, "head_dtype", config.dtype)).removeprefix("torch.")
    if found != wanted:
        raise EngineStartError(
            f"this vLLM computes the LM head in {found}, whatever it is asked to; leave head_dtype={wanted!r} out, or "
            "use vLLM 0.32"
        )


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


class _TorchWithOwnDraws:
    """The module ``torch``, except that ``randint`` without a generator draws from one of its own."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def randint(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.randint(*args, **({"generator": self._generator} | kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def draw_from_no_global_generator() -> None:
    """Leave torch's global CPU generator to the trainer, which may train while the engine samples.

    0.32 ``v1/sample/ops/topk_topp_sampler.py: TopKTopPSampler.forward_cpu`` draws a seed for every row of the batch
    from the global generator, and then replaces those of requests that have a seed, as all of ours do. On CUDA
    ``random_sample`` draws only where a request has none.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    sampler: Any = topk_topp_sampler.TopKTopPSampler
    original = getattr(sampler, "forward_cpu", None)
    if original is None or isinstance(original.__globals__["torch"], _TorchWithOwnDraws):
        return
    names = {**original.__globals__, "torch": _TorchWithOwnDraws()}
    sampler.forward_cpu = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )


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
