"""VLLMEngine: vLLM's synchronous engine on one thread of the trainer's process.

vLLM's `AsyncLLM` and its stock server always put the engine core into another process; in-process weights need
`LLMEngine`, and `LLMEngine` needs exactly one thread that touches it. That thread is here. Everybody else hands it
closures on a queue, which it runs between two steps.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_gym.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    RequestAbortedError,
    WeightSyncError,
)
from lightning_gym.policy.engine import Deliver, EngineModel, Generation, LoRA, Part, SamplingParams
from lightning_gym.policy.vllm_arguments import EngineSettings, engine_arguments

if TYPE_CHECKING:
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    from lightning_gym.policy.vllm_weights import WeightViews

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_CLOSE_TIMEOUT_S = 20.0


class VLLMEngine:
    """vLLM in this process. See `Engine` for the contract.

    Args:
        max_model_len: tokens of context, prompt and generation together.
        max_num_seqs: requests decoded together; more wait in vLLM's queue.
        kv_cache_memory_bytes: size of the KV cache. ``None``: 256 MiB on CPU; on CUDA what `max_num_seqs` requests of
            `max_model_len` need, or what the trainer leaves if that is less, see
            `lightning_gym.memory_budget.plan_engine`. The budget is logged before the engine is built.
        gpu_memory_utilization: vLLM's share of the GPU's *total* memory, weights included: vLLM refuses to start if
            less is free. ``None``: what the budget comes to. Ignored on CPU.
        enforce_eager: no compilation and no CUDA graphs. ``None``: eager on CPU (2 s to start instead of 26 s).
        head_dtype: ``"float32"`` computes the LM head in float32 whatever the model is, for vLLM that can (0.32, not
            0.25.1); set `PolicyModule(head_dtype=...)` alike. ``None``: as the model.
        max_lora_rank: keeps a LoRA adapter of up to this rank apart from the weights, which a sync then leaves alone:
            `sync_mode` ``"adapter"``. 0: adapters are merged into the weights.
        seed: seeds what is not seeded by the request.
        engine_args: further `vllm.EngineArgs` fields, for what has no argument here.

    Raises:
        ConfigError: `engine_args` cut the engine over several ranks.

    Example:
        >>> engine = VLLMEngine(max_model_len=512)
        >>> engine.max_model_len
        512
    """

    def __init__(
        self,
        *,
        max_model_len: int = 4096,
        max_num_seqs: int = 256,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float | None = None,
        enforce_eager: bool | None = None,
        head_dtype: str | None = None,
        max_lora_rank: int = 0,
        seed: int = 0,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        _refuse_several_ranks(engine_args or {})
        self._settings = EngineSettings(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            head_dtype=head_dtype,
            max_lora_rank=max_lora_rank,
            seed=seed,
            engine_args=dict(engine_args or {}),
        )

        self._engine: vllm.LLMEngine
        self._views: WeightViews
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pending: dict[str, Deliver] = {}
        self._device = "cpu"
        self._thread: threading.Thread | None = None
        self._running = False
        self._closing = False
        self._death: BaseException | None = None
        self._weight_version: int | None = None
        self._adapter: LoRARequest | None = None
        self._owns_process_group = False
        self._can_sleep = False
        self._asleep: frozenset[Part] = frozenset()

    @property
    def weight_version(self) -> int | None:
        return self._weight_version

    @property
    def max_model_len(self) -> int:
        return self._settings.max_model_len

    def start(self, model: EngineModel) -> None:
        if self._thread is not None and self._thread.is_alive():
            raise EngineStartError("this engine runs already; close it first")
        self._work, self._pending = queue.SimpleQueue(), {}
        self._running, self._closing, self._death, self._weight_version = False, False, None, None
        self._asleep, self._adapter = frozenset(), None
        built: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(model, built), name="lightning-gym-engine", daemon=True)
        self._thread.start()
        try:
            built.result()
        except Exception as error:
            self._thread.join()
            raise EngineStartError(
                f"vLLM could not be built for {model.path} ({model.dtype}, {model.device}): {error}"
            ) from error

    def generate(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, deliver: Deliver) -> None:
        self._submit(lambda: self._add(request_id, prompt_ids, sampling, deliver), on_death=deliver)

    def abort(self, request_id: str) -> None:
        self._submit(lambda: self._abort([request_id]))

    def resume(self) -> None:
        if self._weight_version is None:
            raise WeightSyncError("the engine was resumed before its first weight sync")
        if self._asleep:
            raise EngineError(f"the engine was resumed while its {', '.join(sorted(self._asleep))} slept; wake it up")

        def go() -> None:
            self._hand_over()
            self._set_running(True)

        self._call(go)

    def pause(self) -> None:
        def stop() -> None:
            self._set_running(False)
            self._hand_over()
            waiting = dict(self._pending)
            self._abort(list(waiting))
            for deliver in waiting.values():
                deliver(RequestAbortedError("the engine was paused"))

        self._call(stop)

    def check_alive(self) -> None:
        if self._death is not None:
            raise self._dead_error()

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return self._call(lambda: self._prompt_logprobs(list(token_ids)))

    def weight_views(self) -> Mapping[str, "torch.Tensor"]:
        return self._call(lambda: self._views.look())  # noqa: PLW0108  looked up there: gone when the engine is

    def load_weights(self, weights: Iterable[tuple[str, "torch.Tensor"]]) -> None:
        from lightning_gym.policy.vllm_weights import reload_weights

        if threading.current_thread() is not self._thread:
            raise WeightSyncError("load_weights belongs inside the `write` of update_weights")
        reload_weights(self._engine, weights)

    @property
    def max_lora_rank(self) -> int:
        return self._settings.max_lora_rank

    def load_adapter(self, adapter: Mapping[str, LoRA]) -> None:
        from lightning_gym.policy.vllm_weights import load_adapter

        if threading.current_thread() is not self._thread:
            raise WeightSyncError("load_adapter belongs inside the `write` of update_weights")
        if (rank := max((part.a.shape[0] for part in adapter.values()), default=0)) > self.max_lora_rank:
            raise WeightSyncError(
                f"the adapter has rank {rank}, and this engine has max_lora_rank={self.max_lora_rank}"
            )
        self._adapter = load_adapter(self._engine, adapter)

    @property
    def can_sleep(self) -> bool:
        return self._can_sleep

    @property
    def asleep(self) -> frozenset[Part]:
        return self._asleep

    def sleep(self, *, weights: bool) -> None:
        def lie_down() -> None:
            if not self._can_sleep:
                raise EngineError(
                    "this engine cannot sleep: vLLM gives memory back on CUDA only, and only with "
                    "VLLMEngine(engine_args={'enable_sleep_mode': True})"
                )
            if self._running or self._pending:
                raise EngineError("the engine was put to sleep while it runs; pause it first")
            if weights:
                self._engine.sleep(level=2)
                self._asleep = frozenset({"kv_cache", "weights"})
            elif hasattr(self._engine, "release_kv_cache_memory"):  # 0.32; earlier ones give back all or nothing
                self._engine.sleep(level=0)  # the scheduler alone: it has to be paused before the cache may go
                self._engine.release_kv_cache_memory()
                self._asleep = frozenset({"kv_cache"})

        self._call(lie_down)

    def wake_up(self, part: Part) -> None:
        def rise() -> None:
            if part in self._asleep:
                self._engine.wake_up(tags=[part])
                self._asleep -= {part}

        self._call(rise)

    def update_weights(self, write: Callable[[], None], *, version: int) -> None:
        def update() -> None:
            if self._running or self._engine.has_unfinished_requests():
                raise WeightSyncError(
                    f"weights of version {version} arrived while requests were running; pause the engine first"
                )
            self._hand_over()
            write()
            self._hand_over()
            if not self._engine.reset_prefix_cache():
                raise WeightSyncError("vLLM kept its prefix cache, so old weights would answer for new ones")
            self._weight_version = version

        self._call(update)

    def close(self) -> None:
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        self._closing = True
        self._work.put(lambda: None)
        thread.join(_CLOSE_TIMEOUT_S)
        if thread.is_alive():
            _log.error("the engine thread did not stop within %.0f s", _CLOSE_TIMEOUT_S)

    # Everything below runs on the engine thread, `_submit` and `_call` excepted.

    def _submit(self, work: Callable[[], None], on_death: Deliver | None = None) -> None:
        if self._death is not None or self._closing:
            if on_death is not None:
                on_death(self._dead_error())
            return
        self._work.put(work)

    def _call(self, fn: Callable[[], _T]) -> _T:
        """Run `fn` on the engine thread and wait for it; at once on that thread itself."""
        if self._thread is None:
            raise EngineDeadError("the engine has not been started")
        if threading.current_thread() is self._thread:
            return fn()
        result: Future[_T] = Future()

        def work() -> None:
            try:
                self._refuse_if_dead()
                result.set_result(fn())
            except BaseException as error:  # noqa: BLE001  handed to the caller, who raises it
                result.set_exception(error)

        self._submit(work, on_death=lambda error: result.set_exception(self._as_error(error)))
        while True:
            try:
                return result.result(timeout=1.0)
            except TimeoutError:
                if result.done():
                    raise
                if not self._thread.is_alive():
                    raise self._dead_error() from self._death

    def _run(self, model: EngineModel, built: Future[None]) -> None:
        try:
            self._build(model)
        except BaseException as error:  # noqa: BLE001  `start` raises it
            built.set_exception(error)
            return
        built.set_result(None)
        try:
            while not self._closing:
                self._drain(block=not (self._running and self._pending))
                if self._running and self._pending:
                    self._step()
        except BaseException as error:  # noqa: BLE001  a dead engine must answer everybody who waits
            _log.exception("the engine thread died")
            self._death = error
        finally:
            self._bury()

    def _hand_over(self) -> None:
        """Between trainer and engine nothing may be under way on the device: each computes on a stream of its own."""
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self._device)

    def _build(self, model: EngineModel) -> None:
        from lightning_gym.policy import vllm_private, vllm_weights

        self._device = model.device
        with vllm_private.trainer_world_intact():
            vllm_private.set_environment(model.device)
            import torch
            import vllm

            if model.device.startswith("cpu"):
                vllm_weights.keep_cpu_weights_live()
                vllm_private.draw_from_no_global_generator()
            vllm_weights.register_loader()
            self._owns_process_group = not torch.distributed.is_initialized()
            try:
                with vllm_weights.loading_from(model.weights):
                    self._engine = vllm.LLMEngine.from_engine_args(
                        vllm.EngineArgs(**engine_arguments(self._settings, model))
                    )
                self._views = vllm_weights.WeightViews(self._engine)
                self._can_sleep = self._engine.vllm_config.model_config.enable_sleep_mode
            except BaseException:
                vllm_private.leave_no_groups(owns_process_group=self._owns_process_group)
                raise
            try:
                vllm_private.check_head_dtype(self._engine, self._settings.head_dtype)
            except BaseException:
                vllm_private.shut_down(self._engine, owns_process_group=self._owns_process_group)
                raise

    def _drain(self, *, block: bool) -> None:
        """Run what is queued; wait for the first piece if `block`."""
        try:
            self._work.get(block=block)()
            while True:
                self._work.get_nowait()()
        except queue.Empty:
            return

    def _set_running(self, running: bool) -> None:  # noqa: FBT001
        self._running = running

    def _add(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, deliver: Deliver) -> None:
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = VLLMSamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the stop ids say when a turn ends; the config's eos id may say something else
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            self._refuse_if_dead()
            prompt = TokensPrompt(prompt_token_ids=list(prompt_ids))
            self._engine.add_request(request_id, prompt, params, lora_request=self._adapter)
        except Exception as error:  # noqa: BLE001  vLLM refuses a bad request here; the requester hears why
            deliver(error)
            return
        self._pending[request_id] = deliver

    def _abort(self, request_ids: list[str]) -> None:
        known = [request_id for request_id in request_ids if self._pending.pop(request_id, None) is not None]
        if known:
            self._engine.abort_request(known)

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished and (deliver := self._pending.pop(output.request_id, None)) is not None:
                deliver(self._generation(output))

    def _generation(self, output: Any) -> Generation:
        completion = output.outputs[0]
        assert self._weight_version is not None
        return Generation(
            token_ids=list(completion.token_ids),
            logprobs=list(completion.logprobs.logprobs),
            finish_reason=completion.finish_reason,
            weight_version=self._weight_version,
        )

    def _prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm import TokensPrompt

        if self._pending:
            raise WeightSyncError("prompt_logprobs needs an idle engine; pause it first")
        params = VLLMSamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompt = TokensPrompt(prompt_token_ids=token_ids)
        self._engine.add_request(f"canary-{time.monotonic_ns()}", prompt, params, lora_request=self._adapter)
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        positions = outputs[-1].prompt_logprobs
        return [positions[i][token_ids[i]].logprob for i in range(1, len(token_ids))]

    def _bury(self) -> None:
        """Answer whoever waits, then free the engine: the interpreter's exit would free it under a running step."""
        from lightning_gym.policy import vllm_private

        self._running = False
        pending, self._pending = self._pending, {}
        for deliver in pending.values():
            deliver(self._dead_error())
        self._drain(block=False)
        vllm_private.shut_down(self._engine, owns_process_group=self._owns_process_group)
        del self._engine, self._views

    def _refuse_if_dead(self) -> None:
        if self._death is not None or self._closing:
            raise self._dead_error()

    def _dead_error(self) -> EngineDeadError:
        why = "was closed" if self._death is None else f"died: {self._death!r}"
        error = EngineDeadError(f"the engine {why}")
        error.__cause__ = self._death
        return error

    @staticmethod
    def _as_error(error: "Generation | BaseException") -> BaseException:
        return error if isinstance(error, BaseException) else EngineDeadError("the engine is gone")


def _refuse_several_ranks(engine_args: Mapping[str, Any]) -> None:
    """An engine over several ranks steps in all of them at once, each with the same requests in the same order.

    Here every rank has an endpoint of its own, and plays groups of its own.
    """
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if engine_args.get(name, 1) != 1:
            raise ConfigError(
                f"engine_args has {name}={engine_args[name]}: an engine that is cut over the trainer's ranks would "
                "have to see the same requests in the same order on each, and every rank serves rollouts of its own. "
                "Leave it at 1: one whole engine a rank. The trainer may be cut (ModelParallelStrategy)"
            )
