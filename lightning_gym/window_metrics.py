"""WindowMetrics: what the micro-batches of an optimizer step measured, as one number each, over all ranks.

Nothing leaves the device before the window is complete: reading a number from a GPU waits for everything before it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gym.mismatch import ratio_quantiles

Reduce = Callable[[Tensor, str], Tensor]
"""``(tensor, "sum" or "max")`` to the same over all ranks; `lightning.pytorch.strategies.Strategy.reduce` does."""
_QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


@dataclass(slots=True)
class _Means:
    """Of metrics that always come together: a vector costs what a number costs."""

    sums: Tensor
    """``[name]`` float64, each value times its count."""
    count: Tensor
    """``[1]`` float64."""
    last: Tensor
    """``[name]`` float64, for a window that counts nothing."""


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
        self._means: dict[tuple[str, ...], _Means] = {}
        self._maxima: dict[tuple[str, ...], Tensor] = {}
        self._histograms: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Any], *, count: Any) -> None:
        """Add one micro-batch.

        Args:
            values: scalars, or count vectors under names that end in ``_hist``.
            count: what the means are means over; a tensor, or a number.
        """
        device = next((value.device for value in values.values() if isinstance(value, Tensor)), None)
        histograms = {name: value for name, value in values.items() if name.endswith("_hist")}
        maxima = {name: value for name, value in values.items() if name.endswith("_max")}
        means = {name: value for name, value in values.items() if name not in histograms and name not in maxima}
        for name, value in histograms.items():
            self._histograms[name] = self._histograms.get(name, 0) + torch.as_tensor(value, device=device).double()
        if maxima:
            names, part = tuple(maxima), _vector(maxima.values(), device)
            self._maxima[names] = torch.maximum(self._maxima.get(names, part), part)
        if means:
            names, part = tuple(means), _vector(means.values(), device)
            weight = _vector([count], device)
            weighted = torch.where(weight > 0, part * weight, 0)
            before = self._means.get(names)
            self._means[names] = _Means(
                sums=weighted if before is None else before.sums + weighted,
                count=weight if before is None else before.count + weight,
                last=part,
            )

    def take(self, reduce: Reduce | None = None) -> dict[str, float]:
        """The window's metrics; the next window starts empty.

        Two collectives and one copy from the device, whatever the number of metrics. Every rank calls it with the same
        names added.

        Args:
            reduce: over ranks; ``None``: there is one.
        """
        means, maxima, histograms = self._means, self._maxima, self._histograms
        self._means, self._maxima, self._histograms = {}, {}, {}
        parts = [part for mean in means.values() for part in (mean.sums, mean.count)]
        if not parts and not maxima and not histograms:
            return {}
        nothing = next(iter((*parts, *maxima.values(), *histograms.values()))).new_zeros(0)
        added, largest = torch.cat([nothing, *parts, *histograms.values()]), torch.cat([nothing, *maxima.values()])
        if reduce is not None:
            added, largest = reduce(added, "sum"), reduce(largest, "max")
        numbers = iter(torch.cat([added, largest, *(mean.last for mean in means.values())]).tolist())

        def read(how_many: int) -> list[float]:
            return list(itertools.islice(numbers, how_many))

        totals, counts = Counter[str](), Counter[str]()
        for names in means:
            totals.update(dict(zip(names, read(len(names)), strict=True)))
            counts.update(dict.fromkeys(names, next(numbers)))
        bins = {name: read(len(histogram)) for name, histogram in histograms.items()}
        found: dict[str, float] = {}
        for names in maxima:
            for name, value in zip(names, read(len(names)), strict=True):
                found[name] = max(value, found.get(name, value))
        for names in means:
            for name, alone in zip(names, read(len(names)), strict=True):
                found[name] = totals[name] / counts[name] if counts[name] else alone
        for name, drawn in bins.items():
            found |= _quantiles(name, drawn)
        return _with_sample_sizes(found)


def _vector(values: Iterable[Any], device: torch.device | None) -> Tensor:
    """``[value]``, float64."""
    return torch.stack([torch.as_tensor(value, device=device).detach() for value in values]).double()


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
