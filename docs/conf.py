"""Configuration of Sphinx, which builds this folder into a website: `make docs`.

The site needs no network, neither to be built nor to be read: no fonts, scripts or search of other servers.

Code in a page is tested (tests/test_documentation.py): a `python` block runs as it is, each command of a `bash` block
on tiny images. A command that can't run in a test ends with a comment that says so to the reader, such as
`# needs a network`, `# needs a cluster`, `# needs an account` or `# needs several GPUs`.
"""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent / "experiments")]
from tutorials import write_notebooks  # noqa: E402

write_notebooks(DOCS / "tutorials" / "_notebooks")

project = "anomalymatch"
author = "the anomalymatch contributors"
project_copyright = "2026, the anomalymatch contributors"
release = version = version_of("anomalymatch")

extensions = [
    "generated_reference",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
nitpicky = True
# Types of other packages, and inner ones of this package, have no page to link to.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!anomalymatch\.).*"),
    (r"py:.*", r"anomalymatch\.(algorithms|backbones|notebook)\..*"),
]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

default_role = "code"  # single backticks in docstrings are code
autodoc_typehints = "description"
napoleon_numpy_docstring = False

copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = "anomalymatch"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": "anomalymatch"},
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "navbar_end": ["version-switcher", "theme-switcher"],
    # Each released version is an entry of the file with the URL of its site. "#" stays on the page.
    "switcher": {"json_url": "_static/switcher.json", "version_match": release},
    "check_switcher": False,
    "footer_start": ["copyright"],
    "footer_end": ["release"],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
templates_path = ["_templates"]
