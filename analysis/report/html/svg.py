"""A figure's SVG made fit for the page: nothing active, ids of its own, the page's colours.

What is not on the lists below is dropped, so a figure from a hostile run folder can neither run
a script nor load anything.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

from markupsafe import Markup

from analysis.report.html.text import clean, html
from mambabyte.errors import UserError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SVG = "{http://www.w3.org/2000/svg}"
XLINK_HREF = "{http://www.w3.org/1999/xlink}href"

_ELEMENTS = _words(
    "svg g defs use path rect circle ellipse line polyline polygon text tspan image clipPath "
    "linearGradient radialGradient stop pattern")
_ATTRIBUTES = _words(
    "id x y x1 y1 x2 y2 cx cy r rx ry dx dy d points width height viewBox transform style "
    "fill stroke opacity fill-opacity stroke-opacity stroke-width clip-path offset stop-color "
    "stop-opacity gradientUnits gradientTransform clipPathUnits patternUnits text-anchor "
    "preserveAspectRatio")
_PROPERTIES = _words(
    "fill stroke opacity fill-opacity stroke-opacity stroke-width stroke-linecap stroke-linejoin "
    "stroke-dasharray stroke-dashoffset stroke-miterlimit fill-rule clip-rule clip-path "
    "font font-size font-weight font-style text-anchor stop-color stop-opacity")
_LOCAL_URL = re.compile(r"url\(\s*['\"]?#([\w.:-]+)['\"]?\s*\)")
_PNG = "data:image/png;base64,"
# A hundredth of a pixel is enough: a third of the page's bytes are digits beyond.
_COORDINATES = _words("d points x y")
_LONG_NUMBER = re.compile(r"(?<!\d)-?\d++\.\d{3,}")  # each digit is looked at once

MOST_DRAWN = 100_000  # elements of a figure, each as often as it is drawn
_REFERENCE = re.compile(r"url\(\s*['\"]?#([\w.:-]+)")

# Colours of style.mplstyle -> variables that the page defines for light and dark.
THEME = {
    "#22272e": "ink", "#8a929c": "axis", "#dfe3e8": "grid", "#ffffff": "paper",
    "#f2f4f7": "panel",
    "#0072b2": "blue", "#d55e00": "vermilion", "#009e73": "green", "#cc79a7": "purple",
    "#e69f00": "orange", "#56b4e9": "sky", "#000000": "ink",
}


def inline_svg(svg: str, prefix: str, title: str, alt: str) -> Markup:
    """The figure as an element of the page, with a title and description for screen readers.

    ``prefix`` starts every id, so two figures on one page cannot clash. UserError where the text
    is no SVG.
    """
    try:
        root = ET.fromstring(svg)
        if root.tag != SVG + "svg":
            raise UserError(f"figure {prefix} is not SVG: run its study again")
        if _drawn(root, {name: e for e in root.iter() if (name := e.get("id"))}, {}) > MOST_DRAWN:
            raise UserError(f"figure {prefix} draws more than {MOST_DRAWN:,} elements, or one "
                            "within itself: a browser would stop at it")
        width, height = _size(root)
        body = "".join(_element(child, prefix) for child in root)
    except ET.ParseError as error:
        raise UserError(f"figure {prefix} is not readable SVG ({error}): run its study again") \
            from None
    except RecursionError:
        raise UserError(f"figure {prefix} has elements within elements beyond all reason: run its "
                        "study again") from None
    return Markup(  # every part below is escaped or made of checked characters
        f'<svg class="plot" role="img" aria-labelledby="{prefix}-t {prefix}-d" '
        f'viewBox="0 0 {width:g} {height:g}" '
        f'style="--width:{width:.0f}px;max-width:{1.5 * width:.0f}px">'
        f'<title id="{prefix}-t">{html(title)}</title>'
        f'<desc id="{prefix}-d">{html(alt)}</desc>{body}</svg>')


def _drawn(
    element: ET.Element, named: dict[str, ET.Element], known: dict[int, float]
) -> float:
    """How many elements a browser draws for one: those within it, and those that it refers to
    (``use``, patterns, clips) each time anew. Infinite where one refers to itself."""
    if id(element) not in known:
        known[id(element)] = math.inf  # until it is known, which it is not if asked within itself
        text = " ".join(element.attrib.values())
        href = element.get(XLINK_HREF) or element.get("href") or ""
        others = [named[name] for name in {href.removeprefix("#"), *_REFERENCE.findall(text)}
                  if name in named]
        known[id(element)] = 1 + sum(_drawn(e, named, known) for e in (*element, *others))
    return known[id(element)]


def _size(root: ET.Element) -> tuple[float, float]:
    try:
        _, _, width, height = map(float, root.get("viewBox", "").split())
    except ValueError:
        return 518.4, 302.4
    return width, height


def _element(element: ET.Element, prefix: str) -> str:
    tag = element.tag
    name = tag.removeprefix(SVG) if isinstance(tag, str) else ""
    if not isinstance(tag, str) or not tag.startswith(SVG) or name not in _ELEMENTS:
        return ""
    attributes = []
    for key, value in element.attrib.items():
        checked = _attribute(name, key, value, prefix)
        if checked is not None:
            attributes.append(f' {checked[0]}="{html(checked[1])}"')
    inside = html(element.text) if element.text and element.text.strip() else ""
    for child in element:
        inside += _element(child, prefix)
        if child.tail and child.tail.strip():
            inside += html(child.tail)
    return f"<{name}{''.join(attributes)}>{inside}</{name}>" if inside else \
        f"<{name}{''.join(attributes)}/>"


def _attribute(element: str, key: str, value: str, prefix: str) -> tuple[str, str] | None:
    value = clean(value)
    if key in (XLINK_HREF, "href"):
        if value.startswith("#") and element == "use":
            return "href", f"#{prefix}-{value[1:]}"
        return ("href", value) if value.startswith(_PNG) and element == "image" else None
    if key not in _ATTRIBUTES:
        return None
    if key == "id":
        return "id", f"{prefix}-{value}"
    if key == "style":
        return "style", _style(value, prefix)
    if key in _COORDINATES:
        value = _LONG_NUMBER.sub(lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)
    paint = _paint(value, prefix)
    return None if paint is None else (key, paint)


def _style(style: str, prefix: str) -> str:
    kept = []
    for declaration in style.split(";"):
        name, _, value = declaration.partition(":")
        name, checked = name.strip().lower(), _paint(value.strip(), prefix)
        if name == "font":  # "bold 12px 'DejaVu Sans', ...": the page's own font, same size
            kept += _font(value)
        elif name in _PROPERTIES and checked is not None:
            kept.append(f"{name}:{checked}")
    return ";".join(kept)


def _font(value: str) -> list[str]:
    value = value[:200]  # bounds the searches below, whatever a drawing holds
    size = re.search(r"(\d+(?:\.\d+)?)px", value)
    weight = re.search(r"\b(bold|[1-9]00)\b", value.partition("px")[0])
    slope = "italic" if re.search(r"\b(italic|oblique)\b", value) else ""
    found = (("font-size", size[1] + "px" if size else ""),
             ("font-weight", weight[1] if weight else ""), ("font-style", slope))
    return [f"{name}:{text}" for name, text in found if text]


def _paint(value: str, prefix: str) -> str | None:
    """A value with local references prefixed and theme colours as variables; None if unsafe."""
    colour = THEME.get(value.lower())
    if colour:
        return f"var(--{colour})"
    value = _LOCAL_URL.sub(lambda m: f"url(#{prefix}-{m[1]})", value)
    rest = value.replace(f"url(#{prefix}-", "")
    if "url" in rest.lower() or "\\" in value or "expression" in rest.lower() or "/*" in value:
        return None
    return value
