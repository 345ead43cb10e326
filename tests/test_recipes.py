"""Every recipe: composes at every scale, can be planned without a GPU, and does two steps on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate

from lightning_gym.configuration import absent_packages, compose_run, names_of
from lightning_gym.plan import plan_run
from lightning_gym.train import run

ROOT = Path(__file__).parent.parent
RECIPES = [name for name in names_of("recipe") if "/" not in name]  # gym/...: tests/test_gym_recipes.py
BENCHMARKS = ("dapo17k_aime24", "workplace_and_math", "workplace_assistant")
SCALES = ("1x80gb", "8x80gb", "2x8x80gb")
COMMAND = [sys.executable, "-m", "lightning_gym.cli", "train"]


def office_row(index):
    tool = {
        "type": "function",
        "name": "email_search_emails",
        "description": "Searches for emails.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        "strict": False,
    }
    return {
        "id": str(index),
        "responses_create_params": {
            "input": [{"role": "user", "content": f"find email {index}"}],
            "tools": [tool],
            "parallel_tool_calls": False,
        },
        "ground_truth": [{"name": "email_search_emails", "arguments": json.dumps({"query": str(index)})}],
        "category": "workplace_assistant_email",
        "environment_name": "workplace_assistant",
    }


def math_row(index):
    question = f"What is {index} + {index}? Put the answer inside \\boxed{{}}."
    return {
        "responses_create_params": {"input": [{"role": "user", "content": question}]},
        "question": question,
        "expected_answer": str(2 * index),
    }


def write_rows(path, row, *, agent=None):
    rows = [row(index) for index in range(5)]
    if agent is not None:
        rows = [one | {"agent_ref": {"type": "responses_api_agents", "name": agent}} for one in rows]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def data(tmp_path):
    """What each benchmark's recipe reads: five rows of the same schema."""
    office, maths = write_rows(tmp_path / "office.jsonl", office_row), write_rows(tmp_path / "math.jsonl", math_row)
    return {
        "workplace_assistant": [f"data.train={office}", f"data.val={office}"],
        "dapo17k_aime24": [f"data.train={maths}", f"data.val={maths}"],
        "workplace_and_math": [f"data.train=[{office},{maths}]"],
    }


@pytest.mark.parametrize("scale", [None, "cpu", "1x24gb", *SCALES])
@pytest.mark.parametrize("recipe", [*RECIPES, "gym/blend"])
def test_a_recipe_composes_at_every_scale_and_what_is_cheap_can_be_built(recipe, scale):
    cfg = compose_run([f"recipe={recipe}", *([] if scale is None else [f"trainer={scale}"])])
    instantiate(cfg.callback, _convert_="all")
    instantiate(cfg.data, _convert_="all")
    assert set(absent_packages(cfg)) <= {"peft.LoraConfig"}


# -- plans


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", BENCHMARKS)
def test_a_benchmark_is_planned_without_a_gpu_and_fits_every_scale_it_is_made_for(recipe, scale, data):
    plan = plan_run([f"recipe={recipe}", f"trainer={scale}", *data[recipe]])
    assert plan.problems == []
    assert plan.budget.total_bytes < plan.budget.device_bytes
    assert "4.02 B parameters" in dict(plan.facts)["model"]


def test_lora_on_one_24_gb_gpu_fits(data):
    plan = plan_run(["recipe=workplace_assistant", "trainer=1x24gb", *data["workplace_assistant"]])
    assert plan.problems == []
    assert "an adapter of 33.0 M that alone trains" in dict(plan.facts)["model"]


def test_an_engine_with_room_for_the_adapter_shares_the_base_with_the_trainer(data):
    lora = ["recipe=workplace_assistant", "trainer=1x24gb", *data["workplace_assistant"]]
    merged, apart = plan_run(lora), plan_run([*lora, "engine.max_lora_rank=16", "callback.sync_mode=adapter"])
    assert apart.problems == []
    assert merged.budget.total_bytes - apart.budget.total_bytes > 4e9 * 2 * 0.9, "4 B weights of bfloat16 less"
    narrow = plan_run([*lora, "engine.max_lora_rank=8", "callback.sync_mode=adapter"])
    assert any("engine.max_lora_rank of at least its rank" in problem for problem in narrow.problems)


def test_a_plan_leaves_the_choice_of_a_correction_to_the_run_that_plays_ahead(data):
    plan = plan_run(["recipe=counter", "data.max_lag=1", "policy.correction=null"])
    assert not [problem for problem in plan.problems if "correction" in problem]


def test_a_plan_says_which_memory_is_too_much(data):
    plan = plan_run(["recipe=workplace_assistant", *data["workplace_assistant"], "engine.kv_cache_memory_bytes=60e9"])
    assert "of a device's 79.0" in plan.problems[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.prompts_per_step=63", "63, which 8 ranks cannot share equally"),
        ("engine.max_model_len=65536", "engine.max_model_len = 65536 tokens, and a micro-batch takes"),
        ("engine.max_model_len=300000", "the model has 262144 positions"),
        ("policy.loss=grpoo", "grpoo"),
        ("policy.model=nobody/nothing", "nobody/nothing is not on this machine"),
        ("gym.config_paths=[]", "config_paths: expected a list of at least one path"),
        ("data.agent=null", "expected `agent_ref`"),
    ],
)
def test_a_plan_says_what_would_stop_the_run(data, override, said):
    plan = plan_run(["recipe=workplace_assistant", *data["workplace_assistant"], override])
    assert any(said in problem for problem in plan.problems), plan.text()
    assert "ready to start" not in plan.text()


def test_the_dry_run_ends_with_a_status_and_says_how_to_get_what_is_missing(data):
    ready = subprocess.run(
        [*COMMAND, "workplace_assistant", "--dry-run", *data["workplace_assistant"]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ready.returncode == 0, ready.stderr
    assert ready.stdout.splitlines()[-1] == "ready to start"
    missing = subprocess.run(
        [*COMMAND, "workplace_assistant", "data.train=no.jsonl", "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 1
    assert "hf download nvidia/Nemotron-RL-agent-workplace_assistant" in missing.stdout


# -- two steps on a CPU

ONE_PROMPT = ["data.prompts_per_step=1", "data.group_size=2", "trainer.max_steps=2", "trainer=cpu", "model=tiny"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_does_two_steps_with_the_fakes(recipe, tmp_path):
    def row(index):
        """Of the recipe's own schema, and with what the fake Gym's game verifies beside it."""
        own = {"workplace_assistant": office_row, "dapo17k_aime24": math_row}.get(recipe, office_row)(index)
        return own | {"expected_count": index, "initial_count": 0}

    rows = write_rows(tmp_path / "rows.jsonl", row, agent="example_session_state_mgmt_simple_agent")
    summary = run(
        compose_run(
            [
                f"recipe={recipe}",
                *ONE_PROMPT,
                f"data.train={rows}",
                "data.agent=null",
                "data.agent_weights=null",
                "data.val=null",
                "engine=fake",
                "gym=fake",
                "gym.environments=[counter]",
                "engine.max_model_len=4096",
                "sampling.max_output_tokens=4",
                "warm_start=null",
                "trainer.enable_progress_bar=false",
                f"output_dir={tmp_path / 'run'}",
            ]
        )
    )
    assert (summary["steps"], summary["rollouts"], summary["misaligned"]) == (2, 4, 0)


# -- on the real engine and real Gym


def example_rows(resources_server):
    """The rows that Gym's wheel ships for an environment."""
    found = list((ROOT / ".venv-gym").glob(f"lib/python3*/site-packages/resources_servers/{resources_server}"))
    return found[0] / "data" / "example.jsonl"


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.gym
@pytest.mark.parametrize(
    ("recipe", "resources_servers"),
    [
        ("workplace_assistant", ["workplace_assistant"]),
        ("dapo17k_aime24", ["math_with_judge"]),
        ("workplace_and_math", ["workplace_assistant", "math_with_judge"]),
    ],
)
def test_a_benchmark_does_two_steps_on_real_gym_and_vllm_with_the_rows_of_its_wheel(
    recipe, resources_servers, tmp_path
):
    files = []
    for name in resources_servers:
        rows = [json.loads(line) for line in example_rows(name).read_text().splitlines()]
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows.__getitem__))
    source = files[0] if len(files) == 1 else f"[{','.join(map(str, files))}]"
    prompts = f"data.prompts_per_step={len(files)}"
    rows = [f"data.train={source}", "data.val=null"]
    command = [*COMMAND, recipe, *ONE_PROMPT[1:], prompts, *rows, f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["rollouts"]) == (2, 4 * len(files))
    assert summary["misaligned"] == summary["dropped"] == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()[1:]]
    assert len(log) == 4 * len(files)
