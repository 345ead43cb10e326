"""Which micro-batch a trajectory goes to, and which prompts of a row are stored once. Numbers only, no tensors.

The cost of a sequence of n tokens is ``n + n² / parity``: everything in a transformer layer grows with n except the
attention scores, which grow with n², and `parity` is the length at which both cost the same. For a dense transformer
that is about 12 times the hidden size (``12 d²`` multiply-adds a token in the projections and the MLP of a layer
against ``n d`` for causal scores and values).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_gym.errors import ConfigError
from lightning_gym.trajectory import Trajectory

ATTENTION_PARITY = 12 * 1024
"""The `parity` of a model of hidden size 1024. A wrong value unbalances the micro-batches a little and changes no
gradient."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens of one trajectory, as it lies in a row."""

    trajectory: int
    """Index into the window's trajectories."""
    start: int
    stop: int
    continues: int = -1
    """Index of the piece that this one continues, in the same row; -1: it begins a sequence."""


@dataclass(frozen=True, slots=True)
class _Item:
    """Trajectories that stay together: one, or several that share a prompt."""

    members: tuple[int, ...]
    num_shared: int
    """Leading tokens stored once; 0 for a single member."""
    num_tokens: int
    cost: float


def rows_of_pieces(
    trajectories: Sequence[Trajectory],
    *,
    num_rows: int,
    ceiling: int,
    parity: float = ATTENTION_PARITY,
    share_prefix: bool = False,
) -> list[list[Piece]]:
    """Lay every token of `trajectories` into exactly `num_rows` rows of about equal cost, the dearest row first.

    Dearest item first, into the cheapest row that has room for it; where that leaves an item without room, longest
    first into the first row that has room. Dearest row first, so that memory runs out at once or never.

    Args:
        trajectories: of one optimizer step.
        num_rows: rows to make; those beyond the number of trajectories stay empty.
        ceiling: tokens that a row may have.
        parity: length at which attention costs as much as all the rest.
        share_prefix: store the prompt of attempts of one group once a row, where it is the same token for token.

    Raises:
        ConfigError: they do not fit; names the number of rows into which they do.

    Example:
        >>> from lightning_gym.testing import tiny_trajectory
        >>> three = [tiny_trajectory(num_trained=n, rollout_id=str(n)) for n in (1, 5, 2)]
        >>> [[(piece.trajectory, piece.stop) for piece in row] for row in rows_of_pieces(three, num_rows=2, ceiling=9)]
        [[(1, 7)], [(0, 3), (2, 4)]]
    """
    longest = max((len(trajectory) for trajectory in trajectories), default=0)
    if longest > ceiling:
        raise ConfigError(
            f"a trajectory has {longest} tokens, over max_tokens_per_micro_batch={ceiling}; raise the ceiling to "
            "at least that, or lower max_model_len"
        )

    def packed(num_rows: int) -> tuple[list[_Item], list[list[int]] | None]:
        items = _items(trajectories, ceiling=ceiling, num_rows=num_rows, parity=parity, share_prefix=share_prefix)
        return items, _by_cost(items, num_rows, ceiling) or _by_length(items, num_rows, ceiling)

    items, rows = packed(num_rows)
    if rows is None:
        enough = num_rows + 1
        while packed(enough)[1] is None:
            enough += 1
        raise ConfigError(
            f"{sum(item.num_tokens for item in items)} tokens do not fit {num_rows} micro-batches of at most "
            f"max_tokens_per_micro_batch={ceiling}; set accumulate_grad_batches={enough} or raise the ceiling"
        )
    rows.sort(key=lambda row: -sum(items[index].cost for index in row))
    return [_pieces([items[index] for index in sorted(row)], trajectories) for row in rows]


def _items(
    trajectories: Sequence[Trajectory], *, ceiling: int, num_rows: int, parity: float, share_prefix: bool
) -> list[_Item]:
    singles = [_item([index], 0, trajectories, parity) for index in range(len(trajectories))]
    if not share_prefix:
        return singles
    families: dict[tuple[int, bytes], list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        key = (trajectory.group_id, trajectory.token_ids[: _num_prompt(trajectory)].tobytes())
        families.setdefault(key, []).append(index)
    fair = sum(item.cost for item in singles) / num_rows
    items: list[_Item] = []
    for family in families.values():
        together: list[int] = []
        item = None
        for index in family:  # a family larger than its fair share of a row is cut: balance goes before sharing
            grown = _item([*together, index], _num_prompt(trajectories[index]), trajectories, parity)
            if item is not None and (grown.cost > fair or grown.num_tokens > ceiling):
                items.append(item)
                grown = singles[index]
            together, item = list(grown.members), grown
        assert item is not None
        items.append(item)
    return items


def _item(members: Sequence[int], num_prompt: int, trajectories: Sequence[Trajectory], parity: float) -> _Item:
    num_shared = num_prompt if len(members) > 1 else 0
    lengths = [len(trajectories[index]) for index in members]
    num_tokens = sum(lengths) - num_shared * (len(members) - 1)
    cost = num_tokens + sum(length**2 for length in lengths) / parity
    return _Item(members=tuple(members), num_shared=num_shared, num_tokens=num_tokens, cost=cost)


def _num_prompt(trajectory: Trajectory) -> int:
    """Tokens before the first one that trains."""
    trained = np.flatnonzero(trajectory.loss_mask)
    return int(trained[0]) if trained.size else len(trajectory)


def _by_cost(items: Sequence[_Item], num_rows: int, ceiling: int) -> list[list[int]] | None:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    costs, room = [0.0] * num_rows, [ceiling] * num_rows
    for index in sorted(range(len(items)), key=lambda i: -items[i].cost):
        fitting = [row for row in range(num_rows) if room[row] >= items[index].num_tokens]
        if not fitting:
            return None
        target = min(fitting, key=costs.__getitem__)
        rows[target].append(index)
        costs[target] += items[index].cost
        room[target] -= items[index].num_tokens
    return rows


def _by_length(items: Sequence[_Item], num_rows: int, ceiling: int) -> list[list[int]] | None:
    """First fit, longest first: no balance, but it fills rows to within 11/9 of the fewest possible."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    room = [ceiling] * num_rows
    for index in sorted(range(len(items)), key=lambda i: -items[i].num_tokens):
        target = next((row for row in range(num_rows) if room[row] >= items[index].num_tokens), None)
        if target is None:
            return None
        rows[target].append(index)
        room[target] -= items[index].num_tokens
    return rows


def _pieces(items: Sequence[_Item], trajectories: Sequence[Trajectory]) -> list[Piece]:
    pieces: list[Piece] = []
    for item in items:
        prefix = len(pieces) if item.num_shared else -1
        if item.num_shared:
            pieces.append(Piece(item.members[0], 0, item.num_shared))
        pieces += [Piece(index, item.num_shared, len(trajectories[index]), prefix) for index in item.members]
    return pieces
