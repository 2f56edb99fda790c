"""A vectorized routing engine for hierarchies of named experts: celmoe-vp's ``HierarchicalCELMoE``, made fast.

From the bottom to the top; each package's docstring is a map of its own:

- `config`, `experts`, `outputs`, `fusion`, `loss`, `errors`: what users write, get and catch
- `torch_internals`: the only file that names PyTorch's inner parts
- `routing`: names to index tensors; `load_tracker` and `load_figure` count and draw them; `collator` makes batches
- `stacked`, `optim`: one parameter for many experts, and optimizers that leave absent experts as they are
- `rows`: into expert order, and back
- `grouped`: many experts, one run
- `engines`: looped or grouped, and the decision; `explain` tells it
- `level`, `hierarchy`: one level, and the model; `lifecycle`: experts come and go; `traced`: compiled models
- `stacking`, `loading`, `groups`, `norms`: functions of whole models; `reference`: the oracle; `zoo`: ready experts
- `attached`, `bridges`, `distributed`: in other people's models, under their trainers, on several ranks
- `devices`: which devices work here, and where one is added; ``python -m celmoe`` prints it

`names`, `patterns`, `files`, `json_values`, `based`, `directml`, `reference_context` and `version` serve these.
"""

from . import optim, reference, zoo
from .attached.adapters import Adapters, adapters, freeze_host
from .attached.attaching import attach, detach
from .attached.files import load_adapters, save_adapters, saved_config
from .attached.merging import merge_adapters
from .attached.routed import routed
from .collator import Collator
from .config import CELMoEConfig, ExpertConfig, HierarchyLevelConfig
from .errors import (
    CELMoEError,
    ChangedError,
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    DeviceMissingError,
    EngineError,
    EngineRefusedError,
    GraphError,
    InputError,
    InputTypeError,
    MeshError,
    MissingRouteError,
    PackageMissingError,
    PlanError,
    ProcessGroupError,
    ResultError,
    ResultTypeError,
    RouteIdError,
    RouteLengthError,
    RouteTypeError,
    RouteWeightError,
    StackedError,
    UnknownDeviceError,
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
    Rows,
    Shared,
)
from .explain import ClassExplanation, Explanation, LevelExplanation
from .fusion import LearnedFusion, MeanFusion, PositionAwareFusion
from .grouped.declared import rowwise
from .grouped.kernels import operators as _operators  # noqa: F401  # exported programs call them
from .groups import parameter_groups
from .hierarchy import HierarchicalCELMoE
from .load_tracker import LoadTracker
from .loading import LoadReport, load_experts
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
from .norms import gradient_norms
from .outputs import CELMoEOutput, LevelOutput
from .routing.compiler import RoutingCompiler
from .routing.load import LevelLoad
from .routing.plan import LevelPlan, RoutingPlan
from .routing.routes import LevelRoutes, LevelRouting, Routing, merge_routing, routing_constant, validate_routing_length
from .stacking import StackedClass, StackReport, stack_experts, unstack_experts
from .version import __version__

__all__ = [
    "Adapters",
    "BridgeLossCallable",
    "CELMoEConfig",
    "CELMoEError",
    "CELMoELossAPI",
    "CELMoEOutput",
    "ChangedError",
    "CheckpointError",
    "ClassExplanation",
    "Collator",
    "ConfigError",
    "ConfigTypeError",
    "DeviceMissingError",
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
    "GraphError",
    "HierarchicalCELMoE",
    "HierarchyLevelConfig",
    "InputError",
    "InputTypeError",
    "LearnedFusion",
    "LevelExplanation",
    "LevelLoad",
    "LevelLossCallable",
    "LevelOutput",
    "LevelPlan",
    "LevelRoutes",
    "LevelRouting",
    "LoadReport",
    "LoadTracker",
    "LossBundle",
    "LossCallable",
    "LossMap",
    "LossResult",
    "LossTerm",
    "MeanFusion",
    "MeshError",
    "MissingRouteError",
    "PackageMissingError",
    "PlanError",
    "PositionAwareFusion",
    "ProcessGroupError",
    "ResultError",
    "ResultTypeError",
    "RouteIdError",
    "RouteLengthError",
    "RouteTypeError",
    "RouteWeightError",
    "Routing",
    "RoutingCompiler",
    "RoutingPlan",
    "Rows",
    "Shared",
    "StackReport",
    "StackedClass",
    "StackedError",
    "UnknownDeviceError",
    "UnknownExpertError",
    "UnknownLevelError",
    "__version__",
    "adapters",
    "attach",
    "detach",
    "freeze_host",
    "gradient_norms",
    "load_adapters",
    "load_experts",
    "merge_adapters",
    "merge_routing",
    "optim",
    "parameter_groups",
    "reference",
    "routed",
    "routing_constant",
    "rowwise",
    "save_adapters",
    "saved_config",
    "stack_experts",
    "unstack_experts",
    "validate_routing_length",
    "zoo",
]
