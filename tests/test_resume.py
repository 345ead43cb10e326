"""A run goes on from a checkpoint of any instant as if nothing had happened: the same tasks, groups and weights."""

import json
import random

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from lightning_gym import GymCallback, GymDataModule, GymLoop, PolicyModule, WindowSettings
from lightning_gym.errors import ConfigError
from lightning_gym.gym.environments import Counter
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import grpo
from lightning_gym.rollout import SamplingProfile
from lightning_gym.rollout_log import read_rollout_log
from lightning_gym.testing import FakeEngine, FakeGym, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "varied_rewards")

MAX_STEPS = 5
STEPS_PER_EPOCH = 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, hidden_size=64, num_layers=1).save_pretrained(directory)
    return directory


def rows(num):
    rng = random.Random(0)
    return [Counter.row(rng) for _ in range(num)]


def fit(model_dir, run_dir, *, callbacks=(), ckpt_path=None, accumulate=3, data=None, trainer=None, callback=None):
    """A small run of 2 groups of 2 rollouts a step, 2 steps an epoch."""
    policy = PolicyModule(model_dir, lr=1e-2, warmup_steps=4)
    gym_callback = GymCallback(
        engine=FakeEngine(max_model_len=96),
        gym=FakeGym(max_steps=2),
        run_dir=run_dir,
        sampling=SamplingProfile(max_output_tokens=4),
        **(callback or {}),
    )
    datamodule = GymDataModule(
        **(
            {"train": rows(5), "prompts_per_step": 2, "group_size": 2, "steps_per_epoch": STEPS_PER_EPOCH}
            | (data or {})
        )
    )
    options = {"max_steps": MAX_STEPS, "accumulate_grad_batches": accumulate} | (trainer or {})
    lightning = L.Trainer(
        callbacks=[gym_callback, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"enable_checkpointing": False} | options),
    )
    lightning.fit(policy, datamodule=datamodule, ckpt_path=ckpt_path)
    return policy, gym_callback, lightning


def played(run_dir):
    """What a run played, in order: optimizer step, task, group and attempt."""
    _, lines = read_rollout_log(run_dir / "rollouts.jsonl")
    return [(line["step"], line["task_index"], line["group_id"], line["attempt"]) for line in lines]


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory):
    """The weights and the rollouts of a run that nothing cut."""
    run_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Counter,
            "verify",
            lambda _self, response: float(
                sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7
            ),
        )
        policy, _, _ = fit(model_dir, run_dir)
    return policy, played(run_dir)


def same(policy, other):
    return all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


class Killed(Exception):  # noqa: N818
    """The run ends here, as by a power cut: what matters is what was saved before."""


class SaveAndDie(L.Callback):
    """Saves a checkpoint at the n-th call of a hook, and ends the run."""

    def __init__(self, hook, number, path):
        self.left = number
        self.path = path

        def at(trainer, *_):
            if not self.left:
                trainer.save_checkpoint(self.path)
                raise Killed
            self.left -= 1

        setattr(self, hook, at)


INSTANTS = [
    ("on_train_batch_start", 0),
    ("on_train_batch_start", 4),
    ("on_train_batch_end", 2),
    ("on_train_batch_end", 4),
    ("on_train_batch_end", 5),
    ("on_before_backward", 7),
    ("on_before_optimizer_step", 2),
    ("on_train_epoch_end", 0),
    ("on_train_epoch_start", 1),
]


@pytest.mark.parametrize(("hook", "number"), INSTANTS)
def test_a_run_goes_on_from_a_checkpoint_of_any_instant_as_if_nothing_had_happened(
    hook, number, model_dir, whole, tmp_path
):
    path = tmp_path / "cut.ckpt"
    with pytest.raises(Killed):
        fit(model_dir, tmp_path, callbacks=[SaveAndDie(hook, number, path)])
    policy, callback, trainer = fit(model_dir, tmp_path, ckpt_path=path)
    assert trainer.global_step == MAX_STEPS
    assert played(tmp_path) == whole[1]
    assert [entry["step"] for entry in callback.history][-1] == MAX_STEPS
    assert same(policy, whole[0])


def test_what_fails_right_after_an_optimizer_step_does_not_have_it_taken_twice(model_dir, whole, tmp_path):
    """The instant at which the weights have moved on and no callback knows of it yet."""
    path = tmp_path / "cut.ckpt"

    class First(SaveAndDie):
        pass

    policy = PolicyModule(model_dir, lr=1e-2, warmup_steps=4)
    die = First("on_train_batch_end", 5, path)
    callback = GymCallback(
        engine=FakeEngine(max_model_len=96),
        gym=FakeGym(max_steps=2),
        run_dir=tmp_path,
        sampling=SamplingProfile(max_output_tokens=4),
    )
    trainer = L.Trainer(
        callbacks=[die, callback],
        max_steps=MAX_STEPS,
        accumulate_grad_batches=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(Killed):
        trainer.fit(policy, datamodule=GymDataModule(rows(5), prompts_per_step=2, group_size=2, steps_per_epoch=2))
    policy, _, _ = fit(model_dir, tmp_path, ckpt_path=path)
    assert played(tmp_path) == whole[1]
    assert same(policy, whole[0])


@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 3), (3, 1)])
def test_a_run_goes_on_with_another_number_of_micro_batches(before, after, model_dir, whole, tmp_path):
    path = tmp_path / "cut.ckpt"
    with pytest.raises(Killed):
        fit(
            model_dir,
            tmp_path,
            accumulate=before,
            callbacks=[SaveAndDie("on_train_batch_start", 3 * before - 1, path)],
        )
    _, callback, trainer = fit(model_dir, tmp_path, ckpt_path=path, accumulate=after)
    assert trainer.global_step == MAX_STEPS
    assert trainer.current_epoch == 3
    assert played(tmp_path) == whole[1]
    assert [entry["step"] for entry in callback.history] == [3, 4, 5]


@pytest.mark.filterwarnings("ignore:.*ckpt_path:UserWarning")  # Lightning's, of OnExceptionCheckpoint itself
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_what_lightning_saves_on_an_exception_is_whole_and_the_run_goes_on_from_it(kind, model_dir, whole, tmp_path):
    class Break(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.fit_loop.epoch_loop.total_batch_idx == 7:
                raise kind

    with pytest.raises(SystemExit if kind is KeyboardInterrupt else kind):
        fit(
            model_dir,
            tmp_path,
            callbacks=[Break(), OnExceptionCheckpoint(tmp_path)],
            trainer={"enable_checkpointing": True, "default_root_dir": tmp_path},
        )
    path = tmp_path / "on_exception.ckpt"
    assert torch.load(path, weights_only=True)["GymDataModule"]["position"] == 4
    policy, _, _ = fit(model_dir, tmp_path, ckpt_path=path)
    assert played(tmp_path) == whole[1]
    assert same(policy, whole[0])


def test_a_run_of_epochs_goes_on_from_the_middle_of_one(model_dir, tmp_path):
    epochs = {"max_steps": -1, "max_epochs": 3}
    expected, _, _ = fit(model_dir, tmp_path / "whole", trainer=epochs)
    path = tmp_path / "cut.ckpt"
    with pytest.raises(Killed):
        fit(model_dir, tmp_path, trainer=epochs, callbacks=[SaveAndDie("on_train_batch_start", 10, path)])
    policy, _, trainer = fit(model_dir, tmp_path, trainer=epochs, ckpt_path=path)
    assert trainer.global_step == 6
    assert played(tmp_path) == played(tmp_path / "whole")
    assert same(policy, expected)


def test_a_run_goes_on_in_the_middle_of_a_collection_with_the_tasks_it_had_left(model_dir, tmp_path):
    data = {"updates_per_collection": 2}
    fit(model_dir, tmp_path / "whole", data=data)
    path = tmp_path / "cut.ckpt"
    with pytest.raises(Killed):
        fit(model_dir, tmp_path, data=data, callbacks=[SaveAndDie("on_train_batch_start", 4, path)])
    _, callback, trainer = fit(model_dir, tmp_path, data=data, ckpt_path=path)
    assert trainer.global_step == MAX_STEPS
    assert [entry["batch/lag"] for entry in callback.history] == [0, 1, 0, 1]
    groups = [group for _, _, group, attempt in played(tmp_path) if not attempt]
    assert groups == [0, 1, 2, 3, *range(2, 10)], "groups 2 and 3 are played again, by newer weights"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": [*rows(4), rows(6)[5]]}, "tasks="),
        ({"train": rows(6)}, "num_tasks=5, this one 6"),
        ({"group_size": 3}, "group_size=2, this one 3"),
        ({"seed": 1}, "seed=0, this one 1"),
        ({"shuffle": False}, "shuffle=True, this one False"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(data, said, model_dir, tmp_path):
    path = tmp_path / "cut.ckpt"
    with pytest.raises(Killed):
        fit(model_dir, tmp_path, callbacks=[SaveAndDie("on_train_batch_end", 2, path)])
    with pytest.raises(ConfigError, match=said):
        fit(model_dir, tmp_path, ckpt_path=path, data=data)


def test_resuming_in_the_middle_of_an_epoch_warns_of_nothing(model_dir, tmp_path, recwarn):
    path = tmp_path / "cut.ckpt"
    with pytest.raises(Killed):
        fit(model_dir, tmp_path, callbacks=[SaveAndDie("on_train_batch_end", 2, path)])
    fit(model_dir, tmp_path, ckpt_path=path)
    assert not [warning for warning in recwarn if "resum" in str(warning.message)]


# -- loops written by hand


def loop_of(model, model_dir, run_dir, **changes):
    return GymLoop(
        model,
        rows(5),
        engine=FakeEngine(max_model_len=96),
        gym=FakeGym(max_steps=2),
        window=WindowSettings(prompts_per_step=2, group_size=2, **changes),
        num_micro_batches=2,
        sampling=SamplingProfile(max_output_tokens=4),
        model_path=model_dir,
        run_dir=run_dir,
    )


def train(gym, model, optimizer, max_steps, each_batch=lambda: None, each_window=lambda: None):
    with gym:
        for window in gym.windows(max_steps):
            for batch in window:
                grpo(token_logprobs(model, batch), batch)[0].backward()
                each_batch()
            optimizer.step()
            optimizer.zero_grad()
            each_window()


def load(model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("when", "number", "steps"), [("each_window", 2, 2), ("each_batch", 2, 0), ("each_batch", 3, 1)]
)
def test_a_loop_goes_on_from_a_state_of_any_instant(when, number, steps, model_dir, tmp_path):
    expected, optimizer = load(model_dir)
    train(loop_of(expected, model_dir, tmp_path / "whole"), expected, optimizer, 4)
    model, optimizer = load(model_dir)
    gym, calls, saved = loop_of(model, model_dir, tmp_path), [], {}

    def save():
        calls.append(None)
        if len(calls) == number:
            saved.update(gym=gym.state_dict(), model={k: v.clone() for k, v in model.state_dict().items()})
            raise Killed

    with pytest.raises(Killed):
        train(gym, model, optimizer, 4, **{when: save})
    assert json.loads(json.dumps(saved["gym"])) == saved["gym"]
    assert saved["gym"]["step"] == steps
    model, optimizer = load(model_dir)
    model.load_state_dict(saved["model"])
    again = loop_of(model, model_dir, tmp_path)
    again.load_state_dict(saved["gym"])
    train(again, model, optimizer, 4)
    assert played(tmp_path) == played(tmp_path / "whole")
    assert same(model, expected)


def test_a_loop_that_has_played_takes_no_state(model_dir, tmp_path):
    model, optimizer = load(model_dir)
    gym = loop_of(model, model_dir, tmp_path)
    state = gym.state_dict()
    train(gym, model, optimizer, 1)
    with pytest.raises(ConfigError, match="load it first"):
        gym.load_state_dict(state)
