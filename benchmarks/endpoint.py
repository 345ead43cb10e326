"""What HTTP costs: CPU time of the endpoint's thread a request, and tokens/s through it against the engine alone."""

import contextlib
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import Measurement
from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.endpoint import Endpoint
from lightning_gym.policy.engine import Deliver, Engine, EngineModel, Generation, SamplingParams
from lightning_gym.policy.ledger import Ledger
from lightning_gym.policy.service import PolicyService
from lightning_gym.rollout import SamplingProfile
from lightning_gym.testing import FakeEngine, tiny_model, tiny_tokenizer

ROUNDS = 5
CONCURRENCY = 64
PROMPT_TOKENS = 256
FORCED_TOKENS = 256
REQUESTS_A_ROUND = 512
REPLY_TOKENS = 32
STEP_S = 0.01
MODELS: Mapping[str, Mapping[str, int]] = {
    "tiny": {},
    "small": {"hidden_size": 384, "num_layers": 4},  # ten milliseconds a step and more
}


def measure() -> Measurement:
    """CPU time with an engine that costs nothing; throughput with vLLM, its arms in turn."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [_cpu_time(Path(folder)), *(_throughput(Path(folder), name) for name in MODELS)]
    return Measurement(
        name="endpoint",
        what=f"Prompts of {PROMPT_TOKENS} tokens, {CONCURRENCY} requests at once from a client in another process; "
        f"medians of {ROUNDS} rounds. CPU time: thread clock of the endpoint's thread, {REQUESTS_A_ROUND} requests a "
        f"round as Gym sends them, each the first of a rollout, answered with {REPLY_TOKENS} tokens by a fake engine "
        f"that takes a batch every {STEP_S * 1e3:.0f} ms. Tokens/s: vLLM, {CONCURRENCY} generations of {FORCED_TOKENS} "
        "tokens a round, asked over HTTP and directly in turn.",
        rows=rows,
    )


class _Metronome(FakeEngine):
    """Answers whatever has arrived every `STEP_S`, with made-up tokens: the engine's thread costs next to nothing."""

    def __init__(self) -> None:
        super().__init__(max_model_len=1024)
        self._arrived: queue.SimpleQueue[tuple[SamplingParams, Deliver]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def generate(self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, deliver: Deliver) -> None:
        self._arrived.put((sampling, deliver))

    def close(self) -> None:
        self._stopped.set()
        super().close()

    def _tick(self) -> None:
        while not self._stopped.wait(STEP_S):
            for _ in range(self._arrived.qsize()):
                sampling, deliver = self._arrived.get()
                deliver(
                    Generation(
                        token_ids=[40 + i % 200 for i in range(sampling.max_tokens)],
                        logprobs=[-1.0 / (i + 3) for i in range(sampling.max_tokens)],
                        finish_reason="length",
                        weight_version=0,
                    )
                )


def _cpu_time(folder: Path) -> dict[str, object]:
    path = folder / "cpu"
    _save_model(path, {"num_layers": 1, "hidden_size": 32, "num_kv_heads": 1})
    with serving(_Metronome(), path, max_output_tokens=REPLY_TOKENS) as (endpoint, ledger, send):
        clock = _clock_of_the_endpoint()
        values: list[float] = []
        for number in range(ROUNDS + 1):
            bodies = [chat_body(endpoint.service.chat, f"{number}.{i}") for i in range(REQUESTS_A_ROUND)]
            for body in bodies:
                ledger.open(body[wire.ROLLOUT_ID], profile="train", seed=1)
            before = time.clock_gettime(clock)
            send(bodies)
            values.append((time.clock_gettime(clock) - before) / REQUESTS_A_ROUND)
            for body in bodies:
                ledger.close(body[wire.ROLLOUT_ID])
    median = statistics.median(values[1:]) * 1e3  # the first round warms up
    return _row("CPU ms a request of the endpoint's thread", "none", http=median)


def _clock_of_the_endpoint() -> int:
    thread = next(thread for thread in threading.enumerate() if thread.name == "lightning-gym-http")
    assert thread.ident is not None
    return time.pthread_getcpuclockid(thread.ident)


def _throughput(folder: Path, name: str) -> dict[str, object]:
    from lightning_gym.policy.vllm_engine import VLLMEngine

    path = folder / name
    model = _save_model(path, MODELS[name])
    arms: dict[str, list[float]] = {"http": [], "direct": []}
    engine = VLLMEngine(max_model_len=PROMPT_TOKENS + FORCED_TOKENS + 16, max_num_seqs=CONCURRENCY)
    with serving(engine, path, weights=model.state_dict(), max_output_tokens=FORCED_TOKENS) as (endpoint, _, send):
        chat = endpoint.service.chat
        for number in range(ROUNDS + 1):
            for arm, seconds in arms.items():
                bodies = [chat_body(chat, f"{arm}.{number}.{i}", rollout=False) for i in range(CONCURRENCY)]
                seconds.append(send(bodies) if arm == "http" else _directly(engine, chat, bodies))
    http, direct = (statistics.median(CONCURRENCY * FORCED_TOKENS / s for s in arms[arm][1:]) for arm in arms)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    size = f"{name}: {millions:.1f} M parameters, {CONCURRENCY / direct * 1e3:.0f} ms a step"
    return _row("tokens/s", size, http=http, direct=direct, ratio=http / direct)


def _directly(engine: Engine, chat: ChatFormat, bodies: Sequence[Mapping[str, Any]]) -> float:
    prompts = [chat.encode(chat.render(body["messages"])) for body in bodies]
    results: queue.SimpleQueue[Generation | BaseException] = queue.SimpleQueue()
    start = time.perf_counter()
    for i, prompt_ids in enumerate(prompts):
        sampling = SamplingParams(
            temperature=1.0, top_p=1.0, top_k=-1, max_tokens=FORCED_TOKENS, seed=i, stop_token_ids=chat.stop_ids
        )
        engine.generate(f"direct-{bodies[0]['messages'][0]['content'][:20]}-{i}", prompt_ids, sampling, results.put)
    generations = [results.get() for _ in bodies]
    seconds = time.perf_counter() - start
    assert all(isinstance(g, Generation) and len(g.token_ids) == FORCED_TOKENS for g in generations), generations
    return seconds


@contextlib.contextmanager
def serving(
    engine: Engine, path: Path, *, max_output_tokens: int, weights: Mapping[str, torch.Tensor] | None = None
) -> Generator[Any]:
    """A started engine behind an endpoint, the ledger, and what has requests sent and returns the seconds it took."""
    engine.start(EngineModel(path=path, dtype="float32", weights=(weights or {}).items))
    engine.update_weights(lambda: None, version=0)
    engine.resume()
    with behind_endpoint(engine, path, max_output_tokens=max_output_tokens) as (endpoint, ledger, ask):

        def send(bodies: Sequence[Mapping[str, Any]]) -> float:
            done = ask(bodies, CONCURRENCY)
            assert done["tokens"] == len(bodies) * max_output_tokens, done
            return done["seconds"]

        yield endpoint, ledger, send
    engine.close()


@contextlib.contextmanager
def behind_endpoint(engine: Engine, path: Path, *, max_output_tokens: int) -> Generator[Any]:
    """The endpoint of a running engine, its ledger, and a function that has a client in another process send requests.

    It takes the requests' bodies and how many are sent at once, and returns seconds and tokens.
    """
    profile = SamplingProfile(max_output_tokens=max_output_tokens)
    ledger = Ledger()
    endpoint = Endpoint(PolicyService(engine, path, ledger, {"train": profile, "eval": profile}))
    endpoint.start()
    command = [sys.executable, "-m", "benchmarks._load", endpoint.url, endpoint.api_key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        replies = client.stdout
        assert replies is not None

        def ask(bodies: Sequence[Mapping[str, Any]], concurrency: int) -> dict[str, float]:
            print(json.dumps({"bodies": bodies, "concurrency": concurrency}), file=client.stdin, flush=True)
            return json.loads(replies.readline())

        yield endpoint, ledger, ask
        client.stdin.close()
    endpoint.close()


def chat_body(chat: ChatFormat, name: str, *, rollout: bool = True, num_tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
    """A chat request of its own whose prompt has `num_tokens` tokens."""
    text = f"{name} " + "go on with the count and say what the answer is, then stop " * 20
    surplus = len(chat.encode(chat.render([{"role": "user", "content": text}]))) - num_tokens
    assert surplus > 0
    ids = chat.encode(text)
    messages = [{"role": "user", "content": chat.decode(ids[: len(ids) - surplus])}]
    body = {"model": "policy", "messages": messages, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
    body |= {"logprobs": True, "top_logprobs": 0, "return_tokens_as_token_ids": True}
    return body | ({wire.ROLLOUT_ID: name} if rollout else {})


def _save_model(path: Path, size: Mapping[str, int]) -> Any:
    """A random model that never ends a turn: the logit of its turn end is 0 among others of about +-100."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, tie_word_embeddings=False, max_position_embeddings=1024, **size)
    with torch.no_grad():
        model.lm_head.weight.mul_(100 / model.lm_head.weight.std() / model.config.hidden_size**0.5)
        model.lm_head.weight[model.config.eos_token_id] = 0.0
    tokenizer.save_pretrained(path)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    return model


def _row(what: str, model: str, *, http: object, direct: object = "", ratio: object = "") -> dict[str, object]:
    return {"what": what, "model": model, "over HTTP": http, "engine alone": direct, "ratio": ratio}
