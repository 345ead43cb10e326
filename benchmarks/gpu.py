"""Proves and measures the CUDA path on one GPU: ``python -m benchmarks.gpu [SECTION ...] [--smoke] [--out FILE]``.

Every section runs in a process of its own for at most `SECTION_TIMEOUT_S` and is merged into one JSON file when it is
over, so that a call may run some of them and a later one the rest; then the table of all that is in the file is
printed. Nothing is downloaded. ``--smoke`` runs the same code on CPU at toy sizes, with ``--fake-engine`` without vLLM;
its figures mean nothing.
"""

import argparse
import datetime as dt
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._gpu import FULL, SMOKE
from benchmarks._gpu_sections import SECTIONS
from benchmarks.table import Measurement, show

ON_REQUEST = True  # `lightning-gym bench all` leaves it out
SECTION_TIMEOUT_S = 480.0
OUT = Path("outputs/gpu.json")


def measure() -> Measurement:
    """All sections; on a machine without a GPU at toy sizes."""
    import torch

    smoke = not torch.cuda.is_available()
    return measurement(run(list(SECTIONS), OUT.with_stem("gpu-smoke") if smoke else OUT, smoke=smoke))


def run(names: Sequence[str], out: Path, *, smoke: bool, fake_engine: bool = False) -> dict[str, Any]:
    """Run sections and merge them into the file.

    Returns:
        What the file holds afterwards: the device, and for each section its rows, seconds, date and error.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    merged: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"sections": {}}
    if merged.get("smoke", smoke) != smoke:
        raise SystemExit(f"{out} holds figures of {'a GPU' if smoke else 'a smoke run'}; give another --out")
    merged |= {"smoke": smoke, "device": _device(smoke=smoke)}
    for name in names:
        start = time.perf_counter()
        rows, error = _section(name, smoke=smoke, fake_engine=fake_engine)
        merged["sections"][name] = {
            "rows": rows,
            "error": error,
            "seconds": round(time.perf_counter() - start, 1),
            "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        }
        out.write_text(json.dumps(merged, indent=1))
    return merged


def measurement(merged: dict[str, Any]) -> Measurement:
    """The table of a merged file, in the order of the sections."""
    found = merged["sections"]
    rows: list[dict[str, Any]] = []
    for name in SECTIONS:
        if name in found:
            rows += found[name]["rows"]
            if found[name]["error"]:
                rows.append(_failed(name, found[name]["error"].strip().splitlines()[-1]))
    toy = " At toy sizes on CPU: only that it runs is told." if merged["smoke"] else ""
    spent = ", ".join(f"{name} {found[name]['seconds']:.0f} s" for name in SECTIONS if name in found)
    return Measurement(
        name="gpu", what=f"{merged['device']}. Medians; random weights unless said.{toy} Sections: {spent}.", rows=rows
    )


def _section(name: str, *, smoke: bool, fake_engine: bool) -> tuple[list[dict[str, Any]], str | None]:
    options = [option for option, on in (("--smoke", smoke), ("--fake-engine", fake_engine)) if on]
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", name, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECTION_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return [], f"not over after {SECTION_TIMEOUT_S:.0f} s"
    if done.returncode:
        return [], done.stderr[-4000:] or f"ended with {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1]), None


def _failed(name: str, why: str) -> dict[str, Any]:
    return {"section": name, "model": "", "what": "FAILED", "value": why, "wanted": "", "holds": "NO"}


def _device(*, smoke: bool) -> str:
    import torch

    if smoke:
        return "CPU"
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --smoke runs the sections on CPU, at toy sizes")
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on CPU")
    parser.add_argument("--fake-engine", action="store_true", help="with --smoke: without vLLM")
    parser.add_argument("--out", type=Path, default=None, help=f"the JSON file; {OUT} by default")
    parser.add_argument("--inside", default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside is not None:
        scale = replace(SMOKE, fake_engine=asked.fake_engine) if asked.smoke else FULL
        print(json.dumps(SECTIONS[asked.inside](scale)))
        return
    if asked.fake_engine and not asked.smoke:
        parser.error("--fake-engine is for --smoke")
    if unknown := [name for name in asked.sections if name not in SECTIONS]:
        parser.error(f"there is no section {', '.join(unknown)}; choose of {', '.join(SECTIONS)}")
    out = asked.out or (OUT.with_stem("gpu-smoke") if asked.smoke else OUT)
    merged = run(asked.sections or list(SECTIONS), out, smoke=asked.smoke, fake_engine=asked.fake_engine)
    show(measurement(merged), as_json=False)
    if any(section["error"] for section in merged["sections"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
