"""Faults that the suite must see: each is put into a copy of the tree, where the test named beside it has to fail.

``make mutants [MUTANTS="name ..."]`` tries them all, real engine included. ``python -m tests.mutants --table`` prints
the list as it stands in ``docs/mutants.md``.
"""

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "lightning.pytorch", "transformers", "httpx", "uvicorn"]
LEFT_BEHIND = shutil.ignore_patterns(".*", "outputs", "dist", "_build", "__pycache__")


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault."""

    area: str
    name: str
    """What is wrong, in words."""
    path: str
    """The module below `lightning_gym`, ``.py`` left out."""
    old: str
    """Text that stands there exactly once."""
    new: str
    test: str
    """That catches it: file and function below ``tests``, with its parameters where one set of them is enough."""
    needs_vllm: bool = False


MUTANTS = [
    # -- the seven
    Mutant(
        area="alignment",
        name="the loss mask is one token late",
        path="trajectory",
        old="        loss_mask[span] = True\n",
        new="        loss_mask[span.start + 1 : span.stop + 1] = True\n",
        test="alignment_oracle::every_sampled_token_trains_once_with_its_logprob_and_its_rollouts_advantage[0-1]",
    ),
    Mutant(
        area="sync",
        name="the engine keeps the weights of the first step",
        path="colocation",
        old='if self._engine.weight_version != version or "weights" in self._engine.asleep:',
        new="if self._engine.weight_version < 0:",
        test="journey::a_step_is_played_by_the_weights_it_trains_and_the_next_one_by_the_new_ones[1]",
    ),
    Mutant(
        area="advantages",
        name="every group gets the advantages of the next one",
        path="comparison",
        old="in zip(candidates, values, strict=True)",
        new="in zip(candidates, [*values[settings.group_size :], *values[: settings.group_size]], strict=True)",
        test="comparison::every_group_gets_its_own_advantages_in_whatever_order_its_members_come",
    ),
    Mutant(
        area="loss",
        name="the mean is taken in each micro-batch",
        path="losses",
        old="loss = (batch.loss_weight * objective).sum()",
        new="loss = (batch.loss_weight * objective).sum() / batch.loss_weight.sum().clamp(min=1e-9)",
        test="loss_properties::the_gradient_does_not_depend_on_the_split[grpo-token_mean]",
    ),
    Mutant(
        area="advantages",
        name="rewards are dealt out to other rollouts",
        path="comparison",
        old="rewards = [_reward(outcome) + _penalty(outcome, settings) for outcome in outcomes]",
        new="rewards = [_reward(outcome) + _penalty(outcome, settings) for outcome in outcomes[::-1]]",
        test="comparison::a_failed_member_is_in_neither_baseline_nor_loss_and_its_group_goes_on",
    ),
    Mutant(
        area="logprobs",
        name="the temperature is ignored",
        path="logprobs",
        old="temperature=batch.temperature, with_entropy=with_entropy",
        new="temperature=1.0, with_entropy=with_entropy",
        test="logprobs::temperature_divides_the_logits",
    ),
    Mutant(
        area="packing",
        name="packed rows are computed with a cache",
        path="logprobs",
        old='"use_cache": False,  # with a cache',
        new='"use_cache": True,  # with a cache',
        test="logprobs::a_model_is_never_asked_for_a_cache_nor_given_a_mask[False]",
    ),
    # -- losses, corrections, penalties, advantages
    Mutant(
        area="loss",
        name="the clip takes the better of the two objectives",
        path="losses",
        old="objective = torch.maximum(free, bounded)",
        new="objective = torch.minimum(free, bounded)",
        test="losses::the_clip_removes_the_gradient_exactly_where_the_token_has_moved_far_enough",
    ),
    Mutant(
        area="loss",
        name="the dual clip bounds good tokens too",
        path="losses",
        old='fractions["dual_clip_frac"] = (batch.advantages < 0) & (objective > ceiling)',
        new='fractions["dual_clip_frac"] = objective > ceiling',
        test="losses::dual_clip_bounds_the_loss_of_a_bad_token_and_leaves_good_ones_alone",
    ),
    Mutant(
        area="loss",
        name="the weight of CISPO has a gradient",
        path="losses",
        old="ratio = ratio_of(logprobs.detach() - old_logprobs(logprobs, batch))",
        new="ratio = ratio_of(logprobs - old_logprobs(logprobs, batch))",
        test="losses::at_ratio_one_the_gradient_of_every_loss_is_that_of_reinforce[equal]",
    ),
    Mutant(
        area="loss",
        name="the ratio of a sequence counts prompt tokens",
        path="tokens",
        old="trained = torch.where(batch.loss_mask, values, 0)[0]",
        new="trained = values[0]",
        test="losses::gspo_takes_one_ratio_a_sequence_and_sequences_do_not_share_theirs",
    ),
    Mutant(
        area="loss",
        name="the old logprobs are the current ones",
        path="tokens",
        old="return logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs",
        new="return logprobs.detach()",
        test="losses::the_clip_removes_the_gradient_exactly_where_the_token_has_moved_far_enough",
    ),
    Mutant(
        area="loss",
        name="a filler's token counts in the metrics",
        path="tokens",
        old="return batch.loss_mask & (batch.weight_versions >= 0)",
        new="return batch.loss_mask",
        test="losses::a_fillers_token_is_no_mismatch_and_an_empty_batch_agrees",
    ),
    Mutant(
        area="loss",
        name="the KL penalty has the gradient of k3",
        path="penalties",
        old="(batch.loss_weight * off_policy * log_ratio**2 / 2).sum()",
        new="(batch.loss_weight * off_policy * _k3(log_ratio)).sum()",
        test="corrections::every_kl_of_ours_has_the_gradient_of_kl_from_the_policy_to_the_reference[penalty-False]",
    ),
    Mutant(
        area="loss",
        name="KL in the reward forgets what comes after the token",
        path="penalties",
        old="to_come = torch.where(batch.loss_mask, sequence_sums(log_ratio, batch) - before, 0)",
        new="to_come = torch.where(batch.loss_mask, log_ratio, 0)",
        test="corrections::kl_in_the_reward_counts_what_a_token_does_to_those_after_it_and_the_penalty_does_not",
    ),
    Mutant(
        area="correction",
        name="a batch is corrected twice",
        path="corrections",
        old="    if batch.corrected:\n",
        new="    if False:\n",
        test="corrections::a_second_correction_is_refused",
    ),
    Mutant(
        area="correction",
        name="the ratio of engine and trainer is upside down",
        path="corrections",
        old="difference = old_logprobs(logprobs, batch).detach() - batch.rollout_logprobs",
        new="difference = batch.rollout_logprobs - old_logprobs(logprobs, batch).detach()",
        test="corrections::the_weights_of_ratios_8_2_and_one_half",
    ),
    Mutant(
        area="advantages",
        name="rounding errors of equal rewards are divided by almost nothing",
        path="advantages",
        old="if count == 1 or rewards.max() == rewards.min():",
        new="if count == 1:",
        test="advantages::equal_rewards_have_advantages_of_exactly_zero",
    ),
    Mutant(
        area="advantages",
        name="the deviation of a group is that of a population",
        path="advantages",
        old="return (float(values.std(ddof=1)) if varies else 0.0) + _STD_FLOOR",
        new="return (float(values.std()) if varies else 0.0) + _STD_FLOOR",
        test="loss_parity::advantages_are_nemo_rls",
    ),
    Mutant(
        area="advantages",
        name="a failed rollout is a reward of zero",
        path="outcome",
        old="alive = [outcome for outcome in outcomes if outcome.failure is None and not outcome.masked]",
        new="alive = [__import__('dataclasses').replace(o, reward=o.reward or 0.0) for o in outcomes if not o.masked]",
        test="comparison::a_failed_member_is_in_neither_baseline_nor_loss_and_its_group_goes_on",
    ),
    # -- mask and weights
    Mutant(
        area="alignment",
        name="a tool's words train",
        path="trajectory",
        old="span = slice(start, start + len(call.token_ids))",
        new="span = slice(len(calls[0].prompt_ids), call.num_tokens)",
        test="trajectory::the_example_of_two_calls_is_one_trajectory",
    ),
    Mutant(
        area="alignment",
        name="a call joins a segment that is not its history",
        path="rollout",
        old="if len(prompt) < end or prompt[start:end] != earlier.token_ids:",
        new="if len(prompt) < end:",
        test="trajectory::a_segment_goes_on_only_where_the_prompt_starts_with_everything_before",
    ),
    Mutant(
        area="alignment",
        name="logprobs of a call that come back changed are believed",
        path="reconcile",
        old="if not isinstance(got, int | float) or not abs(got - want) <= _LOGPROB_TOLERANCE:",
        new="if not isinstance(got, int | float):",
        test="reconcile::what_was_not_served_like_that_is_misaligned_in_a_way_and_says_which_call",
    ),
    Mutant(
        area="batch",
        name="the normalisation counts one rank",
        path="batch",
        old="totals = totals or StepTotals.of(trajectories)",
        new="totals = StepTotals.of(trajectories)",
        test="loss_properties::the_gradient_does_not_depend_on_the_split[grpo-token_mean]",
    ),
    Mutant(
        area="batch",
        name="each segment of a rollout has a vote",
        path="batch",
        old="return _of_means(trajectories, [t.rollout_id for t in trajectories], totals.num_rollouts)",
        new="return _of_means(trajectories, range(len(trajectories)), totals.num_rollouts)",
        test="batch::a_rollout_cut_into_segments_counts_as_much_as_one_in_one_piece",
    ),
    Mutant(
        area="batch",
        name="what Lightning divides by is not undone",
        path="batch",
        old="[weight * weight_scale for weight in weights]",
        new="list(weights)",
        test="journey::the_gradient_does_not_depend_on_the_number_of_micro_batches",
    ),
    # -- packing
    Mutant(
        area="packing",
        name="positions run on from sequence to sequence",
        path="batch",
        old="np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])",
        new="np.arange(sum(lengths))",
        test="batch::the_example_of_two_sequences_is_packed_as_the_docstring_says",
    ),
    Mutant(
        area="packing",
        name="the first token after a shared prompt is predicted by its neighbour in the row",
        path="logprobs",
        old="            if parent >= 0:\n",
        new="            if parent > len(ends):\n",
        test="packing_properties::a_shared_prompt_gives_the_logprobs_and_the_gradient_of_its_copies",
    ),
    Mutant(
        area="packing",
        name="a sliding window is one token too wide",
        path="packed_attention",
        old="visible = visible.triu(1 - window)",
        new="visible = visible.triu(-window)",
        test="packed_attention::an_architecture_computes_a_packed_row_as_it_computes_each_sequence_alone[mistral]",
    ),
    Mutant(
        area="packing",
        name="the chunks of the head leave the last positions out",
        path="lm_head",
        old="chunks = zip(hidden.split(rows), ids.split(rows), strict=True)",
        new="chunks = [*zip(hidden.split(rows), ids.split(rows), strict=True)][:1] * math.ceil(len(ids) / rows)",
        test="lm_head::chunks_of_every_size_cover_every_position_once[4]",
    ),
    # -- splice
    Mutant(
        area="splice",
        name="an edited history is taken for the one that was served",
        path="policy/splice",
        old="if said.messages[: len(told.messages)] != told.messages:",
        new="if len(said.messages) < len(told.messages):",
        test="splice::every_edit_opens_a_new_segment",
    ),
    Mutant(
        area="splice",
        name="what was sampled is tokenized again",
        path="policy/splice",
        old="prompt_ids = [*found.call.prompt_ids[:], *found.call.token_ids, *new_ids]",
        new='prompt_ids = self._chat.encode(self._chat.render(request["messages"], request.get("tools")))',
        test="splice::a_tool_call_in_words_that_the_template_would_not_write_keeps_its_ids",
    ),
    Mutant(
        area="splice",
        name="a sampled turn end is written a second time",
        path="policy/splice",
        old="return ids[1:] if ended else ids",
        new="return ids",
        test="splice::a_request_that_goes_on_gets_the_emitted_ids_and_only_the_new_text_is_encoded",
    ),
    Mutant(
        area="splice",
        name="a turn that was cut is not ended",
        path="policy/splice",
        old="return ids[1:] if ended else ids",
        new="return ids[1:]",
        test="splice_cases::case_f_a_turn_cut_by_its_limit_gets_the_turn_end_as_a_prompt_token_that_never_trains",
    ),
    Mutant(
        area="splice",
        name="ids that a client made up are believed",
        path="policy/splice",
        old="if claim is not None and not _is_of(claim, candidate):",
        new="if claim is None and not served:",
        test="splice::ids_that_were_never_given_open_a_new_segment",
    ),
    Mutant(
        area="splice",
        name="other tools go on with the same segment",
        path="policy/splice",
        old="if said.tools != told.tools or said.template_kwargs != told.template_kwargs:",
        new="if said.template_kwargs != told.template_kwargs:",
        test="splice::other_tools_or_template_arguments_open_a_new_segment",
    ),
    Mutant(
        area="splice",
        name="a control token that somebody types controls",
        path="policy/control_tokens",
        old="if self._nonce not in text and not self._lookalikes:",
        new="if text:",
        test="control_tokens::no_special_token_that_anybody_types_becomes_a_control_token",
    ),
    # -- sync
    Mutant(
        area="sync",
        name="one tensor is not copied",
        path="copying",
        old="weight.parameter) for weight in weights if weight.adapter is None]",
        new="weight.parameter) for weight in weights if weight.adapter is None][:-1]",
        test="weights_sync::after_a_sync_the_engines_tensors_are_the_trainers_bit_for_bit[copy-True-dtype0]",
    ),
    Mutant(
        area="sync",
        name="adapters are left out of what the engine gets",
        path="copying",
        old="view.copy_(weight.tensor())",
        new="view.copy_(weight.parameter)",
        test="weights_sync::adapters_reach_the_engine_merged_and_frozen_weights_only_once",
    ),
    Mutant(
        area="sync",
        name="an adapter that is merged already is added once more",
        path="ladder",
        old="for w in self._weights if w.adapter and not w.adapter.merged}",
        new="for w in self._weights if w.adapter}",
        test="adapter_sync::an_adapter_that_the_user_merged_is_not_added_twice[fake]",
    ),
    Mutant(
        area="sync",
        name="nobody looks whether trainer and engine agree",
        path="sync",
        old="difference = self._canary.check(self._engine_dtype(), version=version)",
        new="difference = 0.0",
        test="weights_sync::the_canary_notices_two_parts_in_each_others_place[copy]",
    ),
    Mutant(
        area="sync",
        name="shared weights may change while the engine samples",
        path="sync",
        old="if self._shared is not None and _stamp(self._inventory.look()) != self._stamp:",
        new="if self._shared is None and not self._stamp:",
        test="weights_sync::shared_weights_that_changed_since_the_sync_are_not_sampled_from",
    ),
    Mutant(
        area="sync",
        name="vLLM answers from the cached prefixes of old weights",
        path="policy/vllm_engine",
        old="if not self._engine.reset_prefix_cache():",
        new="if False:",
        test="sync_ladder::after_a_sync_the_engine_holds_and_samples_from_exactly_the_trainers_weights[tied-float32-vllm-copy]",
        needs_vllm=True,
    ),
    Mutant(
        area="sync",
        name="keys and values lie in each other's place in vLLM's fused tensor",
        path="policy/vllm_weights",
        old="for part, view in zip(parts, tensor.split(sizes), strict=True):",
        new="for part, view in zip([*parts[:-2], *parts[:-3:-1]], tensor.split(sizes), strict=True):",
        test="sync_ladder::after_a_sync_the_engine_holds_and_samples_from_exactly_the_trainers_weights[tied-float32-vllm-copy]",
        needs_vllm=True,
    ),
    # -- the endpoint
    Mutant(
        area="ledger",
        name="an identical later request gets the earlier answer",
        path="policy/retries",
        old="            first = self._forget(key, pending)\n",
        new="            first = pending.waiting == 1\n",
        test="retries::the_same_request_after_a_delivered_answer_is_a_new_call",
    ),
]


# -- trying them


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a copy's test run came to."""

    caught: bool
    seconds: float
    output: str


def node(mutant: Mutant) -> str:
    """The catching test by pytest's name."""
    file, _, function = mutant.test.partition("::")
    return f"tests/test_{file}.py::test_{function}"


def source(mutant: Mutant) -> Path:
    """The mutated file, below the root of a tree."""
    return Path("lightning_gym", f"{mutant.path}.py")


def faulty(mutant: Mutant, text: str) -> str:
    """`text` of the module with the fault in it.

    Raises:
        ValueError: the place is not there exactly once.
    """
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(
            f"mutant {mutant.name!r}: expected exactly once in {source(mutant)}, found {count} times: {mutant.old!r}"
        )
    return text.replace(mutant.old, mutant.new)


def run_tests(nodes: Sequence[str], mutant: Mutant | None = None) -> tuple[int, str]:
    """Run tests in a copy of the tree, with a fault in it or without: pytest's exit status, and what it said.

    In a child of this process, which has imported the heavy packages and nothing of ours: most of the time of a
    single test would go into that.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree, output = Path(folder, "tree"), Path(folder, "output")
        shutil.copytree(ROOT, tree, ignore=LEFT_BEHIND)
        if mutant is not None:
            path = tree / source(mutant)
            path.write_text(faulty(mutant, path.read_text()))
        child = os.fork()
        if not child:
            _run_and_exit(
                tree, output, ["-q", "-x", "-rf", "-m", "", "-p", "no:cacheprovider", "--assert=plain", *nodes]
            )
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def _run_and_exit(tree: Path, output: Path, arguments: list[str]) -> NoReturn:
    """In the child: be a pytest that was started in `tree`."""
    status = 70
    try:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
        os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1", TMPDIR=str(tree.parent))
        sys.dont_write_bytecode = True
        tempfile.tempdir = None
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        status = int(pytest.main(arguments))
    except BaseException:  # noqa: BLE001  the child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def try_mutant(mutant: Mutant) -> Verdict:
    """Whether the named test fails with the fault in place; an error before it begins is no catch."""
    start = time.perf_counter()
    status, output = run_tests([node(mutant)], mutant)
    name, _, _ = node(mutant).partition("[")
    caught = status == pytest.ExitCode.TESTS_FAILED and f"FAILED {name}" in output
    return Verdict(caught=caught, seconds=time.perf_counter() - start, output=output)


def table(mutants: Iterable[Mutant]) -> str:
    """The list, as it stands in the documentation."""
    rows = [f"| {m.area} | {m.name} | `{source(m)}` | `{node(m)}` |" for m in mutants]
    return "\n".join(["| area | fault | in | caught by |", "|---|---|---|---|", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Try mutants; 1 if one survives, or a test fails without any."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of those to try; all without")
    parser.add_argument("--table", action="store_true", help="print the list, try none")
    asked = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not asked.names or any(part in f"{m.area}: {m.name}" for part in asked.names)]
    if asked.table:
        print(table(chosen))
        return 0
    for package in HEAVY:
        importlib.import_module(package)
    status, output = run_tests(sorted({node(mutant) for mutant in chosen}))
    if status != pytest.ExitCode.OK:
        print(f"without a fault the tests fail:\n{output}")
        return 1
    survivors = 0
    for mutant in chosen:
        verdict = try_mutant(mutant)
        survivors += not verdict.caught
        print(
            f"{'caught' if verdict.caught else 'MISSED'}  {verdict.seconds:5.1f} s  {mutant.area}: {mutant.name}",
            flush=True,
        )
        if not verdict.caught:
            print(verdict.output)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults were caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
