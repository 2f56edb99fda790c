"""The jobs that ranks train together, and one process on the joined batches; one comparison for both.

A step is a list of micro-batches, a micro-batch the languages of each rank's samples: ``[[["ru"], ["de"]]]`` is one
step of one micro-batch, in which the first rank has a Russian sample and the second a German one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import celmoe
from celmoe.distributed.remote import stand_ins

WIDTH = 6
FAMILIES = ("slavic", "romance", "germanic")
FAMILY_OF = {"ru": "slavic", "pl": "slavic", "fr": "romance", "it": "romance", "de": "germanic", "zh.Hant": None}
TOLERANCE = 1e-11
# SGD shows a gradient's size, which Adam can't see; AdamW moves parameters with gradients of zeros.
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-3),
}


@dataclass
class Job:
    """A model and its training; the job travels to the processes."""

    steps: list[list[list[list[str]]]]
    engine: str = "looped"
    optimizer: str = "AdamW"
    fusion: str = "learned"
    frozen: tuple[str, ...] = ()
    frozen_at: dict[int, tuple[str, ...]] = field(default_factory=dict)
    detached: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    max_norm: float | None = None
    positions: int | None = None
    objective: str = "all"
    has_losses: bool = False
    has_context: bool = False
    hidden_grad: bool = True
    mixes: bool = False
    has_network: bool = False
    options: dict[str, Any] = field(default_factory=dict)


class Expert(celmoe.ExpertModule):
    """A norm and two products; it may read a mask and a context, give losses, and look at the rows before each."""

    def __init__(self, width, job, level="language"):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        # A level that is never spread gives each rank the loss of its own rows, whose mean is not the joined one.
        self.has_losses = job.has_losses and level != "universal"
        self.has_context = job.has_context
        self.mixes = job.mixes and level != "universal"

    def forward(self, batch):
        rows = self.up(self.norm(batch.hidden))
        hidden = batch.hidden + self.down(torch.tanh(rows))
        if self.has_context:
            hidden = (hidden + batch.context["shift"]) * batch.mask.unsqueeze(-1)
        if self.mixes:
            hidden = hidden + hidden.cumsum(0) / len(hidden)
        losses = {"size": hidden.square().mean()} if self.has_losses else {}
        return celmoe.ExpertResult(hidden, losses)


def make_model(job: Job) -> celmoe.HierarchicalCELMoE:
    """The same model in every process."""

    def expert(name):
        parent = FAMILY_OF.get(name)
        stop = name in job.detached
        weight = 0.5 if name == "ru" else 1.0
        return celmoe.ExpertConfig(name, parent=parent, stop_gradient_from_parent=stop, loss_weight=weight)

    levels = [
        celmoe.HierarchyLevelConfig("universal", {"core": expert("core")}),
        celmoe.HierarchyLevelConfig("family", {name: expert(name) for name in FAMILIES}, "slavic"),
        celmoe.HierarchyLevelConfig("language", {name: expert(name) for name in FAMILY_OF}),
    ]
    config = celmoe.CELMoEConfig(WIDTH, levels, use_learned_fusion=job.fusion == "learned", fusion_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = celmoe.HierarchicalCELMoE(config, lambda level, *_: Expert(WIDTH, job, level), engine=job.engine).to(
            job.dtype
        )
    for level in levels:
        for name in level.experts:
            model.level_modules[level.name][name].requires_grad_(name not in job.frozen)
    return model


class Network(nn.Module):
    """A model with trained layers around."""

    def __init__(self, model, job):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.first = nn.Linear(WIDTH, WIDTH, dtype=job.dtype)
            self.last = nn.Linear(WIDTH, WIDTH, dtype=job.dtype)
        self.model = model

    def forward(self, hidden, routing, **rest):
        output = self.model(self.first(hidden), routing, **rest)
        output.fused_hidden = self.last(output.fused_hidden)
        return output


def network_of(model: celmoe.HierarchicalCELMoE, job: Job) -> nn.Module:
    """What is trained: the model, or a network around it."""
    return Network(model, job) if job.has_network else model


def enter_stage(model: celmoe.HierarchicalCELMoE, job: Job, step: int) -> None:
    """Freeze the languages that are frozen at this step, and no others."""
    if job.frozen_at:
        for name, expert in model.level_modules["language"].items():
            expert.requires_grad_(name not in job.frozen_at.get(step, ()))


@dataclass
class Batch:
    """Some samples: their rows, routes and targets, and the values that experts may read beside."""

    hidden: torch.Tensor
    languages: list[str]
    targets: torch.Tensor
    shift: torch.Tensor
    mask: torch.Tensor

    def inputs(self, job: Job) -> dict[str, Any]:
        given: dict[str, Any] = {"hidden": self.hidden, "routing": {"language": self.languages}}
        if job.has_context:
            given |= {"context": {"shift": self.shift, "names": celmoe.Shared(["shared"])}, "mask": self.mask}
        return given

    def leaves(self, job: Job) -> list[torch.Tensor]:
        return [self.hidden, self.shift, self.mask] if job.has_context else [self.hidden]


def make_batches(job: Job, step: int, micro: int) -> list[Batch]:
    """Each rank's samples."""
    batches = []
    for rank, languages in enumerate(job.steps[step][micro]):
        generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
        shape = (len(languages), WIDTH) if job.positions is None else (len(languages), job.positions, WIDTH)
        hidden, targets, shift = (torch.randn(shape, generator=generator, dtype=job.dtype) for _ in range(3))
        mask = torch.rand(shape[:-1], generator=generator, dtype=job.dtype)
        hidden.requires_grad_(job.hidden_grad)
        shift.requires_grad_(job.has_context)
        mask.requires_grad_(job.has_context)
        batches.append(Batch(hidden, languages, targets, shift, mask))
    return batches


def joined(batches: list[Batch]) -> Batch:
    """All ranks' samples, in the order of the ranks."""
    return Batch(
        torch.cat([each.hidden for each in batches]),
        [language for each in batches for language in each.languages],
        *(torch.cat([getattr(each, name) for each in batches]) for name in ("targets", "shift", "mask")),
    )


def loss_sum(job: Job, output: celmoe.CELMoEOutput, batch: Batch) -> torch.Tensor:
    """The loss, summed over samples."""
    hiddens = [output.fused_hidden]
    if job.objective == "all":
        hiddens += [level.hidden for level in output.levels.values()]
    elif job.objective == "family":
        hiddens = [output.levels["family"].hidden]
    dims = tuple(range(1, batch.targets.dim()))
    return sum((each - batch.targets).square().mean(dims).sum() for each in hiddens)


def extra_losses(output: celmoe.CELMoEOutput) -> torch.Tensor | float:
    """The experts' own losses, weighted."""
    return sum((output.loss_weights[key] * value for key, value in output.losses.items()), 0.0)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A parameter, a gradient or an optimizer's state, whole again; all ranks must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def seen(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Parameters, gradients and optimizer state after a step, by name, but for those that stand for others."""
    found = {}
    elsewhere = set(stand_ins(model))
    for name, parameter in model.named_parameters():
        if parameter in elsewhere:
            continue
        state = {key: torch.as_tensor(value).clone() for key, value in optimizer.state.get(parameter, {}).items()}
        gradient = None if parameter.grad is None else parameter.grad.clone()
        found[name] = {"gradient": gradient, "value": parameter.detach().clone(), "state": state}
    return found


_alone: dict[str, list[Any]] = {}


def train_alone(job: Job) -> list[Any]:
    """One process on the joined batches: the record of `seen` after each step, with the leaves' gradients by rank.

    The process loops, and is asked once for jobs that differ in the engine alone.
    """
    job = replace(job, engine="looped", options={})
    return _alone.setdefault(repr(job), _alone.get(repr(job)) or _train_alone(job))


def _train_alone(job: Job) -> list[Any]:
    hierarchy = make_model(job)
    model = network_of(hierarchy, job)
    optimizer = OPTIMIZERS[job.optimizer](model.parameters())
    history = []
    for step, micros in enumerate(job.steps):
        enter_stage(hierarchy, job, step)
        optimizer.zero_grad()
        inputs = []
        for micro in range(len(micros)):
            batches = make_batches(job, step, micro)
            batch = joined(batches)
            with torch.autocast("cpu", enabled=job.autocast):
                output = model(**batch.inputs(job))
                loss = loss_sum(job, output, batch) / max(len(batch.languages), 1) + extra_losses(output)
            if loss.requires_grad:
                loss.backward()
            inputs.append([[leaf.grad for leaf in each.leaves(job)] for each in batches])
        if job.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_norm)
        optimizer.step()
        history.append((seen(model, optimizer), inputs))
    return history


class DifferenceError(AssertionError):
    """Ranks, or ranks and one process, disagree. The message begins with the name of the value."""


def assert_close(where: str, mine: Any, theirs: Any, tolerance: float) -> None:
    """Equal in structure, and in every tensor relative to its largest value."""
    if isinstance(theirs, torch.Tensor) and isinstance(mine, torch.Tensor):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise DifferenceError(f"{where}: {mine.dtype}{tuple(mine.shape)}, not {theirs.dtype}{tuple(theirs.shape)}")
        worst = (mine - theirs).abs().max().item() if mine.numel() else 0.0
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        if not worst <= tolerance * scale:
            raise DifferenceError(f"{where}: differs by {worst:.2e} of {scale:.2e}")
    elif isinstance(theirs, dict) and isinstance(mine, dict):
        if mine.keys() != theirs.keys():
            raise DifferenceError(f"{where}: has {sorted(mine)}, not {sorted(theirs)}")
        for key, value in theirs.items():
            assert_close(f"{where} {key}", mine[key], value, tolerance)
    elif isinstance(theirs, list) and isinstance(mine, list):
        if len(mine) != len(theirs):
            raise DifferenceError(f"{where}: {len(mine)} entries, not {len(theirs)}")
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            assert_close(f"{where}[{index}]", one, other, tolerance)
    elif mine is not None or theirs is not None:
        raise DifferenceError(
            f"{where}: {'none' if mine is None else 'some'}, not {'none' if theirs is None else 'some'}"
        )


def assert_ranks_agree(histories: list[list[Any]]) -> None:
    """All ranks hold the same values after each step, to the bit."""
    for step, (first, _) in enumerate(histories[0]):
        for rank, history in enumerate(histories[1:], 1):
            for name in history[step][0].keys() & first.keys():
                assert_close(f"rank {rank}, step {step}, {name}", history[step][0][name], first[name], 0.0)


def assert_as_alone(job: Job, histories: list[list[Any]], tolerance: float = TOLERANCE) -> dict[str, int]:
    """The ranks hold one process's values; together every parameter, if each holds some.

    Returns:
        The numbers of compared gradients that are present and that are absent.
    """
    evidence = {"gradients": 0, "absent": 0, "inputs": 0}
    for step, (alone, inputs) in enumerate(train_alone(job)):
        together: dict[str, Any] = {}
        for history in histories:
            together |= history[step][0]
        for name, theirs in alone.items():
            if name not in together:
                raise DifferenceError(f"step {step}, {name}: on no rank")
            assert_close(f"step {step}, {name}", together[name], theirs, tolerance)
            evidence["absent" if theirs["gradient"] is None else "gradients"] += 1
        for micro, by_rank in enumerate(inputs):
            for rank, leaves in enumerate(by_rank):
                mine = histories[rank][step][1][micro]
                # Each rank's own loss weighs the number of ranks times as much as its part in the joined mean.
                scaled = [None if leaf is None else leaf / len(histories) for leaf in mine]
                assert_close(f"step {step}, gradient of rank {rank}'s inputs", scaled, leaves, tolerance)
                evidence["inputs"] += len(leaves)
    return evidence


def own_rounding(job: Job) -> float:
    """The effect of autocast alone on one process: the largest relative distance over all parameters and gradients."""
    worst = 0.0
    exact = train_alone(replace(job, autocast=False))
    for (rounded, _), (wanted, _) in zip(train_alone(job), exact, strict=True):
        for name, theirs in wanted.items():
            for what in ("value", "gradient"):
                if theirs[what] is not None:
                    distance = (rounded[name][what] - theirs[what]).abs().max() / theirs[what].abs().max()
                    worst = max(worst, distance.item())
    return worst
