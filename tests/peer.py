"""celmoe-vp beside celmoe: one program text, run on both, and one comparison of the two results.

A program is a function of the library's module. It uses celmoe-vp's API alone, so that the very same lines run on
both. If celmoe-vp can't be installed, the tests that need it are skipped, loudly (see `tests.peer_report`); with
``CELMOE_REQUIRE_PEER=1`` in the environment, as in CI, they fail.
"""

import dataclasses
import os

import pytest
import torch
from torch import nn

from benchmarks.harness import peers

FIRST, SECOND, THIRD = "1.1.4", "2.0.1", "3.0.0"
VERSIONS = (FIRST, SECOND, THIRD)
REQUIRE = "CELMOE_REQUIRE_PEER"
SEED = 1234
WIDTH = 8
BATCH = 11

FAMILIES = ("slavic", "romance", "germanic")
LANGUAGES = ("ru", "fr", "de", "pl", "it", "nl")
# 'nl' is never routed to: absent experts are part of every program.
LANGUAGE_ROUTES = ["ru", "fr", "de", "fr", "ru", "ru", "it", "pl", "de", "fr", "pl"]
FAMILY_OF = {"ru": "slavic", "pl": "slavic", "fr": "romance", "it": "romance", "de": "germanic", "nl": "germanic"}

missing: dict[str, str] = {}


def require_peer(install, what):
    """Return the result of ``install()``; if a peer is missing, skip or fail, and remember it for the report."""
    try:
        return install()
    except peers.PeerUnavailableError as error:
        missing[what] = str(error)
        reason = f"{what} is missing: {error}"
        if os.environ.get(REQUIRE, "0") not in ("", "0"):
            pytest.fail(f"{reason} ({REQUIRE} is set)")
        pytest.skip(reason)


def peer(version):
    """celmoe-vp of this version, as a module."""
    return require_peer(lambda: peers.load_peer(version), f"celmoe-vp {version}")


# --- the programs' parts ---------------------------------------------------------------------------------------------


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward; ``[B, D]`` is a sequence of one."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, hidden):
        rows = hidden if hidden.dim() == 3 else hidden.unsqueeze(1)
        normed = self.norm(rows)
        rows = rows + self.attention(normed, normed, normed, need_weights=False)[0]
        return (rows + self.feed(rows)).reshape(hidden.shape)


class Recurrent(nn.Module):
    """A GRU over positions."""

    def __init__(self, width):
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, hidden):
        rows = hidden if hidden.dim() == 3 else hidden.unsqueeze(1)
        return self.gru(rows)[0].reshape(hidden.shape)


BODIES = {
    "linear": lambda width: nn.Linear(width, width),
    "mlp": lambda width: nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
    "transformer": TransformerBlock,
    "gru": Recurrent,
    "dropout": lambda width: nn.Sequential(nn.Linear(width, 2 * width), nn.Dropout(0.4), nn.Linear(2 * width, width)),
}


def plain_expert(lib, body):
    """An expert that is its body."""

    class Plain(lib.ExpertModule):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, batch):
            return lib.ExpertResult(self.body(batch.hidden))

    return Plain()


def rich_expert(lib, width=WIDTH):
    """An expert that reads mask, context and state, and returns losses and aux."""

    class Rich(lib.ExpertModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(width, width)

        def forward(self, batch):
            hidden = torch.tanh(self.body(batch.hidden + batch.context["embedding"]))
            hidden = hidden * batch.mask.unsqueeze(-1)
            losses = {"size": hidden.square().mean(), "bias": self.body.bias.sum()}
            aux = {"rows": hidden.shape[0]} if batch.state["expert"] in ("ru", "fr", "core") else {}
            return lib.ExpertResult(hidden, losses, aux)

    return Rich()


class Recorder:
    """A factory of linear experts that keeps its calls, in order."""

    def __init__(self, lib, width=WIDTH):
        self.lib, self.width = lib, width
        self.made, self.calls = [], []

    def __call__(self, *names_and_metadata):
        self.made.append(names_and_metadata)
        recorder, lib = self, self.lib

        class Recorded(lib.ExpertModule):
            def __init__(self):
                super().__init__()
                self.body = nn.Linear(recorder.width, recorder.width)

            def forward(self, batch):
                recorder.calls.append(
                    {
                        "state": dict(batch.state),
                        "hidden": batch.hidden.detach().clone(),
                        "mask": None if batch.mask is None else batch.mask.clone(),
                        "context": batch.context,
                    }
                )
                return lib.ExpertResult(self.body(batch.hidden))

        return Recorded()


def three_levels(lib, **by_level):
    """universal -> family -> language; ``by_level`` holds keyword arguments for the experts of a level."""

    def level(name, experts, **rest):
        made = {each: lib.ExpertConfig(each, **by_level.get(name, {})) for each in experts}
        return lib.HierarchyLevelConfig(name, made, **rest)

    return [level("universal", ["core"]), level("family", FAMILIES), level("language", LANGUAGES)]


def make_model(lib, factory=None, *, kind="mlp", levels=None, fusion_module=None, width=WIDTH, **config):
    """A seeded model. Its fusion has no dropout unless asked for."""
    config = {"fusion_dropout": 0.0, **config}
    torch.manual_seed(SEED)
    made = lib.CELMoEConfig(width, three_levels(lib) if levels is None else levels, **config)
    if factory is None:

        def factory(level, expert, metadata):
            return plain_expert(lib, BODIES[kind](width))

    return lib.HierarchicalCELMoE(made, factory, fusion_module)


def routing():
    """Fresh lists, batch-aligned; the universal level is left to be broadcast."""
    return {"family": [FAMILY_OF[each] for each in LANGUAGE_ROUTES], "language": list(LANGUAGE_ROUTES)}


def random(*shape, seed=1):
    """Numbers that no library's random stream has a part in."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_hidden(*, positions=None, width=WIDTH, seed=2):
    shape = (BATCH, width) if positions is None else (BATCH, positions, width)
    return random(*shape, seed=seed).requires_grad_()


def push(output):
    """A scalar that weighs every number of the output differently."""
    parts = [output.fused_hidden, *(level.hidden for level in output.levels.values())]
    loss = sum((part * random(*part.shape, seed=50 + index)).sum() for index, part in enumerate(parts))
    return loss + sum(output.losses.values())


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def grads_of(model):
    return {
        name: None if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
    }


def levels_of(output):
    """The fields that both libraries' outputs have; `loss_weights` is ours alone."""
    return {
        name: {
            "name": level.name,
            "hidden": level.hidden.detach().clone(),
            "routes": level.routes,
            "losses": {key: value.detach().clone() for key, value in level.losses.items()},
            "aux": level.aux,
        }
        for name, level in output.levels.items()
    }


def pass_through(model, hidden, *args, loss=push, **kwargs):
    """One forward and backward: everything that comes of it, from the keys of the checkpoint to the random stream."""
    initial = state_of(model)
    torch.manual_seed(SEED + 1)
    output = model(hidden, *args, **kwargs)
    loss(output).backward()
    return {
        "initial": initial,
        "levels": levels_of(output),
        "fused": output.fused_hidden.detach().clone(),
        "losses": {key: value.detach().clone() for key, value in output.losses.items()},
        "aux": output.aux,
        "hidden.grad": hidden.grad,
        "grads": grads_of(model),
        "random": torch.get_rng_state(),
    }


def train(model, steps=10, *, make_inputs=None, between=None, lr=1e-2):
    """AdamW steps: the losses, the parameters after each, and the optimizer's state at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    torch.manual_seed(SEED + 2)
    for step in range(steps):
        if between is not None:
            between(step)
        inputs = make_inputs(step) if make_inputs else {"hidden": make_hidden(seed=100 + step), "routing": routing()}
        optimizer.zero_grad()
        loss = push(model(**inputs))
        loss.backward()
        grads = grads_of(model)
        optimizer.step()
        history.append({"loss": loss.detach().clone(), "grads": grads, "state": state_of(model)})
    return {"steps": history, "optimizer": optimizer.state_dict()}


# --- the comparison --------------------------------------------------------------------------------------------------


def assert_same(ours, theirs, *, tolerance=0.0, where="result"):
    """Equal in kind, order of keys and every number; tensors within ``tolerance``, relative to their largest value."""
    if isinstance(ours, torch.Tensor) or isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), f"{where}: a tensor from the peer, {ours!r} from us"
        assert isinstance(theirs, torch.Tensor), f"{where}: a tensor from us, {theirs!r} from the peer"
        assert ours.dtype == theirs.dtype, where
        assert ours.shape == theirs.shape, where
        largest = theirs.abs().max().item() if tolerance and theirs.numel() else 0.0
        torch.testing.assert_close(
            ours, theirs, rtol=0.0, atol=tolerance * largest, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key, value in ours.items():
            assert_same(value, theirs[key], tolerance=tolerance, where=f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, tolerance=tolerance, where=f"{where}[{index}]")
    elif dataclasses.is_dataclass(ours):
        assert_same(vars(ours), vars(theirs), tolerance=tolerance, where=where)
    else:
        assert ours == theirs, f"{where}: {ours!r} from us, {theirs!r} from the peer"
