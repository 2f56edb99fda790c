"""Experts by patterns of their names, as in the shell: ``*``, ``?`` and ``[abc]``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from .errors import InputTypeError, UnknownExpertError, nearest


def matching(pattern: object, known: Iterable[str], what: str) -> list[str]:
    """The names that match a pattern, in their order; upper and lower case differ.

    Args:
        pattern: The pattern.
        known: All names.
        what: The names of what, for errors: ``"experts of level 'l'"``.

    Raises:
        InputTypeError: The pattern is no string.
        UnknownExpertError: No name matches.
    """
    if not isinstance(pattern, str):
        raise InputTypeError(f"'pattern' must be a string (got {pattern!r})")
    names = list(known)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise UnknownExpertError(f"'pattern' must match {what} (got {pattern!r}; {nearest(pattern, names)})")
    return found
