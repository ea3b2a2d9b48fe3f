"""Names in Markdown: they come from strangers, and show as they are."""

from __future__ import annotations

import re

MARKUP = re.compile(r"([\\`*\[\]<>|])")


def inline(text: object) -> str:
    """`text` on one line, without control characters, its markup escaped."""
    line = "".join(sign if sign.isprintable() else " " for sign in str(text))
    return MARKUP.sub(r"\\\1", " ".join(line.split()))
