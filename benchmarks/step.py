"""One whole training step against the sum of its ideal parts, and where the rest of the time goes."""

import asyncio
import copy
import json
import queue
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks._slow_counter import WAIT_S, SlowCounter
from benchmarks.table import Measurement
from lightning_gym import EmbeddedGym, GymCallback, GymDataModule, PolicyModule, VLLMEngine
from lightning_gym.batch import TrajectoryBatch
from lightning_gym.gym.environments import Counter
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import grpo
from lightning_gym.open_collection import OpenCollection
from lightning_gym.policy.engine import Generation, SamplingParams
from lightning_gym.rollout import Rollout, SamplingProfile
from lightning_gym.stream import RolloutStream
from lightning_gym.tasks import Task
from lightning_gym.tiny_policy.build import RECORD, TinyPolicy

ROUNDS = 3
STEPS, WARM_UP = 6, 2
PROMPTS, GROUP = 16, 8
WIDE = TinyPolicy(environment="counter", hidden_size=576, lr=1e-3)
"""Seven times the compute for the same calls: what a call costs beside its tokens is seven times less of a step."""


def measure() -> Measurement:
    """Steps of 128 rollouts of the demo's policy, synchronous and one step ahead, each against its ideal parts."""
    path = TinyPolicy(environment="counter").ensure("outputs/tiny_policy")
    wide_path = WIDE.ensure("outputs/tiny_policy/wide")
    fast, wide, slow, ahead = Steps(), Steps(), Steps(), Steps()
    for _ in range(ROUNDS):
        fast.add(_train(path, Counter))
        wide.add(_train(wide_path, Counter))
        slow.add(_train(path, SlowCounter))
        ahead.add(_train(path, SlowCounter, max_lag=1))
    rows = [
        *_rows("counter", fast, fast.ideal()),
        *_rows(f"counter, {_parameters(wide_path)}", wide, wide.ideal()),
        *_rows("slow counter", slow, slow.ideal()),
        *_rows("slow counter, max_lag=1", ahead, slow.ideal()),
    ]
    return Measurement(
        name="step",
        what=f"`counter` from its warm start of {_parameters(path)} where no other size stands, {PROMPTS} x {GROUP} "
        f"rollouts a step ({statistics.median(fast.num_calls):.0f} calls; {statistics.median(wide.num_calls):.0f} of "
        f"the larger policy) under `L.Trainer`; the slow one's tools take {WAIT_S} s "
        f"each, without a core. {ROUNDS} runs of each arm in turn, of {STEPS} steps, the first {WARM_UP} left out; "
        "medians. Synchronous steps are each followed by their ideal parts: the same calls with the same prompts and "
        "lengths on the bare engine (a rollout's next call when its last is over), forward, backward and AdamW on the "
        "same packed tensors, one flat copy of the weights, the tools and the verifier called in this process, "
        "rollouts side by side. A step ahead of its training is measured against the parts of the synchronous arm; of "
        "its collection only the wait for its end counts as "
        "`collect`. CPU seconds by thread are of the whole step.",
        rows=rows,
    )


def _parameters(path: Path) -> str:
    return f"{json.loads((path / RECORD).read_text())['parameters'] / 1e6:.1f} M parameters"


@dataclass
class Steps:
    """What the steps of an arm took, warm-ups left out."""

    history: list[Mapping[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ideals: list[dict[str, float]] = field(default_factory=list)
    cpu: list[dict[str, float]] = field(default_factory=list)
    num_calls: list[int] = field(default_factory=list)

    def add(self, watch: "Watch") -> None:
        """Of one run."""
        self.history += watch.history[WARM_UP:]
        self.seconds += watch.steps[WARM_UP:]
        self.ideals += watch.ideals[WARM_UP:]
        self.cpu += watch.cpu[WARM_UP:]
        self.num_calls += watch.num_calls[WARM_UP:]

    def ideal(self) -> dict[str, float]:
        """Part -> its median seconds."""
        return {part: statistics.median(found[part] for found in self.ideals) for part in self.ideals[0]}


def _rows(arm: str, steps: Steps, ideal: dict[str, float]) -> list[dict[str, Any]]:
    def row(what: str, taken: float | str, part: str = "", least: float | str = "") -> dict[str, Any]:
        over = taken / least if isinstance(taken, float) and isinstance(least, float) else ""
        return {"arm": arm, "what": what, "s": taken, "ideal": part, "ideal s": least, "over ideal": over}

    taken = {
        phase: statistics.median(entry[f"time/{phase}_s"] for entry in steps.history)
        for phase in ("sync", "collect", "prepare", "train")
    }
    parts = {"sync": "memcpy", "collect": "generation replayed", "train": "bare training loop"}
    if steps.ideals:
        rows = [
            row(phase, seconds, parts.get(phase, ""), ideal[parts[phase]] if phase in parts else "")
            for phase, seconds in taken.items()
        ]
        rows.append(row("", "", "environment alone", ideal["environment alone"]))
    else:
        rows = [row(phase, seconds) for phase, seconds in taken.items()]
    rows.append(row("whole step", statistics.median(steps.seconds), "sum", sum(ideal.values())))
    return rows + [row(f"CPU of {name}", statistics.median(cpu[name] for cpu in steps.cpu)) for name in steps.cpu[0]]


class Watch(GymCallback):
    """Times each step and, with `idealize`, runs its ideal parts after it, on what it did."""

    def __init__(self, *, environment: type[Counter], idealize: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.environment = environment
        self.idealize = idealize
        self.steps: list[float] = []
        self.ideals: list[dict[str, float]] = []
        self.cpu: list[dict[str, float]] = []
        self.num_calls: list[int] = []
        self.engine: Any = arguments["engine"]
        self._rollouts: list[Rollout] = []
        self._window: list[TrajectoryBatch] = []
        self._rows: list[Task] = []
        self._started = 0.0
        self._cpu: dict[str, float] = {}
        begin = self.colocation.begin

        def remembered(
            *args: Any, on_group: Callable[[list[Rollout]], None] | None = None, **options: Any
        ) -> OpenCollection:
            def also(group: list[Rollout]) -> None:
                self._rollouts += group
                if on_group is not None:
                    on_group(group)

            return begin(*args, on_group=also, **options)

        self.colocation.begin = remembered

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._begin_step()

    def _begin_step(self) -> None:
        self._started, self._cpu = time.perf_counter(), _cpu_by_thread()

    def next_window(self, trainer: L.Trainer, stream: RolloutStream, *, last: bool = False) -> list[TrajectoryBatch]:
        self._rows = list(stream.tasks)
        self._window = super().next_window(trainer, stream, last=last)
        return self._window

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.steps.append(time.perf_counter() - self._started)
        after = _cpu_by_thread()
        self.cpu.append({name: after[name] - self._cpu.get(name, 0.0) for name in after})
        self.num_calls.append(sum(len(rollout.calls) for rollout in self._rollouts))
        if self.idealize:
            model = self.find_policy(pl_module)
            rows = {task.index: task.row for task in self._rows}
            self.ideals.append(
                {
                    "generation replayed": self._replayed(self._rollouts),
                    "bare training loop": _trained(copy.deepcopy(model), self._window),
                    "memcpy": _copied(model),
                    "environment alone": asyncio.run(_played(self.environment, self._rollouts, rows)),
                }
            )
        self._rollouts = []
        self._begin_step()

    def _replayed(self, rollouts: Sequence[Rollout]) -> float:
        engine = self.engine
        engine._call(engine._engine.reset_prefix_cache)
        over: queue.SimpleQueue[None] = queue.SimpleQueue()
        engine.resume()
        start = time.perf_counter()
        for rollout in rollouts:
            _ask(engine, iter(rollout.calls), over)
        for _ in rollouts:
            over.get(timeout=120)
        seconds = time.perf_counter() - start
        engine.pause()
        return seconds


def _ask(engine: Any, calls: Iterator[Any], over: "queue.SimpleQueue[None]") -> None:
    """A rollout's next call; the one after it when it is answered."""
    call = next(calls, None)
    if call is None:
        over.put(None)
        return
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, top_k=-1, max_tokens=len(call.token_ids), seed=1, stop_token_ids=()
    )

    def delivered(result: Generation | BaseException) -> None:
        assert isinstance(result, Generation), result
        _ask(engine, calls, over)

    engine.generate(f"replay-{time.monotonic_ns()}-{id(call)}", list(call.prompt_ids), sampling, delivered)


def _trained(model: nn.Module, window: Sequence[TrajectoryBatch]) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)
    seconds: list[float] = []
    for _ in range(2):  # the first makes the optimizer's state
        start = time.perf_counter()
        for batch in window:
            loss, _ = grpo(token_logprobs(model, batch), batch)
            (loss / len(window)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[-1]


def _copied(model: nn.Module) -> float:
    source = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    target = torch.empty_like(source)
    start = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - start


async def _played(environment: type[Counter], rollouts: Sequence[Rollout], rows: Mapping[int, Any]) -> float:
    """Every tool call that was made, and the verifier; rollouts side by side."""

    async def one(rollout: Rollout) -> None:
        world = environment(rows[rollout.task_index])
        for item in rollout.output:
            if item.get("type") == "function_call":
                try:
                    arguments = json.loads(item["arguments"])
                except ValueError:
                    continue  # the agent answers it, not the environment
                await world.answer(item["name"], arguments)
        await world.score({"output": rollout.output})

    start = time.perf_counter()
    await asyncio.gather(*map(one, rollouts))
    return time.perf_counter() - start


def _cpu_by_thread() -> dict[str, float]:
    """CPU seconds of this process, of its threads that matter, and of the Gym's process."""
    known = {
        "MainThread": "main thread",
        "lightning-gym-engine": "engine thread",
        "lightning-gym-http": "HTTP thread",
        "lightning-gym-play": "thread that plays",
    }
    found: dict[str, float] = {}
    for thread in threading.enumerate():
        if thread.name in known and thread.ident is not None:
            found[known[thread.name]] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    found["this process"] = time.process_time()
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    found["the Gym's processes"] = sum(each.user + each.system for each in times)
    return found


def _train(path: Path, environment: type[Counter], *, max_lag: int = 0) -> Watch:
    generator = random.Random(0)
    rows = [environment.row(generator) | {"agent_ref": environment.agent_ref()} for _ in range(PROMPTS * STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(
            environment=environment,
            idealize=not max_lag,
            engine=VLLMEngine(max_model_len=256, max_num_seqs=PROMPTS * GROUP),
            gym=EmbeddedGym([f"{environment.__module__}:{environment.__name__}"]),
            sampling=SamplingProfile(max_output_tokens=48),
            model_path=path,
            run_dir=folder,
        )
        _fit(watch, path, GymDataModule(rows, prompts_per_step=PROMPTS, group_size=GROUP, max_lag=max_lag))
    return watch


def _fit(watch: Watch, path: Path, data: GymDataModule) -> None:
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[watch],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on loaders and cores
        trainer.fit(PolicyModule(AutoModelForCausalLM.from_pretrained(path), lr=1e-6), datamodule=data)
