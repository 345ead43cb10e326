"""The wheel is the product: built, installed outside the checkout, and what a user does first is done with it."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out], cwd=ROOT, check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel in it; its dependencies are this one's, and the checkout is not among them."""
    directory = tmp_path_factory.mktemp("user") / "venv"
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    (site,) = directory.glob("lib/python3*/site-packages")
    # A path that a .pth file names is searched, but .pth files in there (the editable install's) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory


def run(installed, directory, *arguments, expected=0):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [installed / "bin" / "lightning-gym", *map(str, arguments)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == expected, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_the_wheel_holds_the_package_its_configuration_and_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_gym", "hydra_plugins"}
    shipped = {name.removeprefix("lightning_gym/conf/") for name in names if name.startswith("lightning_gym/conf/")}
    assert shipped == {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    for needed in ("py.typed", "chat_templates/qwen3.jinja", "model_configs/Qwen--Qwen3-4B-Instruct-2507.json"):
        assert f"lightning_gym/{needed}" in names


def test_the_installed_package_is_the_wheels(installed, tmp_path):
    code = "import lightning_gym; print(lightning_gym.__file__)"
    python = installed / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(installed)


def test_a_benchmarks_recipe_can_be_planned_with_the_wheel_alone(installed, tmp_path):
    said = run(installed, tmp_path, "train", "workplace_assistant", "--dry-run", expected=1)
    assert "4.02 B parameters" in said
    assert "hf download nvidia/Nemotron-RL-agent-workplace_assistant" in said


def test_bench_says_that_it_needs_a_checkout(installed, tmp_path):
    assert "run from a checkout" in run(installed, tmp_path, "bench", "splice", expected=1)


@pytest.mark.vllm
def test_a_user_of_the_wheel_trains_a_recipe_with_two_commands(installed, tmp_path):
    small = ("--sft-steps", 20, "--measured-rollouts", 16, "--train-rows", 64, "--validation-rows", 8)
    assert "starting reward" in run(installed, tmp_path, "warm-start", "counter", *small)
    said = run(installed, tmp_path, "train", "recipe=counter", "trainer.max_steps=2")
    summary = json.loads((tmp_path / "outputs" / "counter" / "summary.json").read_text())
    assert (summary["steps"], summary["rollouts"], summary["misaligned"]) == (2, 128, 0)
    assert said.strip()
