"""Check the built site (`make docs`, which .ci/run calls before the tests): its links, and that it loads nothing."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"


class Page(HTMLParser):
    """Ids, links and loaded files of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag == "a":
            self.links.append(given.get("href") or "")
        elif tag in ("link", "script", "img", "iframe", "source"):
            self.loaded.append(given.get("href") or given.get("src") or "")


def broken(pages):
    """Return the links within a site that lead nowhere, and what is loaded from elsewhere."""
    bad = []
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            url = urlparse(link)
            if url.scheme or url.netloc:
                bad += [(path.name, link)] * (link in page.loaded and url.scheme != "data")
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchor = unquote(url.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].ids):
                bad.append((path.name, link))
    return bad


def read(folder):
    files = [file for file in folder.resolve().rglob("*.html") if "_static" not in file.parts]
    return {file: Page(file.read_text(encoding="utf-8")) for file in files}


@pytest.mark.skipif(not SITE.is_dir(), reason="the site is not built: make docs")
def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere():
    pages = read(SITE)
    assert len(pages) > 20
    assert broken(pages) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here"></a><a href="#gone"></a><a href="b.html"></a><a href="https://x.org"></a>'
        '<img src="https://x.org/x.png"><img src="data:,">'
    )
    assert [link for _, link in broken(read(tmp_path))] == ["#gone", "b.html", "https://x.org/x.png"]
