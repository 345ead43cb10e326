"""``lightning-gym``: what there is to do from a shell. Each command imports what it needs when it runs."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gym.errors import ConfigError, LightningGymError
from lightning_gym.gym_policy import build as gym_policy
from lightning_gym.tiny_policy.build import ENVIRONMENTS, TinyPolicy, read_record

if TYPE_CHECKING:
    from lightning_gym.validate import Check


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits with 2 and one line on a mistake of the user's, with a traceback on one of ours."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if arguments[:1] == ["train"]:  # Hydra has a command line of its own
        command = partial(_train, arguments[1:])
    else:
        parsed = parser.parse_args(arguments)
        command = partial(parsed.command, parsed)
    try:
        command()
    except LightningGymError as error:
        sys.exit(f"lightning-gym: {error}")
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-gym", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser(
        "train",
        help="train a recipe: lightning-gym train counter --devices 2 trainer.max_steps=20 (Hydra overrides); "
        "--dry-run says what that would be, and whether it could start",
    )
    _add_warm_start_arguments(
        commands.add_parser(
            "warm-start", help="make the tiny policy that a CPU recipe starts from: lightning-gym warm-start counter"
        )
    )
    serve = commands.add_parser("serve", help="start the OpenAI-compatible endpoint alone")
    serve.add_argument("model", type=Path, help="directory of a transformers model")
    serve.add_argument("--port", type=int, default=0, help="0 picks a free one")
    serve.add_argument("--api-key", default=None, help="bearer token; a random one by default")
    serve.add_argument("--max-model-len", type=int, default=4096)
    serve.add_argument("--dtype", default="float32")
    parser_help = "`builtin`, or a name in vLLM's registry"
    serve.add_argument("--tool-parser", default="builtin", help=f"how tool calls are read: {parser_help}")
    serve.add_argument("--reasoning-parser", default="builtin", help=f"how reasoning is read: {parser_help}")
    serve.set_defaults(command=_serve)
    validate = commands.add_parser(
        "validate", help="check a training set-up, or anyone's endpoint and Gym: lightning-gym validate counter"
    )
    validate.add_argument("recipe", nargs="*", help="a recipe and overrides, as `train` takes them: its set-up is run")
    validate.add_argument("--endpoint", default=None, help="check this OpenAI-compatible endpoint, /v1 included")
    validate.add_argument("--api-key", default="", help="its bearer token")
    validate.add_argument("--served-model", default=None, help="which of its models; the first by default")
    validate.add_argument("--gym", default=None, help="check the Gym with this head server's URL; needs --rows")
    validate.add_argument("--rows", type=Path, default=None, help="JSONL of the dataset rows to play")
    validate.add_argument("--limit", type=int, default=4, help="how many rows are played")
    validate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    validate.set_defaults(command=_validate)
    inspect = commands.add_parser("inspect", help="print the rollouts of a rollouts.jsonl, token by token")
    inspect.add_argument("rollouts", type=Path)
    inspect.add_argument("--model", type=Path, default=None, help="whose tokenizer decodes; the run's own by default")
    inspect.add_argument("--step", type=int, default=None, help="only this optimizer step")
    inspect.add_argument("--limit", type=int, default=None, help="at most this many rollouts")
    inspect.add_argument("--json", action="store_true", help="one JSON object a line")
    inspect.set_defaults(command=_inspect)
    report = commands.add_parser("report", help="write a run's curves and rollouts into one HTML file")
    report.add_argument("run_dir", type=Path, help="output directory of a run, finished or not")
    report.add_argument("--out", type=Path, default=None, help="the file to write; RUN_DIR/report.html by default")
    report.add_argument("--model", type=Path, default=None, help="whose tokenizer decodes; the run's own by default")
    report.add_argument("--limit", type=int, default=2000, help="hold at most this many rollouts")
    report.add_argument("--step", type=int, default=None, help="hold the rollouts of this optimizer step only")
    report.set_defaults(command=_report)
    _add_eval_arguments(
        commands.add_parser(
            "eval",
            help="play a model or a checkpoint over a dataset: lightning-gym eval counter ckpt_path=FILE, or "
            "lightning-gym eval --model DIR --rows FILE --gym counter",
        )
    )
    _add_generate_arguments(commands.add_parser("generate", help="play rollouts for a later run, without training"))
    _add_export_arguments(commands.add_parser("export", help="the policy of a checkpoint as a transformers directory"))
    doctor = commands.add_parser("doctor", help="what a model's chat template does, and what that means for training")
    doctor.add_argument("--model", type=Path, required=True, help="directory of a transformers model")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(command=_doctor)
    bench = commands.add_parser("bench", help="measure this machine; from a checkout")
    bench.add_argument("name", help="a module of benchmarks/, or `all`")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(command=_bench)
    return parser


def _add_warm_start_arguments(warm_start: argparse.ArgumentParser) -> None:
    warm_start.add_argument(
        "environment",
        choices=(*ENVIRONMENTS, *gym_policy.ENVIRONMENTS),
        help="the first two are embedded; the others are NeMo Gym's own, and take its Python (make setup-gym)",
    )
    warm_start.add_argument("--out", default="outputs/tiny_policy", help="where ENVIRONMENT-seedN is written")
    warm_start.add_argument("--json", action="store_true", help="print the whole record as one JSON object")
    for field in fields(TinyPolicy):
        if field.name != "environment":
            kind = float if field.name in ("lr", "error_probability") else int
            option = f"--{field.name.replace('_', '-')}"
            warm_start.add_argument(option, type=kind, default=argparse.SUPPRESS, help=f"{field.default} by default")
    warm_start.set_defaults(command=_warm_start)


def _add_eval_arguments(evaluation: argparse.ArgumentParser) -> None:
    evaluation.add_argument("recipe", nargs="*", help="a recipe and overrides, as `train` takes them")
    evaluation.add_argument("--model", type=Path, default=None, help="a model's directory, or a Trainer's checkpoint")
    evaluation.add_argument("--model-path", type=Path, default=None, help="config and tokenizer of a checkpoint")
    evaluation.add_argument("--rows", type=Path, default=None, help="dataset rows; by default the recipe's data.val")
    evaluation.add_argument(
        "--gym", default=None, help="an environment's name, a YAML of Gym's, or a head server's URL"
    )
    evaluation.add_argument("--samples", type=int, default=None, help="attempts at each task")
    evaluation.add_argument("--limit", type=int, default=None, help="at most this many tasks on each device")
    evaluation.add_argument("--out", type=Path, default=None, help="where evaluation.json and val_rollouts.jsonl go")
    evaluation.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluation.set_defaults(command=_eval)


def _add_generate_arguments(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("recipe", nargs="+", help="a recipe and overrides, as `train` takes them")
    generate.add_argument("--steps", type=int, default=1, help="optimizer steps to play rollouts for")
    generate.add_argument("--save-rollouts", type=Path, default=None, help="by default rollouts.jsonl in the output")
    generate.set_defaults(command=_generate)


def _add_export_arguments(export: argparse.ArgumentParser) -> None:
    export.add_argument("checkpoint", type=Path, help="of a Lightning Trainer")
    export.add_argument("directory", type=Path, help="to be made")
    export.add_argument("--model-path", default=None, help="config and tokenizer; by default those of the run's start")
    export.add_argument("--policy", default=None, help="attribute of the module that holds the model")
    export.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, instead of merging it")
    export.set_defaults(command=_export)


def _warm_start(arguments: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "out", "json")}
    if arguments.environment in gym_policy.ENVIRONMENTS:
        _gym_warm_start(given, arguments)
        return
    target = TinyPolicy(**given).ensure(arguments.out)
    record = read_record(target)
    assert record is not None
    if arguments.json:
        print(json.dumps({"path": str(target), **record}))
        return
    print(
        f"{target}: starting reward {record['reward_predicted']:.3f} predicted, "
        f"{record['reward_measured']:.3f} measured ({record['rollouts_measured']} rollouts), "
        f"{record['reward_greedy']:.3f} greedy"
    )
    print(
        f"{record['parameters'] / 1e6:.2f} M parameters, vocabulary {record['vocab_size']}, "
        f"{record['sft_steps']} SFT steps in {record['train_seconds']:.0f} s"
    )


def _gym_warm_start(settings: dict[str, Any], arguments: argparse.Namespace) -> None:
    unknown = set(settings) - {field.name for field in fields(gym_policy.GymPolicy)}
    if unknown:
        raise ConfigError(f"a policy for {arguments.environment} has no setting {', '.join(sorted(unknown))}")
    target = gym_policy.GymPolicy(**settings).ensure(arguments.out)
    record = read_record(target)
    assert record is not None
    if arguments.json:
        print(json.dumps({"path": str(target), **record}))
        return
    rewards = ", ".join(f"{name} {reward:.3f}" for name, reward in record["rewards"].items())
    print(f"{target}: its teacher was rewarded, in {record['demonstrations']} rollouts of real Gym, with {rewards}")


def _train(arguments: list[str]) -> None:
    dry_run = "--dry-run" in arguments
    arguments = _overrides([argument for argument in arguments if argument != "--dry-run"])
    if dry_run:
        _plan(arguments)
        return
    # A program of its own, so that Lightning's launcher can start the other ranks with the same command.
    os.execv(sys.executable, [sys.executable, "-m", "lightning_gym.train", *arguments])  # noqa: S606  no shell


def _plan(overrides: list[str]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a plan downloads nothing
    from lightning_gym.plan import plan_run

    plan = plan_run(overrides)
    print(plan.text())
    if plan.problems:
        sys.exit(1)


_OPTIONS = {
    "--devices": "++trainer.devices",
    "--save-rollouts": "++callback.log_rollouts",
    "--load-rollouts": "++callback.replay",
}


def _overrides(arguments: list[str]) -> list[str]:
    """Hydra's overrides; a bare first word is a recipe, ``--devices N`` is ``++trainer.devices=N``, and so on."""
    overrides: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in _OPTIONS and (value := value if equals else next(words, "")):
            overrides.append(f"{_OPTIONS[option]}={_quoted(value)}")
        else:
            overrides.append(word)
    if overrides and "=" not in overrides[0] and not overrides[0].startswith(("-", "~")):
        return [f"recipe={overrides[0]}", *overrides[1:]]
    return overrides


def _quoted(value: str) -> str:
    """A word of the shell in Hydra's grammar, to which a space, comma or bracket in a path means something."""
    return value if re.fullmatch(r"[\w./:-]+", value) else "'" + value.replace("'", r"\'") + "'"


def _serve(arguments: argparse.Namespace) -> None:
    from lightning_gym.offline import stay_quiet

    stay_quiet(arguments.model)
    from lightning_gym.serve import serve

    serve(
        arguments.model,
        port=arguments.port,
        api_key=arguments.api_key,
        max_model_len=arguments.max_model_len,
        dtype=arguments.dtype,
        tool_parser=arguments.tool_parser,
        reasoning_parser=arguments.reasoning_parser,
    )


def _validate(arguments: argparse.Namespace) -> None:
    from lightning_gym.validate import check_json, check_table

    checks = [*_endpoint_checks(arguments), *_gym_checks(arguments), *_recipe_checks(arguments)]
    if not checks:
        raise ConfigError("nothing to check; name a recipe, --endpoint, or --gym with --rows")
    print(check_json(checks) if arguments.json else check_table(checks))
    if any(check.passed is False for check in checks):
        sys.exit(1)


def _endpoint_checks(arguments: argparse.Namespace) -> "list[Check]":
    from lightning_gym.validate import EndpointChecks

    if arguments.endpoint is None:
        return []
    return EndpointChecks(arguments.endpoint, api_key=arguments.api_key, model=arguments.served_model).run()


def _gym_checks(arguments: argparse.Namespace) -> "list[Check]":
    from lightning_gym.rollout import SamplingProfile
    from lightning_gym.tasks import read_tasks
    from lightning_gym.validate import check_gym

    if arguments.gym is None:
        return []
    if arguments.rows is None:
        raise ConfigError("--gym needs --rows, the dataset rows to play")
    tasks = read_tasks(arguments.rows)[: arguments.limit]
    return check_gym(arguments.gym, tasks, SamplingProfile(), timeout_s=600.0)


def _recipe_checks(arguments: argparse.Namespace) -> "list[Check]":
    if not arguments.recipe:
        return []
    from lightning_gym.validate_training import check_recipe

    return check_recipe(_overrides(arguments.recipe), limit=arguments.limit)


def _inspect(arguments: argparse.Namespace) -> None:
    from lightning_gym.policy.chat import ChatFormat
    from lightning_gym.report import describe_rollout, rollout_text
    from lightning_gym.rollout_log import read_rollout_log

    model_path, rollouts = read_rollout_log(arguments.rollouts)
    chat = ChatFormat(arguments.model or model_path)
    shown = 0
    for rollout in rollouts:
        if arguments.step is not None and rollout["step"] != arguments.step:
            continue
        if arguments.limit is not None and shown >= arguments.limit:
            break
        described = describe_rollout(rollout, chat.decode)
        print(json.dumps(described, ensure_ascii=False) if arguments.json else rollout_text(described) + "\n")
        shown += 1


def _report(arguments: argparse.Namespace) -> None:
    from lightning_gym.viewer.report import write_report

    path = write_report(
        arguments.run_dir, arguments.out, model=arguments.model, max_rollouts=arguments.limit, step=arguments.step
    )
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


def _eval(arguments: argparse.Namespace) -> None:
    from lightning_gym.evaluation_run import EvaluationRun
    from lightning_gym.train import log_to_terminal

    log_to_terminal()
    result = EvaluationRun(
        overrides=_overrides(arguments.recipe),
        model=arguments.model,
        model_path=arguments.model_path,
        rows=arguments.rows,
        gym=arguments.gym,
        num_samples=arguments.samples,
        limit=arguments.limit,
        out=arguments.out,
    ).run()
    print(json.dumps(result) if arguments.json else f"{result['table']}\n{result['rollouts']}")


def _generate(arguments: argparse.Namespace) -> None:
    from lightning_gym.generation_run import GenerationRun
    from lightning_gym.train import log_to_terminal

    log_to_terminal()
    run = GenerationRun(overrides=_overrides(arguments.recipe), num_steps=arguments.steps, path=arguments.save_rollouts)
    print(run.run())


def _export(arguments: argparse.Namespace) -> None:
    from lightning_gym.export import export, read_checkpoint

    checkpoint = read_checkpoint(arguments.checkpoint, model_path=arguments.model_path, attribute=arguments.policy)
    export(checkpoint, arguments.directory, adapter=arguments.adapter)
    print(arguments.directory)


def _doctor(arguments: argparse.Namespace) -> None:
    from lightning_gym.doctor import diagnosis_json, diagnosis_table, examine

    diagnosis = examine(arguments.model)
    print(diagnosis_json(diagnosis) if arguments.json else diagnosis_table(diagnosis))
    if not diagnosis.trainable:
        sys.exit(1)


def _bench(arguments: argparse.Namespace) -> None:
    folder = Path(__file__).parent.parent / "benchmarks"
    names = sorted(path.stem for path in folder.glob("[!_]*.py") if path.stem != "table")
    if not names:
        raise ConfigError(f"the benchmarks are not installed with the package; run from a checkout (no {folder})")
    if arguments.name not in (*names, "all"):
        raise ConfigError(f"there is no benchmark {arguments.name!r}; choose one of {', '.join(names)}, or all")
    sys.path.insert(0, str(folder.parent))
    from benchmarks.table import show

    for name in names if arguments.name == "all" else [arguments.name]:
        benchmark = import_module(f"benchmarks.{name}")
        if arguments.name == "all" and getattr(benchmark, "ON_REQUEST", False):  # needs what not every machine has
            continue
        show(benchmark.measure(), as_json=arguments.json)


if __name__ == "__main__":
    main()
