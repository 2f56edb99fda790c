"""A vectorized routing engine for hierarchies of named experts: the drop-in faster ``HierarchicalCELMoE``."""

from . import reference
from .compiler import RoutingCompiler
from .config import CELMoEConfig, ExpertConfig, HierarchyLevelConfig
from .errors import (
    CELMoEError,
    ConfigError,
    ConfigTypeError,
    EngineError,
    EngineRefusedError,
    InputError,
    InputTypeError,
    MissingRouteError,
    PlanError,
    ResultError,
    ResultTypeError,
    RouteIdError,
    RouteLengthError,
    RouteTypeError,
    UnknownExpertError,
    UnknownLevelError,
)
from .experts import (
    ExpertAux,
    ExpertBatch,
    ExpertContext,
    ExpertContextMap,
    ExpertMetadata,
    ExpertModule,
    ExpertResult,
    Shared,
)
from .explain import ClassExplanation, Explanation, LevelExplanation
from .fusion import LearnedFusion, MeanFusion, PositionAwareFusion
from .hierarchy import HierarchicalCELMoE
from .loss import (
    BridgeLossCallable,
    CELMoELossAPI,
    LevelLossCallable,
    LossBundle,
    LossCallable,
    LossMap,
    LossResult,
    LossTerm,
)
from .outputs import CELMoEOutput, LevelOutput
from .plan import LevelPlan, RoutingPlan
from .routing import LevelRoutes, LevelRouting, Routing, merge_routing, routing_constant, validate_routing_length
from .version import __version__

__all__ = [
    "BridgeLossCallable",
    "CELMoEConfig",
    "CELMoEError",
    "CELMoELossAPI",
    "CELMoEOutput",
    "ClassExplanation",
    "ConfigError",
    "ConfigTypeError",
    "EngineError",
    "EngineRefusedError",
    "ExpertAux",
    "ExpertBatch",
    "ExpertConfig",
    "ExpertContext",
    "ExpertContextMap",
    "ExpertMetadata",
    "ExpertModule",
    "ExpertResult",
    "Explanation",
    "HierarchicalCELMoE",
    "HierarchyLevelConfig",
    "InputError",
    "InputTypeError",
    "LearnedFusion",
    "LevelExplanation",
    "LevelLossCallable",
    "LevelOutput",
    "LevelPlan",
    "LevelRoutes",
    "LevelRouting",
    "LossBundle",
    "LossCallable",
    "LossMap",
    "LossResult",
    "LossTerm",
    "MeanFusion",
    "MissingRouteError",
    "PlanError",
    "PositionAwareFusion",
    "ResultError",
    "ResultTypeError",
    "RouteIdError",
    "RouteLengthError",
    "RouteTypeError",
    "Routing",
    "RoutingCompiler",
    "RoutingPlan",
    "Shared",
    "UnknownExpertError",
    "UnknownLevelError",
    "__version__",
    "merge_routing",
    "reference",
    "routing_constant",
    "validate_routing_length",
]
