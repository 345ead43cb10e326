"""Where a model is: in a directory, in the hub's cache, or only described, by its dimensions."""

import json
from pathlib import Path
from typing import Any

from lightning_gym.errors import ConfigError
from lightning_gym.model_dir import check_model_dir

_DESCRIBED = Path(__file__).with_name("model_configs")


def check_model(model: str | Path, *, tokenizer: bool = True) -> None:
    """Refuse a local directory that is not there or not whole; a name on a hub is left to whoever loads it.

    Args:
        model: a directory, or a hub's name.
        tokenizer: whether a tokenizer has to be in it.

    Raises:
        ConfigError: names what is missing.
    """
    path = Path(model)
    if not path.is_dir():
        if _is_local(model):
            raise ConfigError(f"there is no model directory {model} (looked from {Path.cwd()})")
        return
    check_model_dir(path, tokenizer=tokenizer)


def find_config(model: str | Path) -> tuple[Any, str]:
    """The transformers configuration of a model, without a download.

    Args:
        model: a directory, or a hub's name.

    Returns:
        The configuration, and where it is from: ``directory``, ``cache`` (the hub's, on this machine) or
        ``description`` (dimensions that this package knows; its weights and tokenizer are not here).

    Raises:
        ConfigError: it is nowhere.
    """
    from transformers import AutoConfig

    if Path(model).is_dir():
        check_model(model)
        return AutoConfig.from_pretrained(model), "directory"
    if _is_local(model):
        check_model(model)
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True), "cache"
    except (OSError, ValueError):
        described = _DESCRIBED / f"{str(model).replace('/', '--')}.json"
    if not described.is_file():
        known = ", ".join(path.stem.replace("--", "/") for path in sorted(_DESCRIBED.glob("*.json")))
        raise ConfigError(
            f"{model} is not on this machine, and its dimensions are not among those this package knows ({known}): "
            "download it, or name its directory"
        )
    return AutoConfig.for_model(**json.loads(described.read_text())), "description"


def _is_local(model: str | Path) -> bool:
    """Whether it can only be a path: a hub's names are ``name`` or ``organisation/name``."""
    return isinstance(model, Path) or str(model).startswith((".", "~", "/")) or str(model).count("/") > 1
