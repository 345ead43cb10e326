"""FakeEngine: the Hugging Face model itself as an engine."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_gym.errors import EngineDeadError, EngineError, EngineStartError, RequestAbortedError, WeightSyncError
from lightning_gym.policy.engine import Deliver, EngineModel, Generation, LoRA, Part, SamplingParams

if TYPE_CHECKING:
    import torch


class FakeEngine:
    """A real policy without vLLM: the Hugging Face model itself, one token at a time, on a thread of its own.

    Fulfils `lightning_gym.policy.engine.Engine` and passes its contract tests, logprob parity included; slow, so for
    models and batches of toy size.

    Args:
        max_model_len: tokens of context.
        script: what to "sample" instead of sampling: ``(prompt_ids, seed) -> token ids``. An `Exception` fails the
            request; anything else that it raises, such as `SystemExit`, is the engine's death.
        logprob: what to report instead of the model's: ``(position, token id) -> nats``; a function that is different
            for every pair shows any misplaced token.
        max_num_seqs: accepted for likeness; requests are answered one after the other.
        can_sleep: whether it gives memory back; weights that slept are not numbers until they are written.
        max_lora_rank: highest rank of an adapter that it computes beside the weights; 0: none.
    """

    def __init__(
        self,
        *,
        max_model_len: int = 512,
        script: Callable[[Sequence[int], int], list[int]] | None = None,
        logprob: Callable[[int, int], float] | None = None,
        max_num_seqs: int = 1,
        can_sleep: bool = False,
        max_lora_rank: int = 0,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.events: list[str] = []
        """What was asked of the engine, in order: ``start``, ``update:3``, ``resume``, ``pause``, ``sleep:kv_cache``,
        ``sleep:weights`` (both), ``wake:weights``, ``wake:kv_cache``, ``close``."""
        self.can_sleep = can_sleep
        self.max_lora_rank = max_lora_rank
        self.asleep: frozenset[Part] = frozenset()
        self._max_model_len = max_model_len
        self._script = script
        self._logprob = logprob
        self._model: Any = None
        self._hooks: list[Any] = []
        self._version: int | None = None
        self._waiting: dict[str, tuple[list[int], SamplingParams, Deliver]] = {}
        self._wake = threading.Condition()
        self._running = False
        self._closed = False
        self._death: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def weight_version(self) -> int | None:
        return self._version

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def start(self, model: EngineModel) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        if self._thread is not None and self._thread.is_alive():
            raise EngineStartError("this engine runs already; close it first")
        self.events.append("start")
        self._version, self._running, self._closed, self._death = None, False, False, None
        self.asleep, self._hooks = frozenset(), []
        try:
            config = AutoConfig.from_pretrained(model.path)
            with torch.random.fork_rng(devices=[]):
                self._model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype)).eval()
            self._model.load_state_dict(dict(model.weights()), strict=False)
        except Exception as error:
            raise EngineStartError(f"the fake engine could not load {model.path}: {error}") from error
        self._model.requires_grad_(False)
        _fuse(self._model)
        self._thread = threading.Thread(target=self._work, name="lightning-gym-fake-engine", daemon=True)
        self._thread.start()

    def generate(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, deliver: Deliver) -> None:
        with self._wake:
            gone = self._closed or self._death is not None
            if not gone and len(prompt_ids) < self._max_model_len:
                self._waiting[request_id] = (list(prompt_ids), sampling, deliver)
                self._wake.notify()
                return
        reason = "was closed or died" if gone else f"has room for {self._max_model_len} tokens"
        deliver(EngineDeadError(f"the engine {reason}") if gone else EngineError(f"the engine {reason}"))

    def abort(self, request_id: str) -> None:
        with self._wake:
            self._waiting.pop(request_id, None)

    def resume(self) -> None:
        if self._version is None:
            raise WeightSyncError("the engine was resumed before its first weight sync")
        if self.asleep:
            raise EngineError(f"the engine was resumed while its {', '.join(sorted(self.asleep))} slept; wake it up")
        self.events.append("resume")
        self._set(running=True)

    def pause(self) -> None:
        self.events.append("pause")
        self._set(running=False)
        with self._wake:
            waiting, self._waiting = self._waiting, {}
        for _, _, deliver in waiting.values():
            deliver(RequestAbortedError("the engine was paused"))

    def sleep(self, *, weights: bool) -> None:
        if not self.can_sleep:
            raise EngineError("this engine cannot sleep: FakeEngine(can_sleep=True) can")
        if self._running:
            raise EngineError("the engine was put to sleep while it runs; pause it first")
        self.events.append("sleep:weights" if weights else "sleep:kv_cache")
        self.asleep = frozenset({"kv_cache", "weights"} if weights else {"kv_cache"})
        if weights:
            for parameter in self._model.parameters():
                parameter.data.fill_(float("nan"))

    def wake_up(self, part: Part) -> None:
        if part in self.asleep:
            self.events.append(f"wake:{part}")
            self.asleep -= {part}

    def check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(f"the engine died: {self._death!r}") from self._death

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        import torch

        if self.asleep:
            raise EngineError(f"the engine was asked for logprobs while its {', '.join(sorted(self.asleep))} slept")
        ids = torch.tensor([list(token_ids)])
        values = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return values.gather(-1, ids[0, 1:, None])[:, 0].tolist()

    def weight_views(self) -> "Mapping[str, torch.Tensor]":
        return {name: parameter.data for name, parameter in self._model.named_parameters()}

    def load_weights(self, weights: "Iterable[tuple[str, torch.Tensor]]") -> None:
        try:
            self._model.load_state_dict(dict(weights))
        except RuntimeError as error:
            raise WeightSyncError(f"the fake engine could not load these weights: {error}") from error

    def load_adapter(self, adapter: Mapping[str, LoRA]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        layers = dict(self._model.named_modules())
        for name, part in adapter.items():
            if name not in layers:
                raise WeightSyncError(f"the fake engine takes no adapter for {name}: there is no such layer")
            if part.a.shape[0] > self.max_lora_rank:
                raise WeightSyncError(
                    f"the adapter has rank {part.a.shape[0]}, and this engine has max_lora_rank={self.max_lora_rank}"
                )
            self._hooks.append(layers[name].register_forward_hook(_adding(part.a.clone(), part.b * part.scaling)))

    def update_weights(self, write: Callable[[], None], *, version: int) -> None:
        if self._running:
            raise WeightSyncError(f"weights of version {version} arrived while requests were running; pause first")
        self.events.append(f"update:{version}")
        write()
        self._version = version

    def close(self) -> None:
        if self._closed:
            return
        self.events.append("close")
        with self._wake:
            self._closed, self._running = True, False
            waiting, self._waiting = self._waiting, {}
            self._wake.notify()
        for _, _, deliver in waiting.values():
            deliver(EngineDeadError("the engine was closed"))
        if self._thread is not None:
            self._thread.join()

    def _set(self, *, running: bool) -> None:
        with self._wake:
            self._running = running
            self._wake.notify()

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001  a dead engine must answer everybody who waits
            with self._wake:
                self._death = error
                waiting, self._waiting = self._waiting, {}
            for _, _, deliver in waiting.values():
                deliver(EngineDeadError(f"the engine died: {error!r}"))

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or (self._running and self._waiting))
                if self._closed:
                    return
                request_id, (prompt_ids, sampling, deliver) = next(iter(self._waiting.items()))
            try:
                result = self._generate(prompt_ids, sampling)
            except Exception as error:  # noqa: BLE001  whoever asked hears of it; the others are still answered
                result = EngineError(f"the fake engine could not answer {request_id}: {error!r}")
            with self._wake:
                asked_for = self._waiting.pop(request_id, None) is not None
            if asked_for:
                deliver(result)

    def _generate(self, prompt_ids: list[int], sampling: SamplingParams) -> Generation:
        import torch

        generator = torch.Generator().manual_seed(sampling.seed % (1 << 63))
        scripted = iter(self._script(prompt_ids, sampling.seed)) if self._script else None
        token_ids: list[int] = []
        logprobs: list[float] = []
        while len(token_ids) < min(sampling.max_tokens, self._max_model_len - len(prompt_ids)):
            logits = (
                self._model(input_ids=torch.tensor([prompt_ids + token_ids]), use_cache=False).logits[0, -1].float()
            )
            chances = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
            if scripted is not None:
                token = next(scripted)
            elif sampling.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial(chances.exp(), 1, generator=generator))
            position = len(prompt_ids) + len(token_ids)
            logprobs.append(self._logprob(position, token) if self._logprob else float(chances[token]))
            token_ids.append(token)
            if token in sampling.stop_token_ids:
                break
        stopped = bool(token_ids) and token_ids[-1] in sampling.stop_token_ids
        assert self._version is not None
        return Generation(
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason="stop" if stopped else "length",
            weight_version=self._version,
        )


def _adding(a: "torch.Tensor", b: "torch.Tensor") -> Callable[[Any, tuple[Any, ...], Any], Any]:
    """A forward hook that adds ``b @ a @ x`` to the output of a linear layer."""
    return lambda _layer, inputs, output: output + inputs[0] @ a.to(output.dtype).T @ b.to(output.dtype).T


def _fuse(model: Any) -> None:
    """Lay the weights out as vLLM does: q, k, v and gate, up end to end, the vocabulary padded to a multiple of 64."""
    import torch

    def join(parameters: Sequence[Any], padding: int = 0) -> None:
        rows = [len(parameter) for parameter in parameters]
        fused = torch.zeros((sum(rows) + padding, *parameters[0].shape[1:]), dtype=parameters[0].dtype)
        for parameter, part in zip(parameters, fused.split([*rows, padding] if padding else rows), strict=False):
            part.copy_(parameter)
            parameter.data = part

    for module in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if all(hasattr(module, name) for name in names):
                join([getattr(module, name).weight for name in names])
    for parameter in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        join([parameter], padding=-len(parameter) % 64)
