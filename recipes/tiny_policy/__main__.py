"""``python -m recipes.tiny_policy``: build a tiny policy, or say what the one already built starts at."""

import argparse
import json
from dataclasses import fields

from recipes.tiny_policy.build import ENVIRONMENTS, TinyPolicy, read_record


def main() -> None:
    """Parse the command line, build, and print the starting reward."""
    arguments = vars(_parser().parse_args())
    out, as_json = arguments.pop("out"), arguments.pop("json")
    target = TinyPolicy(**arguments).ensure(out)
    record = read_record(target)
    if as_json:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny_policy", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--environment", choices=ENVIRONMENTS, default="counter")
    parser.add_argument("--out", default="outputs/tiny_policy", help="where <environment>-seed<seed> is written")
    parser.add_argument("--json", action="store_true", help="print the whole record as one JSON object")
    for field in fields(TinyPolicy):
        if field.name != "environment":
            kind = float if field.name in ("lr", "error_probability") else int
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser


if __name__ == "__main__":
    main()
