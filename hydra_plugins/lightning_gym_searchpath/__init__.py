"""Lets any Hydra application compose the configuration files of `lightning_gym`.

Hydra imports every module of the namespace package ``hydra_plugins`` when it starts, so this one stays small, and
``hydra_plugins`` itself has no ``__init__.py``: other distributions put their plugins there too.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from lightning_gym.conf_path import conf_dir


class LightningGymSearchPath(SearchPathPlugin):
    """Appends `conf_dir` to Hydra's search path, after the application's own directories."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="lightning-gym", path=f"file://{conf_dir()}")
