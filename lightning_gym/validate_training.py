"""validate, the training side: from a rollout to the weights that sample the next one.

A set-up that passes has trained for one step: the engine's and the trainer's logprobs agree, the gradient comes from
the sampled tokens and from nothing else, and the engine samples from the weights that the step made.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from lightning_gym.batch import TrajectoryBatch, loss_weights, pack_window
from lightning_gym.callback import GymCallback
from lightning_gym.colocation import Colocation
from lightning_gym.configuration import compose_run
from lightning_gym.errors import LightningGymError
from lightning_gym.logprobs import token_logprobs
from lightning_gym.losses import Loss, reinforce
from lightning_gym.mismatch import mismatch_metrics
from lightning_gym.offline import stay_quiet
from lightning_gym.ranks import Ranks
from lightning_gym.rollout import Rollout
from lightning_gym.tasks import DealtTask, Task, read_tasks
from lightning_gym.trajectory import trajectories
from lightning_gym.validate import (
    Check,
    CheckFailedError,
    EndpointChecks,
    NotApplicableError,
    check_rollouts,
    run_check,
)

_ATTEMPTS = 2
_MAX_PROB_ERROR = 1.05  # NeMo RL's limit on the mean of exp |trainer - engine|
_STEP_SIZE = 0.02  # of the weights' norm: far enough to be seen in every logprob, near enough to stay a language model
_SEEN = 1e-3
"""Nats."""
_GARBAGE = 123.0


class TrainingChecks:
    """Checks of a policy, its engine and its Gym, in this process. Changes the policy's weights.

    Args:
        model: the causal language model to be trained.
        colocation: not started; closed afterwards.
        tasks: few; each is played twice, and once more after the step.
        model_path: directory with config, tokenizer and chat template.
        run_dir: where the logs of Gym go.
        loss: whose gradient is looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        colocation: Colocation,
        tasks: Sequence[Task],
        *,
        model_path: Path,
        run_dir: Path,
        loss: Loss = reinforce,
    ) -> None:
        self._model = model
        self._colocation = colocation
        self._tasks = tasks
        self._model_path = model_path
        self._run_dir = run_dir
        self._loss = loss
        self._batch: TrajectoryBatch | None = None

    def run(self) -> list[Check]:
        """All of them; stops at the first without which the others mean nothing."""
        checks: list[Check] = []
        try:
            checks.append(run_check("training: start", self._start))
            if not checks[-1].passed:
                return checks
            checks.append(run_check("training: weights handed over", lambda: self._synced(0)))
            checks += self._endpoint()
            rollouts = self._play(_ATTEMPTS)
            checks += check_rollouts(rollouts)
            self._batch = self._pack(rollouts)
            checks.append(run_check("training: logprob parity", lambda: self._parity(self._the_batch())))
            checks.append(run_check("training: gradient", self._gradient))
            checks.append(run_check("training: weights after a step", self._step))
        except LightningGymError as error:
            remedy = "the checks above say what held until then"
            checks.append(Check(name="training: rollouts", passed=False, found=str(error), remedy=remedy))
        finally:
            self._colocation.close()
        return checks

    def _start(self) -> str:
        self._colocation.start(
            self._model, self._model_path, self._tasks, run_dir=self._run_dir, run_id="validate", ranks=Ranks()
        )
        seconds = self._colocation.start_seconds
        return f"engine in {seconds['engine']:.1f} s, Gym in {seconds['gym']:.1f} s; packed sequences do not mix"

    def _synced(self, version: int) -> str:
        self._colocation.ensure_synced(version)
        found = self._colocation.take_sync_metrics()
        return (
            f"{found['sync/bytes'] / 1e6:.1f} MB in {found['sync/copy_s'] * 1e3:.1f} ms, and the same logprobs on the "
            f"canary to {found['sync/canary_diff']:.1e} nats"
        )

    def _endpoint(self) -> list[Check]:
        endpoint = self._colocation.endpoint
        with self._colocation.playing():
            return EndpointChecks(endpoint.url, api_key=endpoint.api_key).run()

    def _play(self, attempts: int) -> list[Rollout]:
        dealt = [DealtTask(group_id=task.index, task=task) for task in self._tasks]
        return self._colocation.collect(dealt, group_size=attempts, profile="train").rollouts

    def _pack(self, rollouts: Sequence[Rollout]) -> TrajectoryBatch | None:
        """Every segment that came back as one micro-batch, as if each had done one better than its group."""
        segments = [segment for one in rollouts if one.failure is None for segment in trajectories(one)]
        if not segments:
            return None
        (batch,) = pack_window(
            segments,
            [1.0] * len(segments),
            loss_weights(segments, aggregation="token_mean"),
            num_micro_batches=1,
            max_tokens_per_micro_batch=sum(len(segment) for segment in segments),
            weight_scale=1,
            temperature=self._colocation.profiles["train"].temperature,
        )
        return batch.to(next(self._model.parameters()).device)

    def _the_batch(self) -> TrajectoryBatch:
        if self._batch is None:
            raise NotApplicableError("no rollout came back")
        return self._batch

    @torch.no_grad()
    def _parity(self, batch: TrajectoryBatch) -> str:
        found = mismatch_metrics(token_logprobs(self._model, batch), batch)
        error, largest = found["token_mult_prob_error"].item(), found["logprob_diff_max"].item()
        if not error <= _MAX_PROB_ERROR:
            raise CheckFailedError(
                f"trainer and engine differ by a factor of {error:.4g} in the mean, {largest:.3g} nats at most",
                f"at most {_MAX_PROB_ERROR} is sound: compare dtypes, temperature, dropout, and the attention of both",
            )
        return f"probabilities agree to a factor of {error:.6f} in the mean, {largest:.1e} nats at most"

    def _gradient(self) -> str:
        batch = self._the_batch()
        off = ~batch.loss_mask
        plain, at_tokens = self._gradients(batch)
        spoilt = {name: getattr(batch, name).masked_fill(off, _GARBAGE) for name in ("rollout_logprobs", "advantages")}
        disturbed, _ = self._gradients(replace(batch, **spoilt))
        wrong = int((at_tokens.ne(0) != batch.loss_mask).sum())
        if wrong:
            raise CheckFailedError(
                f"{wrong} tokens have a gradient and were not sampled, or were sampled and have none",
                "the loss must weigh exactly the tokens of `batch.loss_mask`",
            )
        if any(not torch.equal(one, other) for one, other in zip(plain, disturbed, strict=True)):
            raise CheckFailedError(
                "values at tokens that were not sampled change the gradient",
                "multiply every per-token term by `batch.loss_weight`, which is 0 there",
            )
        return f"from {int(batch.loss_mask.sum())} sampled tokens of {batch.num_tokens}, and from no other"

    def _gradients(self, batch: TrajectoryBatch) -> tuple[list[Tensor], Tensor]:
        """Of the parameters, and of each token's logprob."""
        logprobs = token_logprobs(self._model, batch)
        loss, _ = self._loss(logprobs, batch)
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        at_tokens, *of_parameters = torch.autograd.grad(loss, [logprobs, *trained], allow_unused=True)
        return [gradient for gradient in of_parameters if gradient is not None], at_tokens

    def _step(self) -> str:
        batch = self._the_batch()
        self._move()
        handed_over = self._synced(1)
        with torch.no_grad():
            moved = (token_logprobs(self._model, batch) - batch.rollout_logprobs)[batch.loss_mask].abs().max().item()
        if not moved > _SEEN:
            raise CheckFailedError(
                f"a step along the gradient moved the sampled tokens' logprobs by {moved:.2g} nats",
                "the parameters that train are not those that the forward uses, or were put back",
            )
        rollouts = self._play(1)
        versions = {call.weight_version for rollout in rollouts for call in rollout.calls}
        fresh = self._pack(rollouts)
        if versions != {1} or fresh is None:
            raise CheckFailedError(
                f"after the step calls were served by weight versions {sorted(versions)}, expected 1",
                "the engine has to be synced before the next collection",
            )
        return f"old tokens moved by up to {moved:.2g} nats; new ones: {self._parity(fresh)}; {handed_over}"

    def _move(self) -> None:
        """One step along the gradient, of a length that shows."""
        loss, _ = reinforce(token_logprobs(self._model, self._the_batch()), self._the_batch())
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None and gradient.norm() > 0:
                    parameter.sub_(gradient * (_STEP_SIZE * parameter.norm() / gradient.norm()))


def check_recipe(overrides: Sequence[str], *, limit: int) -> list[Check]:
    """Checks of what ``lightning-gym train`` would run with the same overrides.

    Args:
        overrides: Hydra's.
        limit: how many of the dataset's rows are played.

    Raises:
        ConfigError: a setting, a dataset row or a model directory is not usable.
    """
    cfg = compose_run(overrides)
    stay_quiet(cfg.policy.model if isinstance(cfg.policy.model, str) else ".")
    policy = instantiate(cfg.policy, _convert_="all")
    callback: GymCallback = instantiate(cfg.callback, _convert_="all")
    model: Any = callback.find_policy(policy)
    return TrainingChecks(
        model,
        callback.colocation,
        read_tasks(cfg.data.train, agent=cfg.data.get("agent"))[:limit],
        model_path=Path(cfg.callback.get("model_path") or model.config.name_or_path),
        run_dir=Path(cfg.output_dir) / "validate",
        loss=getattr(policy, "loss", reinforce),
    ).run()
