"""Which of a parser's errors are about a value that it did read: on the command line exit code 1, not 2."""

from __future__ import annotations

from mhconvert.errors import MhconvertError


class RefusedError(MhconvertError):
    """A value was read and is refused; a parser's other errors say that it cannot be read."""
