"""Guards tell for which experts, inputs and surroundings a graph holds: the tracer's own guards, and additions."""

from __future__ import annotations

import logging
import operator
import re
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from torch import nn

from .canonical import canonical
from .identities import Identities
from .namespaces import Namespaces


class Guard:
    """Tells for which arguments of a captured function its graph holds.

    This class closes five gaps of the tracer's own guards. They compare constants as Python does: 1 equals True, and
    0.0 equals -0.0. Objects are known by class, though methods may be replaced. A tuple that holds a list is compared
    with itself. Names that were not found during the trace have no guards, and neither have objects that were compared
    by identity.

    Args:
        manager: The tracer's own guard manager.
        aliases: The sources without guards of objects that have another source, too.
        arguments: The arguments that the graph was traced with, by parameter name.
        silent: Loggers that said nothing during the trace, though the code calls them.
        inputs: The sources of the graph's inputs.

    Attributes:
        foreign: A refusal, if the code uses a class that has a metaclass of the user's.
    """

    def __init__(
        self,
        manager: Any,
        aliases: Sequence[str],
        arguments: Mapping[str, Any],
        silent: SilentLoggers,
        inputs: AbstractSet[str],
    ) -> None:
        self._manager = manager
        self._silent = silent
        scope = {"L": arguments, "G": self.scope}
        parts = [part for part in manager.code_parts if isinstance(part, str)]
        compared = dict.fromkeys(part.split(" == ")[0] for part in parts if " == " in part)
        constants = {source: _evaluated(source, scope) for source in compared}
        self._constants = [
            (_reader(source), canonical(value)) for source, value in constants.items() if not _is_exact(value)
        ]
        found = [_evaluated(match[1], scope) for part in parts if (match := _TYPE.match(part))]
        values = {source: _evaluated(source, scope) for source in _sources(manager.root)}
        self._names = Namespaces(values, arguments, self.scope, inputs)
        values |= {source: _evaluated(source, scope) for source in aliases}
        self._objects = Identities(values, arguments, self.scope)
        self.foreign = self._names.foreign
        kinds = [
            *map(type, found),
            *map(type, arguments["expert"].modules()),
            *(kind for each in self._names.classes if (kind := each()) is not None),
        ]
        classes = dict.fromkeys(base for each in kinds for base in each.__mro__ if base.__flags__ & _HEAP_TYPE)
        self._code = [_Methods(each) for each in classes]
        self._of_expert = _of_expert_alone(manager)

    @property
    def scope(self) -> Mapping[str, Any]:
        """The names behind ``G`` in the tracer's expressions: modules that the code reads."""
        scope: Mapping[str, Any] = self._manager.global_scope["G"]
        return scope

    def holds(self, arguments: dict[str, Any]) -> bool:
        """True if the graph holds for arguments, by parameter name."""
        return (
            bool(self._manager.check(arguments))
            and self._holds_beside(arguments)
            and self._names.hold_for(arguments["expert"])
            and self._names.hold_in(arguments["context"])
            and self._objects.hold_for(arguments["expert"], self._objects.others(arguments))
        )

    def holds_for_all(self, arguments: dict[str, Any], experts: Iterable[nn.Module]) -> bool:
        """True if the graph, which holds for these arguments now, also holds with each of some experts."""
        check, is_plain = self._of_expert.check, not self._constants
        has_names, has_objects, others = self._names.hold_for, self._objects.hold_for, self._objects.others(arguments)
        for arguments["expert"] in experts:
            expert = arguments["expert"]
            if not check(arguments) or not has_names(expert) or not has_objects(expert, others):
                return False
            if not is_plain and not self._holds_beside(arguments):
                return False
        return True

    def _holds_beside(self, arguments: dict[str, Any]) -> bool:
        """True if all constants have the types and signs of the trace."""
        return all(canonical(read(arguments, self.scope)) == constant for read, constant in self._constants)

    def state(self, *, is_context_whole: bool) -> str | None:
        """The first source that the code reads and that other experts might change, or ``None``."""
        given = (source for source in self._objects.state if is_context_whole or not source.startswith("L['context']"))
        return next(given, None)

    def objects_of(self, expert: nn.Module) -> set[int]:
        """The ids of the objects that the call reaches through an expert for which the graph holds."""
        return self._objects.objects_of(expert)

    def is_alive(self) -> bool:
        """True if the graph may still be used.

        The tracer drops a graph whose guards compare an object that is gone. This class also drops a graph once traced
        code was replaced, names appeared, or a silent logger says something.
        """
        is_kept = self._manager.cache_entry is not None and self._silent.are_as_before() and self._names.are_as_before()
        return is_kept and all(each.are_as_before() for each in self._code)


def _sources(node: Any) -> Iterator[str]:
    """The sources that a tree of guards mentions."""
    yield node.get_source()
    for each in node.get_child_managers():
        yield from _sources(each)
    if hasattr(node, "get_key_value_managers"):
        # A dict whose keys are compared in order has its values here.
        for pair in node.get_key_value_managers().values():
            for each in pair:
                if each is not None:
                    yield from _sources(each)


_OTHERS = ("G", "L['hidden']", "L['mask']", "L['context']")


def _of_expert_alone(manager: Any) -> Any:
    """The guards that look at the expert; all guards if one of them also looks at something else."""
    lines = str(manager).splitlines()
    mixed = (
        "ALIASING" in line or ("L['expert']" in line and any(other in line for other in _OTHERS[1:])) for line in lines
    )
    if any(mixed):
        return manager
    return manager.root.clone_manager(lambda node: not node.get_source().startswith(_OTHERS)) or manager


class SilentLoggers(set[Any]):
    """A set that contains each method of a logger that says nothing at the logger's present level."""

    def __init__(self) -> None:
        super().__init__()
        self._met: dict[tuple[int, int], logging.Logger] = {}

    def __contains__(self, method: object) -> bool:
        logger = getattr(method, "__self__", None)
        level = _LEVELS.get(getattr(method, "__name__", ""))
        if type(logger) is not logging.Logger or level is None or logger.isEnabledFor(level):
            return False
        self._met[id(logger), level] = logger
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> set[Any]:
        # The tracer copies its settings when it logs its own times.
        return set()

    def are_as_before(self) -> bool:
        """True if the loggers that were looked up still say nothing."""
        return not any(logger.isEnabledFor(level) for (_, level), logger in self._met.items())


_LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}


class _Methods:
    """A snapshot of a class's functions and their code, which keeps neither class nor functions alive.

    A class that PyTorch makes for one module, as for weight norm, holds that module.
    """

    def __init__(self, kind: type) -> None:
        self._kind = weakref.ref(kind)
        attributes = vars(kind)
        self._number = len(attributes)
        found = {name: _function_of(each) for name, each in attributes.items()}
        functions = {name: each for name, each in found.items() if each is not None}
        # Another object may get the id of one that is gone.
        self._gone: list[Any] = []
        self._alive = [weakref.ref(each, self._gone.append) for each in functions.values()]
        plain = [name for name, each in functions.items() if attributes[name] is each]
        self._read = operator.itemgetter(*plain, *plain[:1]) if plain else None
        self._ids = tuple(map(id, self._read(attributes))) if self._read else ()
        self._wrapped = [
            (name, type(attributes[name]), id(each)) for name, each in functions.items() if attributes[name] is not each
        ]
        # Nobody rewrites PyTorch's own functions in place.
        own = {} if kind.__module__.startswith("torch.") else functions
        self._inner = [(weakref.ref(each), _INNER(each)) for each in own.values()]

    def are_as_before(self) -> bool:
        """True if the class's functions and their code are unchanged."""
        kind = self._kind()
        if kind is None or self._gone:
            return False
        attributes = vars(kind)
        if len(attributes) != self._number:
            return False
        try:
            if self._read is not None and tuple(map(id, self._read(attributes))) != self._ids:
                return False
        except KeyError:
            return False
        for name, wrapper, function in self._wrapped:
            attribute = attributes.get(name)
            if type(attribute) is not wrapper or id(_function_of(attribute)) != function:
                return False
        return all(_INNER(function()) == inner for function, inner in self._inner)


def _function_of(attribute: Any) -> types.FunctionType | None:
    """The Python function that a class's attribute calls, or ``None``."""
    if type(attribute) is staticmethod or type(attribute) is classmethod:
        attribute = attribute.__func__
    elif type(attribute) is property:
        attribute = attribute.fget
    return attribute if type(attribute) is types.FunctionType else None


# The guard of an object's class.
_TYPE = re.compile(r"___check_type_id\((.*), \d+\)")
# Classes that Python code can change.
_HEAP_TYPE = 1 << 9
_INNER = operator.attrgetter("__code__", "__defaults__")


def _is_exact(value: Any) -> bool:
    """If equal values are the same: the tracer's guards compare the type of a constant, too."""
    return type(value) in (int, str, bytes, bool, type(None), type) or (type(value) is float and value != 0)


def _reader(source: str) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any]:
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] = eval(f"lambda L, G: {source}", {})
    return read


def _evaluated(source: str, scope: dict[str, Any]) -> Any:
    """The value of a source; ``None`` if only the tracer can read the source."""
    try:
        return eval(source, scope)
    except Exception:  # noqa: BLE001  # the tracer's expressions may use names of its own
        return None
