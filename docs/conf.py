"""How Sphinx makes the documentation: ``make docs``."""

import fxfuse

project = "fxfuse"
author = "The fxfuse developers"
copyright = author
release = version = fxfuse.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"  # fields are listed once
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"fxfuse {release}"
html_show_copyright = False
