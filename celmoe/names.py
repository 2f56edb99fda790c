"""Real names, and their keys in modules, checkpoints and losses.

PyTorch refuses child names with a dot, and the names of its own attributes (``to``, ``keys``, ``type``). A name that
PyTorch accepts is its own key, as in celmoe-vp. Any other name is percent-encoded and put one step deeper, below a
child whose name is the empty string:

    language.de.weight              expert 'de'
    language..zh%2EHant.weight      expert 'zh.Hant'
    language..%74o.weight           expert 'to'

No accepted name is empty, so an encoded name can't meet a plain one (not even an expert that is really called
``zh%2EHant``), and `urllib.parse.unquote` gives the name back.
"""

from __future__ import annotations

from collections.abc import Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, cast
from urllib.parse import unquote

from torch import nn

from .errors import StackedError

ESCAPED = ""
# Under which a module of a stacked expert keeps where its tensors are: a `celmoe.stacked.stack.Slot`.
SLOT = "_celmoe_slot"
# Under which an expert that was frozen keeps the paths of its parameters that were trained before.
FROZEN = "_celmoe_frozen"
# How the names of a registry's own parameters begin, which hold its experts' tensors: checkpoints have the experts'.
STACKED = "stack:"
# How the names of those begin that stand for stacks on other ranks.
ELSEWHERE = f"{STACKED}elsewhere:"
# Names that ``nn.ModuleDict`` refuses because it has attributes of these names.
_TAKEN = frozenset(dir(nn.ModuleDict)) | frozenset(vars(nn.ModuleDict()))


def is_plain(name: str) -> bool:
    """True if ``nn.ModuleDict`` takes this name for a child."""
    return bool(name) and "." not in name and name not in _TAKEN


def name_key(name: str) -> str:
    """The name's form in the keys of checkpoints and losses; an encoded name has a dot in front."""
    return name if is_plain(name) else f".{_encoded(name)}"


def parted_key(key: str) -> tuple[str, str]:
    """The name that a key of a checkpoint begins with, as `name_key` gives it, and the rest behind the next dot.

    Raises:
        ValueError: The key begins with no name.
    """
    escaped, key = key.startswith("."), key.removeprefix(".")
    name, _, rest = key.partition(".")
    if not name:
        raise ValueError(f"{key!r} begins with no name")
    return unquote(name) if escaped else name, rest


def scope_key(name: str) -> str:
    """Like `name_key`, for keys in which ``->`` joins two names: a name with an arrow of its own is encoded too."""
    return f".{_encoded(name)}".replace("->", "-%3E") if "->" in name else name_key(name)


def path_key(*names: str) -> str:
    """Names joined by ``/``, each like `name_key`: one with a slash of its own is encoded too."""
    return "/".join(f".{_encoded(each)}".replace("/", "%2F") if "/" in each else name_key(each) for each in names)


class NamedModules(nn.ModuleDict):
    """An ``nn.ModuleDict`` that takes any non-empty string for a key, and answers to the real names.

    Iteration and `state_dict` give the names in the order in which they were set: a child that is ``None`` holds each
    encoded name's place among the plain ones. The class adds no attribute to its base class, for each attribute is one
    name more that can't be plain.
    """

    def __getitem__(self, key: str) -> nn.Module:
        if (module := _find(self, key)) is None:
            raise KeyError(key)
        return module

    def __setitem__(self, key: str, module: nn.Module) -> None:
        if not isinstance(key, str) or not key:
            raise KeyError(f"'key' must be a non-empty string (got {key!r})")
        _note_replaced(self, key)
        slot = module.__dict__.get(SLOT) if isinstance(module, nn.Module) else None
        if slot is not None and slot.stack.registry is not self:
            raise StackedError(
                f"{key!r} must be a module with parameters of its own (got an expert of another level's stack; "
                f"copy it with copy.deepcopy, or call celmoe.unstack_experts on the other model)"
            )
        if is_plain(key):
            self.add_module(key, module)
            return
        if ESCAPED not in self._modules:
            self._modules[ESCAPED] = nn.ModuleDict()
        escaped = self._modules[ESCAPED]
        assert isinstance(escaped, nn.ModuleDict)
        escaped[_encoded(key)] = module
        self._modules[name_key(key)] = None  # type: ignore[assignment]  # torch's own registry takes it

    def __delitem__(self, key: str) -> None:
        if _find(self, key) is None:
            raise KeyError(key)
        _note_replaced(self, key)
        if is_plain(key):
            del self._modules[key]
        else:
            del _escaped(self)[_encoded(key)], self._modules[name_key(key)]

    def __setattr__(self, name: str, value: Any) -> None:
        _note_replaced(self, name)
        super().__setattr__(name, value)

    def __contains__(self, key: object) -> bool:
        return _find(self, key) is not None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        for child in self._modules:
            if child != ESCAPED:
                yield unquote(child[1:]) if child.startswith(".") else child

    def __dir__(self) -> list[str]:
        # nn.Module.__dir__ reads the first letter of every child's name, and one name is empty.
        return sorted({*dir(type(self)), *vars(self), *filter(str.isidentifier, self._modules)})

    def __repr__(self) -> str:
        lines = "".join(f"\n({name}): {module!r}" for name, module in self.items())
        return f"{type(self).__name__}({lines}".replace("\n", "\n  ") + ("\n)" if lines else ")")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The usual state of a module, in the order of the names."""
        state = super().state_dict(*args, **kwargs)
        if ESCAPED in self._modules:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            places = {child: place for place, child in enumerate(self._modules)}

            def place_of(key: str) -> int:
                first, second, *_ = f"{key[len(prefix) :]}.".split(".")
                return places.get(first or f".{second}", 0)

            for key in sorted((key for key in state if key.startswith(prefix)), key=place_of):
                state[key] = state.pop(key)
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._parameters:
            if name.startswith(STACKED):
                destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing = args[2]
        missing[:] = [key for key in missing if not key.startswith(prefix + STACKED)]

    def clear(self) -> None:
        """Remove all modules."""
        for name in self:
            _note_replaced(self, name)
        self._modules.clear()

    def arrange(self, modules: Mapping[str, nn.Module]) -> None:
        """Take these modules in place of all that there are, in this order."""
        self.clear()
        for name, module in modules.items():
            self[name] = module
        if ESCAPED in self._modules:
            self._modules[ESCAPED].training = self.training

    def keys(self) -> KeysView[str]:
        """The real names."""
        return KeysView(self)

    def items(self) -> ItemsView[str, nn.Module]:
        """The real names and their modules."""
        return ItemsView(self)

    def values(self) -> ValuesView[nn.Module]:
        """The modules."""
        return ValuesView(self)


def modules_named(modules: nn.ModuleDict, names: Collection[str]) -> list[nn.Module]:
    """The modules of several names at once.

    Raises:
        KeyError: A name has no module.
    """
    found = list(map(modules._modules.get, names))
    return [modules[name] for name in names] if None in found else found  # type: ignore[return-value]  # no None


def _note_replaced(modules: NamedModules, name: object) -> None:
    """Let the stack of a module that is about to be replaced know."""
    module = _find(modules, name) if "_modules" in modules.__dict__ else None
    if module is not None and (slot := module.__dict__.get(SLOT)) is not None:
        slot.stack.changed()


def _encoded(name: str) -> str:
    encoded = name.replace("%", "%25").replace(".", "%2E")
    if encoded in _TAKEN:
        # Attributes of a module are ASCII, so one byte is the whole first letter.
        return f"%{ord(encoded[0]):02X}{encoded[1:]}"
    return encoded


def _escaped(modules: NamedModules) -> dict[str, nn.Module]:
    escaped = modules._modules.get(ESCAPED)
    return {} if escaped is None else cast(dict[str, nn.Module], escaped._modules)


def _find(modules: NamedModules, name: object) -> nn.Module | None:
    if not isinstance(name, str) or not name:
        return None
    # Every forward pass looks up every expert here: plain names, which are the children's names, take the short way.
    module = modules._modules.get(name)
    return _escaped(modules).get(_encoded(name)) if module is None else module
