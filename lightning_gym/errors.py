"""Everything that can go wrong, by the boundary at which it went wrong.

::

    LightningGymError
    ├── ConfigError (ValueError)        the user's settings or data; raised before a rollout is paid for
    │   └── TaskError                   one dataset row: which file, which line, which key
    ├── GymError (RuntimeError)         the Gym side of the HTTP border
    │   ├── GymStartError               a Gym server did not come up, or is not reachable
    │   ├── CollectionError             too many rollouts of one collection failed; carries the innermost cause
    │   └── CollectionAbandonedError    a collection was given up before its end, because the run ends
    ├── EngineError (RuntimeError)      the colocated engine
    │   ├── EngineStartError            it could not be built
    │   ├── EngineDeadError             it died while running; every waiting request gets this
    │   ├── EndpointDeadError           the thread that serves it died, or stopped serving
    │   ├── RequestAbortedError         a pause ended a request that was running; asked again, it waits for its turn
    │   ├── PromptTooLongError          a prompt leaves no room for a token; the endpoint's one overflow reply
    │   └── WeightSyncError             weights could not be handed over, or the check afterwards disagreed
    ├── RankLostError (RuntimeError)    another rank was killed or ended, and what all do together cannot go on
    ├── AlignmentError (ValueError)     two things that must agree token for token do not
    ├── OutOfSpaceError (OSError)       a disk is full
    ├── LogError (OSError)              the rollout log cannot be written, as on a full disk
    ├── NotFiniteError (ArithmeticError) a loss is NaN or infinite
    └── StalePolicyError (RuntimeError) a token to be trained on was sampled from other weights than allowed

A failed *rollout* is not an exception but data: see `lightning_gym.rollout.Failure`.

Messages say what was expected, what was found, where, and what to do about it. To add an error: pick the
boundary it belongs to, subclass its branch, and add the line above.
"""


class LightningGymError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(LightningGymError, ValueError):
    """A setting or a piece of user data is wrong, and the message says how to put it right."""


class TaskError(ConfigError):
    """A dataset row cannot be used."""


class GymError(LightningGymError, RuntimeError):
    """The Gym side of the HTTP border failed."""


class GymStartError(GymError):
    """A Gym server did not start, or does not answer."""


class CollectionError(GymError):
    """A collection lost more rollouts than its failure policy allows."""


class CollectionAbandonedError(GymError):
    """A collection was given up before its end: the run ends, or the process was asked to stop."""


class EngineError(LightningGymError, RuntimeError):
    """The colocated engine failed."""


class EngineStartError(EngineError):
    """The engine could not be built."""


class EngineDeadError(EngineError):
    """The engine stopped working; the cause is chained."""


class EndpointDeadError(EngineError):
    """The endpoint serves no longer; the cause is chained."""


class RequestAbortedError(EngineError):
    """The engine was paused while the request was running or queued."""


class PromptTooLongError(EngineError):
    """The prompt leaves no room in the context window for a single new token."""


class WeightSyncError(EngineError):
    """The engine does not hold the trainer's weights after a sync."""


class RankLostError(LightningGymError, RuntimeError):
    """Another rank was killed or ended; its own output says why."""


class AlignmentError(LightningGymError, ValueError):
    """Token ids, log-probabilities or masks that must agree do not."""


class OutOfSpaceError(LightningGymError, OSError):
    """The disk that something is written to is full."""


class LogError(LightningGymError, OSError):
    """The rollout log cannot be written to; the cause is chained."""


class NotFiniteError(LightningGymError, ArithmeticError):
    """A loss came out as NaN or infinite; nothing is trained on it."""


class StalePolicyError(LightningGymError, RuntimeError):
    """A trained token was sampled by weights older than the run allows."""
