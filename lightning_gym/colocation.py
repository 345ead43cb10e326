"""Colocation: whose turn it is.

Owns the engine, the endpoint and the Gym, and is the one place that knows the order: endpoint listening, engine built,
Gym started; then, step by step, *sync* (engine paused) -> *collect* (engine running) -> train (engine paused); and at
the end Gym, endpoint, engine, whatever happened before.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_gym.collect import Collection, Collector, Stragglers
from lightning_gym.errors import ConfigError, EngineError
from lightning_gym.gym import wire
from lightning_gym.gym.client import GymClient
from lightning_gym.gym.recovery import Recovery
from lightning_gym.gym.servers import Gym, SpawnedGym
from lightning_gym.ladder import SyncMode
from lightning_gym.logprobs import check_packing
from lightning_gym.memory_budget import Precision, compute_dtype, precision_of, trainer_bytes_to_come
from lightning_gym.open_collection import LoopThread, OpenCollection
from lightning_gym.packed_attention import use_packed_attention
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.endpoint import Endpoint
from lightning_gym.policy.engine import Engine, EngineModel
from lightning_gym.policy.ledger import Ledger, Profile
from lightning_gym.policy.parsers import BUILTIN
from lightning_gym.policy.service import PolicyService
from lightning_gym.policy_checks import check_adapters, check_no_dropout, check_vocabulary
from lightning_gym.ranks import Ranks
from lightning_gym.rollout import Rollout, SamplingProfile
from lightning_gym.sync import SyncReport, WeightSync
from lightning_gym.tasks import DealtTask, Task, check_agents
from lightning_gym.weights import checkpoint_weights

_log = logging.getLogger(__name__)
_NUM_PROMPTS_CHECKED = 64
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSettings:
    """How rollouts are played."""

    seed: int = 0
    rollout_timeout_s: float = 600.0
    retries: int = 2
    max_failed_frac: float = 0.25
    heartbeat_s: float = 10.0
    stragglers: Stragglers | None = None
    gym_away_s: float = 60.0
    """How long a Gym that does not answer is waited for, see `lightning_gym.gym.recovery`."""
    max_concurrency: int = 512
    endpoint_port: int = 0
    """0 picks a free one."""
    endpoint_api_key: str | None = None
    """Bearer token of the endpoint; ``None`` makes a random one."""
    tool_parser: str | None = BUILTIN
    """How agents see tool calls, see `lightning_gym.policy.chat.ChatFormat`."""
    reasoning_parser: str | None = BUILTIN
    """How agents see reasoning."""


class Colocation:
    """A policy that trains and plays in one process.

    Args:
        engine: not started.
        gym: not started.
        profiles: sampling of train and eval rollouts.
        settings: how rollouts are played.
        sync_mode: how the engine gets the trainer's weights, see `lightning_gym.ladder`.
    """

    def __init__(
        self,
        engine: Engine,
        gym: Gym,
        profiles: dict[Profile, SamplingProfile],
        settings: CollectSettings,
        *,
        sync_mode: SyncMode = "auto",
    ) -> None:
        self.profiles = profiles
        self.ranks = Ranks()
        self._report: SyncReport | None = None
        """Of the last sync, until `take_sync_metrics` is asked for it."""
        self.start_seconds: dict[str, float] = {}
        """What `start` spent on the engine and on Gym."""
        self._engine = engine
        self._gym = gym
        self._settings = settings
        self._sync_mode: SyncMode = sync_mode
        self._ledger = Ledger()
        self._run_dir = Path()
        self._heed: Callable[[], None] = lambda: None
        self._endpoint: Endpoint | None = None
        self._sync: WeightSync | None = None
        self._play: LoopThread | None = None
        self._open: OpenCollection | None = None
        self._client: GymClient | None = None
        self._collector: Collector | None = None
        self._evaluator: Callable[[str], Collector] | None = None
        self._num_evaluations = 0
        self._closers: list[tuple[str, Callable[[], None]]] = []

    def start(
        self,
        model: nn.Module,
        model_path: Path,
        tasks: Sequence[Task],
        *,
        run_dir: Path,
        run_id: str,
        ranks: Ranks,
        precision: Precision | None = None,
        max_tokens_per_micro_batch: int = 0,
        max_lag: int = 0,
    ) -> None:
        """Bring everything up, and check whatever can be checked before a rollout is paid for.

        Args:
            model: the causal language model being trained; the engine starts from its weights in memory.
            model_path: directory with its config, tokenizer and chat template.
            tasks: that will be played; their agents and the first prompts are checked.
            run_dir: where logs go.
            run_id: prefix of rollout ids.
            ranks: who else trains.
            precision: of the Trainer; the engine computes in what it casts to. ``None``: as the parameters are.
            max_tokens_per_micro_batch: packed tokens whose activations will live beside the engine.
            max_lag: optimizer steps by which the weights that sample may be behind when a collection begins to train.

        Raises:
            ConfigError: the model mixes packed sequences, has dropout, an adapter that cannot be merged, or fewer rows
                than the tokenizer ids, or cannot be synced in this mode; the chat template, the port, a task's agent,
                or ``max_model_len`` against a task's prompt.
            EngineStartError: the engine could not be built.
            GymStartError: Gym did not come up.
        """
        self.ranks = ranks
        use_packed_attention(model)
        check_packing(model)
        check_no_dropout(model)
        check_adapters(model)
        service = PolicyService(
            self._engine,
            model_path,
            self._ledger,
            self.profiles,
            tool_parser=self._settings.tool_parser,
            reasoning_parser=self._settings.reasoning_parser,
        )
        endpoint = Endpoint(service, port=self._settings.endpoint_port, api_key=self._settings.endpoint_api_key)
        self._endpoint = endpoint
        self._closers.append(("endpoint", endpoint.close))
        check_vocabulary(model, endpoint.service.chat.num_ids)
        check_prompts(tasks[:_NUM_PROMPTS_CHECKED], endpoint.service.chat, self._engine.max_model_len)
        device = str(next(model.parameters()).device)
        precision = precision or precision_of(model)
        start = time.perf_counter()
        self._closers.append(("weight sync", self._release_weights))
        self._closers.append(("engine", self._engine.close))
        self._engine.start(
            EngineModel(
                path=model_path,
                dtype=compute_dtype(precision),
                device=device,
                weights=lambda: checkpoint_weights(model),
                trainer_bytes=trainer_bytes_to_come(
                    model, precision=precision, max_tokens_per_micro_batch=max_tokens_per_micro_batch
                ),
            )
        )
        self._sync = WeightSync(self._engine, model, mode=self._sync_mode, ranks=ranks, max_lag=max_lag)
        built = time.perf_counter()
        endpoint.start()
        self._closers.append(("gym", self._gym.close))
        self._run_dir = run_dir
        self._connect(self._start_gym(), run_id)
        self.start_seconds = {"engine": built - start, "gym": time.perf_counter() - built}
        assert self._client is not None
        check_agents(tasks, self._client.agents)

    def _start_gym(self) -> str:
        endpoint = self.endpoint
        return self._gym.start(
            policy_url=endpoint.url, api_key=endpoint.api_key, model=endpoint.service.model_name, run_dir=self._run_dir
        )

    def _restart_gym(self) -> str | None:
        """Start the Gym again if it ended by itself."""
        code = self._gym.poll() if isinstance(self._gym, SpawnedGym) else None
        if code is None:
            return None
        _log.warning(
            "the Gym ended by itself with code %d, and is started again; see its log in %s", code, self._run_dir
        )
        return self._start_gym()

    def _connect(self, head_url: str, run_id: str) -> None:
        settings = self._settings
        self._play = LoopThread()
        self._closers.append(("client", self._disconnect))

        async def connect() -> GymClient:
            client = GymClient(
                head_url, max_concurrency=settings.max_concurrency, rollout_timeout_s=settings.rollout_timeout_s
            )
            await client.connect()
            return client

        self._client = client = self._play.submit(connect()).result()
        recovery = Recovery(client, self._restart_gym, away_s=settings.gym_away_s)

        def collector(run_id: str, stragglers: Stragglers | None = None) -> Collector:
            return Collector(
                client,
                self._ledger,
                run_id=run_id,
                rank=self.ranks.rank,
                seed=settings.seed,
                retries=settings.retries,
                max_failed_frac=settings.max_failed_frac,
                heartbeat_s=settings.heartbeat_s,
                stragglers=stragglers,
                recovery=recovery,
            )

        self._collector = collector(run_id, settings.stragglers)
        self._evaluator = lambda number: collector(f"{run_id}-{number}")

    def _disconnect(self) -> None:
        if self._open is not None:
            self._open.abandon()
        assert self._play is not None
        if self._client is not None:
            self._play.submit(self._client.close()).result(timeout=_CLOSE_S)
        self._play.close()

    def _release_weights(self) -> None:
        sync, self._sync = self._sync, None
        if sync is not None:
            sync.close()

    @property
    def endpoint(self) -> Endpoint:
        """The running endpoint."""
        if self._endpoint is None:
            raise EngineError("the colocation has not been started")
        return self._endpoint

    def ensure_synced(self, version: int) -> None:
        """Give the engine the trainer's weights unless it has them already; waits for a collection that is open.

        Args:
            version: the optimizer step that the trainer's weights are of.

        Raises:
            WeightSyncError: trainer and engine disagree afterwards.
        """
        if self._sync is None:
            raise EngineError("the colocation has not been started")
        self._settle()
        if self._engine.weight_version != version or "weights" in self._engine.asleep:
            report = self._sync.sync(version)
            self._report = report
            self.endpoint.service.stats.sync_seconds += report.seconds

    def take_sync_metrics(self) -> dict[str, float]:
        """What to log of the last sync; empty if there was none since this was last asked."""
        report, self._report = self._report, None
        if report is None:
            return {}
        return {
            "sync/copy_s": report.seconds - report.canary_seconds,
            "sync/canary_s": report.canary_seconds,
            "sync/bytes": float(report.num_bytes),
            "sync/tensors": float(report.num_tensors),
            "sync/canary_diff": report.canary_diff,
        }

    def collect(self, dealt: Sequence[DealtTask], *, group_size: int, profile: Profile) -> Collection:
        """Play `group_size` attempts at every task with the weights the engine has.

        Raises:
            CollectionError: too many rollouts failed.
        """
        return self.begin(dealt, group_size=group_size, profile=profile).result()

    def begin(
        self,
        dealt: Sequence[DealtTask],
        *,
        group_size: int,
        profile: Profile,
        on_group: Callable[[list[Rollout]], None] | None = None,
    ) -> OpenCollection:
        """Begin to play `group_size` attempts at every task with the weights the engine has, and do not wait.

        One collection is open at a time: another one, an evaluation or a sync waits for its end.

        Args:
            dealt: the tasks.
            group_size: attempts at each.
            profile: of the sampling.
            on_group: is given each group as soon as its last attempt is over, on the thread that plays; it has to be
                quick.

        Raises:
            WeightSyncError: the engine shares the trainer's weights, and they changed since they were synced.
        """
        if self._collector is None:
            raise EngineError("the colocation has not been started")
        return self._begin(self._collector, dealt, group_size=group_size, profile=profile, on_group=on_group)

    def evaluate(self, dealt: Sequence[DealtTask], *, group_size: int) -> Collection:
        """Play held-out tasks with the weights the engine has, sampled as the eval profile says.

        Every attempt is waited for. Seeds depend on the group and the attempt alone, so that two evaluations differ by
        the weights and not by the draw.

        Raises:
            CollectionError: too many rollouts failed.
        """
        if self._evaluator is None:
            raise EngineError("the colocation has not been started")
        self._num_evaluations += 1  # ids are unique in the run: a late call of an earlier evaluation is nobody's
        collector = self._evaluator(f"eval{self._num_evaluations}")
        return self._begin(collector, dealt, group_size=group_size, profile="eval").result()

    def aggregate(self, rollouts: Sequence[Rollout]) -> dict[str, dict[str, float]]:
        """What each agent's environment makes of its rollouts together, by agent and Gym's names.

        Raises:
            GymError: an agent gives no metrics.
        """
        if self._client is None or self._play is None:
            raise EngineError("the colocation has not been started")
        by_agent: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            by_agent.setdefault(rollout.agent, []).append(rollout)
        return {
            agent: self._play.submit(self._client.aggregate(agent, played)).result()
            for agent, played in by_agent.items()
        }

    def _begin(
        self,
        collector: Collector,
        dealt: Sequence[DealtTask],
        *,
        group_size: int,
        profile: Profile,
        on_group: Callable[[list[Rollout]], None] | None = None,
    ) -> OpenCollection:
        assert self._play is not None
        self._enter_play()
        future = self._play.submit(
            collector.collect(
                dealt,
                group_size=group_size,
                profile_name=profile,
                profile=self.profiles[profile],
                on_group=on_group,
            )
        )
        self._open = OpenCollection(future, check=self._check_alive, finish=self._leave_play)
        return self._open

    @contextlib.contextmanager
    def playing(self) -> Generator[None]:
        """The engine's turn: the endpoint answers inside.

        Raises:
            WeightSyncError: the engine shares the trainer's weights, and they changed since they were synced.
        """
        self._enter_play()
        try:
            yield
        except BaseException:
            self._engine.pause()
            raise
        self._leave_play()

    def _enter_play(self) -> None:
        self._settle()
        sync = self._started_sync()
        sync.check_unchanged()
        sync.wake()
        self._engine.resume()

    def _leave_play(self) -> None:
        self._engine.pause()
        sync = self._started_sync()
        sync.check_unchanged()
        sync.rest()

    def _settle(self) -> None:
        if self._open is not None:
            self._open.settle()

    def _started_sync(self) -> WeightSync:
        if self._sync is None:
            raise EngineError("the colocation has not been started")
        return self._sync

    def _check_alive(self) -> None:
        """Raise what has died of that which rollouts depend on."""
        self._heed()
        self._engine.check_alive()
        self.endpoint.check_alive()

    def heed(self, check: Callable[[], None]) -> None:
        """Have `check` called again and again while rollouts are waited for; what it raises ends the wait."""
        self._heed = check

    def close(self) -> None:
        """Stop everything that was started, last first; bounded, idempotent, never raises. Then it may start again."""
        while self._closers:
            name, closer = self._closers.pop()
            start = time.perf_counter()
            try:
                closer()
            except Exception:  # noqa: BLE001  logged; what was started after it still has to be closed
                _log.exception("closing the %s failed; the rest is closed all the same", name)
            _log.debug("closed the %s in %.2f s", name, time.perf_counter() - start)


def check_prompts(tasks: Sequence[Task], chat: ChatFormat, max_model_len: int) -> None:
    """Refuse tasks whose prompt leaves no room for an answer.

    Raises:
        ConfigError: names the first such task, its length, and the limit.
    """
    for task in tasks:
        params = task.row[wire.RESPONSES_CREATE_PARAMS]
        messages = wire.input_messages(params["input"])
        ids = chat.encode(chat.render(messages, wire.chat_tools(params.get("tools"))))
        if len(ids) >= max_model_len:
            raise ConfigError(
                f"the prompt of task {task.index} has {len(ids)} tokens, and max_model_len is {max_model_len}: there "
                "is no room for an answer; raise max_model_len or drop the task"
            )
