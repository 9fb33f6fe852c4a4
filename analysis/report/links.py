"""The way from one page to another: where in the report is the part that a link names?"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

_ID = re.compile(r'<[a-z][^<>]*? id="([^"]+)"')
_LINK = re.compile(r'(<a\b[^<>]*? ?href=")#([^"]+)"')


def resolve(pages: Mapping[str, str]) -> dict[str, str]:
    """The pages, path -> HTML, with every link ``#part`` to a part of another page led there.

    A part that several pages have is that of the page itself, or else of the last of them: the
    article comes first, and what stands behind it has more to say.
    """
    parts = {name: set(_ID.findall(page)) for name, page in pages.items()}
    home = {part: name for name, found in parts.items() for part in found}

    def on(name: str) -> str:
        def led(match: re.Match[str]) -> str:
            part = match[2]
            if part in parts[name] or part not in home:
                return match[0]
            way = posixpath.relpath(f"/{home[part]}", f"/{posixpath.dirname(name)}")
            return f'{match[1]}{way}#{part}"'
        return _LINK.sub(led, pages[name])

    return {name: on(name) for name in pages}
