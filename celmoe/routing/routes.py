"""Encode a user's routes, in any form, as integer codes; and celmoe-vp's three routing helpers.

A code is an expert's rank among its level's sorted names: the order in which experts run. An id is its position in the
config. This file takes one level at a time; `planner` sorts the samples of all levels by their codes.

A sample's route is a name or an id; a mapping of several to their weights; or ``None``, for no expert at this level.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from celmoe.errors import (
    RouteIdError,
    RouteLengthError,
    RouteTypeError,
    RouteWeightError,
    UnknownExpertError,
    listed,
    nearest,
)

from .memberships import LEAST_WEIGHT, MOST_WEIGHT, CodeArray, ForAll, Memberships, merged

# One code a sample: bytes if codes were looked up and fit into a byte, else an array.
Codes: TypeAlias = bytearray | CodeArray
# A level's codes: one a sample, one for all samples, or memberships, if a sample has not exactly one expert.
SampleCodes: TypeAlias = Codes | int | Memberships
# The same, before the number of samples is known.
LevelCodes: TypeAlias = SampleCodes | ForAll
# One sample's route: an expert; several with their weights; or none.
Route: TypeAlias = str | int | Mapping[str, float] | Mapping[int, float] | None
LevelRoutes: TypeAlias = (
    str | Mapping[str, float] | Sequence[str] | Sequence[int] | Sequence[Route] | npt.NDArray[Any] | torch.Tensor | None
)
# celmoe-vp's alias, with which its callers annotate a routing.
LevelRouting: TypeAlias = dict[str, list[str]]
Routing: TypeAlias = Mapping[str, LevelRoutes]

_BYTE = 256
_WHOLE_BATCH = "the whole batch"


def code_array(codes: Codes) -> CodeArray:
    """Codes as an array, without a copy."""
    return np.frombuffer(codes, dtype=np.uint8) if isinstance(codes, bytearray) else codes


def _as_array(codes: Codes | Memberships) -> CodeArray:
    assert not isinstance(codes, Memberships)
    return code_array(codes)


class RouteTable:
    """The names of one level's experts, and the codes and ids that stand for them.

    Attributes:
        level: The level's name.
        experts: The experts' names in the config's order; an id is a position here.
        sorted_experts: The names in sorted order; a code is a position here.
        dtype: The dtype of arrays of codes: the smallest unsigned one that holds all codes.
        code_by_name: The code for each name.
        ids: The id for each code, as a list.
        ids_of_bytes: 256 bytes, the id for each code; none at all if there are more experts.
        ids_by_code: ``[E]`` int64, the id for each code.
        codes_by_id: ``[E]`` in the codes' dtype, the code for each id.
    """

    def __init__(self, level: str, experts: Sequence[str]) -> None:
        self.level = level
        self.experts = tuple(experts)
        self.sorted_experts = tuple(sorted(experts))
        # NumPy's stable argsort has a radix sort for small unsigned codes.
        self.dtype = np.min_scalar_type(len(experts) - 1)
        self._names = frozenset(experts)
        self.code_by_name = {name: code for code, name in enumerate(self.sorted_experts)}
        self.codes_by_id = np.array([self.code_by_name[name] for name in self.experts], dtype=self.dtype)
        self.ids_by_code = np.empty(len(self.experts), dtype=np.int64)
        self.ids_by_code[self.codes_by_id] = np.arange(len(self.experts))
        self.ids: list[int] = self.ids_by_code.tolist()
        self.ids_of_bytes = bytes(self.ids).ljust(_BYTE) if len(self.ids) <= _BYTE else b""

    def encode(self, routes: LevelRoutes, unknown: int | None = None) -> LevelCodes:
        """The codes of a level's routes, ``[B]``, or of the one route of all samples.

        Args:
            routes: The routes.
            unknown: The code of names that are no expert of this level; ``None`` refuses them.

        Raises:
            RouteTypeError: The routes are of the wrong kind.
            RouteWeightError: A mapping's weights are not from 0 to 2**64, or all are below 2**-64.
            UnknownExpertError: A name is no expert of this level.
            RouteIdError: An id is no position in the level's experts.
            RouteLengthError: An array has no axis, or several.
        """
        if not isinstance(routes, list):
            if isinstance(routes, str):
                return self._code(routes, unknown)
            if isinstance(routes, torch.Tensor):
                return self._encode_array(_host_array(routes, self.level), unknown)
            if isinstance(routes, np.ndarray):
                return self._encode_array(routes, unknown)
            if routes is None or isinstance(routes, Mapping):
                one = self._encode_mixed([routes], unknown, is_whole=True)
                return ForAll(one) if isinstance(one, Memberships) else int(one[0])
            routes = self._as_list(routes)
        return self._encode_list(routes, unknown)

    def _code(self, name: str, unknown: int | None) -> int:
        # str.__str__ undoes subclasses that hash in their own way.
        code = self.code_by_name.get(str.__str__(name), unknown)
        if code is None:
            raise UnknownExpertError(
                f"{self._where} must name an expert of level {self.level!r} (got {name!r} for the whole batch; "
                f"{nearest(name, self.experts)})"
            )
        return code

    def _encode_list(self, routes: list[Any], unknown: int | None) -> Codes | Memberships:
        try:
            return self._look_up(routes)
        except (KeyError, TypeError):
            return self._encode_unusual(routes, unknown)

    def _look_up(self, names: list[Any]) -> Codes:
        if len(self.experts) == 1 and self._names.issuperset(names):
            return bytearray(len(names))
        codes = map(self.code_by_name.__getitem__, names)
        # bytearray takes small integers from an iterator in half the time of np.fromiter.
        return bytearray(codes) if len(self.experts) <= _BYTE else np.fromiter(codes, self.dtype, count=len(names))

    def _encode_unusual(self, routes: Sequence[Any], unknown: int | None) -> Codes | Memberships:
        """Encode ids, names of a str subclass with a hash of its own, several experts or none; refuse all else."""
        kinds = set(map(type, routes))
        if any(kind is type(None) or issubclass(kind, Mapping) for kind in kinds):
            found = self._look_up_mixed(routes)
            return self._encode_mixed(routes, unknown) if found is None else found
        wrong = {kind for kind in kinds if kind is bool or not issubclass(kind, str | int | np.integer)}
        if wrong:
            example = next(route for route in routes if type(route) in wrong)
            raise RouteTypeError(
                f"{self._where} must hold names, integer ids, mappings to weights or None (got {example!r} of type "
                f"{type(example).__name__})"
            )
        if not any(issubclass(kind, str) for kind in kinds):
            return self._encode_ids(np.array(routes, dtype=object))
        if not all(issubclass(kind, str) for kind in kinds):
            raise RouteTypeError(f"{self._where} must hold either names or integer ids (got both)")
        names = [str.__str__(name) for name in routes]
        if strangers := Counter(name for name in names if name not in self.code_by_name):
            if unknown is None:
                raise self._unknown(strangers, f"{strangers.total()} of {len(names)} samples")
            return self._look_up(
                [name if name in self.code_by_name else self.sorted_experts[unknown] for name in names]
            )
        return self._look_up(names)

    def _look_up_mixed(self, routes: Sequence[Any]) -> CodeArray | Memberships | None:
        """Encode names, mappings of names to floats above 0, and ``None``; ``None`` for anything else.

        `_encode_mixed` does the same for whatever there is, and takes five times as long.
        """
        codes: list[int] = []
        odd: list[int] = []
        code_of, rest = self.code_by_name.__getitem__, iter(routes)
        while len(codes) < len(routes):
            try:
                codes.extend(map(code_of, rest))
            except (KeyError, TypeError):
                # What was found so far has been added. A mapping, or None, gets a code that is not used.
                odd.append(len(codes))
                codes.append(0)
        lengths: list[int] = []
        own: list[int] = []
        weights: list[float] = []
        for place in odd:
            before = len(own)
            route = routes[place]
            if route is not None:
                if not isinstance(route, Mapping):
                    return None
                for name, weight in route.items():
                    code = self.code_by_name.get(name) if type(name) is str else None
                    if code is None or type(weight) is not float or not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
                        return None
                    own.append(code)
                    weights.append(weight)
                if len(own) == before:
                    return None
            lengths.append(len(own) - before)
        plain = code_array(bytearray(codes)) if len(self.experts) <= _BYTE else np.array(codes, dtype=self.dtype)
        return self._assembled(plain, odd, lengths, own, weights)

    def _assembled(
        self, codes: CodeArray, odd: Sequence[int], lengths: Sequence[int], own: Any, weights: Sequence[float]
    ) -> CodeArray | Memberships:
        """The memberships of samples with a code each, but for the odd ones, which have so many codes and weights."""
        size = len(codes)
        per_sample = np.ones(size, dtype=np.int64)
        per_sample[odd] = lengths
        samples = np.repeat(np.arange(size, dtype=np.int64), per_sample)
        is_odd = np.zeros(size, dtype=np.bool_)
        is_odd[odd] = True
        of_odd = is_odd[samples]
        every, all_weights = codes[samples], np.ones(len(samples))
        every[of_odd], all_weights[of_odd] = own, weights
        return merged(every, samples, all_weights, size).settled()

    def _encode_mixed(
        self, routes: Sequence[Any], unknown: int | None, *, is_whole: bool = False
    ) -> CodeArray | Memberships:
        """Encode routes of which some are mappings or ``None``; or the one route of the whole batch."""
        odd = [place for place, route in enumerate(routes) if type(route) is not str]
        odd = [place for place in odd if routes[place] is None or isinstance(routes[place], Mapping)]
        shares = [{} if routes[place] is None else self._weighted(routes[place]) for place in odd]
        is_odd = np.zeros(len(routes), dtype=np.bool_)
        is_odd[odd] = True
        others = [route for route, is_other in zip(routes, (~is_odd).tolist(), strict=True) if is_other]
        for name in {name for each in shares for name in each if type(name) is not str}:
            if name is None or isinstance(name, Mapping):
                raise RouteTypeError(f"{self._where} must map names or integer ids to weights (got {name!r})")
        # Names and ids of all samples are encoded in one go, the mappings' behind the others.
        names = [*others, *(name for each in shares for name in each)]
        try:
            codes = _as_array(self._encode_list(names, unknown))
        except UnknownExpertError:
            named = [each if isinstance(each, Mapping) else (each,) for each in routes if each is not None]
            strangers = [{str(name) for name in each if name not in self.code_by_name} for each in named]
            names = [name for name in names if isinstance(name, str) and name not in self.code_by_name]
            told = _WHOLE_BATCH if is_whole else f"{sum(map(bool, strangers))} of {len(routes)} samples"
            raise self._unknown(names, told) from None
        plain = np.zeros(len(routes), dtype=self.dtype)
        plain[~is_odd] = codes[: len(others)]
        weights = [weight for each in shares for weight in each.values()]
        return self._assembled(plain, odd, [*map(len, shares)], codes[len(others) :], weights)

    def _weighted(self, route: Mapping[Any, Any]) -> dict[Any, float]:
        """The experts of a mapping, without those whose weights count as 0."""
        if wrong := [each for each in route.values() if isinstance(each, bool) or not isinstance(each, Real)]:
            raise RouteTypeError(self._of_weights(f"{wrong[0]!r} of type {type(wrong[0]).__name__}"))
        for weight in route.values():
            # Not as a float, which a large integer can't become.
            if not 0 <= weight <= MOST_WEIGHT:
                raise RouteWeightError(self._of_weights(dict(route)))
        found = {name: float(weight) for name, weight in route.items() if weight >= LEAST_WEIGHT}
        if not found:
            raise RouteWeightError(self._of_weights(dict(route)))
        return found

    def _of_weights(self, got: object) -> str:
        return f"{self._where} must map experts to weights from 0 to 2**64, one of them at least 2**-64 (got {got})"

    def _encode_array(self, routes: npt.NDArray[Any], unknown: int | None) -> Codes | Memberships:
        if np.ma.is_masked(routes):
            raise RouteTypeError(f"{self._where} must hold names or integer ids (got a masked array)")
        if routes.ndim != 1:
            raise RouteLengthError(f"{self._where} must have one axis, the samples (got shape {routes.shape})")
        if routes.size == 0:
            return np.empty(0, dtype=self.dtype)
        if routes.dtype.kind in "UOT":
            return self._encode_list(routes.tolist(), unknown)
        if routes.dtype.kind not in "iu":
            raise RouteTypeError(f"{self._where} must hold names or integer ids (got dtype {routes.dtype})")
        return self._encode_ids(routes)

    def _encode_ids(self, ids: npt.NDArray[Any]) -> Codes:
        if ids.min() < 0 or ids.max() >= len(self.experts):
            wrong = [int(each) for each in ids if not 0 <= each < len(self.experts)]
            raise RouteIdError(
                f"{self._where} must hold ids from 0 to {len(self.experts) - 1}, positions in the level's experts "
                f"(got {listed(sorted(set(wrong)))} for {len(wrong)} of {len(ids)} samples)"
            )
        return self.codes_by_id[ids.astype(np.int64, copy=False)]

    def _as_list(self, routes: object) -> list[Any]:
        if isinstance(routes, bytes | bytearray | AbstractSet) or not (
            isinstance(routes, Sized) and isinstance(routes, Iterable)
        ):
            raise RouteTypeError(
                f"{self._where} must be a name, a mapping to weights or None, or a sequence, NumPy array or tensor of "
                f"routes or integer ids, one a sample (got {type(routes).__name__})"
            )
        return list(routes)

    def _unknown(self, unknown: Iterable[str], told: str) -> UnknownExpertError:
        names = sorted(set(unknown))
        return UnknownExpertError(
            f"{self._where} must name experts of level {self.level!r} (got {listed(names)} for {told}; "
            f"{nearest(names, self.experts)})"
        )

    @property
    def _where(self) -> str:
        return f'"routing[{self.level!r}]"'


def _host_array(routes: torch.Tensor, level: str) -> npt.NDArray[Any]:
    if not routes.numel():
        # An empty list makes a floating-point tensor, or such an array.
        return np.empty(tuple(routes.shape))
    if routes.dtype == torch.bool or routes.is_floating_point() or routes.is_complex() or routes.is_quantized:
        raise RouteTypeError(f'"routing[{level!r}]" must hold integer ids (got dtype {routes.dtype})')
    if routes.is_meta:
        raise RouteTypeError(f'"routing[{level!r}]" must hold ids that can be read (got a tensor on meta)')
    array: npt.NDArray[Any] = routes.detach().cpu().numpy()
    return array


def routing_constant(expert_name: str, batch_size: int) -> list[str]:
    """One expert for the whole batch, as a list; a bare ``str`` in a routing says the same without a list."""
    return [expert_name] * batch_size


def validate_routing_length(level_name: str, routes: Sequence[str], batch_size: int) -> None:
    """Check that there is one route a sample.

    Raises:
        RouteLengthError: The numbers differ.
    """
    if len(routes) != batch_size:
        raise RouteLengthError(
            f'"routing[{level_name!r}]" must have one route for each of the {batch_size} samples (got {len(routes)})'
        )


def merge_routing(base: LevelRouting | None, extra: LevelRouting) -> LevelRouting:
    """The levels of both routings, in which ``extra`` overrides ``base``; neither argument is changed."""
    return {**(base or {}), **extra}
