"""What README, documentation and recipes show is true: code runs, commands compose, links lead somewhere."""

import doctest
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gym
from lightning_gym.cli import _overrides
from lightning_gym.configuration import compose_run

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/README.md")])
    if path.name not in ("changelog.md", "contributing.md")
}
BLOCK = re.compile(
    r"^(?P<note><!-- not runnable here: [^\n]+ -->\n)?```(?P<language>\S*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page, language):
    """Code of the page's blocks in a language, those apart that say why they cannot run here."""
    found = [match for match in BLOCK.finditer(PAGES[page]) if match["language"] == language]
    return [match["code"] for match in found if not match["note"]], [match["code"] for match in found if match["note"]]


PAGES_WITH_PYTHON = [page for page in PAGES if blocks(page, "python")[0]]


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for code in blocks(page, "python")[0]:
        if code.startswith(">>> "):
            test = parser.get_doctest(code, names, page, page, 0)
            said = []
            runner.run(test, out=said.append, clear_globs=False)
            names = test.globs
            assert not runner.failures, "".join(said)
        else:
            exec(compile(code, page, "exec"), names)  # noqa: S102  our own documentation


def test_blocks_that_do_not_run_are_few_and_name_things_that_exist():
    excused = [code for page in PAGES for code in blocks(page, "python")[1]]
    assert 0 < len(excused) <= 4
    for code in excused:
        for name in re.findall(r"^from lightning_gym import (.+)$", code, re.MULTILINE):
            assert {part.strip() for part in name.split(",")} <= set(lightning_gym.__all__)
        for called, arguments in re.findall(r"\b(\w+)\(([^()]*=[^()]*)\)", code):
            if called in lightning_gym.__all__:
                known = inspect.signature(getattr(lightning_gym, called)).parameters
                assert set(re.findall(r"(\w+)=", arguments)) <= known.keys(), called


@pytest.mark.full
@pytest.mark.vllm
def test_the_readmes_example_trains_as_printed():
    from lightning_gym.tiny_policy.build import TinyPolicy

    TinyPolicy(environment="counter", seed=0).ensure(ROOT / "outputs" / "tiny_policy")
    code = blocks("README.md", "python")[1][0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]


# -- commands


def train_commands():
    """Every complete ``lightning-gym train`` of the pages; placeholders are capitals, dots, or shell variables."""
    for page, text in PAGES.items():
        for match in re.finditer(r"lightning-gym train ([^`|\n#]+)", text):
            command = match[1].strip()
            if not re.search(r"\b[A-Z]{3,}\b|\.\.\.|[$({]|key=value|\.$", command):
                yield pytest.param(command, id=f"{page}: {command}")


@pytest.mark.parametrize("command", list(train_commands()))
def test_a_command_that_is_shown_composes(command):
    arguments = [word for word in shlex.split(command) if word != "--dry-run"]
    if "--cfg" not in arguments:
        compose_run(_overrides(arguments))


def test_control_there_are_commands_to_check():
    assert len(list(train_commands())) > 10


# -- links and names


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_inside_the_repository_lead_to_files(page):
    text = PAGES.get(page) or (ROOT / page).read_text()
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)\)", text):
        assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^([a-z-]+)$", PAGES["docs/index.md"], re.MULTILINE))
    pages = {path.stem for path in ROOT.glob("docs/*.md")} - {"index"}
    assert pages == listed


def missing_in_the_file_map(text):
    """Modules of the package that ``text`` does not name inside the folder they are in."""
    package, folder, named = ROOT / "lightning_gym", "", set()
    for line in text.splitlines():
        if match := re.match(r"( *)(\S+/)?", line):
            indent, opened = len(match[1]), match[2]
            folder = (opened or "") if indent == 2 else folder if indent > 2 else ""
        named |= {folder + name for name in re.findall(r"\b\w+\.py\b", line)}
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    return sorted(modules - named)


def test_every_module_is_in_the_file_map():
    text = PAGES["docs/file-map.md"]
    assert missing_in_the_file_map(text) == []
    # a name that two folders have is told apart
    assert missing_in_the_file_map(text.replace("report.py, run_dir.py", "run_dir.py")) == ["viewer/report.py"]


def test_every_public_name_is_in_the_api_page():
    api = PAGES["docs/api.md"]
    for name in lightning_gym.__all__:
        assert f"{lightning_gym._MODULE_OF[name]}.{name}" in api, name


def test_every_error_that_a_user_can_meet_is_in_the_documentation():
    from lightning_gym import errors

    told = PAGES["docs/failures.md"] + PAGES["docs/troubleshooting.md"]
    internal = {"LightningGymError", "GymError", "EngineError", "RequestAbortedError"}
    for name, value in vars(errors).items():
        if isinstance(value, type) and name not in internal:
            assert name in told, name
