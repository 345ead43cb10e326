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
    """What came back does not agree with what was served; see `Misaligned`."""
    STRAGGLER = "straggler"
    """The rest of its group was done long ago, and `lightning_gym.collect.Stragglers` says not to wait."""


class Misalignment(enum.StrEnum):
    """How what came back can disagree with what was served; counted one by one as ``rollout/misaligned_<kind>``."""

    NOT_SERVED = "not_served"
    """Ids that this rollout was never given: foreign, stale, or made up."""
    OUT_OF_VOCABULARY = "out_of_vocabulary"
    """Ids that no tokenizer has: negative, or not whole numbers."""
    DUPLICATE = "duplicate"
    """The same call more often than it was served."""
    OTHER_ORDER = "other_order"
    """A call before one that it continues."""
    PARTIAL_IDS = "partial_ids"
    """Prompt ids, sampled ids and logprobs of one call, but not all three, or of different lengths."""
    WRONG_LOGPROBS = "wrong_logprobs"
    """The right ids with other logprobs than the engine's."""
    BAD_CALL = "bad_call"
    """A call that does not add up in itself: no tokens, or a logprob that is no log of a probability."""


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
class Misaligned(Failure):
    """A failure to agree, and in what way."""

    kind: FailureKind = FailureKind.MISALIGNED
    how: Misalignment


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
    """The ids the engine was fed; slices are lists."""
    token_ids: Sequence[int]
    """The ids the engine sampled, the turn-end id included where it was sampled."""
    logprobs: Sequence[float]
    """log p(token_ids[i] | prompt, token_ids[:i]) under the distribution that was sampled from, in nats."""
    finish_reason: str
    """``"stop"`` or ``"length"``."""
    weight_version: int
    """The optimizer step whose weights sampled these tokens."""

    @property
    def num_tokens(self) -> int:
        """Prompt and sampled."""
        return len(self.prompt_ids) + len(self.token_ids)

    def continues(self, earlier: "Call") -> bool:
        """Whether this call's prompt starts with everything that `earlier` was fed and sampled, id for id.

        Compared as they are, for a spliced prompt holds the very objects of the earlier one, or is kept in the same
        list: comparing those costs a tenth of making an array of them.
        """
        start, end = len(earlier.prompt_ids), earlier.num_tokens
        prompt = self.prompt_ids
        if len(prompt) < end or prompt[start:end] != earlier.token_ids:
            return False
        begins_with = getattr(prompt, "begins_with", None)
        return begins_with(earlier.prompt_ids) if begins_with else prompt[:start] == earlier.prompt_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class SpliceBreak:
    """Why a request opened a new segment although an earlier turn had ids."""

    kind: str
    """``edited_history``, ``changed_tools``, ``unknown_ids``, ``branch`` or ``template``."""
    call_index: int
    """The call whose prompt begins the new segment."""
    detail: str
    """Both sides, in words."""
    token_offset: int | None = None
    """The first token at which the prompt differs from the ids of the closest earlier call (its prompt and what it
    sampled); ``None`` where there is no earlier call."""
    expected_text: str = ""
    """The closest earlier call's ids around `token_offset`, decoded."""
    got_text: str = ""
    """The prompt's ids around `token_offset`, decoded."""
    likely_rule: str = ""
    """What a client or a chat template probably did, in a few words, such as ``earlier reasoning dropped``."""


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
    """The served calls that are part of the answer, in the order they were served; see `lightning_gym.reconcile`."""
    unconfirmed_calls: int = 0
    """Calls that were served but are no part of the answer, such as one that a retry superseded; never trained."""
    ids_lost: bool = False
    """The result came back without a single token id, so the ledger alone says what the calls were."""
    breaks: Sequence[SpliceBreak] = ()
    """Where a call could not continue an earlier one; each begins a new segment."""
    output: Sequence[Mapping[str, Any]] = ()
    """The conversation after the prompt, as Gym's Responses items, without token ids."""
    prompt: Sequence[Mapping[str, Any]] = ()
    """The messages the rollout started from."""
    truncated: bool = False
    """A call ran into the token limit, or the context window was full."""
    context_overflow: bool = False
    """The last prompt did not fit the context window and got no answer; the calls before it train."""
    masked: bool = False
    """The environment asked to leave this rollout out of the loss; it has a reward all the same."""
    invalid_tool_calls: int = 0
    """Answers that came back as text with a tool-call tag in it: the parser could not read the call."""
    seconds: float = 0.0
    """Wall time of the ``/run`` request."""
    failure: Failure | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further numbers that the environment returned beside the reward."""
    reward_components: Mapping[str, float] = field(default_factory=dict[str, float])
    """What the reward is made of, by name, where the environment says."""
