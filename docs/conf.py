"""How Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import plots  # noqa: E402

# What other tools make is put where Sphinx finds it; git ignores these folders.
plots.write_all(DOCS / "_generated")
shutil.rmtree(DOCS / "notebooks", ignore_errors=True)
shutil.copytree(
    ROOT / "notebooks",
    DOCS / "notebooks",
    ignore=lambda _, names: {n for n in names if not n.endswith(".ipynb")},
)
_extra = DOCS / "_generated" / "extra"
shutil.rmtree(_extra, ignore_errors=True)
_extra.mkdir()
if (ROOT / "shuffle_viz" / "dist" / "index.html").is_file():
    shutil.copytree(ROOT / "shuffle_viz" / "dist", _extra / "shuffle_viz")
    tags.add("shuffle_viz")  # type: ignore[name-defined]  # noqa: F821

project = "tiledbsoma-ml"
author = "The tiledbsoma-ml developers"
project_copyright = author
release = importlib.metadata.version("tiledbsoma-ml")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "_generated"]

# Markdown
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks, and the code of the pages

# The API: names of other packages are not looked up, because that takes a network; nor are private ones.
autodoc_mock_imports = [name for name in ("lightning", "ray", "scvi") if find_spec(name) is None]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88
default_role = "literal"
# Other packages, and modules that no user imports: `docs/api.md` names none of these.
nitpick_ignore_regex = [
    ("py:.*", r"(?!tiledbsoma_ml).*|tiledbsoma_ml\._.*|tiledbsoma_ml\.(memory|snapshot|testing)\.[a-z_]+\..*")
]

# Pages
html_theme = "furo"
html_title = f"tiledbsoma-ml {release}"
html_extra_path = [str(_extra)]
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def fences_to_directives(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Turn Markdown code in docstrings into what Sphinx takes there."""

    def directive(match: re.Match[str]) -> str:
        language, code = match.groups()
        return f".. code-block:: {language}\n\n" + re.sub("^(?=.)", "   ", code, flags=re.MULTILINE)

    lines[:] = _FENCE.sub(directive, "\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    """Read docstrings before napoleon does."""
    app.connect("autodoc-process-docstring", fences_to_directives, priority=400)
