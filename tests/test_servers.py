"""Starting, watching and stopping NeMo Gym's own servers: what is said when it fails, and that nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from lightning_gym.errors import ConfigError, GymStartError
from lightning_gym.gym.head import Head
from lightning_gym.gym.servers import AttachedGym, NemoGym
from tests.recording_policy import completion, json_server, row

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-gym/bin/python"
CONFIG = "resources_servers/example_session_state_mgmt/configs/example_session_state_mgmt.yaml"
AGENT = "example_session_state_mgmt_simple_agent"
SECRET = "secret-of-the-policy-8c1f"
POLICY = {"policy_url": "http://127.0.0.1:9/v1", "api_key": SECRET, "model": "policy"}
MARK = "LIGHTNING_GYM_TEST_MARK"
LIGHT_OR_STOCK = pytest.mark.parametrize("ray", [False, pytest.param(True, marks=pytest.mark.full)])

# A trainer that starts a Gym and says so, then trains for a minute.
TRAINER = """
import json, sys, time
from pathlib import Path
from lightning_gym.gym.servers import NemoGym
options, policy, run_dir = json.loads(sys.argv[1])
print(NemoGym(**options).start(**policy, run_dir=Path(run_dir)), flush=True)
time.sleep(60)
"""

# A resources server of the user's own, and its agent.
OWN_APP = """
import os
from nemo_gym.base_resources_server import BaseResourcesServerConfig, BaseVerifyResponse, SimpleResourcesServer
from scoring import score

class Shout(SimpleResourcesServer):
    config: BaseResourcesServerConfig

    async def verify(self, body: BaseVerifyResponse.__base__) -> BaseVerifyResponse:
        return BaseVerifyResponse(**body.model_dump(), reward=score(body.response.output_text))

if __name__ == "__main__":
    Shout.run_webserver()
"""
OWN_CONFIG = """
shout:
  resources_servers:
    shout: {entrypoint: app.py, domain: other, verified: false, description: louder is better}
shout_simple_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      resources_server: {type: resources_servers, name: shout}
      model_server: {type: responses_api_models, name: policy_model}
"""


@pytest.fixture
def mark(monkeypatch):
    """Every process started from here on carries it in its environment, whatever session it moves to."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    return value


def alive(mark):
    found = []
    for directory in Path("/proc").iterdir():
        try:
            state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
            if f"{MARK}={mark}".encode() in (directory / "environ").read_bytes() and state not in "ZX":
                found.append(int(directory.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def within(seconds, condition):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def nemo(*paths, **options):
    return NemoGym(list(paths) or [CONFIG], **{"python": PYTHON} | options)


@contextmanager
def started(gym, run_dir):
    with gym:
        yield gym.start(**POLICY, run_dir=run_dir)


def interpreter(tmp_path, script):
    """Something to be run in the place of Gym's Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def own_server(folder, app=OWN_APP):
    server = folder / "resources_servers" / "shout"
    (server / "configs").mkdir(parents=True)
    (server / "app.py").write_text(app)
    (server / "scoring.py").write_text("def score(text):\n    return float(text.isupper())\n")
    (server / "requirements.txt").write_text("nemo-gym\n")
    config = server / "configs" / "shout.yaml"
    config.write_text(OWN_CONFIG)
    return config


# -- what is refused before anything is started


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"config_paths": CONFIG}, "config_paths: expected a list"),
        ({"config_paths": []}, "config_paths: expected a list"),
        ({"config_paths": [CONFIG], "max_steps": 0}, "max_steps: expected at least 1"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        NemoGym(**arguments)


def test_a_missing_interpreter_is_named_with_the_ways_to_get_one(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no Python interpreter .*none.*make setup-gym.*\$LIGHTNING_GYM_GYM_PYTHON"):
        nemo(python=tmp_path / "none").start(**POLICY, run_dir=tmp_path)
    monkeypatch.setenv("LIGHTNING_GYM_GYM_PYTHON", "/from/the/environment")
    assert NemoGym([CONFIG]).python == Path("/from/the/environment")
    assert NemoGym([CONFIG], python=PYTHON).python == PYTHON


def test_a_missing_file_of_the_users_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*/nothing\.yaml"):
        nemo(tmp_path / "nothing.yaml", python=sys.executable).start(**POLICY, run_dir=tmp_path)


def test_the_model_server_for_training_is_added_unless_the_user_names_one():
    assert NemoGym([CONFIG]).config_paths[1:] == [
        "responses_api_models/vllm_model/configs/vllm_model_for_training.yaml"
    ]
    own = "/home/me/responses_api_models/mine/configs/mine.yaml"
    assert NemoGym([CONFIG, own]).config_paths == [CONFIG, own]


# -- what is said when it does not come up


def test_a_python_without_gym_is_told_how_to_get_it(tmp_path, mark):
    with pytest.raises(GymStartError, match=r"cannot import nemo_gym.*-m pip install nemo-gym==0\.4\.0"):
        nemo(python=sys.executable).start(**POLICY, run_dir=tmp_path)
    assert alive(mark) == []


def test_what_the_host_said_before_it_died_is_in_the_error(tmp_path):
    python = interpreter(tmp_path, "echo it hurts >&2\nexit 3")
    gym = nemo(python=python)
    with pytest.raises(GymStartError, match=r"(?s)ended with code 3; the end of .*nemo_gym\.log:.*it hurts"):
        gym.start(**POLICY, run_dir=tmp_path)
    assert gym.poll() == 3


def test_the_error_shows_this_starts_log_and_not_an_earlier_ones(tmp_path):
    (tmp_path / "nemo_gym.log").write_text("yesterday\n")
    with pytest.raises(GymStartError) as raised:
        nemo(python=interpreter(tmp_path, "exit 1")).start(**POLICY, run_dir=tmp_path)
    assert str(raised.value).endswith("(empty)")


def test_a_host_that_is_never_ready_is_stopped_after_the_timeout(tmp_path, mark):
    gym = nemo(python=interpreter(tmp_path, "exec sleep 60"), start_timeout_s=0.3)
    with pytest.raises(GymStartError, match=r"is not ready after 0\.3 s"):
        gym.start(**POLICY, run_dir=tmp_path)
    assert alive(mark) == []


@pytest.mark.gym
def test_a_config_path_that_gym_does_not_have_is_named(tmp_path, mark):
    with pytest.raises(GymStartError, match=r"(?s)refuses its configuration.*'resources_servers/nothing.yaml'"):
        nemo("resources_servers/nothing.yaml").start(**POLICY, run_dir=tmp_path)
    assert alive(mark) == []


@pytest.mark.gym
@LIGHT_OR_STOCK
def test_a_server_that_dies_at_the_start_is_shown_dying_and_the_others_are_stopped(ray, tmp_path, mark):
    config = own_server(tmp_path / "mine", "raise RuntimeError('no luck today')\n" + OWN_APP)
    with pytest.raises(GymStartError, match="no luck today"):
        nemo(config, ray=ray).start(**POLICY, run_dir=tmp_path)
    assert within(2, lambda: not alive(mark))


@pytest.mark.gym
def test_a_server_that_needs_a_package_which_is_not_there_is_told_what_to_install(tmp_path, mark):
    config = own_server(tmp_path / "mine", "import no_such_package\n" + OWN_APP)
    with pytest.raises(GymStartError, match=r"shout needs a package .*'no_such_package'.*shout/requirements\.txt"):
        nemo(config).start(**POLICY, run_dir=tmp_path)
    assert within(2, lambda: not alive(mark))


@pytest.mark.gym
def test_an_own_server_without_requirements_is_told_that_gym_wants_them(tmp_path):
    config = own_server(tmp_path / "mine")
    config.parents[1].joinpath("requirements.txt").unlink()
    with pytest.raises(GymStartError, match=r"shout has no requirements\.txt"):
        nemo(config).start(**POLICY, run_dir=tmp_path)


@pytest.mark.gym
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"policy_model.responses_api_models.vllm_model.return_token_id_information": False}, "without the token ids"),
        ({"policy_base_url": "http://127.0.0.1:8/v1"}, r"no model server .* asks our endpoint"),
    ],
)
def test_a_model_server_that_training_cannot_use_is_refused(overrides, said, tmp_path, mark):
    with pytest.raises(GymStartError, match=said):
        nemo(overrides=overrides).start(**POLICY, run_dir=tmp_path)
    assert alive(mark) == []


# -- what runs


def config_of(head_url):
    return yaml.safe_load(httpx.get(f"{head_url}/global_config_dict_yaml").json())


@pytest.mark.gym
@LIGHT_OR_STOCK
def test_an_own_server_plays_beside_gyms_and_is_limited_in_steps_unless_it_says_so(ray, tmp_path):
    overrides = {f"{AGENT}.responses_api_agents.simple_agent.max_steps": 7}
    gym = nemo(own_server(tmp_path / "mine"), CONFIG, ray=ray, max_steps=3, overrides=overrides)
    with answering(completion("LOUD")) as policy_url, gym:
        head_url = gym.start(**POLICY | {"policy_url": policy_url}, run_dir=tmp_path / "run")
        urls = {entry["process_name"]: entry["url"] for entry in httpx.get(f"{head_url}/server_instances").json()}
        result = httpx.post(f"{urls['shout_simple_agent']}/run", json=row(), timeout=30).json()
        agents = {
            name: entry["responses_api_agents"]["simple_agent"]["max_steps"]
            for name, entry in config_of(head_url).items()
            if isinstance(entry, dict) and "responses_api_agents" in entry
        }
    assert result["reward"] == 1.0
    assert agents == {"shout_simple_agent": 3, AGENT: 7}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["nemo_gym", "nemo_gym.log"]


@pytest.mark.gym
@LIGHT_OR_STOCK
def test_the_policys_key_is_on_no_command_line_in_no_log_and_in_no_answer(ray, tmp_path, mark):
    with answering(completion("6")) as policy_url, nemo(ray=ray) as gym:
        head_url = gym.start(**POLICY | {"policy_url": policy_url}, run_dir=tmp_path)
        urls = {entry["process_name"]: entry["url"] for entry in httpx.get(f"{head_url}/server_instances").json()}
        assert httpx.post(f"{urls[AGENT]}/run", json=row(), timeout=30).status_code == 200, "the key was used"
        assert httpx.post(f"{urls[AGENT]}/run", json={}, timeout=30).status_code == 422
        command_lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive(mark)]
        assert len(command_lines) >= 2
        assert SECRET not in httpx.get(f"{head_url}/global_config_dict_yaml").text
    assert not any(SECRET.encode() in line for line in command_lines)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert tmp_path / "nemo_gym.log" in written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


@pytest.mark.gym
def test_a_second_start_is_refused_and_the_first_goes_on(tmp_path):
    gym = nemo()
    with started(gym, tmp_path) as head_url:
        with pytest.raises(GymStartError, match="started already"):
            gym.start(**POLICY, run_dir=tmp_path)
        assert gym.poll() is None
        assert httpx.get(head_url).status_code == 200


@pytest.mark.gym
def test_two_gyms_of_one_run_directory_start_and_run_side_by_side(tmp_path):
    config = own_server(tmp_path / "mine")
    with nemo(config) as one, nemo(config) as other, ThreadPoolExecutor() as threads:
        starting = [threads.submit(gym.start, **POLICY, run_dir=tmp_path / "run") for gym in (one, other)]
        head_urls = {start.result() for start in starting}
        assert len(head_urls) == 2
        assert [httpx.get(url).status_code for url in head_urls] == [200, 200]


# -- what is left


@pytest.mark.gym
@LIGHT_OR_STOCK
def test_a_server_that_dies_is_noticed_and_takes_the_others_with_it(ray, tmp_path, mark):
    gym = nemo(ray=ray)
    with started(gym, tmp_path) as head_url:
        assert gym.poll() is None
        resources_server = httpx.get(f"{head_url}/server_instances").json()[0]["pid"]
        os.kill(resources_server, signal.SIGKILL)
        assert within(20, lambda: gym.poll() is not None)
        assert gym.poll() != 0
        assert within(1, lambda: not alive(mark))


@pytest.mark.gym
@LIGHT_OR_STOCK
def test_closing_leaves_no_process_and_closing_again_is_fine(ray, tmp_path, mark):
    gym = nemo(ray=ray)
    gym.close()
    with started(gym, tmp_path):
        assert len(alive(mark)) >= (10 if ray else 2)
        start = time.monotonic()
        gym.close()
        assert time.monotonic() - start < (20 if ray else 5)
        assert alive(mark) == []
        assert gym.poll() == 0, "it ended by itself, not by force"


@pytest.mark.gym
@LIGHT_OR_STOCK
def test_nothing_is_left_after_the_trainer_was_killed(ray, tmp_path, mark):
    options = {"config_paths": [CONFIG], "python": str(PYTHON), "ray": ray}
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, json.dumps([options, POLICY, str(tmp_path)])],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert trainer.stdout.readline().startswith("http://")
        assert len(alive(mark)) > 2
        trainer.kill()
        trainer.wait()
        assert within(20 if ray else 5, lambda: not alive(mark)), alive(mark)
    finally:
        trainer.kill()
        trainer.communicate()


# -- what a head server is asked, against a head server that says what the test wants


@contextmanager
def serving(answers):
    """An HTTP server that answers with the JSON of `answers` by path; its URL."""
    with json_server(lambda _, path, *__: (200 if path in answers else 404, answers.get(path))) as url:
        yield url


@contextmanager
def answering(reply):
    """A policy that always gives the same completion; its URL."""
    with serving({"/v1/chat/completions": reply[1]}) as url:
        yield f"{url}/v1"


def gym_config(**settings):
    model_server = {
        "base_url": "${policy_base_url}",
        "api_key": "${policy_api_key}",
        "model": "${policy_model_name}",
        "return_token_id_information": True,
        "uses_reasoning_parser": True,
    }
    return {
        "policy_model": {"responses_api_models": {"vllm_model": model_server | settings}},
        "judge_model": {"responses_api_models": {"openai_model": {"base_url": "http://judge/v1"}}},
        "policy_base_url": ["http://elsewhere/v1", POLICY["policy_url"] + "/"],
        "policy_api_key": SECRET,
        "policy_model_name": "policy",
        "head_server": {"host": "127.0.0.1", "port": 1},
    }


def check(config):
    with serving({"/global_config_dict_yaml": yaml.safe_dump(config)}) as url:
        Head(url).check_policy(**POLICY)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"base_url": "http://localhost:9/v1"},
        {"base_url": POLICY["policy_url"], "model": "policy", "api_key": "${oc.env:SOMEWHERE}"},
    ],
)
def test_a_model_server_that_asks_our_endpoint_is_accepted(settings):
    check(gym_config(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": "http://127.0.0.1:10/v1"}, r"no model server .*:9/v1; they ask .*:10/v1.*policy_base_url=http"),
        ({"base_url": None}, "no model server"),
        ({"return_token_id_information": False}, "return_token_id_information=False.*set it to true"),
        ({"return_token_id_information": None}, "return_token_id_information=None"),
        ({"uses_reasoning_parser": False}, "uses_reasoning_parser=False.*set it to true"),
        ({"model": "gpt"}, "asks for the model 'gpt' and ours is 'policy': set policy_model_name"),
        ({"api_key": "another"}, "another key than our endpoint"),
        ({"model": "${model}"}, "asks for the model None"),
    ],
)
def test_a_setting_of_the_model_server_that_training_cannot_use_is_named_with_its_remedy(settings, said):
    with pytest.raises(GymStartError, match=said) as raised:
        check(gym_config(**settings))
    assert SECRET not in str(raised.value)


def test_an_agent_that_asks_another_model_is_warned_about(caplog):
    agents = {
        name: {"responses_api_agents": {"simple_agent": {"model_server": {"name": model}}}}
        for name, model in (("trained_agent", "policy_model"), ("judged_agent", "judge_model"))
    }
    check(gym_config() | agents)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lightning_gym")] == [
        "the agent judged_agent asks judge_model, which is not the policy being trained"
    ]


@pytest.mark.parametrize("told", ["a: [", "just words", None])
def test_a_configuration_that_is_none_is_refused(told):
    with (
        serving({"/global_config_dict_yaml": told}) as url,
        pytest.raises(GymStartError, match="global_config_dict_yaml"),
    ):
        Head(url).check_policy(**POLICY)


@pytest.mark.parametrize("answers", [{}, {"/server_instances": {"error": 1}}, {"/server_instances": []}])
def test_what_is_no_head_server_cannot_be_attached_to(answers, tmp_path):
    with (
        serving(answers) as url,
        pytest.raises(GymStartError, match=r"does not answer as a Gym head server .* is Gym running\?"),
    ):
        AttachedGym(url, timeout_s=0.2).start(**POLICY, run_dir=tmp_path)


def test_a_server_that_the_head_lists_and_that_does_not_answer_is_named(tmp_path):
    with serving({}) as here:
        instances = [
            {"process_name": "here", "url": here},
            {"process_name": "gone", "url": "http://127.0.0.1:9"},
        ]
        with (
            serving({"/server_instances": instances}) as url,
            pytest.raises(GymStartError, match=r"server gone does not answer at http://127\.0\.0\.1:9"),
        ):
            AttachedGym(url, timeout_s=0.3).start(**POLICY, run_dir=tmp_path)


# -- all of it together


@pytest.mark.gym
@pytest.mark.vllm
def test_the_demos_policy_trains_on_real_gym_from_the_reward_that_was_predicted(tmp_path, mark):
    from lightning_gym.tiny_policy.build import TinyPolicy

    warm_start = TinyPolicy(environment="counter", seed=0).ensure(ROOT / "outputs" / "tiny_policy")
    arguments = ["counter", "gym=nemo_light", "trainer.max_steps=3"]
    arguments += [f"warm_start={warm_start}", f"output_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_gym.cli", "train", *arguments],
        cwd=ROOT,
        env=os.environ | {"LIGHTNING_GYM_GYM_PYTHON": str(PYTHON)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rollouts"] == 3 * 64
    assert summary["misaligned"] == summary["dropped"] == 0
    assert summary["max_logprob_diff"] <= 1e-4
    assert abs(summary["reward_first"] - summary["reward_predicted"]) < 0.2, "64 rollouts: three standard errors"
    assert within(5, lambda: not alive(mark))
