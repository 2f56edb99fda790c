"""torch's own features through the grouped engine: autocast, second derivatives, checkpoints, copies, threads, DDP.

``"auto"`` stands beside ``"grouped"`` in tests whose experts can't always be grouped: the loop has to step in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from celmoe import ExpertResult, HierarchicalCELMoE, stack_experts
from tests.features import needs_selective_checkpoints
from tests.grouped_features import (
    MAKERS,
    WITH_DERIVATIVES,
    _auto_groups_few_experts,  # noqa: F401  # an autouse fixture
    assert_close,
    grads_of,
)
from tests.traps import (
    GROUPED,
    LEVEL,
    WIDTH,
    Batch,
    Plain,
    assert_like_oracle,
    build,
    engines_of,
    oracle_of,
    seed_all,
)


@pytest.mark.parametrize("trailing", [(), (3,)])
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "gru"])
def test_autocast(name: str, trailing: tuple[int, ...]):
    """Products in bfloat16 and torch's float32 operations match the loop's; gradients are in the weights' dtype.

    A recurrent layer rounds at every step: `tests.test_grouped_reach` compares both ways with float64.
    """
    subject, twin = build(MAKERS[name]), build(MAKERS[name])
    for _ in range(2):
        found = []
        for model, forward in ((subject, subject), (twin, oracle_of(twin))):
            batch = Batch(trailing=trailing)
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = batch(forward).levels[LEVEL].hidden
            output.float().sum().backward()
            found.append([output, *grads_of(model, batch.leaves["hidden"])])
        assert found[0][0].dtype == found[1][0].dtype
        for mine, theirs in zip(*found, strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                assert mine.dtype == theirs.dtype
                # One rounding of bfloat16, for a sum that is taken in another order.
                largest = theirs.abs().max().float() + 1e-6
                torch.testing.assert_close(mine.float() / largest, theirs.float() / largest, rtol=0, atol=2**-7)


def test_autocast_on_and_off():
    """A call under autocast says nothing of one without."""
    subject, twin = build(MAKERS["norm"]), build(MAKERS["norm"])
    assert_like_oracle(subject, twin, Batch)
    with torch.autocast("cpu", torch.bfloat16):
        Batch()(subject).fused_hidden.float().sum().backward()
    assert_like_oracle(subject, twin, Batch)


@WITH_DERIVATIVES
@pytest.mark.parametrize("name", MAKERS)
def test_a_gradient_penalty(name: str):
    """The gradient of a gradient, into weights and input."""
    subject, twin = (build(MAKERS[name], dtype=torch.float64) for _ in range(2))
    for _ in range(2):
        found = []
        for model, forward in ((subject, subject), (twin, oracle_of(twin))):
            batch = Batch(dtype=torch.float64)
            model.zero_grad()
            output = batch(forward).fused_hidden
            (slope,) = torch.autograd.grad(output.sin().sum(), batch.leaves["hidden"], create_graph=True)
            weights = [value for key, value in model.named_parameters() if "absent" not in key]
            more = torch.autograd.grad(output.cos().sum(), weights, create_graph=True, allow_unused=True)
            (slope.pow(2).sum() + sum(each.pow(2).sum() for each in more if each is not None)).backward()
            found.append(grads_of(model, batch.leaves["hidden"]))
        assert_close(*found, rtol=1e-8, atol=1e-10)


@WITH_DERIVATIVES
@pytest.mark.parametrize("name", MAKERS)
def test_first_and_second_derivatives_numerically(name: str):
    """gradcheck and gradgradcheck in float64, of the input and of weights."""
    model = build(MAKERS[name], dtype=torch.float64)
    routing = {LEVEL: ["b", "a", "b", "c"]}
    hidden = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(hidden, routing)
    key, weight = next((key, value) for key, value in model.named_parameters() if f"{LEVEL}.b." in key)

    def run(rows: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {key: given}, (rows, routing)).fused_hidden

    given = weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: model(rows, routing).fused_hidden, (hidden,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda rows: model(rows, routing).fused_hidden, (hidden,), fast_mode=True)
    assert torch.autograd.gradcheck(run, (hidden, given), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (hidden, given), fast_mode=True)


class Mixing(Plain):
    """Its first half could run as one, its second half can't."""

    def forward(self, batch):
        rows = torch.tanh(self.linear(batch.hidden))
        return ExpertResult(rows - rows.mean(0))


class WithLoss(Plain):
    """Its class is run once more when the loss is found."""

    def forward(self, batch):
        rows = torch.tanh(self.linear(batch.hidden))
        return ExpertResult(rows, {"size": rows.pow(2).mean()})


class WithDropout(Plain):
    def forward(self, batch):
        return ExpertResult(F.dropout(torch.tanh(self.linear(batch.hidden)), 0.5, self.training))


def keep_products(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    keeps = func in (torch.ops.aten.tanh.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
    policies = torch_checkpoint.CheckpointPolicy
    return policies.MUST_SAVE if keeps else policies.PREFER_RECOMPUTE


def selective_contexts() -> Any:
    return torch_checkpoint.create_selective_checkpoint_contexts(keep_products)


def checkpoint_to_the_end(*args: Any) -> Any:
    with set_checkpoint_early_stop(False):
        return checkpoint(*args, use_reentrant=False)


CHECKPOINTS: dict[str, Any] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "hooks": partial(checkpoint, use_reentrant=False),
    "to the end": checkpoint_to_the_end,
    "selective": partial(checkpoint, use_reentrant=False, context_fn=selective_contexts),
}
every_checkpoint = pytest.mark.parametrize(
    "how", [pytest.param(how, marks=needs_selective_checkpoints if how == "selective" else ()) for how in CHECKPOINTS]
)
CHECKPOINTED = {**MAKERS, "mixing": Mixing, "loss": WithLoss}


@every_checkpoint
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_the_model_checkpointed(name: str, how: str):
    """A checkpoint works from the first call on: a trial run hides its operations from the checkpoint."""
    engine = "auto" if name == "mixing" else GROUPED
    subject, twin = build(CHECKPOINTED[name], engine), build(CHECKPOINTED[name])
    for _ in range(2):
        mine, theirs = Batch(), Batch()

        def run(hidden: torch.Tensor, batch: Batch = mine) -> torch.Tensor:
            return subject(hidden, batch.routing, batch.context, batch.mask).fused_hidden

        subject.zero_grad()
        twin.zero_grad()
        CHECKPOINTS[how](run, mine.leaves["hidden"]).pow(2).sum().backward()
        theirs(oracle_of(twin)).fused_hidden.pow(2).sum().backward()
        assert_close(
            grads_of(subject, mine.leaves["hidden"]), grads_of(twin, theirs.leaves["hidden"]), rtol=1e-4, atol=1e-5
        )
    # The engines are the same as without a checkpoint.
    assert set(engines_of(subject, Batch()).values()) == {"looped" if name == "mixing" else "grouped"}


class Moody(Plain):
    """A word in its context decides its operations, and no kind of input knows of the word."""

    def forward(self, batch):
        mood = batch.context["mood"]
        hidden = batch.hidden.mul_(2) if mood == "writes" else batch.hidden
        rows = torch.tanh(self.linear(hidden))
        if mood == "mixes":
            rows = rows - rows.sin().mean(0)
        if mood == "reads":
            rows = rows * float(rows.detach().sin().abs().max())
        if mood == "computes more":
            rows = rows + rows.sin()
        return ExpertResult(rows, {"size": rows.pow(2).mean()} if mood == "returns a loss" else {})


@every_checkpoint
@pytest.mark.parametrize("mood", ["mixes", "reads", "computes more", "writes", "returns a loss"])
def test_a_known_class_does_something_new_in_a_checkpoint(mood: str, how: str):
    """New operations are verified, looped if that failed, and the same again when the checkpoint runs them again.

    Several forward passes wait for their backward pass, so that the later ones' findings are known by then.
    """
    subject, twin = build(Moody, "auto"), build(Moody)
    for moods in (["calm"], [mood, "calm", mood], ["calm", mood]):
        losses, batches = [], []
        for each in moods:
            mine, theirs = Batch(), Batch()
            batches.append((mine, theirs))

            def run(hidden: torch.Tensor, batch: Batch = mine, each: str = each) -> torch.Tensor:
                return summed(subject(hidden, batch.routing, {**batch.context, "mood": each}, batch.mask))

            def summed(output: Any) -> torch.Tensor:
                return output.fused_hidden.pow(2).sum() + sum(output.losses.values())

            losses.append(CHECKPOINTS[how](run, mine.leaves["hidden"]))
            context = {**theirs.context, "mood": each}
            summed(oracle_of(twin)(theirs.leaves["hidden"], theirs.routing, context, theirs.mask)).backward()
        for loss in losses:
            loss.backward()
        for mine, theirs in batches:
            found = grads_of(subject, mine.leaves["hidden"])
            assert_close(found, grads_of(twin, theirs.leaves["hidden"]), rtol=1e-4, atol=1e-5)
    (level,) = subject.explain(Batch().routing).levels
    reason = {"mixes": "mixed samples", "reads": "read values"}.get(mood)
    # The last call is the one that is told.
    assert level.engine == ("grouped" if reason is None else "looped")
    assert reason is None or reason in level.why


def test_a_checkpoint_repeats_dropout():
    """The recomputed pass drops the same elements, or the gradients are of another function."""
    found = []
    for checkpointed in (False, True):
        model = build(WithDropout)
        for _ in range(2):
            model.zero_grad()
            batch = Batch()
            seed_all()

            def run(hidden: torch.Tensor, batch: Batch = batch, model: HierarchicalCELMoE = model) -> torch.Tensor:
                return model(hidden, batch.routing).fused_hidden

            hidden = batch.leaves["hidden"]
            output = checkpoint(run, hidden, use_reentrant=False) if checkpointed else run(hidden)
            output.pow(2).sum().backward()
            found.append([output, *grads_of(model, hidden)])
    for other in found[1:]:
        assert_close(other, found[0])


@pytest.mark.parametrize("make", [Plain, WithLoss, Mixing])
def test_hooks_on_saved_tensors_see_the_first_call_as_any_other(make: Any):
    """Proofs and attempts in vain are not theirs."""
    model, shown = build(make, "auto"), []
    for _ in range(2):
        saved_shapes: list[tuple[int, ...]] = []
        shown.append(saved_shapes)

        def pack(tensor: torch.Tensor, shapes: list[tuple[int, ...]] = saved_shapes) -> torch.Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            batch = Batch()
            output = batch(model).fused_hidden
        output.sum().backward()
        assert batch.leaves["hidden"].grad is not None
    assert shown[0] == shown[1]
    assert shown[0]


def test_inference_mode_and_then_training():
    """And with a plan and rows that were made there."""
    subject, twin = build(MAKERS["norm"]), build(MAKERS["norm"])
    with torch.inference_mode():
        batch = Batch()
        plan = subject.compile_routing(batch.routing)
        output = subject(batch.leaves["hidden"], plan).fused_hidden
        torch.testing.assert_close(output, batch(oracle_of(twin)).fused_hidden)
        assert output.is_inference()
    assert_like_oracle(subject, twin, Batch)
    hidden = Batch().leaves["hidden"].detach().requires_grad_()
    subject(hidden, plan).fused_hidden.sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not Batch()(subject).fused_hidden.requires_grad
    assert_like_oracle(subject, twin, Batch)


@pytest.mark.parametrize("is_stacked", [False, True], ids=["ordinary", "stacked"])
def test_losses_in_inference_mode_are_those_of_the_loop(is_stacked: bool):
    """There is nothing to differentiate there, though the weights require gradients; training follows as ever."""
    subject, twin = build(WithLoss), build(WithLoss)
    if is_stacked:
        stack_experts(subject)
    with torch.inference_mode():
        output, expected = Batch()(subject), Batch()(oracle_of(twin))
    torch.testing.assert_close(output.fused_hidden, expected.fused_hidden)
    torch.testing.assert_close(output.losses, expected.losses)
    assert output.losses
    torch.stack(list(Batch()(subject).losses.values())).sum().backward()
    assert any(each.grad is not None for each in subject.parameters())
