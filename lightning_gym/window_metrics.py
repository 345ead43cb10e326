"""WindowMetrics: what the micro-batches of an optimizer step measured, as one number each, over all ranks.

Nothing leaves the device before the window is complete: reading a number from a GPU waits for everything before it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gym.mismatch import ratio_quantiles

Reduce = Callable[[Tensor, str], Tensor]
"""``(tensor, "sum" or "max")`` to the same over all ranks; `lightning.pytorch.strategies.Strategy.reduce` does."""
_QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


class WindowMetrics:
    """Collects the metrics of a window's micro-batches.

    Names say how they are combined: ``_max`` are maxima, ``_hist`` are counts that add up (`ratio_histogram`) and
    become quantiles, all others are means, carried as (sum, count). From ``x_mean`` and ``x_sq_mean`` comes
    ``x_ess_frac``, the effective sample size as a fraction of the tokens.

    Example:
        >>> window = WindowMetrics()
        >>> window.add({"diff_max": torch.tensor(0.5), "kl": torch.tensor(1.0)}, count=1)
        >>> window.add({"diff_max": torch.tensor(0.25), "kl": torch.tensor(2.0)}, count=3)
        >>> window.take()
        {'diff_max': 0.5, 'kl': 1.75}
        >>> window.take()
        {}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Any], *, count: Any) -> None:
        """Add one micro-batch.

        Args:
            values: scalars, or count vectors under names that end in ``_hist``.
            count: what the means are means over; a tensor, or a number.
        """
        for name, value in values.items():
            part = torch.as_tensor(value, dtype=torch.float64).detach()
            if name.endswith("_max"):
                self._last[name] = torch.maximum(self._last.get(name, part), part)
            elif name.endswith("_hist"):
                self._sums[name] = self._sums.get(name, 0) + part
            else:
                self._last[name] = part
                weight = torch.as_tensor(count, device=part.device, dtype=torch.float64)
                self._sums[name] = self._sums.get(name, 0) + torch.where(weight > 0, part * weight, 0)
                self._counts[name] = self._counts.get(name, 0) + weight

    def take(self, reduce: Reduce | None = None) -> dict[str, float]:
        """The window's metrics; the next window starts empty.

        Two collectives and one copy from the device, whatever the number of metrics. Every rank calls it with the same
        names added.

        Args:
            reduce: over ranks; ``None``: there is one.
        """
        sums, counts, last = self._sums, self._counts, self._last
        self._sums, self._counts, self._last = {}, {}, {}
        if not sums and not last:
            return {}
        largest = {name: value for name, value in last.items() if name.endswith("_max")}
        added = torch.cat([tensor.flatten() for tensor in (*sums.values(), *counts.values())])
        maxima = torch.stack([*largest.values(), added.new_zeros(())])
        if reduce is not None:
            added, maxima = reduce(added, "sum"), reduce(maxima, "max")
        fallback = torch.stack([*(last[name] for name in counts), added.new_zeros(())])
        numbers = iter(torch.cat([added, maxima, fallback]).tolist())
        total = {name: [next(numbers) for _ in range(tensor.numel())] for name, tensor in sums.items()}
        count = {name: next(numbers) for name in counts}
        largest_of = {name: next(numbers) for name in largest}
        next(numbers)
        alone = {name: next(numbers) for name in counts}
        means = {name: total[name][0] / count[name] if count[name] else alone[name] for name in counts}
        found = {name: means[name] if name in means else largest_of[name] for name in last}
        for name in sums.keys() - counts.keys():
            found |= _quantiles(name, total[name])
        return _with_sample_sizes(found)


def _quantiles(name: str, counts: list[float]) -> dict[str, float]:
    found = ratio_quantiles(counts, list(_QUANTILES.values()))
    stem = name.removesuffix("_hist")
    return {f"{stem}_{label}": value for label, value in zip(_QUANTILES, found, strict=True)}


def _with_sample_sizes(values: dict[str, float]) -> dict[str, float]:
    for name in [name for name in values if name.endswith("_sq_mean")]:
        stem = name.removesuffix("_sq_mean")
        square = values.pop(name)
        values[f"{stem}_ess_frac"] = values[f"{stem}_mean"] ** 2 / square if square else 0.0
    return values
