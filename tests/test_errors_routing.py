"""Every refused routing, to the letter: routes, levels, lengths, ids, missing routes, plans, parents and fallbacks."""

from __future__ import annotations

import enum
import re
from collections import deque

import numpy as np
import pytest
import torch

from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    HierarchyLevelConfig,
    RouteIdError,
    RouteLengthError,
    RouteTypeError,
    RoutingCompiler,
    UnknownExpertError,
)
from tests.refusals import (
    GOOD,
    LANGUAGE,
    WIDTH,
    assert_error,
    assert_refused,
    build,
    rows,
    two_levels,
)

KINDS = (
    "must be a name, a mapping to weights or None, or a sequence, NumPy array or tensor of routes or integer ids, "
    "one a sample"
)
KNOWN = "known: 'ru', 'pl', 'fr', 'de'"


class Code(enum.IntEnum):
    """Ids as an enum."""

    RU = 0
    DE = 3


class Name(enum.StrEnum):
    """Names as an enum."""

    RU = "ru"
    FRENCH = "fr"


class OddStr(str):
    """A string that hashes unlike its characters."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        return self is other


# The routes at 'language' -> the error, the builtin, and the message.
ROUTES = {
    "unknown": (
        ["ru", "frr", "de"],
        (UnknownExpertError, KeyError),
        f"{LANGUAGE} must name experts of level 'language' (got 'frr' for 1 of 3 samples; nearest: 'fr')",
    ),
    "unknown, nothing near": (
        ["xyz", "ru", "xyz"],
        (UnknownExpertError, KeyError),
        f"{LANGUAGE} must name experts of level 'language' (got 'xyz' for 2 of 3 samples; {KNOWN})",
    ),
    "several unknown": (
        ["RU", "zz", "RU"],
        (UnknownExpertError, KeyError),
        (
            f"{LANGUAGE} must name experts of level 'language' (got 'RU', 'zz' for 3 of 3 samples; "
            f"nearest to 'RU': 'ru'; {KNOWN})"
        ),
    ),
    "an expert of another level": (
        ["slavic", "ru", "ru"],
        (UnknownExpertError, KeyError),
        f"{LANGUAGE} must name experts of level 'language' (got 'slavic' for 1 of 3 samples; {KNOWN})",
    ),
    "empty name": (
        ["", "ru", "ru"],
        (UnknownExpertError, KeyError),
        f"{LANGUAGE} must name experts of level 'language' (got '' for 1 of 3 samples; {KNOWN})",
    ),
    "unknown, in an array": (
        np.array(["ru", "dee", "de"]),
        (UnknownExpertError, KeyError),
        f"{LANGUAGE} must name experts of level 'language' (got 'dee' for 1 of 3 samples; nearest: 'de')",
    ),
    "unknown, for the whole batch": (
        "dee",
        (UnknownExpertError, KeyError),
        f"{LANGUAGE} must name an expert of level 'language' (got 'dee' for the whole batch; nearest: 'de')",
    ),
    "ids as strings": (
        ["0", "1", "0"],
        (UnknownExpertError, KeyError),
        f"{LANGUAGE} must name experts of level 'language' (got '0', '1' for 3 of 3 samples; {KNOWN})",
    ),
    "too few": (
        ["ru", "de"],
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one route for each of the 3 samples of 'hidden' (got 2)",
    ),
    "too many": (
        ["ru"] * 4,
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one route for each of the 3 samples of 'hidden' (got 4)",
    ),
    "none": (
        [],
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one route for each of the 3 samples of 'hidden' (got 0)",
    ),
    "one, in a list": (
        ("ru",),
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one route for each of the 3 samples of 'hidden' (got 1)",
    ),
    "array too long": (
        np.zeros(5, dtype=np.int64),
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one route for each of the 3 samples of 'hidden' (got 5)",
    ),
    "id out of range": (
        [0, 4, 9],
        (RouteIdError, ValueError),
        f"{LANGUAGE} must hold ids from 0 to 3, positions in the level's experts (got 4, 9 for 2 of 3 samples)",
    ),
    "negative id": (
        [0, -1, -1],
        (RouteIdError, ValueError),
        f"{LANGUAGE} must hold ids from 0 to 3, positions in the level's experts (got -1 for 2 of 3 samples)",
    ),
    "id past int64": (
        [0, 2**70, 1],
        (RouteIdError, ValueError),
        f"{LANGUAGE} must hold ids from 0 to 3, positions in the level's experts (got {2**70} for 1 of 3 samples)",
    ),
    "array id out of range": (
        np.array([0, 200, 1], dtype=np.uint8),
        (RouteIdError, ValueError),
        f"{LANGUAGE} must hold ids from 0 to 3, positions in the level's experts (got 200 for 1 of 3 samples)",
    ),
    "unsigned 64-bit id": (
        np.array([0, 2**64 - 1, 1], dtype=np.uint64),
        (RouteIdError, ValueError),
        f"{LANGUAGE} must hold ids from 0 to 3, positions in the level's experts (got {2**64 - 1} for 1 of 3 samples)",
    ),
    "tensor id negative": (
        torch.tensor([0, -5, 1]),
        (RouteIdError, ValueError),
        f"{LANGUAGE} must hold ids from 0 to 3, positions in the level's experts (got -5 for 1 of 3 samples)",
    ),
    "bool": (
        [True, False, True],
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names, integer ids, mappings to weights or None (got True of type bool)",
    ),
    "bool among ids": (
        [0, True, 1],
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names, integer ids, mappings to weights or None (got True of type bool)",
    ),
    "NumPy bool": (
        [np.True_, 0, 1],
        (RouteTypeError, TypeError),
        (
            f"{LANGUAGE} must hold names, integer ids, mappings to weights or None (got {np.True_!r} of type "
            f"{type(np.True_).__name__})"
        ),
    ),
    "bool array": (
        np.array([True, False, True]),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names or integer ids (got dtype bool)",
    ),
    "bool tensor": (
        torch.tensor([True, False, True]),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold integer ids (got dtype torch.bool)",
    ),
    "float": (
        [0, 1.0, 2],
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names, integer ids, mappings to weights or None (got 1.0 of type float)",
    ),
    "float array": (
        np.zeros(3),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names or integer ids (got dtype float64)",
    ),
    "float tensor": (
        torch.zeros(3),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold integer ids (got dtype torch.float32)",
    ),
    "complex tensor": (
        torch.zeros(3, dtype=torch.complex64),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold integer ids (got dtype torch.complex64)",
    ),
    "names and ids": (
        ["ru", 1, "de"],
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold either names or integer ids (got both)",
    ),
    "object array of both": (
        np.array(["ru", 1, "de"], dtype=object),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold either names or integer ids (got both)",
    ),
    "nested list": (
        [["ru"], ["de"], ["fr"]],
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names, integer ids, mappings to weights or None (got ['ru'] of type list)",
    ),
    "bytes among names": (
        [b"ru", "de", "fr"],
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names, integer ids, mappings to weights or None (got b'ru' of type bytes)",
    ),
    "tensors in a list": (
        [torch.tensor(0), torch.tensor(1), torch.tensor(2)],
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names, integer ids, mappings to weights or None (got tensor(0) of type Tensor)",
    ),
    "masked array": (
        np.ma.array([0, 1, 2], mask=[False, True, False]),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names or integer ids (got a masked array)",
    ),
    "bytes array": (
        np.array([b"ru", b"de", b"fr"]),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names or integer ids (got dtype |S2)",
    ),
    "date array": (
        np.array(["2020-01-01"] * 3, dtype="datetime64[D]"),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must hold names or integer ids (got dtype datetime64[D])",
    ),
    "array of two axes": (
        np.zeros((3, 1), dtype=int),
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one axis, the samples (got shape (3, 1))",
    ),
    "names of two axes": (
        np.array([["ru"], ["de"], ["fr"]]),
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one axis, the samples (got shape (3, 1))",
    ),
    "tensor of two axes": (
        torch.zeros(3, 2, dtype=torch.long),
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one axis, the samples (got shape (3, 2))",
    ),
    "array of no axis": (
        np.array("ru"),
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one axis, the samples (got shape ())",
    ),
    "tensor of no axis": (
        torch.tensor(1),
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one axis, the samples (got shape ())",
    ),
    "a number": (2, (RouteTypeError, TypeError), f"{LANGUAGE} {KINDS} (got int)"),
    "bytes": (b"ru!", (RouteTypeError, TypeError), f"{LANGUAGE} {KINDS} (got bytes)"),
    "set": ({"ru", "de", "fr"}, (RouteTypeError, TypeError), f"{LANGUAGE} {KINDS} (got set)"),
    "mapping to names": (
        {0: "ru", 1: "de", 2: "fr"},
        (RouteTypeError, TypeError),
        f"{LANGUAGE} must map experts to weights from 0 to 2**64, one of them at least 2**-64 (got 'ru' of type str)",
    ),
    "keys": (
        dict.fromkeys(["ru", "de", "fr"]).keys(),
        (RouteTypeError, TypeError),
        f"{LANGUAGE} {KINDS} (got dict_keys)",
    ),
    "iterator": (iter(["ru", "de", "fr"]), (RouteTypeError, TypeError), f"{LANGUAGE} {KINDS} (got list_iterator)"),
    "object": (Ellipsis, (RouteTypeError, TypeError), f"{LANGUAGE} {KINDS} (got ellipsis)"),
}


@pytest.mark.parametrize("case", ROUTES)
def test_routes_that_are_refused(case):
    routes, (kind, builtin), message = ROUTES[case]
    model = build()
    routing = {"family": GOOD["family"], "language": routes}
    assert_refused(model, lambda: model(rows(), routing), kind, builtin, message, rows(), routing)


@pytest.mark.parametrize("case", ROUTES)
def test_a_compiler_refuses_the_same_in_the_same_words(case):
    routes, (kind, builtin), message = ROUTES[case]
    if case == "iterator":
        routes = iter(["ru"])
    with pytest.raises(kind) as caught:
        RoutingCompiler(two_levels())({"family": GOOD["family"], "language": routes}, 3)
    assert_error(caught.value, kind, builtin, message.replace("of 'hidden'", "of 'batch_size'"))


@pytest.mark.parametrize(
    ("routes", "kind", "builtin", "words"),
    [
        (
            ["core", np.array(["core", "core"])],
            RouteTypeError,
            TypeError,
            "mappings to weights or None (got array",
        ),
        (["core", "cor"], UnknownExpertError, KeyError, "must name experts of level 'level' (got 'cor' for 1 of 2"),
        (["core", 0], RouteTypeError, TypeError, "must hold either names or integer ids (got both)"),
        ([0, 1], RouteIdError, ValueError, "must hold ids from 0 to 0"),
    ],
)
def test_routes_of_a_level_with_one_expert_are_read_too(routes, kind, builtin, words):
    level = HierarchyLevelConfig("level", {"core": ExpertConfig("core")})
    with pytest.raises(kind, match=re.escape(words)) as caught:
        RoutingCompiler(CELMoEConfig(WIDTH, [level]))({"level": routes})
    assert isinstance(caught.value, builtin)


def test_a_generator_is_refused_unread():
    model = build()
    routes = (name for name in ["ru", "de", "fr"])
    message = f"{LANGUAGE} {KINDS} (got generator)"
    call = lambda: model(rows(), {**GOOD, "language": routes})  # noqa: E731
    assert_refused(model, call, RouteTypeError, TypeError, message)
    assert next(routes) == "ru"


ACCEPTED = {
    "list": ["ru", "de", "fr"],
    "tuple": ("ru", "de", "fr"),
    "ids": [0, 3, 2],
    "NumPy ids in a list": [np.int8(0), np.int64(3), np.uint16(2)],
    "enum of ids": [Code.RU, Code.DE, 2],
    "enum of names": [Name.RU, "de", Name.FRENCH],
    "strings that hash otherwise": [OddStr("ru"), OddStr("de"), OddStr("fr")],
    "NumPy strings": [np.str_("ru"), np.str_("de"), np.str_("fr")],
    "array of names": np.array(["ru", "de", "fr"]),
    "object array": np.array(["ru", "de", "fr"], dtype=object),
    "object array of ids": np.array([0, 3, 2], dtype=object),
    "array of ids": np.array([0, 3, 2]),
    "array of unsigned ids": np.array([0, 3, 2], dtype=np.uint64),
    "strided array": np.array([0, 9, 3, 9, 2, 9])[::2],
    "read-only array": np.frombuffer(bytes([0, 3, 2]), dtype=np.uint8),
    "tensor": torch.tensor([0, 3, 2]),
    "small tensor": torch.tensor([0, 3, 2], dtype=torch.int8),
    "tensor that needs no gradient": torch.tensor([[0, 3, 2]])[0].detach(),
    "range of ids": range(3),
    "deque": deque(["ru", "de", "fr"]),
    "values of a dict": {0: "ru", 1: "de", 2: "fr"}.values(),
    "one name": "fr",
    "one name of an enum": Name.FRENCH,
}
if hasattr(np.dtypes, "StringDType"):
    ACCEPTED["NumPy's own strings"] = np.array(["ru", "de", "fr"], dtype=np.dtypes.StringDType())


@pytest.mark.parametrize("form", ACCEPTED)
def test_routes_that_are_accepted(form):
    routes = ACCEPTED[form]
    expected = ["ru", "de", "fr"]
    if isinstance(routes, str):
        expected = ["fr"] * 3
    if isinstance(routes, range):
        expected = ["ru", "pl", "fr"]
    plan = build().compile_routing({"family": "slavic", "language": routes}, 3)
    assert plan.routes("language") == expected
    assert all(type(name) is str for name in plan.routes("language"))


def test_one_string_with_a_hash_of_its_own_for_the_whole_batch():
    plan = build().compile_routing({"family": "slavic", "language": OddStr("fr")}, 2)
    assert plan.routes("language") == ["fr", "fr"]
