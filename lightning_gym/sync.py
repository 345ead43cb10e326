"""WeightSync: hand the trainer's weights to the engine, and prove that it has them.

How they get there is a rung of `lightning_gym.ladder`. What is checked is the same on every rung. Before: the trainer
holds the tensors that the engine was built for (`lightning_gym.manifest`). After: the engine computes with the tensors
that were written, by address, and gives a fixed sequence the trainer's logprobs (`lightning_gym.canary`). What does not
agree stops the run before a rollout.
"""

import contextlib
import logging
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gym.canary import Canary
from lightning_gym.copying import Copy, GatheredCopy
from lightning_gym.errors import ConfigError, WeightSyncError
from lightning_gym.ladder import Adapter, Reload, Rung, Share, SyncMode
from lightning_gym.manifest import Manifest
from lightning_gym.policy.engine import Engine
from lightning_gym.ranks import Ranks
from lightning_gym.sharding import is_sharded
from lightning_gym.weights import Inventory, Weight, without_adapters

_log = logging.getLogger(__name__)
_NO_ADAPTER = "the policy has no LoRA adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one sync did."""

    mode: SyncMode
    """The rung that was used; never ``"auto"``."""
    version: int
    seconds: float
    """All of it."""
    canary_seconds: float
    """Of it, the forward passes of the canary."""
    num_bytes: int
    """Written into the engine. With ``share``: all of it at the first sync, 0 afterwards; with ``adapter``: all of it,
    and then the adapter's."""
    num_tensors: int
    """Written into the engine; frozen ones are written once."""
    canary_diff: float
    """Largest difference between trainer and engine on the canary's tokens, nats."""


class WeightSync:
    """Keeps one engine equal to one model.

    Args:
        engine: started, paused.
        model: the causal language model being trained.
        mode: a rung of the ladder; ``"auto"`` takes the first whose preconditions hold.
        max_lag: optimizer steps by which a rollout's weights may be behind; from 1 on training runs while the engine
            samples: it never sleeps, and its weights must not change with the trainer's.
        ranks: who else trains. Where they hold a part of the policy each, a sync is collective.

    Raises:
        ConfigError: the engine or the model cannot be synced in this mode; says why.
        WeightSyncError: engine and model hold different tensors.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        *,
        mode: SyncMode = "auto",
        max_lag: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._ranks = ranks or Ranks()
        self._is_sharded = is_sharded(model)
        self._mode: SyncMode = mode
        self._max_lag = max_lag
        self._views, no_views = _views_of(engine)
        self._inventory = Inventory(model)
        held = self._known = self._inventory.look()
        self._manifest = Manifest(held, self._views)
        self._canary = Canary(engine, model)
        self._rung = self._choose(held, no_views)
        self._stamp: list[int] = []

    def sync(self, version: int) -> SyncReport:
        """Give the engine the model's weights as `version`.

        Raises:
            WeightSyncError: the engine refused, the trainer holds other tensors than at first, or the two disagree
                afterwards.
            RuntimeError: that happened on another rank.
        """
        start = time.perf_counter()
        held = self._inventory.look()
        if held is not self._known:
            self._manifest.check_trainer(held)
            self._known = held
        self._keep_shared(held)
        written = (0, 0)

        def write() -> None:
            nonlocal written
            written = self._rung.write()
            if self._views is not None:
                self._manifest.check_engine(self._engine.weight_views())

        asleep = self._engine.asleep
        if "weights" in asleep:
            self._rung.forget()
        self._rung.begin(held)
        with self._together():
            if "weights" in asleep:
                self._engine.wake_up("weights")
            self._engine.update_weights(write, version=version)
            self.wake()
        if self._shared is not None:
            self._stamp = _stamp(held)
        handed_over = time.perf_counter()
        difference = self._canary.check(self._engine_dtype(), version=version)
        done = time.perf_counter()
        return SyncReport(
            mode=self._rung.name,
            version=version,
            seconds=done - start,
            canary_seconds=done - handed_over,
            num_bytes=written[0],
            num_tensors=written[1],
            canary_diff=difference,
        )

    @contextlib.contextmanager
    def _together(self) -> Generator[None]:
        """Around what is collective with a sharded policy: a rank that fails still gives its part to the others."""
        if not self._is_sharded:
            yield
            return
        with self._ranks.agreeing():
            try:
                yield
            except Exception:
                self._rung.abstain()
                raise

    def check_unchanged(self) -> None:
        """Refuse to sample from weights that changed since they were synced; only ``share`` lets them.

        Raises:
            WeightSyncError: an optimizer stepped while a collection was open, or before the step was synced.
        """
        if self._shared is not None and _stamp(self._inventory.look()) != self._stamp:
            raise WeightSyncError(
                "the engine shares the trainer's weights, and they changed after version "
                f"{self._engine.weight_version} was synced: something trains while the engine samples, or samples "
                "before a sync. Use sync_mode='copy' if that is meant"
            )

    def rest(self) -> None:
        """Let the trainer have the engine's memory until the next sync or collection, where the engine can sleep.

        What is shared cannot be given back: then it is the KV cache alone. With `max_lag` nothing is given: trainer and
        engine work at the same time.
        """
        if self._engine.can_sleep and not self._max_lag:
            self._engine.sleep(weights=self._shared is None)

    def wake(self) -> None:
        """Give the KV cache its memory again: after a sync, and before a collection that needs none."""
        if "kv_cache" in self._engine.asleep:
            self._engine.wake_up("kv_cache")

    def close(self) -> None:
        """Leave the model with tensors of its own; call it when the engine is gone."""
        self._rung.close(self._inventory.look())

    @property
    def _shared(self) -> Share | None:
        """What makes trainer and engine hold the same tensors, if anything does."""
        rung = self._rung.base if isinstance(self._rung, Adapter) else self._rung
        return rung if isinstance(rung, Share) else None

    def _choose(self, held: Sequence[Weight], no_views: str | None) -> Rung:
        refused: dict[SyncMode, str] = {}
        if (reason := self._adapter_refusal(held)) is not None:
            refused["adapter"] = reason
        if self._engine.max_lora_rank:
            refused["reload"] = "an engine with room for adapters does not load its weights again"
        if self._views is None:
            refused["share"] = refused["copy"] = no_views or ""
        elif self._max_lag:
            refused["share"] = (
                f"max_lag is {self._max_lag}, so training would change weights that the engine samples from"
            )
        elif self._is_sharded:
            refused["share"] = "every rank holds a part of the policy, and its engine needs all of it"
        elif (reason := Share.refusal(held, self._views)) is not None:
            refused["share"] = reason
        if self._mode in refused:
            raise ConfigError(f"sync_mode={self._mode!r} cannot be used: {refused[self._mode]}. Use sync_mode='auto'")
        views = self._views or {}
        copy = GatheredCopy(self._model, views) if self._is_sharded else Copy(views)
        rungs: list[Rung] = [Share(views), copy, Reload(self._engine, self._model)]
        if "adapter" not in refused:
            shareable = not self._max_lag and Share.refusal(without_adapters(held), views) is None
            rungs.insert(0, Adapter(Share(views) if shareable else copy, self._engine))
        chosen = next((rung for rung in rungs if rung.name not in refused and self._mode in ("auto", rung.name)), None)
        because = "".join(f"; not {name}: {reason}" for name, reason in refused.items() if reason != _NO_ADAPTER)
        if chosen is None:
            raise ConfigError(f"the engine cannot get this policy's weights{because}")
        _log.info("weights reach the engine by %s%s", chosen.name, because)
        return chosen

    def _adapter_refusal(self, held: Sequence[Weight]) -> str | None:
        if all(weight.adapter is None for weight in held):
            return _NO_ADAPTER
        if self._is_sharded:
            return "every rank holds a part of the policy"
        if self._views is None:
            return "the engine's weights have a form of their own"
        return Adapter.refusal(held, self._engine.max_lora_rank)

    def _keep_shared(self, held: Sequence[Weight]) -> None:
        """Notice parameters that were given another storage, by ``assign=True``, ``.to()`` or a swap of ``.data``."""
        if self._shared is None or not (strays := self._shared.strays(held)):
            return
        what = (
            f"{len(strays)} of the trainer's parameters, {strays[0]} the first, were given another storage than the "
            "engine's (load_state_dict(assign=True), model.to(), a swap of `.data`)"
        )
        if self._mode == "share":
            raise WeightSyncError(f"{what}, so the engine would keep their old values. Use sync_mode='copy'")
        _log.warning("%s; from here on weights are copied", what)
        assert self._views is not None
        self._rung.close(held)
        copy = Copy(self._views)
        self._rung = Adapter(copy, self._engine) if isinstance(self._rung, Adapter) else copy

    def _engine_dtype(self) -> torch.dtype:
        if (
            self._views is None
        ):  # quantised or otherwise in a form of its own: as coarse as the coarsest that is compared
            return torch.bfloat16
        return next(iter(self._views.values())).dtype


def _views_of(engine: Engine) -> tuple[Mapping[str, Tensor] | None, str | None]:
    """The engine's tensors by name; or why it has none to show."""
    try:
        return engine.weight_views(), None
    except WeightSyncError as error:
        return None, str(error)


def _stamp(held: Sequence[Weight]) -> list[int]:
    """Changes with every change in place that torch counts; optimizers, ``load_state_dict`` and ``copy_`` are."""
    return [weight.parameter._version for weight in held]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
