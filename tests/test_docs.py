"""What the README shows is Python that works with this package."""

import ast
import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_import_of_a_python_block_exists(block):
    imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "README.md", "exec"), {})  # noqa: S102  our own README


def test_the_environment_of_the_readme_can_be_played():
    names = {}
    exec(next(block for block in BLOCKS if "class Dice" in block), names)  # noqa: S102  our own README
    dice = names["Dice"]({"responses_create_params": {"input": "roll"}})
    assert json.loads(dice.call_tool("roll", {"sides": 6})) == {"rolled": 6}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a 6"}]}
    assert dice.verify({"output": [said]}) == 1.0


def test_the_arguments_of_the_readme_exist():
    import inspect

    import lightning_gym

    for block in BLOCKS:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in lightning_gym.__all__:
                parameters = inspect.signature(getattr(lightning_gym, node.func.id)).parameters
                assert {keyword.arg for keyword in node.keywords} <= parameters.keys(), node.func.id
