"""The report of a run as one HTML file that needs nothing else: no server, no network, no second file.

The scripts never turn text into markup, and a content security policy lets nothing run but them, by their hash. So what
a model or an environment wrote stays text.
"""

import base64
import hashlib
import html
import re
from pathlib import Path
from typing import Any

import msgspec

from lightning_gym.errors import ConfigError
from lightning_gym.viewer.contents import contents
from lightning_gym.viewer.run_dir import read_run_dir
from lightning_gym.viewer.selection import MAX_ROLLOUTS, select

_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("dom", "contents", "charts", "curves", "filters", "rollout_list", "tokens", "rollout", "main")


def write_report(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    max_rollouts: int = MAX_ROLLOUTS,
    step: int | None = None,
) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run_dir: the run's directory, with ``rollouts.jsonl`` or ``csv/metrics.csv`` or both.
        out: the file to write; ``None``: ``report.html`` in `run_dir`.
        model: directory whose tokenizer decodes the token ids; ``None``: the one that the run's log names.
        max_rollouts: hold at most this many, chosen evenly over the run.
        step: hold the rollouts of this optimizer step only.

    Returns:
        The path that was written.

    Raises:
        ConfigError: `run_dir` is not a run's, or `out` cannot be written.
    """
    run = read_run_dir(Path(run_dir))
    selection = select(run.entries, max_rollouts=max_rollouts, step=step)
    page = render(contents(run, selection, model=None if model is None else Path(model)))
    path = Path(run_dir) / "report.html" if out is None else Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page)
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {path}: {error.strerror}; name a file with --out"
        ) from error
    return path


def render(data: dict[str, Any]) -> bytes:
    """The page with its contents inside.

    Args:
        data: from `lightning_gym.viewer.contents.contents`.
    """
    script = "\n".join((_PAGE / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    style = (_PAGE / "page.css").read_text(encoding="utf-8")
    parts = {
        b"title": html.escape(data["name"]).encode(),
        b"policy": f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'".encode(),
        b"style": style.encode(),
        b"script": script.encode(),
        b"contents": embedded_json(data),
    }
    return re.sub(rb"\{\{(\w+)\}\}", lambda name: parts[name[1]], (_PAGE / "page.html").read_bytes())


def embedded_json(data: Any) -> bytes:
    r"""JSON that can stand inside a script element: no ``</script>`` and no ``<!--`` can come up in it.

    Example:
        >>> embedded_json({"text": "</script><!-- "})
        b'{"text":"\\u003c/script>\\u003c!-- "}'
    """
    return msgspec.json.encode(data).replace(b"<", b"\\u003c")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
