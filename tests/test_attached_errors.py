"""Every refusal of attached experts, to the letter; a refused call changes nothing."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

import celmoe
from celmoe import CELMoEConfig
from tests.hosts import CLASSES, ROUTES, TOKENS, WIDTH, Bottleneck, Encoder, config, plan_of, tokens


def attached(where="blocks.*", wrapper="tensor"):
    torch.manual_seed(0)
    return celmoe.attach(Encoder(wrapper), config(), lambda *_: Bottleneck(), where)


def attaching(model=None, where="blocks.*", factory=None, **options):
    """A call of `attach`, on a model or on one that is made then."""
    make, factory = factory or (lambda *_: Bottleneck()), Encoder if model is None else model

    def call():
        host = factory if isinstance(factory, nn.Module) or not callable(factory) else factory()
        celmoe.attach(host, config(), make, where, **options)

    return call


class Sized(Encoder):
    """Has modules that no experts can be behind."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 4)
        self.memory = nn.LSTM(WIDTH, WIDTH)


class Taken(Encoder):
    celmoe = 3


def compiled():
    model = Encoder()
    model.blocks[0].compile(backend="eager")
    return model


class DistributedDataParallel(nn.Module):
    """Stands for PyTorch's."""

    def __init__(self):
        super().__init__()
        self.module = Encoder()


def on_meta():
    with torch.device("meta"):
        return Encoder()


CALLED = "'where' must match modules that are called and give rows by sample (got"
ATTACHABLE = "'model' must be one that experts can be attached to (got"
ATTACHING = [
    (attaching(3), celmoe.ConfigTypeError, "'model' must be a torch.nn.Module (got int)"),
    (
        attaching(where=3),
        celmoe.ConfigTypeError,
        "'where' must be a pattern of module names, or several (got 3)",
    ),
    (attaching(where=[]), celmoe.ConfigTypeError, "'where' must be a pattern of module names, or several (got [])"),
    (
        attaching(where="block.*"),
        celmoe.ConfigError,
        "'where' must match modules of the model (got 'block.*'; nearest: 'blocks.1', 'blocks.0', 'blocks')",
    ),
    (
        attaching(where=["blocks.0", "heads"]),
        celmoe.ConfigError,
        "'where' must match modules of the model (got 'heads'; nearest: 'head')",
    ),
    (
        attaching(where="blocks"),
        celmoe.ConfigError,
        (
            f"{CALLED} 'blocks': a ModuleList, which runs whatever is put into it, or is not called itself; name its "
            "last module, 'blocks.1')"
        ),
    ),
    (
        attaching(Sized(), "middle"),
        celmoe.ConfigError,
        (
            f"{CALLED} 'middle': a Sequential, which runs whatever is put into it, or is not called itself; name its "
            "last module, 'middle.1')"
        ),
    ),
    (
        attaching(Sized(), "attention.out_proj"),
        celmoe.ConfigError,
        f"{CALLED} 'attention.out_proj': a part of MultiheadAttention, which is not called; name the attention itself)",
    ),
    (
        attaching(Sized(), "memory"),
        celmoe.ConfigError,
        f"{CALLED} 'memory': a LSTM with batch_first=False, whose first axis is not the samples')",
    ),
    (
        attaching(Sized(), "layer"),
        celmoe.ConfigError,
        f"{CALLED} 'layer': a TransformerEncoderLayer with batch_first=False, whose first axis is not the samples')",
    ),
    (
        attaching(attached("blocks.0")),
        celmoe.ConfigError,
        f"{ATTACHABLE} 'blocks.0', which have experts or another 'celmoe' already)",
    ),
    (
        attaching(Taken(), where=""),
        celmoe.ConfigError,
        f"{ATTACHABLE} '', which have experts or another 'celmoe' already)",
    ),
    (attaching(compiled), celmoe.ConfigError, f"{ATTACHABLE} a compiled one; attach, then compile)"),
    (
        attaching(lambda: torch.compile(Encoder(), backend="eager"), "_orig_mod.blocks.*"),
        celmoe.ConfigError,
        f"{ATTACHABLE} a compiled one; attach, then compile)",
    ),
    (
        attaching(DistributedDataParallel(), "module.blocks.*"),
        celmoe.ConfigError,
        f"{ATTACHABLE} one that is wrapped for several ranks; attach, then wrap)",
    ),
    (
        attaching(on_meta),
        celmoe.ConfigError,
        (
            "'model' must have its weights before experts are attached (got a device of shapes only at 'blocks.0'; "
            "load the model first)"
        ),
    ),
    (
        attaching(fusion="first"),
        celmoe.ConfigError,
        "'fusion' must be 'last', 'config' or a module (got 'first')",
    ),
    (attaching(engine="fast"), celmoe.EngineError, None),
    (
        attaching(factory=lambda *_: 3),
        celmoe.ConfigTypeError,
        "'expert_factory' must return a torch.nn.Module (got int for expert 'germanic' of level 'family')",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ATTACHING)
def test_attaching(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message is None or str(caught.value) == message


def test_a_factory_that_fails_at_the_second_place_leaves_nothing():
    torch.manual_seed(0)
    model = Encoder()
    before, made = copy.deepcopy(model), []

    def factory(*_):
        made.append(1)
        if len(made) == 9:
            raise ValueError("no more")
        return Bottleneck()

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="no more"):
        celmoe.attach(model, config(), factory, "blocks.*")
    assert torch.equal(torch.get_rng_state(), state)
    assert {*model.state_dict()} == {*before.state_dict()}
    assert torch.equal(model(tokens()), before(tokens()))
    assert vars(model).keys() == vars(before).keys()


OTHER = CELMoEConfig.from_tree({"a": ["x", "y"]}, levels=("group", "shop"), hidden_size=WIDTH)


def routing(plan, model=None, **options):
    def call():
        made = attached() if model is None else model
        with celmoe.routed(made, plan, **options):
            made(tokens())

    return call


WITHOUT = "'model' must have experts attached (got a Encoder without; see celmoe.attach)"
CALLS = [
    (
        lambda: attached()(tokens()),
        celmoe.MissingRouteError,
        (
            "'plan' must be given to a model with experts at 'blocks.0' (got none; call the model within 'with "
            "celmoe.routed(model, plan):', or pass it plan=plan)"
        ),
    ),
    (routing(plan_of(ROUTES), Encoder()), celmoe.ConfigError, WITHOUT),
    (lambda: celmoe.adapters(Encoder()), celmoe.ConfigError, WITHOUT),
    (lambda: celmoe.detach(Encoder()), celmoe.ConfigError, WITHOUT),
    (lambda: celmoe.freeze_host(Encoder()), celmoe.ConfigError, WITHOUT),
    (lambda: celmoe.detach(3), celmoe.InputTypeError, "'model' must be a torch.nn.Module (got int)"),
    (
        lambda: celmoe.adapters(attached(), "head"),
        celmoe.ConfigError,
        "'where' must match places with experts (got 'head'; known: 'blocks.0', 'blocks.1')",
    ),
    (
        routing(3),
        celmoe.InputTypeError,
        "'plan' must be a RoutingPlan (got int; celmoe.adapters(model).compile_routing(routing) makes one)",
    ),
    (
        lambda: attached()(tokens(), plan=[ROUTES]),
        celmoe.InputTypeError,
        "'plan' must be a RoutingPlan (got list; celmoe.adapters(model).compile_routing(routing) makes one)",
    ),
    (
        routing(celmoe.RoutingCompiler(OTHER)({"shop": ["x"] * 6})),
        celmoe.PlanError,
        (
            "'plan' must be a plan of a config with levels 'family', 'language' (got one with 'group', 'shop'); "
            "compile the routing again"
        ),
    ),
    (routing({"language": ["klingon"] * 6}), celmoe.UnknownExpertError, None),
    (
        routing(plan_of(ROUTES[:4])),
        celmoe.PlanError,
        (
            "'plan' must have one sample for each row at 'blocks.0' (got 4 samples for 6 rows; beams of generation "
            "want num_beams=)"
        ),
    ),
    (
        routing(plan_of(ROUTES[:4]), num_beams=2),
        celmoe.PlanError,
        (
            "'plan' must have one sample for each row at 'blocks.0', or 2 for each (got 4 samples for 6 rows; beams of "
            "generation want num_beams=)"
        ),
    ),
    (routing(plan_of(ROUTES), num_beams=0), celmoe.InputTypeError, "'num_beams' must be an integer from 1 on (got 0)"),
    (
        routing(plan_of(ROUTES), num_beams=True),
        celmoe.InputTypeError,
        "'num_beams' must be an integer from 1 on (got True)",
    ),
    (
        routing(plan_of(ROUTES), attached(wrapper="object")),
        celmoe.InputTypeError,
        "the output of 'blocks.0' must be a tensor of rows by sample, or begin with one (got Wrapped)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_calls(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message is None or str(caught.value) == message


class ReadsInput(Bottleneck):
    reads_input = True


def reading(model, call, **options):
    def run():
        celmoe.attach(model, config(), lambda *_: ReadsInput(CLASSES), "head")
        with celmoe.routed(model, plan_of(ROUTES), **options):
            call(model)

    return run


READING = [
    (
        reading(Encoder(), lambda model: model.head(torch.zeros(6, WIDTH)), context=torch.zeros(6)),
        celmoe.InputTypeError,
        "'context' must be a mapping for experts that read the input of their module (got Tensor at 'head')",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), READING)
def test_experts_that_read_their_modules_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_an_input_without_rows():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = Table()

    class Table(nn.Module):
        def forward(self, size):
            return torch.zeros(size, WIDTH)

    model = celmoe.attach(Host(), config(), lambda *_: ReadsInput(), "table")
    with celmoe.routed(model, plan_of(ROUTES)), pytest.raises(celmoe.InputError) as caught:
        model.table(6)
    assert str(caught.value) == (
        "the first argument of 'table' must have a row for each of its output's 6, for its experts read it (got int)"
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors():
    """PyTorch's encoder makes some in evaluation, if it is given a mask."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
    model = celmoe.attach(nn.TransformerEncoder(layer, 1).eval(), config(), lambda *_: Bottleneck(), "layers.0")
    padding = torch.zeros(6, 5, dtype=torch.bool)
    padding[:, 3:] = True
    with torch.no_grad(), celmoe.routed(model, plan_of(ROUTES)), pytest.raises(celmoe.InputTypeError) as caught:
        model(torch.randn(6, 5, WIDTH), src_key_padding_mask=padding)
    assert str(caught.value) == (
        "the output of 'layers.0' must be a dense tensor (got a nested one; build nn.TransformerEncoder with "
        "enable_nested_tensor=False)"
    )


def test_files(tmp_path):
    model = attached()
    (tmp_path / "wrong").write_bytes(b"no safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "whole").write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    celmoe.save_adapters(attached("blocks.1"), tmp_path / "second")
    only_first = attached("blocks.0")
    for call, error, message in (
        (
            lambda: celmoe.save_adapters(model, tmp_path / "x", by="languages"),
            celmoe.UnknownLevelError,
            "'by' must be a level of the experts (got 'languages'; nearest: 'language')",
        ),
        (
            lambda: celmoe.load_adapters(model, tmp_path / "none"),
            celmoe.CheckpointError,
            f"'path' must be a file of safetensors, or a folder with some (got {str(tmp_path / 'none')!r})",
        ),
        (
            lambda: celmoe.load_adapters(model, tmp_path / "empty"),
            celmoe.CheckpointError,
            f"'path' must be a file of safetensors, or a folder with some (got {str(tmp_path / 'empty')!r})",
        ),
        (lambda: celmoe.load_adapters(model, tmp_path / "wrong"), celmoe.CheckpointError, None),
        (lambda: celmoe.saved_config(tmp_path / "wrong"), celmoe.CheckpointError, None),
        (
            lambda: celmoe.saved_config(tmp_path / "whole"),
            celmoe.CheckpointError,
            (
                f"'path' must be written by save_adapters, for places of one config (got {str(tmp_path / 'whole')!r}, "
                "which has no config)"
            ),
        ),
        (lambda: celmoe.load_adapters(only_first, tmp_path / "second"), celmoe.CheckpointError, None),
    ):
        with pytest.raises(error) as caught:
            call()
        assert message is None or str(caught.value) == message
    assert "the model's begin with 'blocks.0.celmoe.'" in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_without_safetensors(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(celmoe.PackageMissingError, match="safetensors must be installed"):
        celmoe.save_adapters(attached(), tmp_path / "x")


def test_experts_without_tensors_have_nothing_to_save(tmp_path):
    class Same(celmoe.ExpertModule):
        def forward(self, batch):
            return celmoe.ExpertResult(batch.hidden)

    model = celmoe.attach(Encoder(), config(), lambda *_: Same(), "blocks.0")
    assert model(tokens(), plan=plan_of(ROUTES)).shape[0] < TOKENS
    with pytest.raises(celmoe.ConfigError, match="must have attached experts with tensors to be saved"):
        celmoe.save_adapters(model, tmp_path / "x")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_module_is_refused_before_anything_is_attached():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), torch.jit.script(nn.Linear(WIDTH, WIDTH)))
    with pytest.raises(celmoe.ConfigError, match=r"got one of torch\.jit, which takes no modules"):
        celmoe.attach(model, config(), lambda *_: Bottleneck(), ["0", "1"])
    assert "celmoe" not in model[0]._modules
    assert not model[0]._forward_hooks


def test_a_forward_pass_of_c_code_has_no_argument_called_plan():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    model.forward = max
    celmoe.attach(model, config(), lambda *_: Bottleneck(), "0")
    assert [*celmoe.adapters(model)] == ["0"]
