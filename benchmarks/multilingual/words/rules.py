"""Edit rules: each makes a lemma from a form by changing its two ends.

A rule keeps the longest substring that form and lemma share (the leftmost in the lemma if several are longest) and
replaces the text before and after it. ``gemacht`` -> ``machen`` keeps ``mach``: two characters go in front, ``t`` gives
way to ``en`` behind. Characters are compared as they are, so a change of case is an edit like any other.
"""

from __future__ import annotations

from typing import NamedTuple

FIELD_SEPARATOR = "\t"


class EditRule(NamedTuple):
    """``lemma = new_prefix + form[strip_prefix : len(form) - strip_suffix] + new_suffix``."""

    strip_prefix: int
    new_prefix: str
    strip_suffix: int
    new_suffix: str

    def apply(self, form: str) -> str | None:
        """The lemma that this rule makes of ``form``, or None if the form is too short for the rule."""
        end = len(form) - self.strip_suffix
        if self.strip_prefix > end:
            return None
        return self.new_prefix + form[self.strip_prefix : end] + self.new_suffix

    def to_text(self) -> str:
        """One line that `from_text` reads back; the affixes may hold anything but a tab."""
        return FIELD_SEPARATOR.join((str(self.strip_prefix), self.new_prefix, str(self.strip_suffix), self.new_suffix))

    @classmethod
    def from_text(cls, text: str) -> EditRule:
        """The rule that `to_text` wrote."""
        strip_prefix, new_prefix, strip_suffix, new_suffix = text.split(FIELD_SEPARATOR)
        return cls(int(strip_prefix), new_prefix, int(strip_suffix), new_suffix)


IDENTITY = EditRule(0, "", 0, "")


def decode(form: str, rule: EditRule | None) -> str:
    """The lemma; a rule that does not fit leaves the form as it is."""
    lemma = None if rule is None else rule.apply(form)
    return form if lemma is None else lemma


def find_rule(form: str, lemma: str) -> EditRule:
    """The rule that makes ``lemma`` of ``form``; if they share nothing, the rule replaces the whole form.

    Substring search is left to ``in`` and starts from the longest length: most pairs share nearly everything, so that
    a handful of searches settles them.
    """
    if form == lemma:
        return IDENTITY
    for length in range(min(len(form), len(lemma)), 0, -1):
        for start in range(len(lemma) - length + 1):
            kept = lemma[start : start + length]
            if kept in form:
                at = form.index(kept)
                return EditRule(at, lemma[:start], len(form) - at - length, lemma[start + length :])
    return EditRule(len(form), lemma, 0, "")
