"""The errors of celmoe: every class is a `CELMoEError` and the builtin that celmoe-vp's callers catch.

CELMoEError
|- ConfigError        ValueError    a value or the structure of a config
|- ConfigTypeError    TypeError     a config field, or a factory's result, of the wrong kind
|- EngineError        ValueError    an engine that does not exist
|- EngineRefusedError RuntimeError  an engine asked for by name that can't run these experts
|- StackedError       RuntimeError  what stacked experts, or their tensors, can't do
|- UnknownLevelError  KeyError      a level that the config does not have
|- UnknownExpertError KeyError      an expert that its level does not have
|- MissingRouteError  KeyError      a level that is neither routed nor can be inferred
|- RouteLengthError   ValueError    routes that are not one a sample
|- RouteIdError       ValueError    an id that is no position in the level's experts
|- RouteWeightError   ValueError    weights of several experts that make no sum
|- RouteTypeError     TypeError     routes of the wrong kind
|- PlanError          ValueError    a plan of another config or batch, or parts that a plan does not have
|- InputError         ValueError    a tensor of the wrong shape or device
|- InputTypeError     TypeError     an argument that is no tensor, or marked as rows and has none
|- ResultError        ValueError    an expert's result has the wrong shape, dtype or device
|- ResultTypeError    TypeError     an expert's result is no ExpertResult
|- ChangedError       RuntimeError  experts that are no longer those of a compiled graph
|- GraphError         RuntimeError  a model, or a routing, that a compiled or exported graph can't hold
|- UnknownDeviceError ValueError    a device that does not exist
|- DeviceMissingError RuntimeError  a device that is not there, or does not work
|- PackageMissingError RuntimeError an optional package that is not installed
|- ProcessGroupError  RuntimeError  no process group, or ranks that did not come with the same kind of call
|- MeshError          ValueError    a device mesh that does not fit
'- CheckpointError    ValueError    a checkpoint that is missing, damaged, another's, or could not be written
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 8


class CELMoEError(Exception):
    """Base of everything that celmoe itself raises."""


class ConfigError(CELMoEError, ValueError):
    """A config holds a value that is out of range, or levels and experts that do not fit together."""


class ConfigTypeError(CELMoEError, TypeError):
    """A config field, or the expert factory's result, is of the wrong kind."""


class EngineError(CELMoEError, ValueError):
    """The engine asked for does not exist."""


class EngineRefusedError(CELMoEError, RuntimeError):
    """``engine="grouped"`` was asked for, and experts of one structure can't be proven to run as one."""


class StackedError(CELMoEError, RuntimeError):
    """Experts can't be stacked now, or were asked for what only experts that aren't stacked can do."""


class _LookupError(CELMoEError, KeyError):
    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would put a sentence in quotes.
        return str(self.args[0]) if self.args else ""


class UnknownLevelError(_LookupError):
    """The config has no level of the given name."""


class UnknownExpertError(_LookupError):
    """The level has no expert of the given name."""


class MissingRouteError(_LookupError):
    """The routing leaves a level out, and nothing tells which expert the level's samples take."""


class RouteLengthError(CELMoEError, ValueError):
    """The number of routes is not the number of samples, or nothing tells the batch's size."""


class RouteIdError(CELMoEError, ValueError):
    """A route id is no position in its level's experts."""


class RouteWeightError(CELMoEError, ValueError):
    """The weights of a sample's experts are out of range, or all too small to count."""


class RouteTypeError(CELMoEError, TypeError):
    """Routes are of the wrong kind: neither names, integer ids, mappings to weights, nor ``None``."""


class PlanError(CELMoEError, ValueError):
    """A plan was made for another config or batch size, or can't be cut, joined or read as asked."""


class InputError(CELMoEError, ValueError):
    """Hidden, mask, context or fusion input has the wrong shape or device, or a context's rows are unclear."""


class InputTypeError(CELMoEError, TypeError):
    """Hidden or mask is no tensor, or `Rows` marks something that has no rows."""


class ResultError(CELMoEError, ValueError):
    """An expert returned rows of the wrong shape, dtype or device."""


class ResultTypeError(CELMoEError, TypeError):
    """An expert returned something other than an `ExpertResult` that holds a tensor."""


class ChangedError(CELMoEError, RuntimeError):
    """Experts are no longer those that a compiled graph was made for; the next call compiles anew."""


class GraphError(CELMoEError, RuntimeError):
    """A compiled or exported graph can't hold a level or a routing, or is asked for a second backward pass."""


class UnknownDeviceError(CELMoEError, ValueError):
    """No device has this name."""


class DeviceMissingError(CELMoEError, RuntimeError):
    """The device is not there, or does not work, for the reason given."""


class PackageMissingError(CELMoEError, RuntimeError):
    """An optional package that the call needs is not installed."""


class ProcessGroupError(CELMoEError, RuntimeError):
    """``torch.distributed`` has no process group, or the ranks' calls do not belong together."""


class MeshError(CELMoEError, ValueError):
    """A device mesh has another size, or other dimensions, than its use requires."""


class CheckpointError(CELMoEError, ValueError):
    """A checkpoint is missing, damaged or of another model or optimizer, or could not be written whole."""


def listed(names: Iterable[object]) -> str:
    """The names, quoted and cut after a few: ``'a', 'b', … (12 in all)``."""
    all_names = [repr(name) for name in names]
    if len(all_names) <= _SHOWN:
        return ", ".join(all_names) or "none"
    return f"{', '.join(all_names[:_SHOWN])}, … ({len(all_names)} in all)"


def nearest(names: object, known: Iterable[str]) -> str:
    """The known names that look like each unknown name, as half-sentences; all known names if a name has none.

    Args:
        names: The unknown name, or a list of several, of which as many get an answer as `listed` shows.
        known: The names that would be right.
    """
    all_known = list(known)
    folded: dict[str, list[str]] = {}
    for candidate in all_known:
        folded.setdefault(candidate.casefold(), []).append(candidate)
    unknown = list(names)[:_SHOWN] if isinstance(names, list) else [names]
    found = {}
    for name in unknown:
        if close := difflib.get_close_matches(str(name).casefold(), folded, n=3, cutoff=0.6):
            found[name] = listed(candidate for match in close for candidate in folded[match])
    if len(unknown) == 1:
        words = [f"nearest: {close}" for close in found.values()]
    else:
        words = [f"nearest to {name!r}: {close}" for name, close in found.items()]
    return "; ".join(words if len(found) == len(unknown) else [*words, f"known: {listed(all_known)}"])
