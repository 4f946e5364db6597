"""How the documentation site is built: `sphinx-build -W docs site`."""

import re
import sys
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

from _reference import page_names, write_reference  # noqa: E402

import asyncmq_nats  # noqa: E402

project = "asyncmq-nats"
author = "the asyncmq-nats authors"
project_copyright = f"2026, {author}"
version = release = asyncmq_nats.__version__
REPOSITORY = "https://github.com/asyncmq-nats/asyncmq-nats"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "**/_*.md"]

html_theme = "furo"
html_title = f"{project} {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [],
}
pygments_style = "friendly"
pygments_dark_style = "native"
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

default_role = "literal"
autodoc_default_options = {"exclude-members": "model_config"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# -- links and pictures

LINK = re.compile(r"(?<=\]\()(?!\w+:)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="(?P<dark>[^"]+)">\s*'
    r'<img src="(?P<light>[^"]+)" alt="(?P<alt>[^"]+)"[^>]*>\s*</picture>'
)
HIDDEN = re.compile(r"^<!-- hidden.*?-->\n", re.MULTILINE | re.DOTALL)
PATTERN = re.compile(r"^[\w/]+\*\n", re.MULTILINE)


def _rewrite_links(text: str, folder: Path) -> str:
    """Have links to files outside of `docs/` lead to the repository. `folder`: of the text."""

    def rewrite(match: re.Match[str]) -> str:
        target = (folder / match["path"]).resolve()
        if folder.is_relative_to(DOCS) and (target.is_relative_to(DOCS) or not target.exists()):
            return match[0]
        if target.is_relative_to(DOCS) and target.exists():
            return f"{target.relative_to(DOCS).as_posix()}{match['anchor'] or ''}"
        kind = "tree" if target.is_dir() else "blob"
        path = target.relative_to(ROOT).as_posix()
        return f"{REPOSITORY}/{kind}/main/{path}{match['anchor'] or ''}"

    return LINK.sub(rewrite, text)


def read_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Make a page, which is also read in the repository, one of the site."""
    source[0] = HIDDEN.sub("", _rewrite_links(source[0], (DOCS / page).parent))
    source[0] = PICTURE.sub(_switch_pictures, source[0])
    if page == "index":
        source[0] = PATTERN.sub(_keep_pattern, source[0])
    if page == "reference/index":
        names = "\n".join(f"api/{name}" for name in page_names())
        source[0] = source[0].replace("api/*", names)


def read_included(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
    """Do the same to a file of another folder, which a page includes."""
    source[0] = _rewrite_links(source[0], (DOCS / path).resolve().parent)


def _switch_pictures(match: re.Match[str]) -> str:
    """Have pictures follow the choice of light and dark on the site."""
    return "\n".join(
        f"![{match['alt']}]({match[kind]}){{.only-{kind}}}" for kind in ("light", "dark")
    )


def _keep_pattern(match: re.Match[str]) -> str:
    """Leave out a pattern of the table of contents that matches no page."""
    return match[0] if any(DOCS.glob(match[0].strip() + ".md")) else ""


# -- docstrings, which are written for readers of the code


CODE = re.compile(r"(``.*?``|`[^`]+`)", re.DOTALL)
LETTERS = re.compile(r"([*|])|(?<=\w)(_)(?!\w)")


def read_docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Make a docstring reStructuredText.

    Its code is in single backticks, its `*` mean nothing else.
    """
    parts = CODE.split("\n".join(lines))
    for index, part in enumerate(parts):
        if index % 2:
            follows = "\\ " if parts[index + 1][:1].isalnum() else ""  # as in "`Job`s"
            parts[index] = f"``{part.strip('`')}``{follows}"
        else:
            parts[index] = LETTERS.sub(lambda match: "\\" + match[0], part)
    lines[:] = "".join(parts).split("\n")
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")  # or napoleon takes what is before a colon for the type


def hide_signature(app: Sphinx, what: str, name: str, *_: Any) -> tuple[str, str] | None:
    """Leave out the signature of the settings, which names each of them."""
    return ("", "") if name == "asyncmq_nats.settings.Settings" else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect what is above."""
    app.add_lexer("conf", TextLexer)
    app.connect("builder-inited", lambda app: write_reference(DOCS / "reference" / "api"))
    app.connect("env-get-outdated", lambda *_: ["index", "reference/index"])
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-signature", hide_signature)
    app.connect("autodoc-process-docstring", read_docstring, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
