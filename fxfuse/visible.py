"""Text of others, on a terminal: no character of it moves the cursor, colours, hides or reverses anything."""

from __future__ import annotations


def visible(text: str) -> str:
    r"""`text`, in which whatever is not printed but obeyed stands as its escape, as ``\x1b``.

    Those are control characters, marks that change the direction of writing, and characters of no width.
    Lines remain lines.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """`text` as `visible` makes it, on one line: a name cannot add a line of its own."""
    return visible(text).replace("\n", "\\n")
