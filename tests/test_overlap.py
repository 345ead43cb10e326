"""Overlap: with max_lag=1 the next step is played while this one trains, by weights that are one step old and known."""

import random
import threading
import time

import lightning.pytorch as L
import pytest
import torch

from lightning_gym import GymCallback, GymDataModule, GymLoop, PolicyModule, WindowSettings
from lightning_gym.corrections import none, token_tis
from lightning_gym.errors import CollectionError, ConfigError, EndpointDeadError, EngineDeadError
from lightning_gym.gym.environments import Counter
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import grpo
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import read_rollout_log
from lightning_gym.testing import FakeEngine, FakeGym

pytestmark = pytest.mark.usefixtures("one_thread", "varied_rewards")


def rows(num):
    rng = random.Random(0)
    return [Counter.row(rng) for _ in range(num)]


def parts(model_dir, run_dir, *, engine=None, gym=None, callbacks=(), data=None, trainer=None, module=None, **callback):
    """A small run of 2 groups of 2 rollouts a step, one step ahead."""
    policy = PolicyModule(model_dir, **({"lr": 1e-2} | (module or {})))
    gym_callback = GymCallback(
        engine=engine or FakeEngine(max_model_len=96),
        gym=gym or FakeGym(max_steps=2),
        run_dir=run_dir,
        sampling=SamplingProfile(max_output_tokens=4),
        **callback,
    )
    settings = {"train": rows(5), "prompts_per_step": 2, "group_size": 2, "max_lag": 1} | (data or {})
    lightning = L.Trainer(
        callbacks=[gym_callback, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_steps": 4, "enable_checkpointing": False} | (trainer or {})),
    )
    return policy, gym_callback, GymDataModule(**settings), lightning


def fit(*arguments, ckpt_path=None, **changes):
    policy, callback, datamodule, trainer = parts(*arguments, **changes)
    trainer.fit(policy, datamodule=datamodule, ckpt_path=ckpt_path)
    return policy, callback, trainer


def played(run_dir):
    _, lines = read_rollout_log(run_dir / "rollouts.jsonl")
    return [
        (line["step"], line["task_index"], line["group_id"], line["attempt"], line["segments"][0]["weight_version"])
        for line in lines
    ]


def test_each_step_but_the_first_is_played_by_the_weights_before_while_those_train(model_dir, tmp_path):
    engine = FakeEngine(max_model_len=96)
    policy, callback, _ = fit(model_dir, tmp_path, engine=engine)
    assert [entry["batch/lag"] for entry in callback.history] == [0, 1, 1, 1]
    assert [(step, version) for step, _, _, attempt, version in played(tmp_path) if not attempt] == [
        (0, 0), (0, 0), (1, 0), (1, 0), (2, 1), (2, 1), (3, 2), (3, 2),
    ]  # fmt: skip
    turns = [event for event in engine.events if event.startswith("update")]
    assert turns == ["update:0", "update:1", "update:2"], "the last step is not followed by another collection"
    assert engine.events.count("resume") == engine.events.count("pause") == 4
    assert policy.correction is token_tis


def test_the_same_tasks_groups_and_attempts_are_played_as_one_after_the_other(model_dir, tmp_path):
    fit(model_dir, tmp_path / "ahead")
    fit(model_dir, tmp_path / "one by one", data={"max_lag": 0})
    ahead, one_by_one = (played(tmp_path / name) for name in ("ahead", "one by one"))
    assert [line[:4] for line in ahead] == [line[:4] for line in one_by_one]


class AtTraining(L.Callback):
    """Does something while a step trains, and a collection is open."""

    def __init__(self, act, step=1):
        self.act, self.step = act, step

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == self.step:
            self.act()


def test_rollouts_are_played_while_the_trainer_trains(model_dir, tmp_path):
    gym = FakeGym(max_steps=2)
    seen = []

    def wait_for_rollouts():
        before, deadline = gym.num_runs, time.monotonic() + 20
        while gym.num_runs < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((before, gym.num_runs))

    fit(model_dir, tmp_path, gym=gym, callbacks=[AtTraining(wait_for_rollouts)], trainer={"max_steps": 3})
    assert seen[0][1] == 12, "all of the third step's rollouts began before the second step was taken"


def test_rollouts_are_aligned_as_soon_as_their_group_is_over(model_dir, tmp_path, monkeypatch):
    from lightning_gym import played as played_module

    threads = set()
    original = played_module.trajectories
    monkeypatch.setattr(
        played_module,
        "trajectories",
        lambda rollout: (threads.add(threading.current_thread().name), original(rollout))[1],
    )
    fit(model_dir, tmp_path, trainer={"max_steps": 2})
    assert threads == {"lightning-gym-play"}


def test_several_updates_of_a_collection_are_played_ahead_of_the_next(model_dir, tmp_path):
    _, callback, _ = fit(model_dir, tmp_path, data={"updates_per_collection": 2}, trainer={"max_steps": 6})
    assert [entry["batch/lag"] for entry in callback.history] == [0, 1, 1, 2, 1, 2]


def test_epochs_do_not_interrupt_it_and_the_last_of_them_ends_it(model_dir, tmp_path):
    gym = FakeGym(max_steps=2)
    _, callback, _ = fit(
        model_dir, tmp_path, gym=gym, data={"steps_per_epoch": 2}, trainer={"max_steps": -1, "max_epochs": 2}
    )
    assert [entry["batch/lag"] for entry in callback.history] == [0, 1, 1, 1]
    assert gym.num_runs == 4 * 4


def test_a_run_that_is_resumed_plays_again_what_was_being_played(model_dir, tmp_path):
    fit(model_dir, tmp_path / "whole")
    _, _, trainer = fit(model_dir, tmp_path / "cut", trainer={"max_steps": 2})
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    _, callback, _ = fit(model_dir, tmp_path / "cut", ckpt_path=tmp_path / "cut.ckpt")
    assert [entry["batch/lag"] for entry in callback.history] == [0, 1], "the first by the weights of the checkpoint"
    assert [line[:4] for line in played(tmp_path / "cut")] == [line[:4] for line in played(tmp_path / "whole")]


def test_the_trainers_random_numbers_are_those_of_a_run_without_overlap(model_dir, tmp_path):
    drawn = {}

    class Draw(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            drawn.setdefault(trainer.log_dir or str(trainer.default_root_dir), []).append(torch.rand(()).item())

    for lag in (0, 1):
        torch.manual_seed(0)
        root = tmp_path / str(lag)
        fit(model_dir, root, data={"max_lag": lag}, callbacks=[Draw()], trainer={"default_root_dir": root})
    first, second = drawn.values()
    assert first == second


def test_resampling_goes_on_after_what_was_played_ahead(model_dir, tmp_path, monkeypatch):
    def first_of_each_task(self, response):
        return 1.0

    monkeypatch.setattr(Counter, "verify", first_of_each_task)
    with pytest.raises(CollectionError, match="fewer than 1 group"):
        fit(model_dir, tmp_path, data={"zero_variance": "resample", "max_resample_rounds": 2})


def test_an_engine_that_could_sleep_stays_awake_where_it_plays_while_the_trainer_trains(model_dir, tmp_path):
    engine = FakeEngine(max_model_len=96, can_sleep=True)
    fit(model_dir, tmp_path, engine=engine)
    assert not [event for event in engine.events if event.startswith(("sleep", "wake"))]


def test_a_validation_waits_for_what_is_being_played_and_leaves_it_to_the_next_step(model_dir, tmp_path):
    ends = []
    for name, val in (("with", rows(2)), ("without", None)):
        trainer = {"max_steps": 4, "num_sanity_val_steps": 0}
        if val:
            trainer |= {"val_check_interval": 2, "check_val_every_n_epoch": None}
        policy, callback, _ = fit(model_dir, tmp_path / name, data={"val": val}, trainer=trainer)
        ends.append((played(tmp_path / name), [entry["batch/lag"] for entry in callback.history], policy))
        assert [entry["step"] for entry in callback.evaluations] == ([2, 4] if val else [])
    (lines, lags, policy), (lines_alone, lags_alone, alone) = ends
    assert lines == lines_alone
    assert lags == lags_alone == [0, 1, 1, 1]
    pairs = zip(policy.parameters(), alone.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)
    _, evaluated = read_rollout_log(tmp_path / "with" / "val_rollouts.jsonl")
    assert {(line["step"], line["segments"][0]["weight_version"]) for line in evaluated} == {(2, 2), (4, 4)}


# -- what goes wrong in the background is raised at the next window, by name


def test_too_many_failures_while_training_stop_the_run_at_the_next_window(model_dir, tmp_path):
    gym = FakeGym(max_steps=2, fault=lambda number: 500 if number >= 8 else None)
    steps = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            steps.append(trainer.global_step)

    with pytest.raises(CollectionError, match="fault injected"):
        fit(model_dir, tmp_path, gym=gym, callbacks=[Count()])
    assert steps == [1, 2], "what was whole by then was trained on"


@pytest.mark.parametrize("max_lag", [0, 1])
def test_an_engine_that_dies_is_told_with_its_cause(max_lag, model_dir, tmp_path):
    calls = []

    def script(prompt_ids, seed):
        calls.append(seed)
        if len(calls) > 12:
            raise SystemExit("out of memory")
        return [3, 3, 3, 3]

    engine = FakeEngine(max_model_len=96, script=script)
    with pytest.raises(EngineDeadError, match="out of memory") as caught:
        fit(model_dir, tmp_path, engine=engine, data={"max_lag": max_lag})
    assert isinstance(caught.value.__cause__, SystemExit)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a dead loop leaves its sockets open
@pytest.mark.parametrize("max_lag", [0, 1])
def test_an_endpoint_that_dies_is_told_with_its_cause(max_lag, model_dir, tmp_path):
    gym = FakeGym(max_steps=2, fault=lambda number: die() if number == 9 else None)
    policy, callback, datamodule, trainer = parts(model_dir, tmp_path, gym=gym, data={"max_lag": max_lag})

    def die():
        def fail():
            raise SystemExit("a bug in the loop")

        callback.colocation.endpoint._loop.call_soon_threadsafe(fail)

    with pytest.raises(EndpointDeadError, match="a bug in the loop") as caught:
        trainer.fit(policy, datamodule=datamodule)
    assert isinstance(caught.value.__cause__, SystemExit)


def test_a_gym_that_dies_while_it_plays_ahead_is_started_again_and_the_run_goes_on(model_dir, tmp_path):
    import os
    import signal

    from lightning_gym import EmbeddedGym

    gym = EmbeddedGym(["counter"], max_steps=2)

    class Kill(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                os.kill(gym._server.pid, signal.SIGTERM)

    _, callback, _ = fit(model_dir, tmp_path, gym=gym, callbacks=[Kill()])
    assert [entry["rollout/dropped"] for entry in callback.history] == [0] * 4


def test_an_exception_in_training_ends_the_collection_that_is_open(model_dir, tmp_path):
    engine = FakeEngine(max_model_len=96)

    def fail():
        raise ValueError("in the loss")

    with pytest.raises(ValueError, match="in the loss"):
        fit(model_dir, tmp_path, engine=engine, callbacks=[AtTraining(fail)])
    assert engine.events[-1] == "close"
    assert "lightning-gym-play" not in {thread.name for thread in threading.enumerate()}


# -- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"module": {"correction": "none"}}, "max_lag is 1.*no correction is on"),
        ({"sync_mode": "share"}, "sync_mode='share' cannot be used: max_lag is 1"),
        ({"data": {"max_lag": -1}}, "max_lag is -1"),
        ({"data": {"max_lag": 2}}, "max_lag is 2.*one collection is open at a time"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(changes, said, model_dir, tmp_path):
    gym = FakeGym()
    with pytest.raises(ConfigError, match=said):
        fit(model_dir, tmp_path, gym=gym, **changes)
    assert gym.num_runs == 0


def test_a_correction_of_ones_own_choice_stays_and_without_overlap_there_is_none(model_dir, tmp_path):
    policy, _, _ = fit(model_dir, tmp_path, module={"correction": "icepop"}, trainer={"max_steps": 1})
    assert policy.correction.__name__ == "token_mask"
    policy, _, _ = fit(model_dir, tmp_path, data={"max_lag": 0}, trainer={"max_steps": 1})
    assert policy.correction is none


# -- loops written by hand


def loop_of(model, model_dir, run_dir, **changes):
    return GymLoop(
        model,
        rows(5),
        model_path=model_dir,
        run_dir=run_dir,
        sampling=SamplingProfile(max_output_tokens=4),
        window=WindowSettings(prompts_per_step=2, group_size=2, max_lag=1),
        **({"engine": FakeEngine(max_model_len=96), "gym": FakeGym(max_steps=2)} | changes),
    )


def test_a_loop_plays_ahead_as_a_trainer_does(model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    fit(model_dir, tmp_path / "trainer")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lags = []
    with loop_of(model, model_dir, tmp_path / "loop", corrected=True) as gym:
        for window in gym.windows(4):
            lags.append(gym.metrics["batch/lag"])
            for batch in window:
                logprobs = token_logprobs(model, batch)
                corrected, _ = token_tis(logprobs, batch)
                grpo(logprobs, corrected)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert lags == [0, 1, 1, 1]
    assert [line[:4] for line in played(tmp_path / "loop")] == [line[:4] for line in played(tmp_path / "trainer")]


def test_a_loop_that_corrects_nothing_is_refused(model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ConfigError, match=r"GymLoop\(corrected=True\)"):
        loop_of(AutoModelForCausalLM.from_pretrained(model_dir), model_dir, tmp_path)
