"""What goes wrong between a policy and its Gym, with a whole colocation on one side and real servers on the other.

Nothing hangs beyond its timeout, a failure is no reward, and an attempt counts once.
"""

import collections
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from lightning_gym.colocation import CollectSettings, Colocation
from lightning_gym.errors import CollectionError
from lightning_gym.gym.embedded import EmbeddedGym
from lightning_gym.gym.environments import Counter
from lightning_gym.gym.servers import AttachedGym, NemoGym
from lightning_gym.ranks import Ranks
from lightning_gym.rollout import FailureKind, SamplingProfile
from lightning_gym.tasks import DealtTask, read_tasks
from lightning_gym.testing import FakeEngine, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
CONFIG = "resources_servers/example_session_state_mgmt/configs/example_session_state_mgmt.yaml"
PROFILE = SamplingProfile(max_output_tokens=200)
TOKENIZER = tiny_tokenizer()
MAX_STEPS = 5

# A resources server that does what the row asks it to do when the rollout is over.
MISCHIEF = """
import asyncio
from fastapi import HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse
from nemo_gym.base_resources_server import BaseResourcesServerConfig, SimpleResourcesServer
from nemo_gym.base_resources_server import BaseVerifyRequest, BaseVerifyResponse

class Request(BaseVerifyRequest):
    fault: str

class Mischief(SimpleResourcesServer):
    config: BaseResourcesServerConfig

    async def verify(self, body: Request) -> BaseVerifyResponse:
        said = body.model_dump(mode="json")
        match body.fault:
            case "crash":
                raise RuntimeError("the verifier tripped")
            case "refuse":
                raise HTTPException(422, "no such office")
            case "null":
                return JSONResponse(said | {"reward": None})
            case "no reward":
                return JSONResponse(said)
            case "garbage":
                return PlainTextResponse("<html>it works!</html>")
            case "hang":
                await asyncio.sleep(3600)
        return BaseVerifyResponse(**body.model_dump(), reward=1.0)

if __name__ == "__main__":
    Mischief.run_webserver()
"""
MISCHIEF_CONFIG = """
mischief:
  resources_servers:
    mischief: {entrypoint: app.py, domain: other, verified: false, description: fails as it is told}
mischief_simple_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      resources_server: {type: resources_servers, name: mischief}
      model_server: {type: responses_api_models, name: policy_model}
"""


class Policy:
    """What the engine says: the right thing in the counter, unless `says` is something else; counts its calls."""

    def __init__(self):
        self.says = None
        self.pause_s = 0.0
        self.calls = 0

    def __call__(self, prompt_ids, _seed):
        self.calls += 1
        time.sleep(self.pause_s)
        prompt = TOKENIZER.decode(prompt_ids)
        said = self.says(prompt) if self.says else _right(prompt)
        return TOKENIZER.encode(said + "<|im_end|>")


def _right(prompt):
    results = prompt.count("<|im_start|>tool")
    numbers = [word for word in prompt.split("<|im_end|>")[0].split() if word.isdigit()]
    if not numbers:
        return "ok"
    if results == 0:
        return "\n".join(tool_call("increment_counter", f'{{"count": {number}}}') for number in numbers)
    if results == 2:
        return tool_call("get_counter_value", "{}")
    return prompt.rpartition('{"count":')[2].partition("}")[0]


def tool_call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class Played:
    """A colocation that has been started."""

    def __init__(self, gym, policy, colocation):
        self.gym, self.policy, self.colocation = gym, policy, colocation
        self.num_dealt = 0

    def collect(self, rows, group_size=1):
        """Every group has a number of its own, as in a run."""
        dealt = [DealtTask(group_id=self.num_dealt + i, task=task) for i, task in enumerate(read_tasks(rows))]
        self.num_dealt += len(dealt)
        return self.colocation.collect(dealt, group_size=group_size, profile="train")

    def instances(self):
        return httpx.get(f"{self.colocation._client._head_url}/server_instances").json()


@pytest.fixture
def playing(tmp_path, model_dir):
    """Starts a colocation with the Gym it is given; everything is closed at the end."""
    closers = []

    def start(gym, *, max_model_len=1024, **settings):
        policy = Policy()
        model = tiny_model(TOKENIZER, hidden_size=32, num_layers=1, num_kv_heads=1)
        colocation = Colocation(
            FakeEngine(max_model_len=max_model_len, script=policy),
            gym,
            {"train": PROFILE, "eval": PROFILE},
            CollectSettings(**{"rollout_timeout_s": 30.0, "max_failed_frac": 1.0} | settings),
        )
        closers.append(colocation.close)
        colocation.start(model, model_dir, [], run_dir=tmp_path, run_id="run", ranks=Ranks())
        colocation.ensure_synced(0)
        return Played(gym, policy, colocation)

    yield start
    for close in closers:
        close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    TOKENIZER.save_pretrained(directory)
    tiny_model(TOKENIZER, hidden_size=32, num_layers=1, num_kv_heads=1).save_pretrained(directory)
    return directory


def rows(number):
    return [Counter.row(random.Random(seed)) for seed in range(number)]


def mischief(*faults):
    agent = {"type": "responses_api_agents", "name": "mischief_simple_agent"}
    params = {"input": [{"role": "user", "content": "do what you want"}]}
    return [{"responses_create_params": params, "fault": fault, "agent_ref": agent} for fault in faults]


def nemo(*paths, ray=False):
    return NemoGym([*paths, CONFIG], ray=ray, python=ROOT / ".venv-gym/bin/python", max_steps=MAX_STEPS)


def make_gym(kind):
    if kind == "embedded":
        return EmbeddedGym(["counter"], max_steps=MAX_STEPS)
    return nemo(ray=kind == "nemo-stock")


KINDS = [
    "embedded",
    pytest.param("nemo-light", marks=pytest.mark.gym),
    pytest.param("nemo-stock", marks=[pytest.mark.gym, pytest.mark.full]),
]
every_gym = pytest.mark.parametrize("kind", KINDS)


def once(rollouts):
    """Whether every attempt is there once."""
    return max(collections.Counter((r.group_id, r.attempt) for r in rollouts).values()) == 1


# -- the Gym is gone


@every_gym
def test_a_gym_that_is_killed_in_the_middle_is_started_again_and_no_attempt_is_lost_or_counted_twice(kind, playing):
    here = playing(make_gym(kind))
    victim = here.instances()[0]["pid"]  # of the stock way, one of several processes
    here.policy.pause_s = 0.05

    def kill():
        while here.policy.calls < 10:
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    collection = here.collect(rows(4), group_size=4)
    killer.join()
    rollouts = collection.rollouts
    assert victim not in [entry["pid"] for entry in here.instances()]
    assert len(rollouts) == 16
    assert once(rollouts)
    assert [rollout.failure for rollout in rollouts] == [None] * 16
    assert {(rollout.reward, len(rollout.calls)) for rollout in rollouts} == {(1.0, 3)}
    assert {rollout.rollout_id.rpartition(".")[2] for rollout in rollouts} >= {"1"}, "some were on their way"
    assert here.collect(rows(1)).rollouts[0].reward == 1.0


def test_a_gym_of_somebody_elses_that_stays_away_ends_the_run_with_the_cause(tmp_path, playing):
    class Attached(AttachedGym):
        def start(self, **_options):
            return self.head_url

    class Remote:
        """Somebody else's Gym, which plays against our endpoint."""

        def __init__(self):
            self.theirs = EmbeddedGym(["counter"])

        def start(self, **options):
            return Attached(self.theirs.start(**options)).start()

        def close(self):
            self.theirs.close()

    remote = Remote()
    here = playing(remote, gym_away_s=0.5, max_failed_frac=0.25)
    here.policy.pause_s = 0.05
    closer = threading.Timer(0.3, remote.theirs.close)
    closer.start()
    start = time.monotonic()
    with pytest.raises(
        CollectionError, match=r"rollouts failed \(\d+ infra\).*example_session_state_mgmt_simple_agent"
    ):
        here.collect(rows(4), group_size=4)
    assert time.monotonic() - start < 10
    closer.join()


# -- the environment fails


@pytest.fixture
def mischief_config(tmp_path):
    server = tmp_path / "mine" / "resources_servers" / "mischief"
    (server / "configs").mkdir(parents=True)
    (server / "app.py").write_text(MISCHIEF)
    (server / "requirements.txt").write_text("nemo-gym\n")
    config = server / "configs" / "mischief.yaml"
    config.write_text(MISCHIEF_CONFIG)
    return config


@pytest.mark.gym
def test_whatever_a_real_environment_does_to_a_rollout_is_a_typed_failure_beside_the_others(mischief_config, playing):
    here = playing(nemo(mischief_config), rollout_timeout_s=6.0)
    here.collect(mischief("nothing"))  # the servers' first answers take their time
    faults = ("crash", "refuse", "null", "no reward", "garbage", "hang")
    start = time.monotonic()
    collection = here.collect([*mischief("nothing", *faults), *rows(1)], group_size=2)
    assert time.monotonic() - start < 12
    found = [
        [r.failure.kind if r.failure else r.reward for r in collection.rollouts[i : i + 2]] for i in range(0, 16, 2)
    ]
    environment, timeout = FailureKind.ENVIRONMENT, FailureKind.TIMEOUT
    assert found == [[1.0, 1.0], *[[environment, environment]] * 5, [timeout, timeout], [1.0, 1.0]]
    assert [r.group_id - 1 for r in collection.survivors] == [0, 0, 7, 7]
    assert all(r.reward is None and not r.calls for r in collection.rollouts if r.failure)
    messages = [r.failure.message for r in collection.rollouts[::2] if r.failure]
    assert "the verifier tripped" in messages[0]
    assert "no such office" in messages[1]
    assert here.policy.calls == 1 + 2 * 7 + 2 * 3, "none of them was worth another try"


@pytest.mark.gym
def test_a_row_that_always_fails_costs_its_group_and_too_many_end_the_run_with_their_cause(mischief_config, playing):
    here = playing(nemo(mischief_config), max_failed_frac=0.25)
    for _ in range(2):
        collection = here.collect([*mischief("crash"), *rows(3)], group_size=2)
        assert {r.group_id % 4 for r in collection.survivors} == {1, 2, 3}
    with pytest.raises(CollectionError, match=r"3 of 8 rollouts failed \(3 environment\).*the verifier tripped"):
        here.collect([*mischief("crash", "crash"), *rows(2)], group_size=2)
    assert here.collect(rows(1)).rollouts[0].reward == 1.0, "what was given up holds nothing up"


# -- the policy fails, or misbehaves


@every_gym
def test_a_policy_that_is_too_slow_is_a_timeout_and_its_rollout_does_not_live_on(kind, playing):
    here = playing(make_gym(kind), rollout_timeout_s=4.0)
    here.policy.pause_s = 5.0
    start = time.monotonic()
    (rollout,) = here.collect(rows(1)).rollouts
    assert (rollout.failure.kind, rollout.reward) == (FailureKind.TIMEOUT, None)
    assert time.monotonic() - start < 8
    here.policy.pause_s = 0.0
    time.sleep(1.5)  # the engine of these tests does one thing at a time
    (rollout,) = here.collect(rows(1)).rollouts
    assert rollout.reward == 1.0
    time.sleep(1)
    assert here.policy.calls <= 1 + 3, "nobody goes on with the first one"


@every_gym
def test_a_policy_that_is_paused_for_a_moment_answers_the_same_calls_later(kind, playing):
    here = playing(make_gym(kind))
    here.policy.pause_s = 0.05
    engine = here.colocation._engine

    def pause():
        while here.policy.calls < 4:
            time.sleep(0.01)
        engine.pause()
        time.sleep(0.5)
        engine.resume()

    pauser = threading.Thread(target=pause)
    pauser.start()
    rollouts = here.collect(rows(2), group_size=4).rollouts
    pauser.join()
    assert once(rollouts)
    assert [(rollout.reward, len(rollout.calls)) for rollout in rollouts] == [(1.0, 3)] * 8


@every_gym
def test_a_prompt_that_does_not_fit_is_a_failure_on_the_first_call_and_a_cut_rollout_later(kind, playing):
    (one,) = rows(1)
    prompt = TOKENIZER.apply_chat_template(
        one["responses_create_params"]["input"], add_generation_prompt=True, return_dict=False
    )
    first = len(prompt) + len(TOKENIZER.encode(_right(TOKENIZER.decode(prompt))))
    here = playing(make_gym(kind), max_model_len=first + 3)
    long = {**one, "responses_create_params": {"input": [{"role": "user", "content": "add 1 then " * 60 + "add 2"}]}}
    cut, too_long = here.collect([one, long]).rollouts
    assert too_long.failure.kind is FailureKind.NO_TOKEN_IDS
    assert "its first prompt did not fit the context window" in too_long.failure.message
    assert too_long.reward is None
    assert cut.failure is None
    assert (len(cut.calls), cut.truncated, cut.context_overflow) == (1, True, True)


@every_gym
def test_tool_calls_that_make_no_sense_are_answered_in_words_and_the_rollout_goes_on(kind, playing):
    said = iter(
        [
            tool_call("no_such_tool", "{}"),
            tool_call("increment_counter", '{"count": "many"}'),
            tool_call("increment_counter", '{"count": '),
            "I give up",
        ]
    )
    here = playing(make_gym(kind))
    here.policy.says = lambda _prompt: next(said)
    (rollout,) = here.collect(rows(1)).rollouts
    assert rollout.failure is None
    assert rollout.reward == 0.0, "the environment's own judgement"
    assert len(rollout.calls) in (3, 4), "a call that is cut is no call, and its text may be taken for the answer"


@every_gym
def test_a_policy_that_only_ever_thinks_is_stopped_after_its_steps(kind, playing):
    here = playing(make_gym(kind))
    here.policy.says = lambda _prompt: "<think>hm</think>"
    (rollout,) = here.collect(rows(1)).rollouts
    assert rollout.failure is None
    assert here.policy.calls <= MAX_STEPS
    assert rollout.reward == 0.0
    assert 1 <= len(rollout.calls) <= MAX_STEPS


def test_control_the_policy_of_these_tests_is_right():
    prompt = "<|im_start|>user\nadd 1 then add 2 then get the count<|im_end|>"
    assert re.findall(r'"count": (\d)', _right(prompt)) == ["1", "2"]
