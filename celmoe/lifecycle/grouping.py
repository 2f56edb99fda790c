"""The group of a new expert's parameters: that of the same tensors of other experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from celmoe.errors import ConfigError
from celmoe.optim.per_expert import PerExpert
from celmoe.stacked.stack import Stack

from .places import Places
from .shares import Row


def groups_for(
    places: Sequence[Places], rows: Sequence[Row], known: Collection[Row], source: str | None, stack: Stack | None
) -> list[dict[Row, int | None]]:
    """By optimizer, the group of each row of a new expert; ``None`` for one that the optimizer does not take.

    Args:
        places: The places of all optimizers.
        rows: The new expert's rows.
        known: The rows of the level's experts.
        source: The name of the expert that the new one is warm-started from.
        stack: The stack that the new expert joins, whose members then tell the group; else the level's experts do.

    Raises:
        ConfigError: Nothing tells one group of one optimizer.
    """
    found: list[dict[Row, int | None]] = [dict.fromkeys(rows) for _ in places]
    members = None if stack is None else {stack.names[place] for place in stack.intact}
    everyone = {row: (number, group) for number, each in enumerate(places) for row, group in each.group_of.items()}
    taken = {row: place for row, place in everyone.items() if members is None or row[0] in members}
    for name, path in rows if places else ():
        own = None if source is None else everyone.get((source, path))
        # PyTorch's optimizers have a stack in one group, whichever the group of a source outside of the stack is.
        if own is not None and ((source, path) in taken or isinstance(places[own[0]].optimizer, PerExpert)):
            fitting = {own}
        elif not (fitting := {place for row, place in taken.items() if row[1] == path}):
            if stack is not None or (taken and any(row[1] == path for row in known)):
                # The optimizers train the others without this tensor, or do not train them.
                continue
            fitting = {*taken.values()}
        if not fitting and len(places) == 1 and len(places[0].optimizer.param_groups) == 1:
            fitting = {(0, 0)}
        if len(fitting) != 1:
            raise ConfigError(
                f"'optimizer' must have {path!r} of the level's experts in one group (got {len(fitting)} groups with "
                f"it; give 'warm_start' to choose its group, or leave 'optimizer' out and call its add_param_group)"
            )
        number, group = fitting.pop()
        found[number][name, path] = group
    return found
