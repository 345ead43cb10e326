"""Records what TRL's and NeMo RL's own code computes on fixed random tensors, for tests/test_loss_parity.py.

Run by hand, in an environment that has TRL, with a checkout of NeMo RL; the tests need neither::

    python tests/data/record_loss_parity.py --nemo-rl path/to/RL > tests/data/loss_parity.json

TRL's ``_compute_loss`` runs on an object that has the attributes it reads and returns the recorded logprobs as its
model's. Of NeMo RL only the arithmetic is loaded; the packages around it that start clusters are empty modules here.
Everything is float64, and gradients are those by the per-token logprobs.
"""

import argparse
import ast
import collections
import importlib.util
import json
import sys
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

LENGTHS = (5, 1, 7, 3, 4, 6)
WIDTH = max(LENGTHS)
GROUP = 3
MAX_LENGTH = 9


def inputs():
    rng = np.random.default_rng(20260101)
    logprobs = -rng.gamma(1.0, 0.7, (len(LENGTHS), WIDTH)) - 1.5
    mask = np.arange(WIDTH) < np.array(LENGTHS)[:, None]
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + rng.normal(0, 0.25, logprobs.shape),
        "rollout_logprobs": logprobs + rng.normal(0, 0.6, logprobs.shape),
        "ref_logprobs": logprobs + rng.normal(0, 0.4, logprobs.shape),
    }
    rewards = rng.normal(0, 1, len(LENGTHS))
    components = {"format": rng.integers(0, 2, len(LENGTHS)).astype(float), "right": rng.normal(0, 3, len(LENGTHS))}
    components["format"][0::GROUP], components["format"][1::GROUP] = 0.0, 1.0
    grouped = rewards.reshape(-1, GROUP)
    advantages = ((grouped - grouped.mean(1, keepdims=True)) / grouped.std(1, ddof=1, keepdims=True)).reshape(-1)
    return {name: np.where(mask, value, 0.0) for name, value in tensors.items()} | {
        "mask": mask,
        "rewards": rewards,
        "components": components,
        "advantages": advantages,
    }


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# -- TRL

TRL_CASES = {
    "grpo": {"loss_type": "grpo"},
    "grpo_dual_clip": {"loss_type": "grpo", "delta": 1.25},
    "bnpo_token_mean": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo"},
    "grpo_with_kl": {"loss_type": "grpo", "beta": 0.5},
    "grpo_with_kl_bias_corrected": {"loss_type": "grpo", "beta": 0.5, "bias_correction": True},
    "token_truncate": {"loss_type": "dapo", "correction": "token_truncate", "cap": 1.5},
    "token_mask": {"loss_type": "dapo", "correction": "token_mask", "cap": 1.5},
    "sequence_truncate": {"loss_type": "dapo", "correction": "sequence_truncate", "cap": 1.5},
    "sequence_mask": {"loss_type": "dapo", "correction": "sequence_mask", "cap": 3.0},
}


class Everywhere(dict):
    def __missing__(self, key):
        self[key] = collections.defaultdict(list)
        return self[key]


def trl_self(case, given, leaf):
    """An object with what `GRPOTrainer._compute_loss` reads."""
    settings = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token"} | case
    return types.SimpleNamespace(
        **{name: settings[name] for name in ("epsilon_low", "epsilon_high", "beta", "importance_sampling_level")},
        loss_type=settings.get("loss_type"),
        args=types.SimpleNamespace(
            delta=settings.get("delta"),
            use_bias_correction_kl=settings.get("bias_correction", False),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (leaf, torch.zeros_like(leaf), None),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm="correction" in case,
        vllm_importance_sampling_correction="correction" in case,
        model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        accelerator=types.SimpleNamespace(
            num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value
        ),
        _metrics=Everywhere(),
    )


def trl_inputs(case, given):
    mask = tensor(given["mask"])
    found = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
        "completion_ids": torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long),
        "completion_mask": mask,
        "advantages": tensor(given["advantages"]),
        "old_per_token_logps": tensor(given["old_logprobs"]),
        "old_logps": (tensor(given["old_logprobs"]) * mask).sum(1),
        "ref_per_token_logps": tensor(given["ref_logprobs"]),
        "num_items_in_batch": mask.sum(),
    }
    if "correction" in case:
        found["importance_sampling_ratio"] = trl_correction(case["correction"], case["cap"], given)
    return found


def trl_correction(mode, cap, given):
    """The lines of `GRPOTrainer._generate_and_score_completions` that make the ratio, which only run with an engine."""
    from trl.trainer import grpo_trainer

    source = Path(grpo_trainer.__file__).read_text()
    start = source.index(
        "                mask = completion_mask if tool_mask is None else completion_mask * tool_mask\n"
    )
    stop = source.index("            # Compute the per-token log probabilities for the reference model", start)
    block = "if True:\n" + source[start:stop]
    names = {
        "torch": torch,
        "math": __import__("math"),
        "self": types.SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=None,
            vllm_importance_sampling_clip_max=cap,
        ),
        "completion_mask": tensor(given["mask"]),
        "tool_mask": None,
        "old_per_token_logps": tensor(given["old_logprobs"]),
        "sampling_per_token_logps": tensor(given["rollout_logprobs"]),
    }
    exec(block, names)  # noqa: S102  TRL's own source
    return names["vllm_importance_sampling_ratio"]


def record_trl(given):
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    recorded = {}
    for name, case in TRL_CASES.items():
        leaf = tensor(given["logprobs"]).requires_grad_()
        loss = GRPOTrainer._compute_loss(trl_self(case, given, leaf), None, trl_inputs(case, given))
        loss.backward()
        recorded[name] = {"settings": case, "loss": loss.item(), "gradient": leaf.grad.tolist()}
    # RLOO clips the ratio of whole sequences; at ratio 1 its gradient is that of REINFORCE.
    leaf = tensor(given["logprobs"]).requires_grad_()
    on_policy = given | {"old_logprobs": given["logprobs"]}
    loss = RLOOTrainer._compute_loss(trl_self({}, on_policy, leaf), None, trl_inputs({}, on_policy))
    loss.backward()
    recorded["rloo_on_policy"] = {"settings": {}, "loss": loss.item(), "gradient": leaf.grad.tolist()}
    return recorded


# -- NeMo RL

NEMO_CASES = {
    "grpo": {},
    "dapo": {"ratio_clip_max": 0.28},
    "dual_clip": {"ratio_clip_c": 1.25},
    "seq_mean": {"token_level_loss": False},
    "gspo": {
        "token_level_loss": False,
        "sequence_level_importance_ratios": True,
        "ratio_clip_min": 0.03,
        "ratio_clip_max": 0.04,
    },
    "cispo": {"use_cispo": True, "ratio_clip_min": 1.0, "ratio_clip_max": 0.3},
    "reinforce": {"disable_ppo_ratio": True},
    "tis": {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 1.5,
    },
    "icepop": {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "icepop",
        "truncated_importance_sampling_ratio": 1.5,
        "truncated_importance_sampling_ratio_min": 0.6,
    },
    "seq_mask_tis": {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "seq-mask-tis",
        "truncated_importance_sampling_ratio": 1.2,
        "truncated_importance_sampling_ratio_min": 0.9,
    },
    "kl_k1": {"reference_policy_kl_penalty": 0.5, "reference_policy_kl_type": "k1"},
    "kl_k2": {"reference_policy_kl_penalty": 0.5, "reference_policy_kl_type": "k2"},
    "kl_k3": {"reference_policy_kl_penalty": 0.5, "reference_policy_kl_type": "k3"},
}


def nemo_modules(root):
    """NeMo RL's loss and advantage modules, and empty ones for what they import but do not need here."""

    class Anything:
        def __class_getitem__(cls, item):
            return cls

    def empty(name, *attributes):
        module = types.ModuleType(name)
        module.__path__ = []
        for attribute in attributes:
            setattr(module, attribute, Anything)
        sys.modules[name] = module
        return module

    for package in ("", ".algorithms", ".algorithms.x_token", ".distributed", ".models", ".models.dtensor"):
        empty(f"nemo_rl{package}")
    empty("nemo_rl.distributed.batched_data_dict", "BatchedDataDict")
    empty("nemo_rl.models.dtensor.parallelize", "to_local_if_dtensor")
    source = (root / "nemo_rl/algorithms/loss/loss_functions.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module.endswith(("x_token.loss_utils", "distributed.model_utils")):
            empty(node.module, *(alias.name for alias in node.names))
    utilities = (root / "nemo_rl/algorithms/utils.py").read_text()
    kept = {
        "calculate_kl",
        "masked_mean",
        "masked_var",
        "calculate_baseline_and_std_per_prompt",
        "get_gdpo_reward_component_keys",
    }
    body = [node for node in ast.parse(utilities).body if isinstance(node, ast.FunctionDef) and node.name in kept]
    module = empty("nemo_rl.algorithms.utils", *kept)
    names = {"torch": torch, "Any": object, "Optional": __import__("typing").Optional, "BatchedDataDict": Anything}
    exec(compile(ast.Module(body, []), "utils.py", "exec"), names)  # noqa: S102  NeMo RL's own source
    for name in kept & names.keys():
        setattr(module, name, names[name])

    def load(name, path):
        spec = importlib.util.spec_from_file_location(name, root / path)
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded
        spec.loader.exec_module(loaded)
        return loaded

    empty("nemo_rl.algorithms.loss")
    load("nemo_rl.algorithms.loss.interfaces", "nemo_rl/algorithms/loss/interfaces.py")
    losses = load("nemo_rl.algorithms.loss.loss_functions", "nemo_rl/algorithms/loss/loss_functions.py")
    sys.modules["nemo_rl.algorithms.loss"].ClippedPGLossConfig = losses.ClippedPGLossConfig
    return losses, load("nemo_rl.algorithms.advantage_estimator", "nemo_rl/algorithms/advantage_estimator.py")


def record_nemo(root, given):
    losses, advantages = nemo_modules(root)

    def shifted(values):  # NeMo RL leaves out the first column
        return torch.cat([torch.zeros(len(LENGTHS), 1, dtype=torch.float64), tensor(values)], 1)

    mask = shifted(given["mask"])
    data = {
        "advantages": shifted(np.broadcast_to(given["advantages"][:, None], given["mask"].shape)),
        "prev_logprobs": shifted(given["old_logprobs"]),
        "generation_logprobs": shifted(given["rollout_logprobs"]),
        "reference_policy_logprobs": shifted(given["ref_logprobs"]),
        "token_mask": mask,
        "sample_mask": torch.ones(len(LENGTHS), dtype=torch.float64),
    }
    recorded = {}
    for name, case in NEMO_CASES.items():
        settings = {"reference_policy_kl_penalty": 0.0} | case
        leaf = tensor(given["logprobs"]).requires_grad_()
        function = losses.ClippedPGLossFn(losses.ClippedPGLossConfig(**settings))
        loss, metrics = function(leaf, data, torch.tensor(float(len(LENGTHS))), mask.sum())
        loss.backward()
        recorded[name] = {"settings": case, "loss": loss.item(), "gradient": leaf.grad.tolist()}
        recorded[name] |= {key: metrics[key] for key in ("token_mult_prob_error", "gen_kl_error", "approx_entropy")}
        recorded[name] |= {key: metrics[key] for key in ("is_oob_ratio", "kl_penalty") if key in metrics}
    return recorded, record_nemo_advantages(advantages, given)


def record_nemo_advantages(module, given):
    prompts = torch.arange(len(LENGTHS))[:, None] // GROUP
    rewards, mask = tensor(given["rewards"]), torch.ones(len(LENGTHS), 1)
    config = module.AdvEstimatorConfig
    components = {f"reward/{name}": tensor(values) for name, values in given["components"].items()}

    def estimated(kind, **settings):
        estimator = kind(config(**settings), None)
        found = estimator.compute_advantage(prompts, rewards, mask, repeated_batch=components)
        return found[:, 0].tolist()

    torch.set_default_dtype(torch.float64)  # its masks are made in the default type
    sys.modules["nemo_rl.algorithms.advantage_estimator"].get_gdpo_reward_component_keys = sorted
    return {
        "group_std": estimated(module.GRPOAdvantageEstimator, use_leave_one_out_baseline=False),
        "none": estimated(module.GRPOAdvantageEstimator, use_leave_one_out_baseline=False, normalize_rewards=False),
        "leave_one_out": estimated(module.GRPOAdvantageEstimator, normalize_rewards=False),
        "components": estimated(module.GDPOAdvantageEstimator, use_leave_one_out_baseline=False),
        "weighted_components": estimated(
            module.GDPOAdvantageEstimator, use_leave_one_out_baseline=False, reward_weights=[0.5, 2.0]
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nemo-rl", type=Path, required=True)
    parser.add_argument("--nemo-rl-commit", required=True)
    options = parser.parse_args()
    given = inputs()
    nemo, advantages = record_nemo(options.nemo_rl, given)
    torch.set_default_dtype(torch.float32)
    found = {
        "versions": {"trl": version("trl"), "nemo_rl": options.nemo_rl_commit},
        "max_length": MAX_LENGTH,
        "group_size": GROUP,
        "inputs": {
            name: value.tolist() if isinstance(value, np.ndarray) else {k: v.tolist() for k, v in value.items()}
            for name, value in given.items()
        },
        "trl": record_trl(given),
        "nemo_rl": nemo,
        "nemo_rl_advantages": advantages,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
