"""GymLoop: hand-written loops play and train as a Trainer does, in one process and in two."""

import ast
import json
import os
import runpy
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch import nn

import lightning_gym
from lightning_gym import CollectSettings, GymCallback, GymDataModule, GymLoop, PolicyModule, WindowSettings
from lightning_gym.errors import ConfigError, StalePolicyError
from lightning_gym.gym.environments import Counter
from lightning_gym.logprobs import token_logprobs
from lightning_gym.loop import unwrapped
from lightning_gym.losses import grpo
from lightning_gym.ranks import Ranks
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import read_rollout_log
from lightning_gym.testing import FakeEngine, FakeGym, tiny_model, tiny_tokenizer
from lightning_gym.trainer_logprobs import read_trainer_logprobs

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "recipes" / "loops").glob("*.py"))

pytestmark = pytest.mark.usefixtures("one_thread", "varied_rewards")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model_dir(tmp_path_factory.mktemp("policy"))


def make_model_dir(directory):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, hidden_size=64, num_layers=2).save_pretrained(directory)
    lines = "\n".join(json.dumps(row) for row in rows(6))
    (directory / "train.jsonl").write_text(lines + "\n")
    return directory


def rows(num):
    import random

    rng = random.Random(0)
    return [Counter.row(rng) for _ in range(num)]


def load(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir)


def loop_of(model, run_dir, *, model_dir=None, engine=None, gym=None, **changes):
    """A small run: 2 groups of 2 rollouts a step."""
    return GymLoop(
        model,
        rows(5),
        engine=engine or FakeEngine(max_model_len=96),
        gym=gym or FakeGym(max_steps=2),
        sampling=SamplingProfile(max_output_tokens=5),
        model_path=model_dir,
        run_dir=run_dir,
        **({"window": WindowSettings(prompts_per_step=2, group_size=2)} | changes),
    )


def gradients(model):
    return torch.cat([parameter.grad.flatten().clone() for parameter in unwrapped(model).parameters()])


# -- the same gradient under every framework


NUM_MICRO_BATCHES = 2


def lightning_gradients(model_dir, run_dir):
    found = []

    class Capture(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            found.append(gradients(pl_module.model))

    callback = GymCallback(
        engine=FakeEngine(max_model_len=96),
        gym=FakeGym(max_steps=2),
        sampling=SamplingProfile(max_output_tokens=5),
        run_dir=run_dir,
    )
    trainer = L.Trainer(
        max_steps=1,
        accumulate_grad_batches=NUM_MICRO_BATCHES,
        callbacks=[callback, Capture()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(PolicyModule(model_dir), datamodule=GymDataModule(rows(5), prompts_per_step=2, group_size=2))
    return found[0]


def plain_gradients(model_dir, run_dir):
    model = load(model_dir).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with loop_of(model, run_dir, num_micro_batches=NUM_MICRO_BATCHES) as gym:
        for window in gym.windows(1):
            for batch in window:
                grpo(token_logprobs(model, batch), batch)[0].backward()
            optimizer.step()
    return gradients(model)


def fabric_gradients(model_dir, run_dir):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    policy = load(model_dir).train()
    model, optimizer = fabric.setup(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
    with loop_of(model, run_dir, num_micro_batches=NUM_MICRO_BATCHES) as gym:
        for window in gym.windows(1):
            for batch in window:
                fabric.backward(grpo(token_logprobs(model, batch), batch)[0])
            optimizer.step()
    return gradients(model)


@pytest.fixture
def accelerators():
    """Makes Accelerators; they share state in their class, which is reset afterwards."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    yield partial(Accelerator, cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerate_gradients(model_dir, run_dir, accelerator):
    policy = load(model_dir).train()
    model, optimizer = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
    with loop_of(model, run_dir, accelerator=accelerator) as gym:
        for window in gym.windows(1):
            for batch in window:
                with accelerator.accumulate(model):
                    accelerator.backward(grpo(token_logprobs(model, batch), batch)[0])
                    optimizer.step()
    return gradients(model)


def test_every_loop_has_the_trainers_gradient(model_dir, tmp_path, accelerators):
    expected = lightning_gradients(model_dir, tmp_path / "lightning")
    assert expected.norm() > 0
    accelerator = accelerators(gradient_accumulation_steps=NUM_MICRO_BATCHES)
    for found in (
        plain_gradients(model_dir, tmp_path / "plain"),
        fabric_gradients(model_dir, tmp_path / "fabric"),
        accelerate_gradients(model_dir, tmp_path / "accelerate", accelerator),
    ):
        assert (found - expected).norm() / expected.norm() < 1e-6


def test_an_accelerator_that_does_not_accumulate_divides_by_nothing(model_dir, tmp_path, accelerators):
    accelerator = accelerators()
    policy = load(model_dir).train()
    model, optimizer = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
    with loop_of(model, tmp_path / "run", accelerator=accelerator, num_micro_batches=NUM_MICRO_BATCHES) as gym:
        for window in gym.windows(1):
            for batch in window:
                accelerator.backward(grpo(token_logprobs(model, batch), batch)[0])
            optimizer.step()
    expected = plain_gradients(model_dir, tmp_path / "plain")
    assert (gradients(model) - expected).norm() / expected.norm() < 1e-6


# -- windows, versions, state


def train(loop, model, max_steps, *, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with loop as gym:
        for window in gym.windows(max_steps):
            for batch in window:
                grpo(token_logprobs(model, batch), batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_window_is_played_by_the_weights_it_trains_and_the_engine_is_closed(model_dir, tmp_path):
    engine = FakeEngine(max_model_len=96)
    model = load(model_dir)
    loop = loop_of(model, tmp_path, engine=engine)
    train(loop, model, 3)
    turns = ["update:0", "resume", "pause", "update:1", "resume", "pause", "update:2", "resume", "pause"]
    assert engine.events == ["start", *turns, "close"]
    assert loop.step == 3
    assert loop.metrics["rollout/count"] == 4
    assert loop.metrics["sync/canary_diff"] < 1e-4
    _, lines = read_rollout_log(tmp_path / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4


def test_what_a_loop_records_is_what_the_engine_sampled(model_dir, tmp_path):
    model = load(model_dir).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with loop_of(model, tmp_path) as gym:
        for window in gym.windows(2):
            for batch in window:
                logprobs = token_logprobs(model, batch)
                gym.record(batch, logprobs)
                grpo(logprobs, batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    _, rollouts = read_rollout_log(tmp_path / "rollouts.jsonl")
    engine = {
        (rollout["rollout_id"], index): (rollout["step"], [value for value in segment["logprobs"] if value])
        for rollout in rollouts
        for index, segment in enumerate(rollout["segments"])
    }
    trainer = list(read_trainer_logprobs(tmp_path / "trainer_logprobs.jsonl"))
    assert {line.step for line in trainer} == {0, 1}
    assert {(line.rollout_id, line.segment) for line in trainer} == engine.keys()
    for line in trainer:
        step, logprobs = engine[line.rollout_id, line.segment]
        assert (line.step, line.logprobs) == (step, pytest.approx(logprobs, abs=1e-4))


def test_a_loop_continues_from_its_state(model_dir, tmp_path):
    whole = load(model_dir)
    train(loop_of(whole, tmp_path / "whole"), whole, 4)
    halves = load(model_dir)
    first = loop_of(halves, tmp_path / "halves")
    train(first, halves, 2)
    state = first.state_dict()
    assert json.loads(json.dumps(state)) == state
    second = loop_of(halves, tmp_path / "halves")
    second.load_state_dict(state)
    train(second, halves, 4)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)
    _, lines = read_rollout_log(tmp_path / "halves" / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    with pytest.raises(ConfigError, match="saved run has seed=0, this one 1"):
        loop_of(halves, tmp_path, seed=1).load_state_dict(state)


def test_updates_of_one_collection_take_their_ratios_to_the_weights_that_sampled(model_dir, tmp_path):
    engine = FakeEngine(max_model_len=96)
    model = load(model_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = WindowSettings(prompts_per_step=2, group_size=2, updates_per_collection=2)
    ratios = []
    with loop_of(model, tmp_path, engine=engine, window=settings) as gym:
        for window in gym.windows(3):
            for batch in window:
                logprobs = token_logprobs(model, batch)
                ratios.append((logprobs - batch.old_logprobs).abs().max().item())
                grpo(logprobs, batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [event for event in engine.events if event.startswith("update")] == ["update:0", "update:2"]
    assert max(ratios[0], ratios[2]) < 1e-6
    assert ratios[1] > 1e-4


def test_a_run_that_fails_closes_what_it_started(model_dir, tmp_path):
    engine, gym = FakeEngine(max_model_len=96), FakeGym(fault=lambda number: 500)
    model = load(model_dir)
    from lightning_gym.errors import CollectionError

    with pytest.raises(CollectionError, match="fault injected"):
        train(loop_of(model, tmp_path, engine=engine, gym=gym), model, 1)
    assert engine.events[-1] == "close"


# -- mistakes, each named before or where it happens


def refused(match, loop, model, *, each_batch=lambda: None, each_window=lambda: None, leave_early=False):
    def run():
        with loop as gym:
            for window in gym.windows(2):
                for batch in window:
                    grpo(token_logprobs(model, batch), batch)[0].backward()
                    each_batch()
                    if leave_early:
                        break
                each_window()

    with pytest.raises(StalePolicyError, match=match):
        run()


def test_a_window_without_an_optimizer_step_is_refused_with_what_to_do(model_dir, tmp_path):
    model = load(model_dir)
    refused(r"no optimizer step .* after window 0\. Call optimizer\.step\(\)", loop_of(model, tmp_path), model)


def test_steps_of_other_models_are_not_counted(model_dir, tmp_path):
    model, elsewhere = load(model_dir), torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    refused("no optimizer step", loop_of(model, tmp_path), model, each_window=elsewhere.step)


def test_a_step_that_something_else_makes_can_be_said(model_dir, tmp_path):
    model = load(model_dir)
    with loop_of(model, tmp_path) as gym:
        for window in gym.windows(2):
            list(window)
            gym.mark_step()
    assert gym.step == 2


def test_a_step_in_the_middle_of_a_window_is_refused(model_dir, tmp_path):
    model = load(model_dir)
    step = torch.optim.SGD(model.parameters(), lr=0.1).step
    refused("middle of window 0", loop_of(model, tmp_path, num_micro_batches=2), model, each_batch=step)


def test_a_window_that_is_left_early_is_refused(model_dir, tmp_path):
    model = load(model_dir)
    step = torch.optim.SGD(model.parameters(), lr=0.1).step
    loop = loop_of(model, tmp_path, num_micro_batches=3)
    refused("2 of the 3 micro-batches of window 0", loop, model, each_window=step, leave_early=True)


def test_a_model_of_an_accelerator_that_is_not_passed_is_refused(model_dir, tmp_path, accelerators):
    model = accelerators().prepare(load(model_dir))
    with pytest.raises(ConfigError, match="pass accelerator="):
        loop_of(model, tmp_path)


def test_processes_that_joined_no_group_are_refused(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="started 2 processes, but there is no process group"):
        loop_of(load(model_dir), tmp_path)
    assert loop_of(load(model_dir), tmp_path, ranks=Ranks()).step == 0


def test_what_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the model is a Linear"):
        loop_of(nn.Linear(1, 1), tmp_path)


def test_settings_are_checked_as_the_callbacks_are(model_dir, tmp_path):
    model = load(model_dir)
    with pytest.raises(ConfigError, match="top_p"):
        GymLoop(
            model,
            rows(1),
            engine=FakeEngine(),
            gym=FakeGym(),
            window=WindowSettings(prompts_per_step=1, group_size=2),
            sampling=SamplingProfile(top_p=0.5),
        )
    with pytest.raises(ConfigError, match="max_model_len is 8"):
        train(loop_of(model, tmp_path, engine=FakeEngine(max_model_len=8)), model, 1)


def test_what_wraps_the_model_is_looked_through(model_dir):
    model = load(model_dir)
    wrapped = nn.Module()
    wrapped.module = model
    assert unwrapped(torch.compile(wrapped)) is model


def test_how_rollouts_are_played_is_a_setting(model_dir, tmp_path):
    first, second = load(model_dir), load(model_dir)
    train(loop_of(first, tmp_path / "a"), first, 1)
    train(loop_of(second, tmp_path / "b", collect=CollectSettings(seed=1)), second, 1)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# -- the examples


def test_each_example_is_at_most_25_lines():
    assert [path.name for path in EXAMPLES] == ["accelerate_loop.py", "fabric_loop.py", "plain_loop.py"]
    for path in EXAMPLES:
        source = path.read_text()
        beside: set[int] = set()
        for node in ast.parse(source).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if docstring or isinstance(node, ast.Import | ast.ImportFrom):
                beside |= set(range(node.lineno, node.end_lineno + 1))
        lines = [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in beside]
        assert len(lines) <= 25, path


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_runs_as_it_stands(example, model_dir, tmp_path, monkeypatch, capsys, accelerators):
    monkeypatch.setattr(lightning_gym, "VLLMEngine", FakeEngine)
    monkeypatch.setattr(lightning_gym, "EmbeddedGym", partial(FakeGym, max_steps=1))
    monkeypatch.setattr(lightning_gym, "SamplingProfile", lambda **_: SamplingProfile(max_output_tokens=3))
    monkeypatch.setattr(sys, "argv", [str(example), str(model_dir), str(tmp_path), "2"])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(example), run_name="__main__")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in printed] == ["0", "1"]


# -- two processes


JOB = """
import sys
import torch
from pathlib import Path

sys.path.insert(0, str(Path({tests!r}).parent))
import test_loop as here
from lightning_gym.sharding import shard
from lightning_gym.weights import named_weights

framework, model_dir, run_dir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
here.Counter.verify = lambda self, response: float(
    sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7
)
torch.set_num_threads(1)
policy = here.load(model_dir).train()
before = {{name: tensor.clone() for name, tensor in named_weights(policy)}}
sgd = torch.optim.SGD(policy.parameters(), lr=0.1)
accelerator = None
if framework == "fabric":
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=int(here.os.environ.get("LOCAL_WORLD_SIZE", "1")))
    fabric.launch()
    model, sgd = fabric.setup(policy, sgd)
elif framework == "accelerate":
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, sgd = accelerator.prepare(policy, sgd)
else:
    model = policy
    if "RANK" in here.os.environ:
        torch.distributed.init_process_group("gloo")
        if framework == "plain":
            model = torch.nn.parallel.DistributedDataParallel(policy)
        if framework == "fully_shard":
            model = shard(policy, torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)

with here.loop_of(model, run_dir, accelerator=accelerator, num_micro_batches=2) as gym:
    for window in gym.windows(2):
        for batch in window:
            loss, _ = here.grpo(here.token_logprobs(model, batch), batch)
            if framework == "fabric":
                fabric.backward(loss)
            elif framework == "accelerate":
                with accelerator.accumulate(model):
                    accelerator.backward(loss)
                    sgd.step()
            else:
                loss.backward()
        if framework != "accelerate":
            sgd.step()
        sgd.zero_grad()
moved = torch.cat([(tensor - before[name]).flatten() for name, tensor in named_weights(policy)])
if gym.ranks.rank == 0:
    torch.save({{"moved": moved, "metrics": gym.metrics}}, run_dir / "end.pt")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def run_job(tmp_path, framework, *, processes):
    model_dir, run_dir, script = tmp_path / "policy", tmp_path / f"run-{processes}", tmp_path / "job.py"
    if not model_dir.exists():
        model_dir.mkdir()
        make_model_dir(model_dir)
        script.write_text(textwrap.dedent(JOB.format(tests=__file__)))
    command = [script, framework, model_dir, run_dir]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes == 2 else ()), *command],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, run_dir


@pytest.mark.ranks
@pytest.mark.parametrize("framework", ["plain", "fabric", "accelerate", "fully_shard"])
def test_two_processes_end_with_the_weights_and_metrics_of_one(tmp_path, framework):
    ends = []
    for processes in (1, 2):
        done, run_dir = run_job(tmp_path, framework, processes=processes)
        assert done.returncode == 0, done.stderr
        ends.append(torch.load(run_dir / "end.pt"))
    one, two = ends
    assert one["moved"].norm() > 0
    assert (one["moved"] - two["moved"]).norm() / one["moved"].norm() < 1e-5
    for name in ("rollout/reward_mean", "rollout/count", "batch/tokens", "batch/trained_tokens"):
        assert one["metrics"][name] == pytest.approx(two["metrics"][name]), name
    assert (run_dir / "rank_1" / "rollouts.jsonl").exists()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FABRIC_RUN = [Path(sys.executable).with_name("fabric"), "run", "--devices", "2", "--main-port", "29412"]


@pytest.mark.vllm
@pytest.mark.ranks
@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_learns_the_counter(example, processes, tmp_path):
    from lightning_gym.tiny_policy.build import TinyPolicy

    warm_start = TinyPolicy(environment="counter", seed=0).ensure(ROOT / "outputs" / "tiny_policy")
    several = FABRIC_RUN if example.stem == "fabric_loop" else TORCHRUN
    launcher = several if processes == 2 else [sys.executable]
    done = subprocess.run(
        [*launcher, example, warm_start, tmp_path, "40"],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rewards = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(rewards) == 40
    predicted = json.loads((warm_start / "warm_start.json").read_text())["reward_predicted"]
    assert sum(rewards[-10:]) / 10 >= predicted + 0.25


@pytest.mark.ranks
def test_processes_that_train_apart_are_refused_after_one_step(tmp_path):
    done, _ = run_job(tmp_path, "apart", processes=2)
    assert done.returncode != 0
    assert "the ranks hold different weights at step 1" in done.stderr
