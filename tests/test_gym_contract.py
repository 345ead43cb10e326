"""What every Gym does alike: the fake, the embedded and the real one play the same rollouts to the same end.

``python tests/test_gym_contract.py`` records anew what the real one does.
"""

import asyncio
import itertools
import json
import random
from pathlib import Path

import httpx
import pytest

from lightning_gym.errors import GymStartError
from lightning_gym.gym.client import GymClient
from lightning_gym.gym.embedded import EmbeddedGym
from lightning_gym.gym.environments import Counter
from lightning_gym.gym.servers import AttachedGym, NemoGym
from lightning_gym.policy.endpoint import Endpoint
from lightning_gym.policy.engine import EngineModel
from lightning_gym.policy.ledger import Ledger
from lightning_gym.policy.service import PolicyService
from lightning_gym.rollout import Failure, SamplingProfile
from lightning_gym.testing import FakeEngine, FakeGym, tiny_tokenizer
from tests.recording_policy import KEY, completion, recording_policy, row, scenarios

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).parent / "gym_samples" / "session_state_contract.json"
AGENT = "example_session_state_mgmt_simple_agent"
CONFIG = "resources_servers/example_session_state_mgmt/configs/example_session_state_mgmt.yaml"
MAX_STEPS = 4

DEMO_ROW = Counter.row(random.Random(0))
SCENARIOS = scenarios(DEMO_ROW)


def make_gym(kind):
    if kind == "fake":
        return FakeGym(["counter"], max_steps=MAX_STEPS)
    if kind == "embedded":
        return EmbeddedGym(["counter"], max_steps=MAX_STEPS)
    return NemoGym([CONFIG], ray=kind == "nemo-stock", python=ROOT / ".venv-gym/bin/python", max_steps=MAX_STEPS)


KINDS = [
    "fake",
    "embedded",
    pytest.param("nemo-light", marks=pytest.mark.gym),
    pytest.param("nemo-stock", marks=[pytest.mark.gym, pytest.mark.full]),
]


class Played:
    """A running Gym whose policy is the recording one."""

    def __init__(self, gym, policy, policy_url, head_url):
        self.gym, self.policy, self.policy_url, self.head_url = gym, policy, policy_url, head_url
        instances = httpx.get(f"{head_url}/server_instances").json()
        self.agents = {i["process_name"]: i["url"] for i in instances if i["server_type"] == "responses_api_agents"}

    def run(self, scenario):
        request, answers = scenario
        self.policy.play(answers)
        response = httpx.post(f"{self.agents[AGENT]}/run", json=request, timeout=30)
        return {"status": response.status_code, "result": masked(response.json()), "sent": self.policy.sent}


def masked(value):
    """Without what is new in every rollout."""
    if isinstance(value, list):
        return [masked(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    value = {key: masked(entry) for key, entry in value.items()}
    if isinstance(value.get("id"), str):
        value["id"] = value["id"].partition("_")[0] if value["id"].startswith(("msg_", "rs_", "resp_")) else value["id"]
    return value | ({"created_at": 0} if "created_at" in value else {})


@pytest.fixture(scope="module", params=KINDS)
def played(request, tmp_path_factory):
    gym = make_gym(request.param)
    with recording_policy() as (policy, url):
        try:
            run_dir = tmp_path_factory.mktemp(request.param)
            yield Played(gym, policy, url, gym.start(policy_url=url, api_key=KEY, model="policy", run_dir=run_dir))
        finally:
            gym.close()


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_rollout_goes_as_it_was_recorded_in_real_gym(played, name):
    expected = json.loads(RECORDED.read_text())[name]
    found = played.run(SCENARIOS[name])
    assert found["sent"] == expected["sent"]
    assert (found["status"], found["result"]) == (expected["status"], expected["result"])


def test_the_demos_row_is_rewarded_for_the_right_sum_only(played):
    assert played.run(SCENARIOS["right"])["result"]["reward"] == 1.0
    assert played.run(SCENARIOS["wrong"])["result"]["reward"] == 0.0


def test_the_agent_has_the_name_that_the_demos_rows_ask_for(played):
    assert list(played.agents) == [AGENT] == [DEMO_ROW["agent_ref"]["name"]]


@pytest.mark.parametrize("missing", ["initial_count", "expected_count"])
def test_a_row_without_a_field_of_the_environment_fails_and_says_which(played, missing):
    request = row()
    del request[missing]
    found = played.run((request, [completion("6")]))
    # Gym hides its resources server's 422 in a 500, and asks for `expected_count` after the generations were paid for.
    assert found["status"] in (422, 500)
    assert missing in json.dumps(found["result"])


def test_every_server_answers_on_its_root(played):
    for url in (played.head_url, *played.agents.values()):
        assert httpx.get(url).json() == {"status": "ok"}


def test_metrics_are_aggregated_alike(played):
    verified = [
        {"_ng_task_index": task, "_ng_rollout_index": 0, "reward": reward, "response": {"usage": None}}
        for task, reward in ((0, 1.0), (1, 0.0))
    ]
    body = httpx.post(f"{played.agents[AGENT]}/aggregate_metrics", json={"verify_responses": verified}).json()
    assert body["agent_metrics"]["mean/reward"] == body["key_metrics"]["mean/reward"] == 0.5
    assert [group["mean/reward"] for group in body["group_level_metrics"]] == [1.0, 0.0]


def test_closing_twice_and_before_the_start_is_fine(played):
    gym = make_gym("fake" if isinstance(played.gym, FakeGym) else "embedded")
    gym.close()
    gym.close()


# -- with our own endpoint in between

PROFILE = SamplingProfile(max_output_tokens=64)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def sums_up(tokenizer):
    """A policy that plays the demo's rows right, whatever else is being played."""

    def script(prompt_ids, seed):
        said = tokenizer.decode(prompt_ids)
        results = said.count("<|im_start|>tool")
        first, second = (word for word in said.split("<|im_end|>")[0].split() if word.isdigit())
        if results == 0:
            text = "\n".join(
                f'<tool_call>\n{{"name": "increment_counter", "arguments": {{"count": {count}}}}}\n</tool_call>'
                for count in (first, second)
            )
        elif results == 2:
            text = '<tool_call>\n{"name": "get_counter_value", "arguments": {}}\n</tool_call>'
        else:
            text = said.rpartition('{"count":')[2].partition("}")[0]
        return tokenizer.encode(text + "<|im_end|>")

    return script


@pytest.fixture(scope="module", params=KINDS)
def circle(request, policy_dir, tokenizer, tmp_path_factory, one_thread):
    """A Gym that plays against a real endpoint: its head server, the endpoint and the ledger."""
    engine = FakeEngine(script=sums_up(tokenizer), logprob=lambda p, t: -(p * 1024 + t) / 2**20)
    engine.start(EngineModel(path=policy_dir, dtype="float32", weights=lambda: ()))
    engine.update_weights(lambda: None, version=0)
    engine.resume()
    ledger = Ledger()
    endpoint = Endpoint(PolicyService(engine, policy_dir, ledger, {"train": PROFILE, "eval": PROFILE}))
    endpoint.start()
    gym = make_gym(request.param)
    try:
        run_dir = tmp_path_factory.mktemp(request.param)
        head_url = gym.start(
            policy_url=endpoint.url, api_key=endpoint.api_key, model=endpoint.service.model_name, run_dir=run_dir
        )
        yield head_url, endpoint, ledger
    finally:
        gym.close()
        endpoint.close()
        engine.close()


def test_concurrent_rollouts_keep_their_own_state_and_bring_every_served_id_back(circle):
    head_url, _, ledger = circle
    rng = random.Random(1)
    rows = [Counter.row(rng) for _ in range(8)]
    for number in range(8):
        ledger.open(f"r{number}", profile="train", seed=number)

    async def play():
        client = GymClient(head_url)
        await client.connect()
        try:
            return await asyncio.gather(*(client.run(AGENT, rows[n], f"r{n}", PROFILE, n) for n in range(8)))
        finally:
            await client.close()

    for number, (rollout, _) in enumerate(asyncio.run(play())):
        assert not isinstance(rollout, Failure), rollout
        assert rollout.reward == 1.0
        served = [entry.call for entry in ledger.close(f"r{number}").served]
        assert len(served) == 3
        assert [b.prompt_ids for b in rollout.bundles] == [call.prompt_ids for call in served]
        assert [b.token_ids for b in rollout.bundles] == [call.token_ids for call in served]
        assert [b.logprobs for b in rollout.bundles] == [call.logprobs for call in served]
        for call, later in itertools.pairwise(served):
            so_far = [*call.prompt_ids, *call.token_ids]
            assert later.prompt_ids[: len(so_far)] == so_far, "later prompts continue what was emitted"


def test_a_rollout_that_is_over_ends_at_once_with_the_endpoints_words(circle):
    head_url, _, _ = circle

    async def play():
        client = GymClient(head_url, rollout_timeout_s=10)
        await client.connect()
        try:
            return await client.run(AGENT, DEMO_ROW, "never-opened", PROFILE, 0)
        finally:
            await client.close()

    failure, seconds = asyncio.run(play())
    assert isinstance(failure, Failure)
    assert "rollout never-opened is over" in failure.message
    assert seconds < 5


@pytest.mark.gym
@pytest.mark.parametrize("played", ["nemo-light"], indirect=True)
def test_a_running_gym_can_be_attached_to_and_one_with_another_policy_is_refused(played, tmp_path):
    attached = AttachedGym(played.head_url)
    right = {"policy_url": played.policy_url, "api_key": KEY, "model": "policy", "run_dir": tmp_path}
    assert attached.start(**right) == played.head_url
    attached.close()
    assert httpx.get(played.head_url).status_code == 200, "it is somebody else's to stop"
    with pytest.raises(
        GymStartError, match=r"no model server .* asks our endpoint http://127.0.0.1:1/v1.*endpoint_port"
    ):
        attached.start(**right | {"policy_url": "http://127.0.0.1:1/v1"})
    with pytest.raises(GymStartError, match="asks for the model 'policy' and ours is 'other': set policy_model_name"):
        attached.start(**right | {"model": "other"})


def record(tmp_path):
    gym = make_gym("nemo-light")
    with recording_policy() as (policy, url):
        try:
            real = Played(gym, policy, url, gym.start(policy_url=url, api_key=KEY, model="policy", run_dir=tmp_path))
            lines = [f"{json.dumps(name)}: {json.dumps(real.run(SCENARIOS[name]))}" for name in SCENARIOS]
        finally:
            gym.close()
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
