"""``lightning-gym train ... --dry-run``: what a run would be, and whether it could start; needs no GPU and no weights.

Composes the configuration, builds what is cheap to build, divides a device's memory, reads the dataset's rows, and
says what it could not check.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_gym.configuration import absent_packages, arguments_of, compose_run
from lightning_gym.corrections import check_composition, correction_named
from lightning_gym.errors import ConfigError, LightningGymError
from lightning_gym.losses import loss_named
from lightning_gym.memory_budget import (
    DEVICE_ALLOWANCE_BYTES,
    GIB,
    MemoryBudget,
    ModelSize,
    Part,
    engine_parts,
    trainer_parts,
    wanted_kv_cache_bytes,
)
from lightning_gym.model_files import find_config
from lightning_gym.tasks import Task, read_tasks

_CPU_KV_CACHE_BYTES = 256 << 20
_BATCHED_TOKENS = 8192
_NUM_PROMPTS_CHECKED = 64


@dataclass(slots=True)
class Plan:
    """What a run would be."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    """Name and words, in the order in which they are read."""
    budget: MemoryBudget | None = None
    """Of one device."""
    unchecked: list[str] = field(default_factory=list)
    """What could not be looked at here."""
    problems: list[str] = field(default_factory=list)
    """What would stop the run."""

    def text(self) -> str:
        """For a terminal."""
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:{width}}  {words}" for name, words in self.facts]
        if self.budget is not None:
            lines += ["", "memory of one device", *(f"  {line}" for line in self.budget.table().splitlines())]
        lines += [f"not checked: {words}" for words in self.unchecked]
        lines += [f"PROBLEM: {words}" for words in self.problems] or ["ready to start"]
        return "\n".join(lines)


def plan_run(overrides: Sequence[str]) -> Plan:
    """Look at what ``lightning-gym train`` with these overrides would do.

    Raises:
        ConfigError: the configuration itself is wrong.
    """
    cfg = compose_run(overrides)
    plan = Plan()
    plan.facts.append(("recipe", " ".join(overrides)))
    plan.unchecked += [f"{target}: it is not installed here" for target in absent_packages(cfg)]
    _check_parts(cfg, plan)
    model = _make_model_files(_Arguments(cfg.policy)["model"])
    size = _plan_model(cfg, model, plan)
    tasks = _plan_data(cfg, plan)
    _plan_prompts(cfg, model, size, tasks, plan)
    _plan_steps(cfg, plan)
    if size is not None:
        _plan_memory(cfg, size, plan)
    return plan


def _make_model_files(model: Any) -> Any:
    """Where `model` is a call that writes a directory (model=tiny), write it."""
    return instantiate(model) if isinstance(model, Mapping) else model


class _Arguments:
    """Arguments of a node's constructor: as the configuration has them, else its defaults."""

    def __init__(self, node: DictConfig) -> None:
        given: Any = OmegaConf.to_container(node, resolve=True)
        self._values: Mapping[str, Any] = (arguments_of(node["_target_"]) or {}) | given

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or `default` where the constructor has none of that name."""
        return self._values.get(name, default)


def _check_parts(cfg: DictConfig, plan: Plan) -> None:
    """Build what costs nothing: everything but the policy and the Trainer, whose devices are elsewhere."""
    for name in ("callback", "data"):
        try:
            instantiate(cfg[name], _convert_="all")
        except InstantiationException as error:
            plan.problems.append(f"{name}: {error.__cause__ or error}")
    policy = _Arguments(cfg.policy)
    try:
        check_composition(loss_named(policy.get("loss", "grpo")), correction_named(policy.get("correction") or "none"))
    except ConfigError as error:
        plan.problems.append(str(error))


def _plan_model(cfg: DictConfig, model: Any, plan: Plan) -> ModelSize | None:
    if not isinstance(model, str):
        plan.unchecked.append(f"the model that {model.get('_target_', 'the configuration')} makes")
        return None
    try:
        config, source = find_config(model)
    except ConfigError as error:
        plan.problems.append(str(error))
        return None
    size = _with_adapter(ModelSize.of_config(config), config, _Arguments(cfg.policy).get("peft_config"))
    adapter = _of_adapter(size)
    trained = f", and an adapter of {adapter / 1e6:.1f} M that alone trains" if adapter else ""
    plan.facts.append(
        ("model", f"{model}: {(size.num_parameters - adapter) / 1e9:.2f} B parameters{trained} ({source})")
    )
    if source != "directory":
        plan.unchecked.append(f"weights, tokenizer and chat template of {model}: they are not in a directory here")
    max_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = _Arguments(cfg.engine).get("max_model_len")
    if max_positions is not None and wanted is not None and wanted > max_positions:
        plan.problems.append(f"engine.max_model_len is {wanted}, but the model has {max_positions} positions")
    return size


def _with_adapter(size: ModelSize, config: Any, peft_config: Mapping[str, Any] | None) -> ModelSize:
    """With a LoRA of rank r, every adapted layer trains r (inputs + outputs) numbers, and nothing else trains."""
    if peft_config is None:
        return size
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = peft_config.get("target_modules")
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not model.get_output_embeddings()
        and (wanted == "all-linear" or name.rpartition(".")[2] in (wanted or ()))
    ]
    num_trained = sum(peft_config.get("r", 8) * (layer.in_features + layer.out_features) for layer in layers)
    return replace(size, num_parameters=size.num_parameters + num_trained, num_trained=num_trained)


def _plan_data(cfg: DictConfig, plan: Plan) -> list[Task]:
    data = _Arguments(cfg.data)
    try:
        tasks = read_tasks(data["train"], agent=data.get("agent"))
        _plan_validation(data, plan)
    except LightningGymError as error:
        prepare = cfg.get("prepare_data")
        plan.problems.append(f"{error}{f'. Its data: {prepare}' if prepare else ''}")
        return []
    by_agent: dict[str, int] = {}
    for task in tasks:
        by_agent[task.agent] = by_agent.get(task.agent, 0) + 1
    plan.facts.append(("data", ", ".join(f"{count} rows for {agent}" for agent, count in sorted(by_agent.items()))))
    for agent in data.get("agent_weights") or {}:
        if agent not in by_agent:
            plan.problems.append(f"data.agent_weights names {agent!r}, for which there are no rows")
    return tasks


def _plan_validation(data: _Arguments, plan: Plan) -> None:
    held_out = data.get("val")
    if held_out is None:
        return
    named = held_out if isinstance(held_out, Mapping) else {"val": held_out}
    samples = data.get("val_samples", 1)
    for name, source in named.items():
        rows = read_tasks(source, agent=data.get("agent"))
        plan.facts.append(("validation", f"{len(rows)} rows of {name} x {samples} attempts"))


def _plan_prompts(cfg: DictConfig, model: Any, size: ModelSize | None, tasks: Sequence[Task], plan: Plan) -> None:
    if not tasks:
        return
    if size is None or not isinstance(model, str) or not Path(model).is_dir():
        plan.unchecked.append("whether prompts fit into the context: needs the tokenizer")
        return
    from lightning_gym.colocation import check_prompts
    from lightning_gym.policy.chat import ChatFormat

    try:
        check_prompts(tasks[:_NUM_PROMPTS_CHECKED], ChatFormat(Path(model)), _Arguments(cfg.engine)["max_model_len"])
    except ConfigError as error:
        plan.problems.append(str(error))
        return
    plan.facts.append(("prompts", f"the first {min(len(tasks), _NUM_PROMPTS_CHECKED)} leave room for an answer"))


def _num_ranks(cfg: DictConfig) -> int:
    trainer = _Arguments(cfg.trainer)
    devices = trainer.get("devices", "auto")
    devices = len(devices) if isinstance(devices, list) else 1 if devices in ("auto", -1, "-1", None) else int(devices)
    return devices * (trainer.get("num_nodes") or 1)


def _plan_steps(cfg: DictConfig, plan: Plan) -> None:
    data, trainer, ranks = _Arguments(cfg.data), _Arguments(cfg.trainer), _num_ranks(cfg)
    prompts, attempts = data["prompts_per_step"], data["group_size"]
    micro_batches, ceiling = trainer.get("accumulate_grad_batches", 1), data["max_tokens_per_micro_batch"]
    if prompts % ranks:
        plan.problems.append(f"data.prompts_per_step is {prompts}, which {ranks} ranks cannot share equally")
    of_rank = prompts * attempts / ranks
    longest = _Arguments(cfg.engine).get("max_model_len")
    room = micro_batches * ceiling / of_rank
    plan.facts.append(
        ("a step", f"{prompts} tasks x {attempts} attempts = {prompts * attempts} rollouts on {ranks} rank(s)")
    )
    plan.facts.append(
        (
            "a rank",
            f"{micro_batches} micro-batches of {ceiling} tokens: room for {room:.0f} tokens a rollout in the mean"
            + ("" if longest is None else f", where max_model_len is {longest}"),
        )
    )
    if longest is not None and longest > ceiling:
        plan.problems.append(
            f"a rollout may have engine.max_model_len = {longest} tokens, and a micro-batch takes "
            f"data.max_tokens_per_micro_batch = {ceiling}: raise one or lower the other"
        )
    steps = trainer.get("max_steps", -1)
    if steps and steps > 0:
        plan.facts.append(("run", f"{steps} steps, {steps * prompts * attempts} rollouts"))


def _plan_memory(cfg: DictConfig, size: ModelSize, plan: Plan) -> None:
    policy, trainer, callback = _Arguments(cfg.policy), _Arguments(cfg.trainer), _Arguments(cfg.callback)
    precision = str(trainer.get("precision") or "32-true")
    weights_dtype = policy.get("dtype", "float32")
    trained = trainer_parts(
        size,
        precision="bf16-true" if weights_dtype == "bfloat16" else precision,  # type: ignore[arg-type]  one of them
        max_tokens_per_micro_batch=_Arguments(cfg.data)["max_tokens_per_micro_batch"],
        gradient_checkpointing=policy.get("gradient_checkpointing", False),
        reference=bool(policy.get("kl_coefficient")) and policy.get("peft_config") is None,
    )
    shards = _num_shards(trainer)
    parts = [_cut(part, shards) for part in trained]
    engine = _engine_parts(cfg, size, weights_dtype, alone=_num_ranks(cfg) == 1)
    on_cpu = trainer.get("accelerator") == "cpu"
    device = [] if on_cpu else [Part("device", "allowance", DEVICE_ALLOWANCE_BYTES)]
    gib = (cfg.get("hardware") or {}).get("device_gib")
    plan.budget = MemoryBudget(
        parts=[*parts, *engine, *device], device_bytes=None if gib is None or on_cpu else int(gib * GIB)
    )
    if plan.budget.device_bytes is not None and plan.budget.total_bytes > plan.budget.device_bytes:
        plan.problems.append(
            f"trainer and engine need {plan.budget.total_bytes / GIB:.1f} GiB of a device's "
            f"{plan.budget.device_bytes / GIB:.1f}: see the table above for what to make smaller"
        )
    if gib is None and not on_cpu:
        plan.unchecked.append("whether this fits: nothing says how much memory a device has (+hardware.device_gib=80)")
    if callback.get("sync_mode") == "share" and (policy.get("peft_config") is not None or shards > 1):
        plan.problems.append("callback.sync_mode=share: the trainer's weights are not the engine's here; use auto")
    if callback.get("sync_mode") == "adapter" and not _is_kept_apart(policy, _Arguments(cfg.engine)):
        plan.problems.append(
            "callback.sync_mode=adapter: needs policy.peft_config, and engine.max_lora_rank of at least its rank"
        )


def _is_kept_apart(policy: _Arguments, engine: _Arguments) -> bool:
    """Whether the policy has an adapter for which the engine has room."""
    peft_config = policy.get("peft_config")
    return peft_config is not None and peft_config.get("r", 8) <= engine.get("max_lora_rank", 0)


def _base_is_shared(policy: _Arguments, engine: _Arguments) -> bool:
    return policy.get("peft_config") is None or _is_kept_apart(policy, engine)


def _num_shards(trainer: _Arguments) -> int:
    strategy = trainer.get("strategy")
    size = strategy.get("data_parallel_size") if isinstance(strategy, Mapping) else None
    return size if isinstance(size, int) else 1


def _cut(part: Part, shards: int) -> Part:
    """What FSDP2 keeps of it on one rank."""
    if shards > 1 and part.name in ("weights", "gradients", "optimizer state", "reference model"):
        return Part(part.owner, f"{part.name}, 1 of {shards} parts", math.ceil(part.num_bytes / shards))
    return part


def _engine_parts(cfg: DictConfig, size: ModelSize, weights_dtype: str, *, alone: bool) -> list[Part]:
    engine, trainer, policy = _Arguments(cfg.engine), _Arguments(cfg.trainer), _Arguments(cfg.policy)
    on_cpu = trainer.get("accelerator") == "cpu"
    further = engine.get("engine_args") or {}
    dtype = str(further.get("dtype", weights_dtype))
    longest, num_seqs = engine.get("max_model_len", 4096), engine.get("max_num_seqs", 256)
    kv = engine.get("kv_cache_memory_bytes") or (_CPU_KV_CACHE_BYTES if on_cpu else None)
    if kv is None:
        kv = wanted_kv_cache_bytes(size, dtype=dtype, max_num_seqs=num_seqs, max_model_len=longest)
    batched = further.get("max_num_batched_tokens", max(_BATCHED_TOKENS, longest) if on_cpu else _BATCHED_TOKENS)
    return engine_parts(
        replace(size, num_parameters=size.num_parameters - _of_adapter(size)),
        dtype=dtype,
        kv_cache_bytes=kv,
        max_num_seqs=num_seqs,
        max_batched_tokens=batched,
        shared=alone and _base_is_shared(policy, engine) and dtype == weights_dtype,
        cuda_graphs=not on_cpu and not engine.get("enforce_eager"),
    )


def _of_adapter(size: ModelSize) -> int:
    return 0 if size.num_trained == size.num_parameters else size.num_trained
