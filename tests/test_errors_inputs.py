"""Every refused hidden, mask and context, to the letter, and the accepted ones beside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from celmoe import InputError, InputTypeError, LearnedFusion, MeanFusion, PositionAwareFusion, Shared
from tests.refusals import GOOD, WIDTH, assert_error, assert_refused, build, rows, two_levels

META = torch.device("meta")

# Hidden -> the error, the builtin, and the message.
HIDDEN = {
    "None": (None, (InputTypeError, TypeError), "'hidden' must be a tensor (got NoneType)"),
    "list": ([[0.0] * WIDTH] * 3, (InputTypeError, TypeError), "'hidden' must be a tensor (got list)"),
    "array": (np.zeros((3, WIDTH)), (InputTypeError, TypeError), "'hidden' must be a tensor (got ndarray)"),
    "no axis": (
        torch.tensor(1.0),
        (InputError, ValueError),
        "'hidden' must have the samples for its first axis (got a tensor of no axes)",
    ),
    "another device": (
        torch.zeros(3, WIDTH, device="meta"),
        (InputError, ValueError),
        "'hidden' must be on cpu, where the model is (got meta)",
    ),
    "one axis": (
        torch.zeros(3),
        (InputError, ValueError),
        "'hidden' must be [B, ..., 4], as wide as the fusion (got shape (3,))",
    ),
    "too narrow": (
        torch.zeros(3, 3),
        (InputError, ValueError),
        "'hidden' must be [B, ..., 4], as wide as the fusion (got shape (3, 3))",
    ),
    "too wide, with positions": (
        torch.zeros(3, 2, 5),
        (InputError, ValueError),
        "'hidden' must be [B, ..., 4], as wide as the fusion (got shape (3, 2, 5))",
    ),
    "axes swapped": (
        torch.zeros(3, WIDTH, 2),
        (InputError, ValueError),
        "'hidden' must be [B, ..., 4], as wide as the fusion (got shape (3, 4, 2))",
    ),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_that_is_refused(case):
    hidden, (kind, builtin), message = HIDDEN[case]
    model = build()
    assert_refused(model, lambda: model(hidden, GOOD), kind, builtin, message, GOOD)


def test_position_aware_fusion_refuses_a_fourth_axis():
    model = build(two_levels(fusion_type="position_aware"))
    message = "'hidden' must be [B, D] or [B, S, D] for the position-aware fusion (got shape (3, 2, 2, 4))"
    assert_refused(model, lambda: model(rows(3, 2, 2), GOOD), InputError, ValueError, message)
    assert model(rows(3, 2), GOOD).fused_hidden.shape == (3, 2, WIDTH)
    fourth = build()(rows(3, 2, 2), GOOD)
    assert fourth.fused_hidden.shape == (3, 2, 2, WIDTH)


class Last(nn.Module):
    """A fusion of the user's own, which takes any width."""

    def forward(self, hiddens):
        return hiddens[-1]


def test_the_width_is_checked_against_the_fusion_that_is_there():
    def model(fusion):
        config = two_levels()
        config.hidden_size = 99
        return build(config, fusion_module=fusion)

    for fusion in (
        Last(),
        MeanFusion(),
        LearnedFusion(WIDTH, 2, 0.0),
        PositionAwareFusion(WIDTH, 2),
        lambda all_: all_[0],
    ):
        assert model(fusion)(rows(), GOOD).fused_hidden.shape == (3, WIDTH)


def test_a_subclass_of_a_built_in_fusion_may_take_what_it_likes():
    class Narrowed(LearnedFusion):
        def forward(self, hiddens):
            return super().forward([hidden[..., :2] for hidden in hiddens])

    assert build(fusion_module=Narrowed(2, 2, 0.0))(rows(), GOOD).fused_hidden.shape == (3, 2)


# Mask -> the error, the builtin, and the message.
MASKS = {
    "list": ([True] * 3, (InputTypeError, TypeError), "'mask' must be a tensor (got list)"),
    "array": (np.ones(3), (InputTypeError, TypeError), "'mask' must be a tensor (got ndarray)"),
    "bool": (True, (InputTypeError, TypeError), "'mask' must be a tensor (got bool)"),
    "no axis": (
        torch.tensor(True),
        (InputError, ValueError),
        "'mask' must have one row for each of the 3 samples (got shape ())",
    ),
    "too short": (
        torch.ones(2, 5),
        (InputError, ValueError),
        "'mask' must have one row for each of the 3 samples (got shape (2, 5))",
    ),
    "too long": (
        torch.ones(4),
        (InputError, ValueError),
        "'mask' must have one row for each of the 3 samples (got shape (4,))",
    ),
    "positions first": (
        torch.ones(5, 3),
        (InputError, ValueError),
        "'mask' must have one row for each of the 3 samples (got shape (5, 3))",
    ),
    "another device": (
        torch.ones(3, device=META),
        (InputError, ValueError),
        "'mask' must be on cpu, where 'hidden' is (got meta)",
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_that_are_refused(case):
    mask, (kind, builtin), message = MASKS[case]
    model = build()
    assert_refused(model, lambda: model(rows(), GOOD, None, mask), kind, builtin, message, mask)


def cure(where):
    return (
        f"{where} must be on cpu, where 'hidden' is, for its rows are the samples' (got meta; celmoe.Shared keeps a "
        "tensor whole)"
    )


ELSEWHERE = torch.zeros(3, 2, device=META)
CONTEXTS = {
    "bare": (ELSEWHERE, cure("'context'")),
    "in a mapping": ({"x": torch.zeros(3), "lengths": ELSEWHERE}, cure("\"context['lengths']\"")),
    "in a list": ([torch.zeros(3), [ELSEWHERE]], cure("'context[1][0]'")),
    "deep": ({"a": ({"b": [0, ELSEWHERE]},)}, cure("\"context['a'][0]['b'][1]\"")),
    "by an odd key": ({7: ELSEWHERE}, cure("'context[7]'")),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_context_on_another_device(case):
    context, message = CONTEXTS[case]
    model = build()
    assert_refused(model, lambda: model(rows(), GOOD, context), InputError, ValueError, message, context)


def test_what_is_no_batch_of_rows_may_lie_on_any_device():
    model = build()
    for context in (
        Shared(ELSEWHERE),
        {"x": Shared(ELSEWHERE)},
        [torch.zeros(4, device=META), torch.zeros((), device=META)],
    ):
        model(rows(), GOOD, context)


def test_the_order_of_checks_names_the_first_fault():
    model = build()
    with pytest.raises(InputTypeError, match="'hidden'"):
        model(None, {"nonsense": 1}, ELSEWHERE, "mask")
    with pytest.raises(InputError, match="'mask'"):
        model(rows(), {"nonsense": 1}, ELSEWHERE, torch.ones(1))


@pytest.mark.parametrize(
    ("fusion", "counts"), [(LearnedFusion(WIDTH, 2, 0.0), (0, 3)), (PositionAwareFusion(WIDTH, 2), (0, 1, 3))]
)
def test_fusions_refuse_another_number_of_levels(fusion, counts):
    for count in counts:
        with pytest.raises(InputError) as caught:
            fusion([rows()] * count)
        message = f"'level_hiddens' must hold one tensor for each of the 2 levels (got {count})"
        assert_error(caught.value, InputError, ValueError, message)


def test_the_mean_of_no_levels():
    with pytest.raises(InputError) as caught:
        MeanFusion()([])
    assert_error(caught.value, InputError, ValueError, "'level_hiddens' must hold one tensor a level (got none)")


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((WIDTH,), "[B, ..., 4], as wide as the fusion"),
        ((), "[B, ..., 4], as wide as the fusion"),
        ((3, 5), "[B, ..., 4], as wide as the fusion"),
        ((3, 2, 2, WIDTH), "[B, D] or [B, S, D] for the position-aware fusion"),
    ],
)
def test_position_aware_fusion_by_itself(shape, rule):
    with pytest.raises(InputError) as caught:
        PositionAwareFusion(WIDTH, 1)([torch.zeros(shape)])
    assert_error(caught.value, InputError, ValueError, f"'hidden' must be {rule} (got shape {shape})")


def test_an_empty_batch_is_legal():
    for fusion_type in ("learned", "position_aware"):
        model = build(two_levels(fusion_type=fusion_type))
        for hidden in (rows(0), rows(0, 2)):
            output = model(hidden, {"family": [], "language": np.array([], dtype=np.int64)}, mask=torch.ones(0))
            assert output.fused_hidden.shape == hidden.shape
            assert output.levels["language"].routes == []
            assert output.losses == {}
    with pytest.raises(KeyError):
        build()(rows(0), None)


def test_a_model_on_the_meta_device_tells_shapes():
    model = build().to("meta")
    assert model(rows().to("meta"), GOOD, mask=torch.ones(3, device="meta")).fused_hidden.shape == (3, WIDTH)
