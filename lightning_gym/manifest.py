"""Manifest: which tensors trainer and engine hold, agreed on once and checked again at every sync."""

from collections.abc import Mapping, Sequence

from torch import Size, Tensor

from lightning_gym.errors import WeightSyncError
from lightning_gym.weights import Weight


class Manifest:
    """What trainer and engine were found to hold when they were brought together.

    Args:
        weights: the trainer's.
        views: the engine's tensors under the same names; ``None`` if the engine has none to show.

    Raises:
        WeightSyncError: they do not hold the same.
    """

    def __init__(self, weights: Sequence[Weight], views: Mapping[str, Tensor] | None) -> None:
        self._of_trainer = [_entry(weight) for weight in weights]
        self._views = views
        self._addresses = {} if views is None else {name: view.data_ptr() for name, view in views.items()}
        if views is not None:
            check_manifest({name: view.shape for name, view in views.items()}, _shapes(weights))

    def check_trainer(self, weights: Sequence[Weight]) -> None:
        """Refuse a trainer that holds other names, shapes or dtypes than at first.

        Raises:
            WeightSyncError: names every tensor concerned.
        """
        if [_entry(weight) for weight in weights] == self._of_trainer:
            return
        check_manifest({name: shape for name, shape, _ in self._of_trainer}, _shapes(weights))
        dtypes = {name: dtype for name, _, dtype in self._of_trainer}
        changed = [
            f"{weight.name}: {dtypes[weight.name]} at first, {weight.parameter.dtype} now"
            for weight in weights
            if weight.parameter.dtype != dtypes[weight.name]
        ]
        if changed:
            raise WeightSyncError(f"the trainer's weights changed their dtype during the run: {_listed(changed)}")

    def check_engine(self, views: Mapping[str, Tensor]) -> None:
        """Refuse an engine that computes with other tensors than those that are written.

        Raises:
            WeightSyncError: names every tensor concerned.
        """
        if views is self._views:
            return
        addresses = {name: view.data_ptr() for name, view in views.items()}
        if addresses != self._addresses:
            moved = [
                name for name in {**addresses, **self._addresses} if addresses.get(name) != self._addresses.get(name)
            ]
            raise WeightSyncError(
                f"the engine computes with other tensors than those that the sync writes: {_listed(sorted(moved))}. "
                "Something replaced them after the engine was built"
            )


def check_manifest(engine: Mapping[str, Size], trainer: Mapping[str, Size]) -> None:
    """Refuse engine tensors that the trainer does not fill, trainer tensors without a place, and other shapes.

    Args:
        engine: name -> shape.
        trainer: name -> shape.

    Raises:
        WeightSyncError: names every tensor concerned.

    Example:
        >>> check_manifest({"lm_head.weight": Size([7, 2])}, {"lm_head.weight": Size([7, 2])})
        >>> check_manifest({}, {"lm_head.weight": Size([7, 2])})
        Traceback (most recent call last):
        lightning_gym.errors.WeightSyncError: trainer and engine hold different weights: lm_head.weight: the trainer ...
    """
    problems = [f"{name}: the trainer has it, the engine does not" for name in trainer.keys() - engine.keys()]
    problems += [f"{name}: the engine has it, the trainer does not" for name in engine.keys() - trainer.keys()]
    problems += [
        f"{name}: {tuple(shape)} in the trainer, {tuple(engine[name])} in the engine"
        for name, shape in trainer.items()
        if name in engine and engine[name] != shape
    ]
    if problems:
        raise WeightSyncError(
            f"trainer and engine hold different weights: {_listed(sorted(problems))}. Is `policy` the attribute of the "
            "whole causal LM?"
        )


def _entry(weight: Weight) -> tuple[str, Size, object]:
    return weight.name, weight.shape, weight.parameter.dtype


def _shapes(weights: Sequence[Weight]) -> dict[str, Size]:
    return {weight.name: weight.shape for weight in weights}


def _listed(items: Sequence[str]) -> str:
    return "; ".join(items[:8]) + (f"; and {len(items) - 8} more" if len(items) > 8 else "")
