"""What the directory of a transformers model must hold, and what a full disk is called."""

import contextlib
import errno
import json
from collections.abc import Generator, Sequence
from pathlib import Path

from lightning_gym.errors import ConfigError, OutOfSpaceError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
"""One of these makes a tokenizer."""
_COMPANIONS = (
    *TOKENIZER_FILES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "*.py",
)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def check_model_dir(path: Path, *, weights: bool = True, tokenizer: bool = True) -> None:
    """Refuse a directory that is no complete model's.

    Args:
        path: of the directory.
        weights: whether weights have to be there, all shards of them.
        tokenizer: whether a tokenizer has to.

    Raises:
        ConfigError: names what is missing.
    """
    if not path.is_dir():
        raise ConfigError(
            f"there is no model directory {path} (looked from {Path.cwd()}); expected one with config.json, a "
            "tokenizer and *.safetensors"
        )
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    if tokenizer and not _some(path, TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json)")
    if weights:
        missing += _missing_weights(path)
    if missing:
        raise ConfigError(
            f"the model directory {path} is missing {', '.join(missing)}; it holds "
            f"{', '.join(sorted(entry.name for entry in path.iterdir())[:8]) or 'nothing'}. Was a copy or a download "
            "cut short?"
        )


def companions(path: Path) -> list[Path]:
    """The files beside weights and config: tokenizer, chat template, generation config, code."""
    return _some(path, _COMPANIONS)


def _missing_weights(path: Path) -> list[str]:
    for name in _INDEXES:
        if (path / name).is_file():
            shards = set(json.loads((path / name).read_text())["weight_map"].values())
            return sorted(shard for shard in shards if not (path / shard).is_file())
    return [] if _some(path, _WEIGHTS) else ["weights (*.safetensors)"]


def _some(path: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({found for pattern in patterns for found in path.glob(pattern) if found.is_file()})


_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))


@contextlib.contextmanager
def full_disk_named(path: Path) -> Generator[None]:
    """Say where the space ran out, and what to do.

    Args:
        path: what is being written.

    Raises:
        OutOfSpaceError: instead of the system's error, or the one in which a library wraps it.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in _FULL or "No space left on device" in str(error):
            raise OutOfSpaceError(
                f"no space left while writing {path}: free some on its file system, or name another place"
            ) from error
        raise
