"""Lightning: loads, norms and early stopping by expert, for a hierarchy of one's own and for a host."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import celmoe
from celmoe import ConfigError, ConfigTypeError, HierarchicalCELMoE, InputTypeError, UnknownLevelError
from celmoe.bridges.experts import experts_of, freeze, gradient_scalars, hierarchies, plan_in
from celmoe.bridges.patience import Patience
from tests.bridges.hosts import WIDTH, Bottleneck, attached, bert, collator, config, samples, stirred

lightning = pytest.importorskip("lightning.pytorch")
ours = importlib.import_module("celmoe.bridges.lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
SIZE, STEPS = 6, 4


class Own(lightning.LightningModule):
    """A hierarchy as a part of somebody's module; the batches are pairs of rows and a plan."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = HierarchicalCELMoE(config(), lambda level, name, metadata: Bottleneck())
        self.seen: list[dict[str, float]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        hidden, plan = batch
        return self.experts(hidden, plan).fused_hidden.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Hosted(Own):
    """A host with experts attached; the batches are mappings."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = stirred(attached(bert(), "bert.encoder.layer.*"))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.experts(**batch).loss


class Stacked(Hosted):
    """Its experts are stacked, and stepped by an optimizer that leaves absent and frozen ones as they are."""

    def __init__(self) -> None:
        super().__init__()
        celmoe.adapters(self.experts).stack()

    def configure_optimizers(self) -> Any:
        return celmoe.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def loader_of(module: Own, size: int = SIZE * STEPS) -> DataLoader[Any]:
    if isinstance(module, Hosted):
        return DataLoader(samples(size), SIZE, collate_fn=collator(module.experts))
    rows = [{"hidden": torch.randn(WIDTH), "lang": each["lang"]} for each in samples(size)]
    inner = celmoe.Collator(celmoe.RoutingCompiler(config()), {"language": "lang"})

    def pairs(given: list[Any]) -> Any:
        batch = inner(given)
        return batch["hidden"], batch["plan"]

    return DataLoader(rows, SIZE, collate_fn=pairs)


def trainer_of(folder: Path, *callbacks: Any, **others: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        logger=False,
        **{"enable_checkpointing": False, "max_epochs": 1, **others},
    )


@pytest.mark.parametrize("kind", [Own, Hosted, Stacked])
def test_loads_and_norms_are_logged(tmp_path: Path, kind: type[Own]) -> None:
    """Each value is that of the tracker and of the gradients at the last step."""
    module, loads, norms = kind(), ours.LoadCallback(), ours.GradientNormCallback()
    wanted: list[dict[str, float]] = []

    class Look(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            wanted.append(gradient_scalars(pl_module))

    trainer = trainer_of(tmp_path, loads, norms, Look())
    trainer.fit(module, loader_of(module))
    assert loads.tracker.steps == len(wanted) == STEPS
    logged = {key: each.item() for key, each in trainer.callback_metrics.items()}
    scalars = loads.tracker.scalars()
    assert scalars.items() <= {key: logged[key] for key in scalars}.items() or all(
        math.isclose(logged[key], each, rel_tol=1e-5) for key, each in scalars.items()
    )
    last = wanted[-1]
    assert last
    assert all(math.isclose(logged[key], each, rel_tol=1e-5) for key, each in last.items())


def test_the_norm_of_a_host_is_that_of_all_places() -> None:
    model = stirred(attached(bert(), "bert.encoder.layer.*"))
    batch = collator(model)(samples(8))
    model(**batch).loss.backward()
    scalars = gradient_scalars(model)
    for name in ("de", "nl", "fr", "it"):
        grads = [
            each.grad.reshape(-1)
            for key, each in model.named_parameters()
            if f".level_modules.language.{name}." in key and each.grad is not None
        ]
        wanted = torch.cat(grads).norm().item() if grads else None
        assert scalars.get(f"gradient_norm/language/{name}") == (pytest.approx(wanted) if grads else None)


def test_loads_are_in_checkpoints(tmp_path: Path) -> None:
    module, loads = Own(), ours.LoadCallback(every=2)
    trainer = trainer_of(tmp_path, loads)
    trainer.fit(module, loader_of(module))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    other = ours.LoadCallback()
    again = trainer_of(tmp_path, other, max_epochs=2)
    again.fit(Own(), loader_of(module), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert other.tracker.steps == 2 * STEPS


class Judged(Own):
    """Logs a loss of each language, which stops to improve at a time of its own."""

    ENDS: ClassVar = {"de": 1, "nl": 2, "fr": 3, "it": 9}

    def validation_step(self, batch: Any, index: int) -> None:
        for name, end in self.ENDS.items():
            self.log(f"val_loss/{name}", float(-min(self.current_epoch, end)), batch_size=1)


class JudgedStacks(Judged, Stacked):
    """The same, stacked."""


def is_frozen(module: Own, name: str) -> bool:
    experts = [each.level_modules["language"][name] for each in hierarchies(module).values()]
    found = {each.requires_grad for expert in experts for each in dict(expert.named_parameters()).values()}
    assert len(found) == 1
    return not found.pop()


@pytest.mark.parametrize("kind", [Judged, JudgedStacks])
def test_experts_stop_one_by_one(tmp_path: Path, kind: type[Own]) -> None:
    """A frozen expert stays as it is while the others go on; once all are frozen, training ends."""
    module, stopping = kind(), ours.ExpertEarlyStopping("language", "val_loss/{expert}", patience=2)
    states: list[tuple[int, list[str], torch.Tensor]] = []

    class Look(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            first = next(iter(hierarchies(pl_module).values()))
            weight = first.level_modules["language"]["de"].up.weight
            states.append((trainer.current_epoch, list(stopping.patience.frozen), weight.detach().clone()))

    trainer = trainer_of(tmp_path, stopping, Look(), max_epochs=20)
    trainer.fit(module, loader_of(module), DataLoader([0], collate_fn=lambda given: given))
    assert stopping.patience.frozen == ["de", "nl", "fr", "it"]
    assert all(is_frozen(module, name) for name in Judged.ENDS)
    assert trainer.current_epoch == 12
    frozen = [weight for _, names, weight in states if "de" in names]
    assert len(frozen) == 8
    assert all(torch.equal(each, frozen[0]) for each in frozen)
    assert not torch.equal(states[1][2], states[2][2])


def test_who_is_frozen_is_in_checkpoints(tmp_path: Path) -> None:
    """An interrupted training ends where an uninterrupted one does."""
    validation = DataLoader([0], collate_fn=lambda given: given)

    def stopping() -> Any:
        return ours.ExpertEarlyStopping("language", "val_loss/{expert}", patience=2)

    first, module = stopping(), Judged()
    trainer = trainer_of(tmp_path, first, max_epochs=5)
    trainer.fit(module, loader_of(module), validation)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    assert first.patience.frozen == ["de", "nl"]
    second, other = stopping(), Judged()
    trainer = trainer_of(tmp_path, second, max_epochs=20)
    trainer.fit(other, loader_of(module), validation, ckpt_path=tmp_path / "some.ckpt", weights_only=False)
    assert second.patience.frozen == ["de", "nl", "fr", "it"]
    assert trainer.current_epoch == 12


def test_a_frozen_expert_is_frozen_at_all_places() -> None:
    model = stirred(attached(bert(), "bert.encoder.layer.*"))
    patience = Patience("language", "acc/{expert}", patience=1, min_delta=0.1, mode="max")
    assert not patience.update(model, {"acc/de": 0.5, "acc/nl": 0.5, "loss": 3.0})
    assert not patience.update(model, {"acc/de": torch.tensor(0.55), "acc/nl": 0.65, "acc/fr": math.nan})
    assert patience.frozen == ["de", "fr"]
    trained = {key for key, each in model.named_parameters() if each.requires_grad}
    for name in ("de", "nl", "fr", "it"):
        keys = {key for key, _ in model.named_parameters() if f".level_modules.language.{name}." in key}
        assert len(keys) == 12
        assert keys & trained == (set() if name in ("de", "fr") else keys)
    assert not patience.update(model, {"acc/de": 0.9, "acc/nl": 0.9, "acc/it": 0.2})
    assert patience.update(model, {"acc/nl": 0.9, "acc/it": 0.2})


def test_a_name_is_no_pattern() -> None:
    levels = [celmoe.HierarchyLevelConfig("l", {name: celmoe.ExpertConfig(name) for name in ("[ab]", "a", "*")})]
    tree = celmoe.CELMoEConfig(WIDTH, levels)
    model = HierarchicalCELMoE(tree, lambda level, name, metadata: nn.Linear(2, 2))
    freeze(model, "l", "*")
    freeze(model, "l", "[ab]")
    trained = [name for name in ("[ab]", "a", "*") if model.level_modules["l"][name].weight.requires_grad]
    assert trained == ["a"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hierarchies(nn.Linear(2, 2)), ConfigError, "'model' must have experts (got a Linear without)"),
        (lambda: hierarchies(3), InputTypeError, "'model' must be a torch.nn.Module (got int)"),
        (
            lambda: experts_of(Own(), "languge"),
            UnknownLevelError,
            "'level' must be a level of the experts (got 'languge'; nearest: 'language')",
        ),
        (
            lambda: plan_in({"hidden": 3}),
            InputTypeError,
            "batches must have a RoutingPlan among their entries (got a dict without; celmoe.Collator puts one in)",
        ),
        (lambda: Patience(3, "{expert}"), ConfigTypeError, "'level' must be a level's name (got 3)"),
        (
            lambda: Patience("l", "val_loss"),
            ConfigError,
            "'monitor' must be a key with {expert} in it (got 'val_loss')",
        ),
        (
            lambda: Patience("l", "{expert}", patience=0),
            ConfigError,
            "'patience' must be an integer from 1 on (got 0)",
        ),
        (
            lambda: Patience("l", "{expert}", min_delta=-1),
            ConfigError,
            "'min_delta' must be a number from 0 on (got -1)",
        ),
        (lambda: Patience("l", "{expert}", mode="least"), ConfigError, "'mode' must be 'min' or 'max' (got 'least')"),
        (
            lambda: Patience("language", "val/{expert}").update(Own(), {"loss": 1.0}),
            ConfigError,
            "'monitor' must be the key of some expert's figure (got 'val/{expert}'; figures 'loss')",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
