"""The environment of every test: offline and silent, whoever starts pytest. Set before anything is imported."""

import os
import signal

os.environ.update(
    DO_NOT_TRACK="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_DO_NOT_TRACK="1",
    VLLM_NO_USAGE_STATS="1",
)

from pathlib import Path

import pytest

# A shell starts a job in the background with Ctrl-C ignored, and whatever the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory) -> Path:
    """A policy's directory as an engine and an endpoint take it: the tiny tokenizer, and the config of a model."""
    from lightning_gym.testing import tiny_model, tiny_tokenizer

    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, num_layers=1, hidden_size=32, num_kv_heads=1).config.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A directory that a policy is loaded from: weights of the tiniest model, and the tiny tokenizer."""
    from lightning_gym.testing import tiny_model, tiny_tokenizer

    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_model(tokenizer, hidden_size=32, num_layers=1, num_kv_heads=1).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread: tiny tensors gain nothing from more, and lose a lot on a machine that is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def varied_rewards(monkeypatch):
    """A reward of the counter that differs inside a group, so that an untrained policy has something to learn."""
    from lightning_gym.gym.environments import Counter

    def ids_decide(self, response):
        return float(sum(sum(item.get("generation_token_ids", ())) for item in response["output"]) % 7)

    monkeypatch.setattr(Counter, "verify", ids_decide)
    return ids_decide
