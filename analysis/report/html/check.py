"""The page's own links, looked at before it is written."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection
from html.parser import HTMLParser

from mambabyte.errors import UserError


def check_page(
    page: str, path: str, files: Collection[str], *, draft: bool = False
) -> None:
    """UserError where an id is not unique, a link leads nowhere or something would be loaded.

    ``files`` are the paths that links may name, seen from the folder that ``path`` is seen from.
    In a ``draft`` a link may lead to a part that is not there: its study has not been run.
    """
    found = _Links()
    found.feed(page)
    found.close()
    twice = sorted(i for i, n in Counter(found.ids).items() if n > 1)
    if twice:
        raise UserError(f"the report has two parts with the id {twice[0]!r}: rename one of them")
    ids = set(found.ids)
    for link in found.links:
        if link.startswith("#"):
            if link[1:] not in ids and not draft:
                raise UserError(f"a link in the report leads to {link}, which does not exist")
        elif not link.startswith(("https://", "http://")) and posixpath.normpath(
                posixpath.join(posixpath.dirname(path), link.partition("#")[0])) not in files:
            raise UserError(f"a link in the report leads to {link!r}, which is no part of it")
    if found.loaded:
        raise UserError(f"the report would load {found.loaded[0]!r}: it must stand alone")


_LOADING = ("href", "src", "srcset", "poster", "data", "action")


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            elif key == "href" and tag == "a":
                self.links.append(value or "")
            elif key in _LOADING and not (value or "").startswith(("#", "data:")):
                self.loaded.append(value or "")
