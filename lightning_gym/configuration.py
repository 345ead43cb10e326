"""What a run is made of: files of ``conf/`` and overrides, put together and checked before anything is built.

A recipe, a group's file or a key that does not exist is answered with the nearest one that does. An argument of a
constructor that no file mentions can be overridden all the same: ``policy.kl_coefficient=0.1`` needs no ``+``.
"""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra import compose, initialize
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lightning_gym.conf_path import conf_dir
from lightning_gym.errors import ConfigError

_REFUSED = re.compile(r"Could not override '([^']+)'")


def compose_run(overrides: Sequence[str]) -> DictConfig:
    """The configuration that ``lightning-gym train`` would run with the same overrides, checked by `check_config`.

    Raises:
        ConfigError: an override is not one, or names what does not exist.

    Example:
        >>> compose_run(["recipe=counter", "policy.lr=1e-4"]).policy.lr
        0.0001
        >>> compose_run(["recipe=countr"])
        Traceback (most recent call last):
        lightning_gym.errors.ConfigError: there is no recipe 'countr'; did you mean 'counter'? There are: ...
    """
    cfg = _compose(complete_overrides(overrides))
    check_config(cfg)
    return cfg


def complete_overrides(arguments: Sequence[str]) -> list[str]:
    """Let every argument of a constructor be overridden, whether or not a file mentions it.

    Args:
        arguments: of Hydra's command line. Where one is an option such as ``--cfg``, all are left as they are.

    Raises:
        ConfigError: an override is not one, or names what does not exist.

    Example:
        >>> complete_overrides(["recipe=counter", "policy.lr=1e-4", "policy.kl_coefficient=0.1"])
        ['recipe=counter', 'policy.lr=1e-4', '++policy.kl_coefficient=0.1']
    """
    if any(argument.startswith("-") for argument in arguments):
        return list(arguments)
    completed = list(arguments)
    while True:
        try:
            _compose(completed)
        except _RefusedOverrideError as refused:
            _check_key(refused.key, completed)
            completed = [f"++{one}" if one.partition("=")[0] == refused.key else one for one in completed]
        else:
            return completed


def check_config(cfg: DictConfig) -> None:
    """Refuse a composed configuration with values missing, or with arguments that a constructor does not take.

    Raises:
        ConfigError: names the key.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(
            f"nothing says what {' and '.join(missing)} should be; name a recipe, or give "
            f"{' '.join(f'{key}=...' for key in missing)}. Recipes: {', '.join(names_of('recipe'))}"
        )
    for where, node in _targets(OmegaConf.to_container(cfg), ""):
        known = arguments_of(node["_target_"])
        for key in node:
            if known is not None and not key.startswith("_") and key not in known:
                raise ConfigError(f"{where} has no {key!r}{_nearest(key, known)} It takes: {', '.join(known)}")


def arguments_of(target: str) -> dict[str, Any] | None:
    """Arguments of what a ``_target_`` names, with their defaults; ``None`` if it takes any, or is not installed."""
    if _package_is_absent(target):
        return None
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_ {target!r} cannot be imported: {error}") from error
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name: parameter.default for parameter in parameters}


def absent_packages(cfg: DictConfig) -> list[str]:
    """What the configuration names and is not installed here, as ``_target_``."""
    found = (node["_target_"] for _, node in _targets(OmegaConf.to_container(cfg), ""))
    return sorted({target for target in found if _package_is_absent(target)})


def _package_is_absent(target: str) -> bool:
    return importlib.util.find_spec(target.partition(".")[0]) is None


def names_of(group: str) -> list[str]:
    """What can be chosen of a group, as ``names_of("recipe")``. Files that begin with ``_`` are parts of others."""
    folder = conf_dir() / group
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("[!_]*.yaml")]
    return sorted(path.as_posix() for path in paths)


class _RefusedOverrideError(Exception):
    """Hydra found no such key in the configuration."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        with initialize(version_base="1.3", config_path=None):
            return compose("train", overrides=list(overrides))
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").partition("/")
        options = names_of(group) or list(error.options or [])
        raise ConfigError(
            f"there is no {group} {name!r}{_nearest(name, options)} There are: {', '.join(options)}"
        ) from error
    except OverrideParseException as error:
        raise ConfigError(f"{error.override!r} is no override: {str(error).splitlines()[0]}") from error
    except ConfigCompositionException as error:
        refused = _REFUSED.match(str(error))
        if refused is None:
            raise ConfigError(f"the configuration does not fit together: {error}") from error
        raise _RefusedOverrideError(refused[1]) from error


def _compose_without_refused(overrides: Sequence[str]) -> DictConfig:
    while True:
        try:
            return _compose(overrides)
        except _RefusedOverrideError as refused:
            overrides = [one for one in overrides if one.partition("=")[0] != refused.key]


def _check_key(key: str, overrides: Sequence[str]) -> None:
    """Refuse a key that names neither what a file mentions nor an argument of what is built there."""
    node: Any = OmegaConf.to_container(_compose_without_refused(overrides))
    done: list[str] = []
    for part in key.split("."):
        if isinstance(node, dict) and part in node:
            node = node[part]
            done.append(part)
            continue
        target = node.get("_target_") if isinstance(node, dict) else None
        arguments = {} if target is None else arguments_of(target)
        if arguments is None or part in arguments:
            return
        groups = [] if done else [path.name for path in conf_dir().iterdir() if path.is_dir()]
        keys = [str(name) for name in node] if isinstance(node, dict) else []
        known = sorted({name for name in [*keys, *groups, *arguments] if not name.startswith("_")} - {"self", "hydra"})
        where = ".".join(done) or "the configuration"
        raise ConfigError(f"{where} has no {part!r}{_nearest(part, known)} It has: {', '.join(known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _targets(node: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a ``_target_``, and its place."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from _targets(value, f"{where}.{key}".removeprefix("."))
