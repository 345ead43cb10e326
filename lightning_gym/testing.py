"""Small stand-ins that are held to the contracts of the real things.

Public, so that a user can test an own `LightningModule` or environment in seconds, on a CPU, without a download.
`tiny_tokenizer` and `tiny_model` are real Hugging Face classes of toy size: they save, load and serve like a released
checkpoint.

Importing this module imports no torch; the functions that need it import it.
"""

import asyncio
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gym.errors import EngineDeadError, EngineError, EngineStartError, WeightSyncError
from lightning_gym.gym.environments import load_environment
from lightning_gym.policy.engine import Deliver, EngineModel, Generation, SamplingParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    from lightning_gym.batch import TrajectoryBatch
    from lightning_gym.trajectory import Trajectory

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content -%}{%- for part in content -%}{{ part.text if part.type == "text" else "" }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- set text = text_of(message.content) -%}
  {{- "<|im_start|>" + message.role + "\\n" + text -}}
  {%- for call in message.tool_calls or [] -%}
    {%- set call = call.function or call -%}
    {{- "\\n" if text or not loop.first -}}
    {{- "<tool_call>\\n{\\"name\\": " + call.name | tojson + ", \\"arguments\\": " -}}
    {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
    {{- "}\\n</tool_call>" -}}
  {%- endfor -%}
  {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""
"""ChatML with Hermes-style calls.

`tools` is ignored on purpose: a tiny policy knows its tools from the demonstrations it was trained on, and two JSON
schemas in front of every prompt would cost more tokens than the whole rollout. Each message is rendered without
looking at its neighbours, so a slice of a conversation renders to the same slice of its text.
"""

_SMALL_CORPUS = (
    "<|im_start|>user\nadd 1 then add 2 then get the count<|im_end|>\n<|im_start|>assistant\n",
    '<tool_call>\n{"name": "increment_counter", "arguments": {"count": 1}}\n</tool_call>\n<tool_call>',
    '<tool_call>\n{"name": "get_counter_value", "arguments": {}}\n</tool_call><|im_end|>\n',
    '<|im_start|>tool\n{"success":true}<|im_end|>\n<|im_start|>tool\n{"count":3}<|im_end|>\n',
    "<|im_start|>user\nreverse a b c d e f g h i j k l m n o p q r s t u v w x y z<|im_end|>\n",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello, what is the answer?",
)

# A letter between white space is a symbol of its own, together with the space in front of it: without this, the BPE
# would learn "a b" as one token and a task about single letters would be about an arbitrary grouping of them.
_LONE_LETTER = r" ?(?<!\S)\p{L}(?!\S)"


def tiny_tokenizer(corpus: Iterable[str] | None = None, *, vocab_size: int = 640) -> "PreTrainedTokenizerFast":
    r"""Train a byte-level BPE tokenizer with a ChatML template, in a fraction of a second and always to the same ids.

    Text between digits, lone letters and special tokens is *not* split into words: whatever the corpus repeats
    verbatim, such as the fixed part of a tool call, becomes a single token. Decode steps are what a small run pays
    for. The full byte alphabet is in the vocabulary, so any text encodes and decodes to itself.

    ``<tool_call>`` and ``</tool_call>`` are single tokens but not *special* ones, as in Qwen3: a decoder that skips
    special tokens must not swallow the call.

    Args:
        corpus: texts, rendered chat turns included; a small built-in one if ``None``. What is seen at least twice is
            merged.
        vocab_size: upper limit; a small corpus runs out of merges before.

    Example:
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.tokenize('<tool_call>\n{"name": "increment_counter", "arguments": {"count": 1')[2:]
        ['1']
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(_LONE_LETTER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # the two call tokens are added after training
        min_frequency=2,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_between_added_tokens(corpus if corpus is not None else _SMALL_CORPUS * 2), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (CALL_START, CALL_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _between_added_tokens(corpus: Iterable[str]) -> Iterable[str]:
    """What the BPE will see of each text: training, unlike encoding, does not cut the text at added tokens."""
    border = re.compile("|".join(map(re.escape, (PAD, TURN_START, TURN_END, CALL_START, CALL_END))))
    for text in corpus:
        yield from filter(None, border.split(text))


def tiny_model(
    tokenizer: "PreTrainedTokenizerFast",
    *,
    seed: int = 0,
    tie_word_embeddings: bool = True,
    num_layers: int = 2,
    hidden_size: int = 192,
    intermediate_size: int | None = None,
    head_dim: int = 32,
    num_kv_heads: int = 2,
    max_position_embeddings: int = 512,
) -> "Qwen3ForCausalLM":
    """A randomly initialised Qwen3 of toy size, fp32, on the CPU; 0.9 M parameters by default.

    Qwen3, because vLLM serves the architecture natively and because it has what real models have: grouped key/value
    heads, q/k norms, a fused gate and up projection, tied embeddings.

    Args:
        seed: of the initial weights; the global generator is left as it was.
        intermediate_size: three times `hidden_size` if ``None``.
        head_dim: 32 is the smallest that vLLM's attention on a CPU takes.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(num_kv_heads, hidden_size // head_dim),
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[TURN_END],
        pad_token_id=tokenizer.get_vocab()[PAD],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float().eval()


def tiny_trajectory(
    *, num_prompt: int = 2, num_trained: int = 2, rollout_id: str = "a", group_id: int = 0, weight_version: int = 0
) -> "Trajectory":
    """A trajectory of one turn: ids 1, 2, ..., logprobs of -1 nat."""
    import numpy as np

    from lightning_gym.trajectory import Trajectory

    length = num_prompt + num_trained
    mask = np.arange(length) >= num_prompt
    return Trajectory(
        rollout_id=rollout_id,
        segment=0,
        group_id=group_id,
        token_ids=np.arange(1, length + 1, dtype=np.int64),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        weight_versions=np.where(mask, weight_version, -1).astype(np.int64),
    )


def tiny_batch(*, advantage: float = 1.0, weight: float = 1.0, old_logprob: float | None = None) -> "TrajectoryBatch":
    """A batch of two tokens of which the second trains, for worked examples of losses."""
    import torch

    from lightning_gym.batch import TrajectoryBatch

    def second(value: float) -> "torch.Tensor":
        return torch.tensor([[0.0, value]])

    return TrajectoryBatch(
        input_ids=torch.tensor([[1, 2]]),
        position_ids=torch.tensor([[0, 1]]),
        loss_mask=torch.tensor([[False, True]]),
        rollout_logprobs=second(-1.0),
        advantages=second(advantage),
        loss_weight=second(weight),
        weight_versions=torch.tensor([[-1, 0]]),
        sequence_lengths=(2,),
        old_logprobs=None if old_logprob is None else second(old_logprob),
    )


class FakeEngine:
    """A real policy without vLLM: the Hugging Face model itself, one token at a time, on a thread of its own.

    Fulfils `lightning_gym.policy.engine.Engine` and passes its contract tests, logprob parity included; slow, so for
    models and batches of toy size.

    Args:
        max_model_len: tokens of context.
        script: what to "sample" instead of sampling: ``(prompt_ids, seed) -> token ids``.
        logprob: what to report instead of the model's: ``(position, token id) -> nats``; a function that is different
            for every pair shows any misplaced token.
        max_num_seqs: accepted for likeness; requests are answered one after the other.
    """

    def __init__(
        self,
        *,
        max_model_len: int = 512,
        script: Callable[[Sequence[int], int], list[int]] | None = None,
        logprob: Callable[[int, int], float] | None = None,
        max_num_seqs: int = 1,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.events: list[str] = []
        """What was asked of the engine, in order: ``start``, ``update:3``, ``resume``, ``pause``, ``close``."""
        self._max_model_len = max_model_len
        self._script = script
        self._logprob = logprob
        self._model: Any = None
        self._version: int | None = None
        self._waiting: dict[str, tuple[list[int], SamplingParams, Deliver]] = {}
        self._wake = threading.Condition()
        self._running = False
        self._closed = False
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

        self.events.append("start")
        try:
            config = AutoConfig.from_pretrained(model.path)
            with torch.random.fork_rng(devices=[]):
                self._model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype)).eval()
            self._model.load_state_dict(dict(model.weights()), strict=False)
        except Exception as error:
            raise EngineStartError(f"the fake engine could not load {model.path}: {error}") from error
        self._model.requires_grad_(False)
        self._thread = threading.Thread(target=self._work, name="lightning-gym-fake-engine", daemon=True)
        self._thread.start()

    def generate(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, deliver: Deliver) -> None:
        with self._wake:
            if not self._closed and len(prompt_ids) < self._max_model_len:
                self._waiting[request_id] = (list(prompt_ids), sampling, deliver)
                self._wake.notify()
                return
        reason = "was closed" if self._closed else f"has room for {self._max_model_len} tokens"
        deliver(EngineDeadError(f"the engine {reason}") if self._closed else EngineError(f"the engine {reason}"))

    def abort(self, request_id: str) -> None:
        with self._wake:
            self._waiting.pop(request_id, None)

    def resume(self) -> None:
        if self._version is None:
            raise WeightSyncError("the engine was resumed before its first weight sync")
        self.events.append("resume")
        self._set(running=True)

    def pause(self) -> None:
        self.events.append("pause")
        self._set(running=False)
        with self._wake:
            self._waiting.clear()

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        import torch

        ids = torch.tensor([list(token_ids)])
        values = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return values.gather(-1, ids[0, 1:, None])[:, 0].tolist()

    def weight_views(self) -> "Mapping[str, torch.Tensor]":
        return {name: parameter.data for name, parameter in self._model.named_parameters()}

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


class FakeGym:
    """Gym's HTTP contract on a thread of this process: agents that play `environments`, and can be told to fail.

    Fulfils `lightning_gym.gym.servers.Gym` and passes its contract tests.

    Args:
        environments: what `lightning_gym.gym.environments.load_environment` takes.
        max_steps: model calls of one rollout.
        fault: ``n -> HTTP status`` with which the n-th ``/run`` is answered instead of being played, or ``None``.
    """

    def __init__(
        self,
        environments: Sequence[str] = ("counter",),
        *,
        max_steps: int = 10,
        fault: Callable[[int], int | None] | None = None,
    ) -> None:
        self.num_runs = 0
        """``/run`` requests so far."""
        self._environments = [load_environment(spec) for spec in environments]
        self._max_steps = max_steps
        self._fault = fault
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event
        self._thread: threading.Thread | None = None

    def start(self, *, policy_url: str, api_key: str, model: str, run_dir: Path) -> str:
        from lightning_gym.gym.embedded_server import Settings, listening

        settings = Settings(
            environments=[],
            policy_url=policy_url,
            api_key=api_key,
            model=model,
            max_steps=self._max_steps,
            ready_file="",
        )
        head_url: Future[str] = Future()

        async def serve() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            async with listening(settings, self._environments, [self._maybe_fail()]) as url:
                head_url.set_result(url)
                await self._stop.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="lightning-gym-fake-gym", daemon=True)
        self._thread.start()
        return head_url.result()

    def close(self) -> None:
        if self._thread is None or self._loop is None or not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _maybe_fail(self) -> Any:
        from aiohttp import web

        @web.middleware
        async def maybe_fail(request: web.Request, handler: Any) -> web.StreamResponse:
            if request.path == "/run":
                number, self.num_runs = self.num_runs, self.num_runs + 1
                status = self._fault(number) if self._fault else None
                if status is not None:
                    return web.json_response(f"fault injected into run {number}", status=status)
            return await handler(request)

        return maybe_fail
