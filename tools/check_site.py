"""Checks a built site: every link inside of it leads to a file and a place that are there, every
picture too, nothing is loaded from elsewhere, and no markup is left as text. Links to elsewhere are
listed, and not followed.

python -m tools.check_site build/site
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "src"), ("object", "data")}

# What is shown as it is written; and what a reader should not see anywhere else: the beginning of a
# directive, or a role.
VERBATIM = {"pre", "code", "script", "style", "title"}
MARKUP = re.compile(r"\.\. [a-z][\w:-]*::|:[a-z]+:`|\{[a-z][a-z:]*\}`|^```", re.MULTILINE)


class Page(HTMLParser):
    """What a page refers to, the names of its places, and markup that is left in its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.places: set[str] = set()
        self.left: list[str] = []
        self._verbatim = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._verbatim += tag in VERBATIM
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.places.add(value)
            elif (tag, name) == ("a", "href") or (tag, name) in LOADS:
                self.links.append((tag, value))

    def handle_endtag(self, tag: str) -> None:
        self._verbatim -= tag in VERBATIM

    def handle_data(self, data: str) -> None:
        if not self._verbatim:
            self.left += MARKUP.findall(data)


def check(site: Path) -> tuple[list[str], Counter[str]]:
    """The faults, and the links to elsewhere with how often each occurs."""
    pages = {p.resolve(): Page(p.read_text()) for p in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"no page in {site}"], Counter()
    faults: list[str] = []
    elsewhere: Counter[str] = Counter()
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        faults += [f"{name}: markup left as text: {left}" for left in dict.fromkeys(page.left)]
        for tag, link in page.links:
            parts = urlsplit(link)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                elsewhere[link] += 1
                if tag != "a":
                    faults.append(f"{name}: <{tag}> loads {link}")
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            if target.is_dir():
                target = target / "index.html"
            target = target.resolve()
            if not target.is_file():
                faults.append(f"{name}: no file for {link}")
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].places
            ):
                faults.append(f"{name}: no such place: {link}")
    return faults, elsewhere


def main() -> int:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "build/site")
    faults, elsewhere = check(site)
    for link, count in sorted(elsewhere.items()):
        print(f"elsewhere, not followed: {link} ({count})")
    for fault in faults:
        print(fault)
    pages = len(list(site.rglob("*.html")))
    print(f"{pages} pages, {len(faults)} faults, {len(elsewhere)} links to elsewhere")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
