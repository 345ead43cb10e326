"""Sphinx: furo for the looks, MyST for plain Markdown pages, autodoc for what the docstrings say."""

import importlib.metadata
import re
from pathlib import Path

from sphinx.application import Sphinx

project = "lightning_gym"
copyright = "the lightning_gym authors"
release = version = importlib.metadata.version("lightning-gym")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "code"  # docstrings write `name` for code

html_theme = "furo"
html_title = f"lightning_gym {release}"
html_show_sourcelink = False


HERE = Path(__file__).parent


def links_from_the_root(_app: Sphinx, _path: Path, _page: str, content: list[str]) -> None:
    """Point the links of an included file of the root (README, CHANGELOG) at the pages here.

    ``docs/alignment.md`` becomes ``alignment.md`` and ``CHANGELOG.md`` ``changelog.md``. What is no page here keeps its
    words and loses its link; what does not exist at all is left alone, for Sphinx to complain about.
    """

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        page = target.removeprefix("docs/").lower()
        if (HERE / page.partition("#")[0]).is_file():
            return f"[{words}]({page})"
        return words if (HERE.parent / target.partition("#")[0]).exists() else match[0]

    content[0] = re.sub(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)", link, content[0])


def setup(app: Sphinx) -> None:
    """Register what is no setting."""
    app.connect("include-read", links_from_the_root)
