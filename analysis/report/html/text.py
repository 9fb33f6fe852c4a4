"""Text that cannot break a page, and numbers as a reader wants them."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

from markupsafe import Markup, escape

NOT_MEASURED = "not measured"
# Characters that reorder or hide what follows them. This report is in one direction, so they are
# spelled out: a reader sees that something odd is there.
_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?!\.?\w)")
_POWER = re.compile(r"(\d)\s*[x×*]\s*10\^\{?([+-]?\d{1,3})\}?")
_ODD = re.compile(f"[{_BIDI}\ufeff\u2028\u2029\ufff9-\ufffb]")


def clean(text: str) -> str:
    """``text`` without control characters, direction marks and lone surrogates: made visible."""
    if text.replace("\n", " ").isprintable():  # most of it is: no character by itself
        return text
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = _ODD.sub(lambda m: f"[U+{ord(m[0]):04X}]", text)
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cn", "Co")
                   else f"[U+{ord(c):04X}]" for c in text)


def html(text: Any) -> Markup:
    """Cleaned and escaped for HTML, in text and in quoted attributes; Markup passes."""
    return text if isinstance(text, Markup) else escape(clean(str(text)))


def number(value: float, digits: int = 4) -> str:
    """A number for people: 12,345, 0.0132, 1.5e-7 as ``1.5 × 10⁻⁷``; whole numbers stay whole."""
    if isinstance(value, int):
        return f"{value:,}".replace("-", "\u2212")
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "\u221e" if value > 0 else "\u2212\u221e"
    if value == 0:
        return "0"
    if value == int(value) and abs(value) < 1e6:
        text = f"{value:,.0f}"
    elif 1e-3 <= abs(value) < 1e6:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        text = f"{value:,.{decimals}f}"
        if "." in text:
            text = text.rstrip("0").rstrip(".")
    else:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa} × 10{_superscript(int(exponent))}"
    return text.replace("-", "\u2212")


def fixed(value: float, decimals: int) -> str:
    """A number with that many decimals: 1,234.50."""
    return f"{value:,.{decimals}f}".replace("-", "\u2212")


def plain(value: Any, digits: int = 4) -> str:
    """Any value of a run as text: "not measured", yes, no, a number, or the words themselves."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value, digits)
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v, digits) for v in value)
    return clean(str(value))


def binary_bytes(value: float) -> str:
    """1.5e9 -> "1.4 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{number(float(f'{value:.3g}'))} {unit}"
        value /= 1024
    raise AssertionError("not reached")


def powers(text: str) -> str:
    """Numbers in a text in one style: 1.22e+39 and 1.22 x 10^39 -> ``1.22 × 10³⁹``."""
    text = _EXPONENT.sub(lambda m: f"{m[1]} × 10{_superscript(int(m[2]))}", text)
    return _POWER.sub(lambda m: f"{m[1]} × 10{_superscript(int(m[2]))}", text)


def slug(text: str) -> str:
    """An id for an anchor: lower case, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
