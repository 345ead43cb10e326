"""Run directories for the viewer's tests: written by the run's own log, with all that can go wrong in a rollout."""

import random
from pathlib import Path

import numpy as np

from lightning_gym.rollout import Call, Failure, FailureKind, Misaligned, Misalignment, Rollout, SpliceBreak
from lightning_gym.rollout_log import RolloutLog
from lightning_gym.testing import tiny_tokenizer
from lightning_gym.trajectory import Trajectory, trajectories
from lightning_gym.viewer.report import write_report

HOSTILE = (
    "<img src=x onerror=\"window.ran='img'\"></script><script>window.ran='script'</script><!-- <b>größe</b> 日本 🙂"
)
ENVIRONMENTS = ("counter", "reverse_string")
BREAK = SpliceBreak(
    kind="edited_history",
    call_index=1,
    detail="message 2: the earlier turn had ('assistant', '<think>add</think>'), this request has ('assistant', '')",
    token_offset=6,
    expected_text="<|im_start|>assistant\n<think>add them up</think>\n14<|im_end|>",
    got_text="<|im_start|>assistant\n14<|im_end|>",
    likely_rule="earlier reasoning dropped",
)


class RunWriter:
    """Writes a run step by step.

    Args:
        path: the run's directory; its tokenizer is put into ``model`` inside.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer = tiny_tokenizer()
        self.tokenizer.save_pretrained(path / "model")
        self.log = RolloutLog(path / "rollouts.jsonl", path / "model")
        self._random = random.Random(0)
        self._trainer: list[str] = []

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def calls(self, *segments, step=0) -> list[Call]:
        """The calls of segments of turns, texts that are context and sampled by turns, beginning with context."""
        calls: list[Call] = []
        for turns in segments:
            fed: list[int] = []
            for context, sampled in zip(turns[::2], turns[1::2], strict=True):
                fed = [*fed, *self.ids(context)]
                ids = self.ids(sampled)
                logprobs = np.array([-self._random.expovariate(2) for _ in ids], dtype=np.float32).tolist()
                calls.append(
                    Call(
                        index=len(calls),
                        prompt_ids=fed,
                        token_ids=ids,
                        logprobs=logprobs,
                        finish_reason="stop",
                        weight_version=step,
                    )
                )
                fed = [*fed, *ids]
        return calls

    def segments(self, rollout: Rollout, *, step=0) -> list[Trajectory]:
        """A rollout's segments; what the trainer computed for them is noted."""
        found = trajectories(rollout)
        for one in found:
            logprobs = one.rollout_logprobs[one.loss_mask]
            self._trainer.append(self._line(rollout.rollout_id, one.segment, step, logprobs))
        return found

    def _line(self, rollout_id, segment, step, logprobs) -> str:
        gaps = [value + self._random.gauss(0, 1) * 10 ** self._random.uniform(-6, -2) for value in logprobs.tolist()]
        values = ",".join(f"{value:.6f}" for value in gaps)
        return f'{{"step":{step},"rollout_id":"{rollout_id}","segment":{segment},"logprobs":[{values}]}}\n'

    def steps(self, count, *, prompts=8, group_size=8) -> None:
        """Write `count` steps of two environments; some attempts fail, are cut off, or break."""
        for step in range(count):
            for prompt in range(prompts):
                group = [self._attempt(step, step * prompts + prompt, attempt) for attempt in range(group_size)]
                rewards = {rollout.rollout_id: rollout.reward for rollout, _ in group if rollout.reward is not None}
                mean = sum(rewards.values()) / max(1, len(rewards))
                self.log.write(
                    step,
                    [rollout for rollout, _ in group],
                    {rollout.rollout_id: segments for rollout, segments in group},
                    {rollout_id: reward - mean for rollout_id, reward in rewards.items()},
                )

    def _attempt(self, step, group_id, attempt):
        rollout_id = f"run.{step}.train.{group_id}.{attempt}.0"
        kind = (step * 31 + group_id * 7 + attempt * 3) % 41
        first, second = self._random.randrange(10), self._random.randrange(10)
        asked = f"add {first} then add {second} then get the count" + (f" {HOSTILE}" if kind == 7 else "")
        said = (
            f'<tool_call>\n{{"name": "increment_counter", "arguments": {{"count": {first}}}}}\n</tool_call><|im_end|>'
        )
        turns = [
            f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n",
            said,
            '\n<|im_start|>tool\n{"success": true}<|im_end|>\n<|im_start|>assistant\n',
            f"{first + second}" + (HOSTILE if kind == 7 else "") + "<|im_end|>",
        ]
        failure = self._failure(kind)
        broken = kind == 17
        cut = [turns[:2], [turns[0], turns[3]]] if broken else [turns]
        rollout = Rollout(
            rollout_id=rollout_id,
            task_index=group_id % 5,
            group_id=group_id,
            attempt=attempt,
            agent=ENVIRONMENTS[group_id % 2],
            reward=None if failure else float(self._random.random() < 0.3 + step / 60),
            truncated=kind == 11,
            seconds=self._random.uniform(0.5, 4),
            breaks=(BREAK,) if broken else (),
            failure=failure,
            calls=self.calls(*cut, step=step) if failure is None else (),
            metrics={"steps": 2.0},
            reward_components={"exact": 0.5} if kind == 5 else {},
            masked=kind == 3,
            prompt=[{"role": "user", "content": asked, "type": "message"}],
            output=[
                {"type": "function_call", "name": "increment_counter", "arguments": f'{{"count": {first}}}'},
                {"type": "function_call_output", "output": '{"success": true}'},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": turns[3]}]},
            ],
        )
        return rollout, self.segments(rollout, step=step)

    def _failure(self, kind):
        if kind == 23:
            return Failure(kind=FailureKind.TIMEOUT, message=f"no answer within 600 s: {HOSTILE}")
        if kind == 29:
            return Misaligned(message="call 1 came back with ids that were never served", how=Misalignment.NOT_SERVED)
        return None

    def long_rollout(self, num_tokens, *, step=0) -> None:
        """One rollout of so many tokens: a long context, and a long answer."""
        words = self.ids("the quick brown fox jumps over the lazy dog and counts ")
        many = self.tokenizer.decode((words * (num_tokens // 2 // len(words) + 1))[: num_tokens // 2])
        rollout = Rollout(
            rollout_id="long",
            task_index=0,
            group_id=10**6,
            attempt=0,
            agent="counter",
            reward=0.5,
            calls=self.calls([many, many], step=step),
        )
        self.log.write(step, [rollout], {"long": self.segments(rollout, step=step)}, {"long": 0.0})

    def close(self, *, metrics=True) -> None:
        self.log.close()
        (self.path / "trainer_logprobs.jsonl").write_text("".join(self._trainer))
        if metrics:
            self.write_metrics(30)

    def write_metrics(self, count) -> None:
        names = [
            "step",
            "epoch",
            "rollout/reward_mean",
            "train/logprob_diff_max",
            "train/loss",
            "val/reward_mean",
            "val/<b>",
            "val/pass_at_4",
        ]
        names += [f"time/{phase}_s" for phase in ("sync", "collect", "prepare", "train")]
        lines = [",".join(names)]
        for step in range(count):
            values = [step, 0, 0.3 + step / 60, 10 ** self._random.uniform(-6, -5), 0.1 * self._random.random()]
            values += [step / 100, step / 90, step / 80] if step % 5 == 0 else ["", "", ""]
            values += [0.05, 2 + self._random.random(), 0.02, 1.2]
            lines.append(",".join(map(str, values)))
        (self.path / "csv").mkdir(exist_ok=True)
        (self.path / "csv" / "metrics.csv").write_text("\n".join(lines) + "\n")


def report_of(path: Path) -> Path:
    return write_report(path)
