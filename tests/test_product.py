"""The products by segment, whoever computes them, against a plain loop over the segments in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import celmoe.grouped.kernels.members
import celmoe.grouped.kernels.product
from celmoe.grouped.kernels.members import linear_of_members
from celmoe.grouped.kernels.product import backend_for, linear, outer, segment_sum, spread
from celmoe.grouped.segments import MOST_PLACES_A_ROW, Segments
from tests.strategies import examples

# Relative to the largest value. In bfloat16 a result is rounded once as a product and once more with its bias.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}
COUNTS = {
    "uniform": (4, 4, 4, 4),
    "alike": (6, 7, 7, 8, 2, 2, 2),
    "skewed": (1, 40, 2, 9, 1),
    "one row each": (1, 1, 1),
    "one member": (5,),
}
# Multiples of 16 bytes in every dtype, and not.
EVEN, ODD = (8, 16), (5, 3)
CPU = torch.device("cpu")


class Who(NamedTuple):
    """The backend, the dtype, and the widths of inputs and outputs."""

    backend: str
    dtype: torch.dtype
    widths: tuple[int, int] = EVEN

    def __repr__(self) -> str:
        return f"{self.backend}, {str(self.dtype).removeprefix('torch.')}, {self.widths[0]} to {self.widths[1]}"


def everyone() -> Iterator[Who]:
    for dtype in TOLERANCES:
        for widths in (EVEN, ODD):
            yield Who("runs", dtype, widths)
            yield Who("padded", dtype, widths)
            yield Who("even", dtype, widths)
    # PyTorch's own takes neither float64 nor odd widths, and came late.
    if hasattr(F, "grouped_mm"):
        yield Who("grouped_mm", torch.float32)
        yield Who("grouped_mm", torch.bfloat16)


@pytest.fixture(params=everyone(), ids=repr)
def who(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Who:
    name = request.param.backend
    monkeypatch.setattr(celmoe.grouped.kernels.product, "backend_of", lambda *_: name)
    monkeypatch.setattr(celmoe.grouped.kernels.members, "backend_of", lambda *_: name)
    return request.param


class Drawn:
    """Leaves in a dtype, and the same values as leaves in float64."""

    def __init__(self, who: Who, counts: Sequence[int], factor: int = 1, *, has_bias: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(who.dtype).requires_grad_()

        width, num_out = who.widths
        self.counts, self.factor = tuple(counts), factor
        self.segments = Segments(counts, CPU)
        self.x = draw(sum(counts) * factor, width)
        self.weights = [draw(num_out, width) for _ in counts]
        self.biases = [draw(num_out) for _ in counts] if has_bias else []
        self.y = draw(sum(counts) * factor, num_out)

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.x, *self.weights, *self.biases]

    def wide(self) -> Drawn:
        twin = object.__new__(Drawn)
        twin.__dict__.update(self.__dict__)
        twin.x, twin.y = widened(self.x), widened(self.y)
        twin.weights, twin.biases = list(map(widened, self.weights)), list(map(widened, self.biases))
        return twin

    def cut(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        return rows.split([count * self.factor for count in self.counts])


def widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().requires_grad_()


def stacked(drawn: Drawn) -> torch.Tensor:
    bias = torch.stack(drawn.biases) if drawn.biases else None
    return linear(drawn.x, torch.stack(drawn.weights), bias, drawn.segments, drawn.factor)


def transposed(drawn: Drawn) -> torch.Tensor:
    weights = torch.stack([weight.T.contiguous() for weight in drawn.weights])
    bias = torch.stack(drawn.biases) if drawn.biases else None
    return linear(drawn.x, weights, bias, drawn.segments, drawn.factor, is_transposed=True)


def of_members(drawn: Drawn) -> torch.Tensor:
    return linear_of_members(drawn.x, drawn.weights, drawn.biases, drawn.segments, drawn.factor)


def looped(drawn: Drawn) -> torch.Tensor:
    biases = drawn.biases or [None] * len(drawn.weights)
    return torch.cat([F.linear(*each) for each in zip(drawn.cut(drawn.x), drawn.weights, biases, strict=True)])


LINEARS = {"stacked": stacked, "transposed": transposed, "of members": of_members}


def assert_close(who: Who, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == who.dtype
        assert mine.shape == theirs.shape
        difference = (mine.double() - theirs).abs().max().item()
        assert difference <= TOLERANCES[who.dtype] * theirs.abs().max().item()


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("how", LINEARS)
def test_a_linear_layer(who: Who, how: str, counts: tuple[int, ...], factor: int):
    """Rows, and the gradients of rows, of each weight and of each bias."""
    for has_bias in (True, False):
        drawn = Drawn(who, counts, factor, has_bias=has_bias)
        wide = drawn.wide()
        found, expected = LINEARS[how](drawn), looped(wide)
        assert found.is_contiguous()
        assert_close(who, [found.detach()], [expected.detach()])
        mine = torch.autograd.grad(found, drawn.leaves, drawn.y.detach())
        assert_close(who, mine, torch.autograd.grad(expected, wide.leaves, wide.y.detach()))


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_sums_by_segment(who: Who, counts: tuple[int, ...], factor: int):
    """The sums that gradients are, and the gradients of those."""
    drawn = Drawn(who, counts, factor)
    wide = drawn.wide()
    member = drawn.segments.member_of_row(factor)
    per_member = torch.stack(wide.biases)
    found = [
        outer(drawn.y, drawn.x, drawn.segments, factor),
        segment_sum(drawn.x, drawn.segments, factor),
        spread(torch.stack(drawn.biases), drawn.segments, factor),
    ]
    expected = [
        torch.stack([y.T @ x for y, x in zip(wide.cut(wide.y), wide.cut(wide.x), strict=True)]),
        torch.stack([x.sum(0) for x in wide.cut(wide.x)]),
        per_member[member],
    ]
    assert_close(who, [each.detach() for each in found], [each.detach() for each in expected])
    grads = []
    for each, values in ((drawn, found), (wide, expected)):
        leaves = [each.x, each.y, *each.biases]
        weights = [torch.linspace(-1, 1, value.numel()).view(value.shape).to(value.dtype) for value in values]
        grads.append(torch.autograd.grad(values, leaves, weights))
    assert_close(who, *grads)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_sums_of_any_shape(who: Who, shape: tuple[int, ...]):
    """Everything behind the row axis is summed alike."""
    if who.backend == "grouped_mm":
        shape = (*shape, 8)
    segments = Segments(COUNTS["skewed"], CPU)
    rows = torch.randn(segments.num_rows, *shape, dtype=torch.float64).to(who.dtype)
    found = segment_sum(rows, segments, 1)
    expected = torch.stack([each.double().sum(0) for each in rows.split(COUNTS["skewed"])])
    assert_close(who, [found], [expected])
    torch.testing.assert_close(spread(found, segments, 1), found[segments.member_of_row()], rtol=0, atol=0)


# Layouts of autograd's gradients: a sum's gradient is one number expanded, a product's may be turned or cut out.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expanded": lambda rows: rows[:1, :1].expand_as(rows),
    "one row expanded": lambda rows: rows[:1].expand_as(rows),
    "turned": lambda rows: rows.T.contiguous().T,
    "cut out": lambda rows: torch.cat([rows, rows], 1)[:, : rows.shape[1]],
    "every other": lambda rows: rows.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", LINEARS)
def test_rows_and_gradients_laid_out_otherwise(who: Who, how: str, layout: str):
    drawn = Drawn(who, COUNTS["skewed"], 3)
    laid_out = LAYOUTS[layout]
    wide = drawn.wide()
    inputs = []
    for each in (drawn, wide):
        leaf, each.x = each.x, laid_out(each.x)
        inputs.append([leaf, *each.weights, *each.biases])
    found, expected = LINEARS[how](drawn), looped(wide)
    mine = torch.autograd.grad(found, inputs[0], laid_out(drawn.y.detach()))
    theirs = torch.autograd.grad(expected, inputs[1], laid_out(wide.y.detach()))
    # The gradient of an expanded input is a sum of PyTorch's own, in the dtype at hand.
    first = 1 if "expanded" in layout else 0
    assert_close(who, mine[first:], theirs[first:])


@pytest.mark.parametrize("how", LINEARS)
def test_second_derivatives(who: Who, how: str):
    """The gradient of a function of all gradients."""
    if who.dtype == torch.bfloat16:
        # Roundings of roundings; that it can be done is all there is to see.
        drawn = Drawn(who, COUNTS["skewed"])
        grads = torch.autograd.grad(LINEARS[how](drawn), drawn.leaves, drawn.y, create_graph=True)
        again = torch.autograd.grad(sum(each.sum() for each in grads), [*drawn.leaves[:-1], drawn.y], allow_unused=True)
        assert all(each is None or each.isfinite().all() for each in again)
        return
    found = []
    drawn = Drawn(who, COUNTS["skewed"], 3)
    for each, run in ((drawn, LINEARS[how]), (drawn.wide(), looped)):
        output = run(each)
        grads = torch.autograd.grad(output, each.leaves, each.y, create_graph=True)
        total = sum((grad * torch.linspace(-1, 1, grad.numel()).to(grad).view(grad.shape)).sum() for grad in grads)
        found.append(torch.autograd.grad(total + output.sum(), [*each.leaves, each.y]))
    assert_close(who, *found)


@pytest.mark.parametrize("backend", ["runs", "padded", "even"])
@pytest.mark.parametrize("how", LINEARS)
def test_derivatives_numerically(backend: str, how: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(celmoe.grouped.kernels.product, "backend_of", lambda *_: backend)
    monkeypatch.setattr(celmoe.grouped.kernels.members, "backend_of", lambda *_: backend)
    drawn = Drawn(Who(backend, torch.float64, (3, 2)), (2, 1, 1))

    def run(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        drawn.x, drawn.weights, drawn.biases = x, list(tensors[:3]), list(tensors[3:])
        return LINEARS[how](drawn)

    assert torch.autograd.gradcheck(run, tuple(drawn.leaves))
    assert torch.autograd.gradgradcheck(run, tuple(drawn.leaves))


@pytest.mark.parametrize("how", LINEARS)
def test_batches_of_gradients(who: Who, how: str):
    """All directions at once are each direction alone."""
    drawn = Drawn(who, COUNTS["uniform"])
    output = LINEARS[how](drawn)
    directions = torch.stack([drawn.y.detach(), drawn.y.detach() * 2, drawn.y.detach().flip(0)])
    batched = torch.autograd.grad(output, drawn.leaves, directions, is_grads_batched=True, retain_graph=True)
    for number, direction in enumerate(directions):
        alone = torch.autograd.grad(output, drawn.leaves, direction, retain_graph=True)
        assert_close(who, [each[number] for each in batched], [each.double() for each in alone])


@pytest.mark.parametrize("how", LINEARS)
@pytest.mark.parametrize("asked", ["rows", "one weight", "one bias", "weights"])
def test_some_gradients_alone(who: Who, how: str, asked: str):
    """The others are frozen: nothing is computed for them, and nothing goes wrong without them."""
    drawn = Drawn(who, COUNTS["alike"])
    wide = drawn.wide()
    found = []
    for each, run in ((drawn, LINEARS[how]), (wide, looped)):
        wanted = {
            "rows": [each.x],
            "one weight": [each.weights[2]],
            "one bias": [each.biases[1]],
            "weights": each.weights,
        }[asked]
        for leaf in each.leaves:
            leaf.requires_grad_(any(leaf is one for one in wanted))
        run(each).backward(each.y.detach())
        assert all((leaf.grad is not None) == leaf.requires_grad for leaf in each.leaves)
        found.append([leaf.grad for leaf in wanted])
    assert_close(who, *found)


@pytest.mark.parametrize("bytes_at_a_time", [0, 3 * 16 * 8 * 4, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_members_are_stacked_some_at_a_time(dtype: torch.dtype, bytes_at_a_time: int, monkeypatch: pytest.MonkeyPatch):
    """One by one, a few (with some left over), and all."""
    monkeypatch.setattr(celmoe.grouped.kernels.members, "_BYTES_AT_A_TIME", bytes_at_a_time)
    who = Who("runs", dtype)
    for counts in ((2,) * 7, COUNTS["alike"]):
        drawn = Drawn(who, counts, 3)
        wide = drawn.wide()
        found, expected = of_members(drawn), looped(wide)
        assert_close(who, [found.detach()], [expected.detach()])
        mine = torch.autograd.grad(found, drawn.leaves, drawn.y.detach())
        assert_close(who, mine, torch.autograd.grad(expected, wide.leaves, wide.y.detach()))


def test_what_is_not_finite_stays_where_it_is(who: Who):
    """A member's own rows and weights are all that its rows and gradients see; its neighbours in a bucket are not."""
    counts = COUNTS["alike"]
    for place, value in ((1, float("inf")), (4, float("nan"))):
        drawn, clean = Drawn(who, counts), Drawn(who, counts)
        with torch.no_grad():
            drawn.weights[place].fill_(value)
            drawn.biases[place].fill_(value)
            drawn.cut(drawn.x)[place].fill_(value)
        found = []
        for each in (drawn, clean):
            output = stacked(each)
            grad_x, *grads = torch.autograd.grad(output, each.leaves, each.y.detach())
            found.append([*each.cut(output.detach()), *each.cut(grad_x), *grads])
        for number, (mine, theirs) in enumerate(zip(*found, strict=True)):
            if number % len(counts) != place:
                assert torch.equal(mine, theirs)


def test_what_is_computed_in_vain_is_dropped(monkeypatch: pytest.MonkeyPatch):
    """Places without a row hold large values, but only rows' results are asked for."""
    monkeypatch.setattr(celmoe.grouped.kernels.product, "backend_of", lambda *_: "padded")
    who = Who("padded", torch.float64)
    drawn = Drawn(who, COUNTS["alike"], 3)
    wide = drawn.wide()
    assert drawn.segments.num_places > drawn.segments.num_rows
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda self, *shape: self.new_full(shape, float("nan")))
    found = stacked(drawn)
    assert_close(who, [found.detach()], [looped(wide).detach()])
    (grad,) = torch.autograd.grad(found, [drawn.x], drawn.y.detach())
    assert_close(who, [grad], torch.autograd.grad(looped(wide), [wide.x], wide.y.detach()))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 3))
@examples(100)
def test_padding_is_bounded(counts: list[int], factor: int):
    """At most a quarter more places than rows; each row has one, in its member's block, and none has two."""
    segments = Segments(counts, CPU)
    num_rows, num_places = sum(counts) * factor, segments.num_places * factor
    assert num_rows <= num_places <= MOST_PLACES_A_ROW * num_rows
    index, places = segments.padded(factor)
    assert index.shape == (num_places,)
    assert torch.equal(index[places], torch.arange(num_rows))
    assert int((index == num_rows).sum()) == num_places - num_rows
    # Buckets take the members one after another, and give each as many places as the largest of them needs.
    expected: list[int] = []
    member = 0
    for bucket in segments.buckets:
        own = counts[member : member + bucket.members]
        assert (bucket.member, bucket.most) == (member, max(own))
        for number, count in enumerate(own):
            first = (bucket.place + number * bucket.most) * factor
            expected += range(first, first + count * factor)
        member += bucket.members
    assert member == len(counts)
    assert places.tolist() == expected


def test_segments():
    segments = Segments((2, 2, 1, 3), CPU)
    assert segments.num_rows == 8
    assert [tuple(run) for run in segments.runs] == [(0, 0, 2, 2), (4, 2, 1, 1), (5, 3, 3, 1)]
    assert segments.member_of_row().tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    assert segments.member_of_row(2).tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 6
    assert segments.ends().tolist() == [2, 4, 5, 8]
    assert segments.ends(3).tolist() == [6, 12, 15, 24]
    assert segments.ends().dtype == torch.int32


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "expected"),
    [
        ("cpu", torch.float32, (8, 16), "runs"),
        ("cpu", torch.bfloat16, (8, 16), "runs"),
        ("cuda", torch.bfloat16, (8, 16), "grouped_mm"),
        ("cuda", torch.float16, (64,), "grouped_mm"),
        ("cuda", torch.bfloat16, (8, 12), "padded"),
        ("cuda", torch.bfloat16, (3, 16), "padded"),
        ("cuda", torch.float32, (8, 16), "padded"),
        ("cuda", torch.float64, (8, 16), "padded"),
        ("mps", torch.bfloat16, (8, 16), "padded"),
        ("privateuseone", torch.float32, (8, 16), "padded"),
    ],
)
def test_who_computes(device: str, dtype: torch.dtype, widths: tuple[int, ...], expected: str):
    if not hasattr(F, "grouped_mm"):
        expected = expected.replace("grouped_mm", "padded")
    assert backend_for(device, dtype, widths) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((1, 0, 3, 2), "even"), ((0, 0, 1, 0), "even"), ((1, 1, 1, 2000), "grouped_mm"), ((4, 4, 4, 4), "runs")],
)
def test_who_computes_for_a_stack(counts: tuple[int, ...], expected: str):
    """Places for all members if that wastes little; no places if none would be empty."""
    if not hasattr(F, "grouped_mm"):
        expected = expected.replace("grouped_mm", "runs")
    rows, weights = torch.zeros(sum(counts), 64), torch.zeros(len(counts), 64, 64)
    segments = Segments(counts, CPU, is_stacked=True)
    assert celmoe.grouped.kernels.product.backend_of(segments, rows, weights) == expected
    assert celmoe.grouped.kernels.product.backend_of(Segments(counts, CPU), rows, weights) == "runs"


@pytest.mark.parametrize("widths", [EVEN, (5, 8), (8, 5), ODD])
@pytest.mark.parametrize("how", LINEARS)
def test_a_gpus_choice_can_do_what_it_is_chosen_for(how: str, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """The test runs a GPU's rule on the CPU: PyTorch's grouped product makes the same demands on strides there."""
    chosen = []

    def as_on_a_gpu(_: str, *rest: Any) -> str:
        chosen.append(backend_for("cuda", *rest))
        return chosen[-1]

    monkeypatch.setattr(celmoe.grouped.kernels.product, "backend_for", as_on_a_gpu)
    who = Who("", torch.bfloat16, widths)
    drawn = Drawn(who, COUNTS["alike"])
    wide = drawn.wide()
    found, expected = LINEARS[how](drawn), looped(wide)
    assert found.is_contiguous()
    assert_close(who, [found.detach()], [expected.detach()])
    mine = torch.autograd.grad(found, drawn.leaves, drawn.y.detach())
    assert_close(who, mine, torch.autograd.grad(expected, wide.leaves, wide.y.detach()))
    if widths == EVEN and hasattr(F, "grouped_mm"):
        assert set(chosen) == {"grouped_mm"}


# Members of a stack that are absent have no rows.
SPARSE = [0, 3, 0, 0, 5, 300, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["runs", "even", "padded", "grouped_mm", None])
@pytest.mark.parametrize("factor", [1, 2])
def test_absent_members_of_a_stack_get_zeros(backend, dtype, factor, monkeypatch):
    if backend == "grouped_mm" and dtype == torch.float64:
        pytest.skip("the grouped product takes no float64")
    if backend is not None:
        monkeypatch.setattr(celmoe.grouped.kernels.product, "backend_of", lambda *_: backend)
    segments = Segments(SPARSE, CPU, is_stacked=True)
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(SPARSE) * factor
    given = torch.randn(num_rows, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(SPARSE), 24, 16, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(len(SPARSE), 24, generator=generator).to(dtype).requires_grad_()
    out = celmoe.grouped.kernels.product.linear(given, weight, bias, segments, factor)
    wide = [each.detach().double().requires_grad_() for each in (given, weight, bias)]
    parts = wide[0].split([count * factor for count in SPARSE])
    expected = torch.cat([part @ wide[1][place].T + wide[2][place] for place, part in enumerate(parts)])
    upstream = torch.randn(out.shape, generator=generator).to(dtype)
    found = torch.autograd.grad(out, [given, weight, bias], upstream)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.02}[dtype]
    for mine, theirs in zip([out, *found], [expected, *wanted], strict=True):
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()
    for grad in found[1:]:
        assert not any(grad[place].any() for place, count in enumerate(SPARSE) if not count)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 3), st.integers(1, 9))
@examples(100)
def test_rows_lie_in_blocks_of_one_member(counts: list[int], factor: int, most: int):
    segments = Segments(counts, CPU, is_stacked=True)
    block_of_row, member_of_block = segments.blocks(factor, most)
    assert torch.equal(member_of_block[block_of_row], segments.member_of_row(factor))
    sizes = block_of_row.bincount(minlength=len(member_of_block))
    assert not len(sizes) or (int(sizes.min()) >= 1 and int(sizes.max()) <= most)


def test_long_sums_are_as_precise_as_pytorchs_own():
    counts = [5000, 1, 20000, 7]
    rows = torch.rand(sum(counts), 8, generator=torch.Generator().manual_seed(0))
    found = celmoe.grouped.kernels.product.added(rows, Segments(counts, CPU, is_stacked=True), 1)
    exact = torch.stack([part.double().sum(0) for part in rows.split(counts)])
    own = torch.stack([part.sum(0) for part in rows.split(counts)])
    assert found is not None
    assert (found - exact).abs().max() <= 4 * (own - exact).abs().max() + 1e-6 * exact.max()
