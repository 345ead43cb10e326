"""What imports what: nothing heavy on `import lightning_gym`, and inside the package only upwards."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import lightning_gym

ROOT = Path(__file__).parents[1]

HEAVY = {"accelerate", "lightning", "torch", "uvicorn", "vllm"}

# A module may import those above it. light_host and errors import nothing of ours, so they stand first.
ORDER = [
    "gym.light_host",
    "errors",
    "offline",
    "memory_budget",
    "ranks",
    "rollout",
    "outcome",
    "scores",
    "advantages",
    "metrics",
    "gym.number_arrays",
    "gym.wire",  # above tasks, which reads dataset rows by Gym's key names
    "tasks",
    "gym.environments",
    "gym.conversion",
    "gym.policy_client",
    "gym.agent_loop",
    "gym.supervisor",
    "gym.ready",
    "gym.client",
    "gym.recovery",
    "gym.head",
    "gym.servers",
    "gym.embedded_server",
    "gym.embedded",
    "policy.engine",
    "policy.parsers",
    "policy.control_tokens",
    "policy.vllm_private",
    "policy.vllm_weights",
    "policy.vllm_parsers",
    "policy.vllm_arguments",
    "policy.vllm_engine",
    "policy.tail",
    "policy.chat",
    "policy.conversation",
    "policy.ledger",
    "policy.breaks",
    "policy.splice",
    "policy.inbox",
    "policy.retries",
    "policy.replies",
    "policy.openapi",
    "policy.requests",
    "policy.completion",
    "policy.service",
    "policy.app",
    "policy.endpoint",
    "reconcile",
    "progress",
    "collection",
    "collect",
    "open_collection",
    "trajectory",
    "model_dir",
    "rollout_log",
    "packing",
    "batch",
    "trainer_logprobs",
    "tokens",
    "mismatch",
    "window_metrics",
    "losses",
    "corrections",
    "penalties",
    "packed_attention",
    "lm_head",
    "liger",
    "logprobs",
    "reference",
    "policy_checks",
    "sharding",
    "model_files",
    "weights",
    "manifest",
    "canary",
    "ladder",
    "copying",
    "sync",
    "comparison",
    "colocation",
    "played",
    "resume",
    "stream",
    "evaluation",
    "replay",
    "export",
    "preconditions",
    "validation",
    "sigterm",
    "callback",
    "datamodule",
    "module",
    "loop",
    "conf_path",
    "configuration",
    "validate",
    "validate_training",
    "template_traits",
    "doctor",
    "report",
    "viewer.run_dir",
    "viewer.selection",
    "viewer.token_texts",
    "viewer.contents",
    "viewer.report",
    "fake_engine",
    "fake_gym",
    "testing",
    "template_families",
    "tiny_policy.demonstrations",
    "tiny_policy.sft",
    "tiny_policy.measure",
    "tiny_policy.build",
    "gym_policy.environments",
    "gym_policy.demonstrations",
    "gym_policy.build",
    "plan",
    "serve",
    "evaluation_run",
    "generation_run",
    "train",
    "cli",
]


# -- what `import lightning_gym` costs


def heavy_after(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter holds after `statement`."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return HEAVY & {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_importing_the_package_imports_nothing_heavy():
    assert heavy_after("import lightning_gym; dir(lightning_gym); lightning_gym.__all__") == set()


def test_control_the_check_sees_torch_behind_another_module():
    assert heavy_after("import safetensors.torch") == {"torch"}


# -- the public names


def test_public_names_are_sorted_and_said_once_each():
    source = ast.parse(Path(lightning_gym.__file__).read_text())
    typed = {
        alias.name: node.module
        for block in source.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert lightning_gym.__all__ == sorted(lightning_gym.__all__)
    assert typed == lightning_gym._MODULE_OF
    assert set(lightning_gym.__all__) == set(typed)
    assert set(lightning_gym.__all__) <= set(dir(lightning_gym))


def test_a_public_name_is_found_when_asked_for_and_an_unknown_one_is_refused():
    assert lightning_gym.Environment.__module__ == "lightning_gym.gym.environments"
    with pytest.raises(AttributeError, match="no attribute 'Enviroment'"):
        _ = lightning_gym.Enviroment


# -- imports point up


def imports_of_ours(source: str) -> Iterable[str]:
    """Module names below `lightning_gym` that `source` imports anywhere, type-checking blocks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "lightning_gym")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"a relative import of {node.module or node.names[0].name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lightning_gym":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name.removeprefix("lightning_gym.") in ORDER else str(node.module) for name in names)


def wrong_imports(sources: Mapping[str, str]) -> list[str]:
    """Sentences about every module of `sources` (name below the package -> text) that breaks the order."""
    problems = []
    for module, source in sources.items():
        if module not in ORDER:
            problems.append(f"{module} is not in ORDER: add it (tests/test_imports.py) right below what it imports")
            continue
        above = ORDER[: ORDER.index(module)]
        for imported in imports_of_ours(source):
            target = imported.removeprefix("lightning_gym.")
            if target not in ORDER:
                problems.append(f"{module} imports {imported}: name the module of ORDER that makes what is needed")
            elif target not in above:
                problems.append(f"{module} imports {target}, which is not above it in ORDER")
    return problems


def sources_of_the_package() -> dict[str, str]:
    package = ROOT / "lightning_gym"
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path.read_text()
        for path in sorted(package.rglob("*.py"))
        if path.name != "__init__.py"
    }


def test_imports_inside_the_package_point_up():
    assert wrong_imports(sources_of_the_package()) == []


def test_packages_inside_the_package_import_nothing_of_ours():
    for path in (ROOT / "lightning_gym").rglob("*/__init__.py"):
        assert list(imports_of_ours(path.read_text())) == [], path


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("rollout", "from lightning_gym.errors import ConfigError", None),
        ("policy.endpoint", "from lightning_gym.gym import wire", None),
        ("gym.wire", "from lightning_gym.policy.engine import Engine", "gym.wire imports policy.engine"),
        ("errors", "def late():\n    import lightning_gym.cli", "errors imports cli"),
        ("batch", "from lightning_gym import losses", "batch imports losses"),
        ("cli", "from lightning_gym import GymCallback", "cli imports lightning_gym: name the module"),
        ("batch", "from .losses import grpo", "batch imports a relative import of losses"),
        ("utils", "", "utils is not in ORDER"),
    ],
)
def test_control_the_order_check_tells_right_from_wrong(module, source, said):
    problems = wrong_imports({module: source})
    assert problems == [] if said is None else problems[0].startswith(said)


# -- what the repository may not mention

MACHINE = re.compile(r"(?<![\w.])/(?:work|root)/|pypi\.(?:org|python)|pythonhosted\.|download\.pytorch\.")
TORCH_CPU_INDEX = re.compile(r"^TORCH_CPU_INDEX := \S+$", re.MULTILINE)
"""The one line that may: PyPI carries no CPU build of torch."""


def files_of_the_repository() -> list[Path]:
    """Tracked files, and new ones that nothing ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine_or_a_package_index():
    for path in files_of_the_repository():
        text = path.read_text(errors="replace")
        if path.name == "Makefile":
            text = TORCH_CPU_INDEX.sub("", text)
        if path.suffix == ".md":
            assert "/tmp/" not in text, path
        assert MACHINE.search(text) is None, path


@pytest.mark.parametrize("text", ["see /" + "root/x", "cd /" + "work/main", "https://pypi." + "org/simple"])
def test_control_the_pattern_finds_what_it_is_for(text):
    assert MACHINE.search(text)
