"""A measurement, and how it is shown: a Markdown table for `RESULTS.md`, or JSON."""

import datetime as dt
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gym.report import versions


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a benchmark found."""

    name: str
    what: str
    """One sentence: what was done, how often, and what the figures are (median, minimum, one run)."""
    rows: Sequence[Mapping[str, Any]]
    """Equal keys in every row."""


def show(measurement: Measurement, *, as_json: bool) -> None:
    """Print it."""
    context = {
        "command": f"lightning-gym bench {measurement.name}",
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "cpu": _cpu(),
        "load_1min": round(os.getloadavg()[0], 1),
        "versions": versions(),
    }
    if as_json:
        print(json.dumps({"name": measurement.name, "what": measurement.what, "rows": measurement.rows, **context}))
        return
    columns = list(measurement.rows[0])
    lines = [
        f"### {measurement.name}",
        "",
        measurement.what,
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in measurement.rows),
        "",
        f"`{context['command']}`, {context['date']}, {context['cpu']}, load {context['load_1min']} at the end, "
        + ", ".join(f"{name} {version}" for name, version in context["versions"].items()),
        "",
    ]
    print("\n".join(lines))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{os.cpu_count()} x {model}"
