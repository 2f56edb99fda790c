"""Encode a user's routes, in any form, as integer codes; and celmoe-vp's three routing helpers.

A code is an expert's rank among its level's sorted names: the order in which experts run. This file handles one level
at a time and sorts no samples; `plan` does both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from celmoe.errors import RouteIdError, RouteLengthError, RouteTypeError, UnknownExpertError, listed, nearest

CodeArray: TypeAlias = npt.NDArray[np.unsignedinteger[Any] | np.signedinteger[Any]]
# One code a sample: bytes if codes were looked up and fit into a byte, else an array.
Codes: TypeAlias = bytearray | CodeArray
LevelRoutes: TypeAlias = str | Sequence[str] | Sequence[int] | npt.NDArray[Any] | torch.Tensor
# celmoe-vp's alias, with which its callers annotate a routing.
LevelRouting: TypeAlias = dict[str, list[str]]
Routing: TypeAlias = Mapping[str, LevelRoutes]

_BYTE = 256


def code_array(codes: Codes) -> CodeArray:
    """Codes as an array, without a copy."""
    return np.frombuffer(codes, dtype=np.uint8) if isinstance(codes, bytearray) else codes


class RouteTable:
    """The names of one level's experts, and the codes and ids that stand for them.

    Attributes:
        level: The level's name.
        experts: The experts' names in the config's order; an id is a position here.
        sorted_experts: The names in sorted order; a code is a position here.
        dtype: The dtype of arrays of codes: the smallest unsigned one that holds all codes.
        code_by_name: The code for each name.
        ids: The id for each code, as a list.
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

    def encode(self, routes: LevelRoutes) -> Codes:
        """The code of each sample, ``[B]``.

        Raises:
            RouteTypeError: The routes are neither names nor integer ids.
            UnknownExpertError: A name is no expert of this level.
            RouteIdError: An id is no position in the level's experts.
            RouteLengthError: An array has no axis, or several.
        """
        if not isinstance(routes, list):
            if isinstance(routes, torch.Tensor):
                return self._encode_array(_host_array(routes, self.level))
            if isinstance(routes, np.ndarray):
                return self._encode_array(routes)
            routes = self._as_list(routes)
        try:
            return self._look_up(routes)
        except (KeyError, TypeError):
            return self._encode_unusual(routes)

    def code(self, name: str) -> int:
        """The code of one expert.

        Raises:
            UnknownExpertError: This level does not have the expert.
        """
        try:
            # str.__str__ undoes subclasses that hash in their own way.
            return self.code_by_name[str.__str__(name)]
        except KeyError:
            raise UnknownExpertError(
                f"{self._where} must name an expert of level {self.level!r} (got {name!r} for the whole batch; "
                f"{nearest(name, self.experts)})"
            ) from None

    def _look_up(self, names: list[Any]) -> Codes:
        if len(self.experts) == 1 and self._names.issuperset(names):
            return bytearray(len(names))
        codes = map(self.code_by_name.__getitem__, names)
        # bytearray takes small integers from an iterator in half the time of np.fromiter.
        return bytearray(codes) if len(self.experts) <= _BYTE else np.fromiter(codes, self.dtype, count=len(names))

    def _encode_unusual(self, routes: Sequence[Any]) -> Codes:
        """Encode ids, or names of a str subclass with a hash of its own; raise a precise error for all else."""
        kinds = set(map(type, routes))
        wrong = {kind for kind in kinds if kind is bool or not issubclass(kind, str | int | np.integer)}
        if wrong:
            example = next(route for route in routes if type(route) in wrong)
            raise RouteTypeError(
                f"{self._where} must hold names or integer ids (got {example!r} of type {type(example).__name__})"
            )
        if not any(issubclass(kind, str) for kind in kinds):
            return self._encode_ids(np.array(routes, dtype=object))
        if not all(issubclass(kind, str) for kind in kinds):
            raise RouteTypeError(f"{self._where} must hold either names or integer ids (got both)")
        names = [str.__str__(name) for name in routes]
        if unknown := Counter(name for name in names if name not in self.code_by_name):
            raise self._unknown(unknown, len(names))
        return self._look_up(names)

    def _encode_array(self, routes: npt.NDArray[Any]) -> Codes:
        if np.ma.is_masked(routes):
            raise RouteTypeError(f"{self._where} must hold names or integer ids (got a masked array)")
        if routes.ndim != 1:
            raise RouteLengthError(f"{self._where} must have one axis, the samples (got shape {routes.shape})")
        if routes.size == 0:
            return np.empty(0, dtype=self.dtype)
        if routes.dtype.kind in "UOT":
            return self.encode(routes.tolist())
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
        if isinstance(routes, bytes | bytearray | Mapping | AbstractSet) or not (
            isinstance(routes, Sized) and isinstance(routes, Iterable)
        ):
            raise RouteTypeError(
                f"{self._where} must be a name, or a sequence, NumPy array or tensor of names or integer ids, one a "
                f"sample (got {type(routes).__name__})"
            )
        return list(routes)

    def _unknown(self, unknown: Counter[str], num_samples: int) -> UnknownExpertError:
        names = sorted(unknown)
        return UnknownExpertError(
            f"{self._where} must name experts of level {self.level!r} (got {listed(names)} for {unknown.total()} of "
            f"{num_samples} samples; {nearest(names, self.experts)})"
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
