"""The documentation site: `python -m sphinx -W -n --keep-going docs docs/_build/html`."""

import json
import re
from pathlib import Path

import dstee_jax

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "dstee_jax"
author = "The dstee_jax authors"
copyright = author
release = version = dstee_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path: list[str] = []

# Pages. Notebooks are shown with the outputs that they are committed with; a test runs them.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
nb_execution_mode = "off"

# Docstrings: `names` in single backticks are code, and types are said in words.
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False
napoleon_attr_annotations = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Deviations"]
maximum_signature_line_length = 80

html_theme = "sphinx_book_theme"
html_title = "dstee_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "navbar_persistent": [],
}
html_show_sphinx = False


def from_elsewhere() -> None:
    """Write the pages that are kept outside this folder into it, with their links set right.

    They are ignored by git.
    """
    notebook = json.loads((ROOT / "experiments/notebooks/tour.ipynb").read_text())
    for cell in notebook["cells"]:
        cell["source"] = [line.replace("](../../docs/", "](") for line in cell["source"]]
    (HERE / "tour.ipynb").write_text(json.dumps(notebook))
    for name in ("CHANGELOG", "CONTRIBUTING"):
        text = (ROOT / f"{name}.md").read_text()
        text = re.sub(r"\]\(docs/", "](", text)
        (HERE / f"{name.lower()}.md").write_text(text)


def inside(app, docname, source) -> None:
    """Links of pages to files that are pages here, by their names in the site."""
    pages = {
        "../experiments/notebooks/tour.ipynb": "tour.ipynb",
        "../CHANGELOG.md": "changelog.md",
        "../CONTRIBUTING.md": "contributing.md",
        "../README.md": "index.md",
    }
    for file, page in pages.items():
        source[0] = source[0].replace(f"]({file}", f"]({page}")


def plain_text(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text: outside of code, | and * mean themselves."""
    blocks = r"^ *>>>.*(?:\n(?! *$).+)*|^ *\* |`[^`]*`(?=(\w)?)|[|*]"

    def escaped(found: re.Match) -> str:
        if found[0] in "|*":
            return "\\" + found[0]
        return found[0] + ("\\ " if found[1] else "")

    lines[:] = re.sub(blocks, escaped, "\n".join(lines), flags=re.MULTILINE).split("\n")


def returns_as_written(app, what, name, obj, options, lines) -> None:
    """A colon in a Returns section is no type's: napoleon makes it a dash."""
    lines[:] = [re.sub(r"^(:returns: )\*?(.*?)\*? -- ", r"\1\2: ", line) for line in lines]


def setup(app) -> None:
    app.connect("source-read", inside)
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", returns_as_written, priority=600)


from_elsewhere()
