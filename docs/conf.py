"""Sphinx's settings; `make docs` builds the pages into build/docs/html."""

from __future__ import annotations

import dataclasses
from typing import Any

from docutils.nodes import SkipNode, math_block
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import sanm_kernels

project = "sanm_kernels"
version = release = sanm_kernels.__version__
copyright = "the sanm_kernels authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {release}"
html_show_sphinx = html_copy_source = False
html_math_renderer = "mathml"

highlight_language = "none"  # of blocks that name none
default_role = "code"  # `name` in a docstring is code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False  # what is returned is said in prose
napoleon_custom_sections = [("Attributes", "params_style")]  # "a, b: …" names two of them

nitpicky = True  # a reference that leads nowhere is a warning, and every warning an error
ELSEWHERE = r"Tensor|(torch|pathlib|collections|types|sanm_train\.(data|images|registry))\..*"
nitpick_ignore_regex = [("py:.*", ELSEWHERE)]


#: Installed fonts that can draw fractions, in case the browser's own choice is not installed.
MATH_FONTS = "math, 'STIX Two Math', 'Cambria Math', 'Latin Modern Math', 'DejaVu Math TeX Gyre'"


def visit_math(writer: Any, node: Any) -> None:
    """Formulas as MathML, which browsers render without a script."""
    start = f'<math style="font-family: {MATH_FONTS}"'
    if isinstance(node, math_block):
        start = f'<math display="block" style="font-family: {MATH_FONTS}; padding: 0.3em 0"'
    writer.body.append(tex2mathml(node.astext()).replace("<math", start, 1))
    raise SkipNode


def describe_settings(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Appends the settings of a dataclass that keeps its help in the fields' metadata."""
    if what == "class" and dataclasses.is_dataclass(obj):
        lines.append("")
        for f in dataclasses.fields(obj):
            if "help" in f.metadata:
                lines.append(f":param {f.name}: {f.metadata['help']}. Default: ``{f.default!r}``.")


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("autodoc-process-docstring", describe_settings)
    # One signature, the function's own: the overloads of masked_forward are for type checkers.
    analyzer = ModuleAnalyzer.for_module("sanm_kernels.masking")
    analyzer.analyze()
    analyzer.overloads.clear()
