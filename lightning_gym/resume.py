"""Resume: where a run stands after its last finished window, in our state and in the loop's.

A checkpoint can be taken at any instant, also in the middle of a window, whose gradients are not in it. What is saved
speaks about the last finished window: a window that the checkpoint cut is collected and trained again, whole.
"""

from collections.abc import Mapping
from typing import Any

from lightning_gym.errors import ConfigError


def check_same_run(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a saved state whose tasks or groups are others than this run's.

    Args:
        state: as it was saved.
        expected: what it must hold to be continued here.

    Raises:
        ConfigError: names what differs, both values, and what to do.
    """
    for key, value in expected.items():
        if state.get(key) != value:
            raise ConfigError(
                f"the saved run has {key}={state.get(key)!r}, this one {value!r}; a run goes on with the tasks, their "
                "order and the groups that it began with. Put them back, or start a new run from the saved weights"
            )


def rewind_fit_loop(fit_loop: dict[str, Any], *, saved_micro_batches: int, micro_batches: int) -> int:
    """Move the saved progress of Lightning's fit loop back to its last finished window, in place.

    Lightning 2.6.6 ``loops/training_epoch_loop.py`` goes on in the middle of a window, with the gradients of its first
    micro-batches lost. The counters are put where they are when a window has ended, as ``on_train_batch_end`` of its
    last micro-batch sees them or as they are after it, whichever the checkpoint was closer to. A run that goes on with
    another number of micro-batches a window is at the same window of the epoch.

    A checkpoint of after an epoch is moved to the beginning of the next one: without a validation loop, Lightning would
    train one more micro-batch of the epoch that is over, and step the optimizer after it.

    Args:
        fit_loop: of a checkpoint, ``checkpoint["loops"]["fit_loop"]``, of a module with automatic optimization.
        saved_micro_batches: of a window, when it was saved.
        micro_batches: of a window, from here on.

    Returns:
        Micro-batches whose work is done again.

    Example: saved in the second of four micro-batches of an epoch's third window.

        >>> counters = {"ready": 10, "started": 10, "processed": 9, "completed": 9}
        >>> loop = {
        ...     "epoch_progress": {"current": {"started": 1, "processed": 0}},
        ...     "epoch_loop.batch_progress": {"total": dict(counters), "current": counters, "is_last_batch": False},
        ...     "epoch_loop.automatic_optimization.optim_progress": {
        ...         "optimizer": {"step": {"current": {"completed": 2}}}
        ...     },
        ... }
        >>> rewind_fit_loop(loop, saved_micro_batches=4, micro_batches=4), counters
        (2, {'ready': 8, 'started': 8, 'processed': 8, 'completed': 8})
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    epoch = fit_loop["epoch_progress"]
    total, current = progress["total"], progress["current"]
    steps = optimizer["step"]["current"]["completed"]
    again = current["ready"] - steps * saved_micro_batches
    at_the_end = not again and current["completed"] < current["ready"]
    epoch_is_over = steps > 0 and epoch["current"]["processed"] == epoch["current"]["started"]
    before_epoch = total["ready"] - current["ready"]
    for name in current:
        current[name] = steps * micro_batches - (at_the_end and name == "completed")
        total[name] = before_epoch + current[name]
    if again or epoch_is_over:
        progress["is_last_batch"] = False
    if epoch_is_over:
        for counters in (current, optimizer["step"]["current"], optimizer["zero_grad"]["current"]):
            counters.update(dict.fromkeys(counters, 0))
        for counters in (epoch["total"], epoch["current"]):
            counters.update(dict.fromkeys(counters, counters["processed"]))
    return again
