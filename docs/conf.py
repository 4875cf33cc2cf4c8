"""Sphinx settings of the site: `make docs` writes it to docs/_build, offline, and warnings are errors."""

import os
import subprocess
import sys
from pathlib import Path

from sphinx.errors import ExtensionError

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "src")]

from reparam import __version__  # noqa: E402

project = "reparam"
author = "The reparam authors"
copyright = author
release = version = __version__
language = "en"

extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"),
    *("mathml", "images", "docstrings", "commands"),  # of docs/_ext
]
root_doc = "index"
exclude_patterns = ["_build"]
# A word in an annotation, such as "schedule", may name attributes of several classes; it is then no link.
suppress_warnings = ["ref.python"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# A transcript, or a diff with an ellipsis, is no language.
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = f"reparam {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": False, "top_of_page_buttons": []}


def build_lesson(app, failed):
    """The lesson is a page of its own, in one file."""
    if failed is None and app.builder.name == "html" and "lesson" in app.env.found_docs:
        page = Path(app.outdir) / "lesson" / "index.html"
        command = [sys.executable, HERE / "lesson" / "build.py", page, "--home", "../index.html"]
        source = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": source})
        if done.returncode != 0:
            raise ExtensionError("the lesson could not be built")


def setup(app):
    app.connect("build-finished", build_lesson)
