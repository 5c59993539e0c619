"""How Sphinx builds the site: `make docs`."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

import memokern  # noqa: E402

project = "memokern"
author = "The memokern authors"
copyright = "The memokern authors, Apache 2.0"
release = version = memokern.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "commands",
    "docstrings",
    "pages",
    "repository",
]
exclude_patterns = ["_extensions", "figures/*.py", "auto_gallery/*.ipynb", "auto_gallery/*.py.md5"]
suppress_warnings = ["config.cache"]

# Markdown, as the pages are written for people who read them in the repository too.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# The reference. Signatures show defaults as they are written, types as they are annotated.
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_default_options = {"show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False
default_role = "literal"
nitpicky = False

# The one file of MathJax that needs no others, from the package that ships it: no network to read.
mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
assert mathjax is not None and mathjax.origin is not None, "pip install sphinx-mathjax-offline"
mathjax_file = Path(mathjax.origin).parent / "static" / "mathjax" / "tex-svg.js"
mathjax_path = mathjax_file.name
mathjax3_config = {
    "svg": {"fontCache": "global", "scale": 0.92},
    "options": {"enableMenu": False},
}

# The scripts run once, and again when they change.
sphinx_gallery_conf = {
    "examples_dirs": str(HERE.parent / "examples"),
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"plot_\d",
    "within_subsection_order": "FileNameSortKey",
    "copyfile_regex": r"$^",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,  # that page loads scripts from elsewhere
    "min_reported_time": 0,
    "image_srcset": [],
    "thumbnail_size": (320, 224),
    "abort_on_example_error": False,
    "matplotlib_animations": False,
}

html_theme = "furo"
html_title = f"memokern {release}"
html_static_path = ["_static", str(mathjax_file)]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
