"""Where the configuration files are: inside an installed package, or beside it in a source checkout."""

from pathlib import Path

from lightning_gym.errors import ConfigError


def conf_dir() -> Path:
    """Return the absolute directory that holds ``train.yaml`` and its groups.

    A wheel carries it as ``lightning_gym/conf``; a checkout (run from its root, or installed editable) has ``conf/``
    beside the package.

    Raises:
        ConfigError: if neither is there.
    """
    package = Path(__file__).resolve().parent
    candidates = [package / "conf", package.parent / "conf"]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    looked = " nor ".join(map(str, candidates))
    raise ConfigError(f"no configuration files: neither {looked} is a directory. Reinstall lightning-gym.")
