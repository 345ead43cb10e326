"""Rollout and what it is made of: the nouns that Gym and the policy both speak of.

A `Rollout` is one ``POST /run``: one attempt at one task. While it plays, the policy answers `Call`s; when it is
over it has a reward, or a typed `Failure`. A failure is data: it is counted, excluded from the group's baseline and
from the loss, and never turned into a reward of zero.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class FailureKind(enum.StrEnum):
    """Why a rollout cannot be trained on; each kind is retried, counted and reported on its own."""

    INFRA = "infra"
    """Connection refused or lost, 5xx without an environment's traceback: worth another try."""
    ENVIRONMENT = "environment"
    """The environment refused or crashed (422, a verifier's exception): the same row would fail again."""
    POLICY = "policy"
    """Our endpoint answered the agent with an error."""
    TIMEOUT = "timeout"
    """The rollout outlived ``rollout_timeout_s``."""
    NO_TOKEN_IDS = "no_token_ids"
    """The rollout came back without a single call of ours."""
    MISALIGNED = "misaligned"
    """What came back does not agree with what was served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingProfile:
    """How a rollout's turns are sampled: pinned by our endpoint, written into the row so that every server agrees.

    The trainer scores tokens under the same temperature; `top_p` and `top_k` other than the defaults would sample from
    a distribution that the trainer does not compute.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps the whole vocabulary."""
    max_output_tokens: int | None = None
    """Per turn; ``None`` lets the context window decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a rollout failed."""

    kind: FailureKind
    message: str
    """The innermost cause, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One model invocation, exactly as the engine saw it.

    Example: the prompt was ``[1, 10, 11, 7]``, the engine sampled ``[20, 21, 2]`` (2 ends the turn)::

        prompt_ids = [1, 10, 11, 7]
        token_ids  = [20, 21, 2]
        logprobs   = [-0.11, -0.02, -0.30]      # of the three sampled tokens, in nats
    """

    index: int
    """0 for the rollout's first call, in the order they were served."""
    prompt_ids: Sequence[int]
    """The ids the engine was fed."""
    token_ids: Sequence[int]
    """The ids the engine sampled, the turn-end id included where it was sampled."""
    logprobs: Sequence[float]
    """log p(token_ids[i] | prompt, token_ids[:i]) under the distribution that was sampled from, in nats."""
    finish_reason: str
    """``"stop"`` or ``"length"``."""
    weight_version: int
    """The optimizer step whose weights sampled these tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpliceBreak:
    """Why a request opened a new segment although an earlier turn had ids."""

    kind: str
    """``edited_history``, ``changed_tools``, ``unknown_ids``, ``branch`` or ``template``."""
    call_index: int
    """The call whose prompt begins the new segment."""
    detail: str
    """Both sides, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One attempt at one task, played to its end or to its failure."""

    rollout_id: str
    """Unique in the run; what our endpoint knows the rollout by."""
    task_index: int
    """Which dataset row."""
    group_id: int
    """The attempts that share a baseline share this; unique in the run."""
    attempt: int
    """0 .. group_size - 1 within the group."""
    agent: str
    """Name of the Gym agent that played it."""
    reward: float | None = None
    """The verifier's reward; ``None`` exactly when `failure` is set."""
    calls: Sequence[Call] = ()
    """What the policy served for this rollout, in order."""
    breaks: Sequence[SpliceBreak] = ()
    """Where a call could not continue an earlier one; each begins a new segment."""
    output: Sequence[Mapping[str, Any]] = ()
    """The conversation after the prompt, as Gym's Responses items, without token ids."""
    prompt: Sequence[Mapping[str, Any]] = ()
    """The messages the rollout started from."""
    truncated: bool = False
    """A call ran into the token limit, or the context window was full."""
    seconds: float = 0.0
    """Wall time of the ``/run`` request."""
    failure: Failure | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers that the environment returned beside the reward."""
