"""Text that came out of a file, made fit to be shown."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["listing", "printable"]


def printable(text: object, limit: int = 200) -> str:
    r"""Return `text` with everything that could drive a terminal in a visible form.

    Control characters, ANSI escapes, newlines, zero-width characters, bidirectional overrides and lone
    surrogates become ``\x1b``, ``\u202e`` and so on; past `limit` characters the rest is cut off.
    Markup of a particular display (rich, HTML) is left to that display to escape.
    """
    text = str(text)
    cut = text[:limit]
    shown = "".join(c if c.isprintable() else _escape(c) for c in cut)
    return shown if len(text) <= limit else shown + "…"


def listing(names: Iterable[object], most: int = 5) -> str:
    """Return `names` quoted, printable and joined by commas, with no more than `most` of them spelled out."""
    all_names = list(names)
    shown = ", ".join(f"'{printable(name)}'" for name in all_names[:most])
    rest = len(all_names) - most
    return shown if rest <= 0 else f"{shown} and {rest} more"


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
