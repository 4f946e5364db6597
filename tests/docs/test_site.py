"""The site: it is built without a warning, and its links lead somewhere."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.docs.pages import DOCS, ROOT
from tests.receiver import PATIENCE

pytest.importorskip("furo", reason="the site needs the extra `docs`")


class Links(HTMLParser):
    """The links of a page, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        target = given.get("href") or given.get("src") or ""
        if target and ":" not in target.partition("/")[0]:
            self.targets.add(target)


def find_broken(site: Path) -> list[str]:
    pages = {page.resolve(): Links(page) for page in site.rglob("*.html")}
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            path, anchor = urldefrag(target)
            file = (page.parent / unquote(path.partition("?")[0])).resolve() if path else page
            known = pages[file].anchors if file in pages else set()
            if not file.exists() or (anchor and file in pages and unquote(anchor) not in known):
                broken.append(f"{page.relative_to(site.resolve())}: {target}")
    return broken


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_no_broken_link(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*program, "-d", tmp_path / "doctrees", DOCS, tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=9 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert len(list(site.rglob("*.html"))) > 40
    assert find_broken(site) == []
    assert (site / "searchindex.js").is_file()


@pytest.mark.slow
def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#there">b</a><a href="#here" id="here">a</a>')
    (tmp_path / "b.html").write_text('<a href="c.html">c</a>')
    assert sorted(find_broken(tmp_path)) == ["a.html: b.html#there", "b.html: c.html"]
