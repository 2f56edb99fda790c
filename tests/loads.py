"""Plans and trackers whose loads are known by hand."""

from __future__ import annotations

from celmoe import (
    CELMoEConfig,
    LoadTracker,
    RoutingCompiler,
    RoutingPlan,
)

TREE = {"slavic": ["ru", "pl"], "romance": ["it"]}


def config_of(tree: dict[str, list[str]]) -> CELMoEConfig:
    return CELMoEConfig.from_tree(tree, ("family", "language"), 4)


def plan_of(*languages: str, tree: dict[str, list[str]] = TREE) -> RoutingPlan:
    routing = {"language": list(languages)} if languages else {"family": [], "language": []}
    return RoutingCompiler(config_of(tree))(routing)


def tracked(*steps: tuple[str, ...], half_life: float = 1.0) -> LoadTracker:
    tracker = LoadTracker(half_life)
    for languages in steps:
        tracker.update(plan_of(*languages))
    return tracker
