"""Any non-empty string names a level or an expert, and checkpoints keep celmoe-vp's keys wherever it had any."""

from __future__ import annotations

import copy
import io
import pickle
from urllib.parse import unquote

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from celmoe import CELMoEConfig, CELMoELossAPI, ExpertConfig, HierarchicalCELMoE, HierarchyLevelConfig
from celmoe.names import NamedModules, is_plain, name_key
from tests.refusals import WIDTH, Counting, rows

ATTRIBUTES = [
    *("to", "keys", "pop", "type", "training", "forward", "state_dict", "__class__", "__dict__", "_modules", "values"),
    *(
        "items",
        "clear",
        "update",
        "T_destination",
        "dump_patches",
        "half",
        "_parameters",
        "call_super_init",
        "extra_repr",
    ),
]
LOOKALIKES = ["%74o", ".%74o", "%2E", "a%2Eb", "%25", "%", "%%", "%zz", "%74%6F", "zh%2EHant", "..%74o", "+", "%C3%A9"]
ODD = [
    "zh.Hant",
    "a.b",
    ".",
    "..",
    "...",
    ".a",
    "a.",
    " ",
    "\n",
    "\t",
    "a b",
    "\x00",
    "é",
    "中文",
    "😀",
    "\u0130",
    "0",
    "-1",
]
OURS = ["_find", "_escaped", "_probe", "ESCAPED", "_get_name", "__dir__"]

HARD = [*ATTRIBUTES, *LOOKALIKES, *ODD, *OURS]
names = st.one_of(
    st.sampled_from(HARD),
    st.text(min_size=1, max_size=6),
    st.text("%.27E4toF_", min_size=1, max_size=6),
    st.sampled_from(HARD).map(name_key),
)
several = st.lists(names, min_size=1, max_size=6, unique=True)


def accepted_by_torch(name):
    try:
        nn.ModuleDict({name: nn.Identity()})
    except (KeyError, TypeError):
        return False
    return name != ""


def hierarchy(levels, experts, factory=lambda *_: Counting()):
    config = CELMoEConfig(
        WIDTH, [HierarchyLevelConfig(level, {name: ExpertConfig(name) for name in experts}) for level in levels]
    )
    torch.manual_seed(0)
    return HierarchicalCELMoE(config, factory)


def name_of(key):
    """Decode a name as a reader of a checkpoint does."""
    return unquote(key[1:]) if key.startswith(".") else key


@given(names)
def test_a_name_and_its_key_are_one_to_one(name):
    assert name_of(name_key(name)) == name
    assert is_plain(name) == accepted_by_torch(name)
    assert (name_key(name) == name) == is_plain(name)


@given(names, names)
@example("%74o", "to")
@example(".%74o", "to")
@example("zh%2EHant", "zh.Hant")
@example("%2E", ".")
def test_two_names_never_share_a_key(first, second):
    assert (name_key(first) == name_key(second)) == (first == second)


@given(names)
def test_an_escaped_key_is_read_back_by_urllib(name):
    if not is_plain(name):
        encoded = name_key(name)
        assert encoded[0] == "."
        assert "." not in encoded[1:]
        assert unquote(encoded[1:]) == name


@given(st.tuples(several, several), st.data())
@settings(max_examples=25)
def test_a_model_of_any_names(levels_and_experts, data):
    levels, experts = levels_and_experts
    levels = levels[:2]
    model = hierarchy(levels, experts)
    keys = list(model.state_dict())
    assert len(set(keys)) == len(keys) == len(levels) * len(experts) * 2 + len(levels) + 2
    # The real names everywhere but in keys, in the config's order everywhere.
    assert list(model.level_modules) == levels
    written = [f"level_modules.{name_key(level)}.{name_key(name)}" for level in levels for name in experts]
    assert [key.removesuffix(".linear.weight") for key in keys if key.endswith("linear.weight")] == written
    by_key = dict(model.named_parameters())
    for level in levels:
        assert list(model.level_modules[level].keys()) == experts
        for name in experts:
            path = f"level_modules.{name_key(level)}.{name_key(name)}"
            module = model.level_modules[level][name]
            assert model.get_submodule(path) is module
            assert by_key[f"{path}.linear.weight"] is module.linear.weight
    # Routes, losses and outputs.
    routes = data.draw(st.lists(st.sampled_from(experts), min_size=3, max_size=3))
    output = model(rows(), dict.fromkeys(levels, routes))
    assert list(output.levels) == levels
    present = sorted(set(routes))
    expected = [f"{name_key(level)}.{name_key(name)}.size" for level in levels for name in present]
    assert list(output.losses) == list(output.loss_weights) == expected
    assert len(set(expected)) == len(levels) * len(present)
    assert all(output.levels[level].routes == routes for level in levels)
    assert list(CELMoELossAPI().compute(output).as_dict()) == expected


@given(several)
@settings(max_examples=40)
def test_plain_names_keep_the_keys_of_a_module_dict_in_order(experts):
    plain = [name for name in experts if accepted_by_torch(name)] or ["plain"]
    mine, torchs = NamedModules(), nn.ModuleDict()
    for name in plain:
        mine[name] = torchs[name] = nn.Linear(1, 1)
    assert list(mine.state_dict()) == list(torchs.state_dict())
    assert list(mine) == list(torchs) == plain
    # Beside names that it would refuse, too.
    mixed = NamedModules({name: nn.Linear(1, 1) for name in experts})
    keys = [key.removesuffix(".weight") for key in mixed.state_dict() if key.endswith("weight")]
    assert list(map(name_of, keys)) == experts == list(mixed)


@pytest.mark.parametrize("name", HARD)
def test_every_hard_name(name):
    other = "other"
    model = hierarchy([name], [name, other])
    output = model(rows(), {name: [name, other, name]})
    assert output.levels[name].routes == [name, other, name]
    assert output.levels[name].name == name
    again = hierarchy([name], [name, other], lambda *_: Counting())
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    # Checkpoints, through a file that is read without running code.
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for mine, loaded in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, loaded)
    assert dir(model.level_modules[name])
    assert repr(model)


def test_names_that_celmoe_vp_accepts_are_those_of_module_dict():
    """celmoe-vp builds nn.ModuleDict({level: nn.ModuleDict({expert: ...})}): its legal names are exactly torch's."""
    from benchmarks.harness.peers import PeerUnavailableError, load_peer

    try:
        peer = load_peer("1.1.4")
    except PeerUnavailableError as error:
        pytest.skip(f"celmoe-vp 1.1.4: {error}")

    class Expert(peer.ExpertModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

    def build(lib, level, name):
        config = lib.CELMoEConfig(
            WIDTH, [lib.HierarchyLevelConfig(level, {name: lib.ExpertConfig(name), "zz": lib.ExpertConfig("zz")})]
        )
        return lib.HierarchicalCELMoE(config, lambda *_: Expert())

    import celmoe

    for name in HARD:
        for level, expert in (("level", name), (name, "expert")):
            try:
                theirs = list(build(peer, level, expert).state_dict())
            except KeyError:
                assert not is_plain(name)
            else:
                assert is_plain(name)
                assert list(build(celmoe, level, expert).state_dict()) == theirs


# NamedModules is an nn.ModuleDict in all that its users do with one.


def three():
    return NamedModules({name: nn.Linear(1, number + 1) for number, name in enumerate(["to", "de", "zh.Hant"])})


def test_reading():
    modules = three()
    assert len(modules) == 3
    assert list(modules) == ["to", "de", "zh.Hant"]
    assert list(modules.keys()) == list(modules)
    assert [module.out_features for module in modules.values()] == [1, 2, 3]
    assert [(name, module.out_features) for name, module in modules.items()] == [("to", 1), ("de", 2), ("zh.Hant", 3)]
    assert dict(modules) == dict(modules.items())
    assert {"to", "de"} < modules.keys()
    assert "zh.Hant" in modules
    assert not any(name in modules for name in ("", "keys", "%74o", "zh%2EHant", "zh", ".%74o", None, 1, []))
    assert modules
    assert not NamedModules()


@pytest.mark.parametrize("name", ["", "keys", "%74o", "zh", ".%74o", None, 1])
def test_what_is_not_there(name):
    modules = three()
    for call in (modules.__getitem__, modules.__delitem__, modules.pop):
        with pytest.raises(KeyError):
            call(name)
    assert len(modules) == 3


def test_changing():
    modules = three()
    new = nn.Linear(1, 9)
    for name in list(modules):
        modules[name] = new
    assert list(modules) == ["to", "de", "zh.Hant"]
    assert all(module is new for module in modules.values())
    assert modules.pop("to") is new
    assert list(modules) == ["de", "zh.Hant"]
    del modules["zh.Hant"], modules["de"]
    assert len(modules) == 0
    assert list(modules) == []
    assert modules.state_dict() == {}
    modules.update({"to": new, "a": new})
    modules.update([("keys", new)])
    modules.update(three())
    assert list(modules) == ["to", "a", "keys", "de", "zh.Hant"]
    modules.clear()
    assert list(modules) == []
    with pytest.raises(KeyError, match="'key' must be a non-empty string"):
        modules[""] = new
    for wrong in (None, 1, 1.5):
        with pytest.raises((KeyError, TypeError)):
            modules[wrong] = new
    assert list(modules) == []


def test_copies():
    modules = three()
    for copied in (copy.deepcopy(modules), pickle.loads(pickle.dumps(modules))):
        assert list(copied) == list(modules)
        assert list(copied.state_dict()) == list(modules.state_dict())
        copied["de"].weight.data.zero_()
        assert modules["de"].weight.abs().sum() > 0


ORDER = ["b", "z.h", "a", "to", "c", "keys", "a.a"]


def in_order(model):
    """True if iteration and checkpoint have levels and experts in this order."""
    keys = [key for key in model.state_dict() if key.endswith("linear.weight")]
    written = [f"level_modules.{name_key(level)}.{name_key(name)}.linear.weight" for level in ORDER for name in ORDER]
    orders = [list(model.level_modules), *map(list, model.level_modules.values())]
    return keys == written and orders == [ORDER] * (1 + len(ORDER))


def loaded(model):
    again = hierarchy(ORDER, ORDER)
    again.load_state_dict(dict(reversed(model.state_dict().items())))
    return again


def replaced(model):
    for modules in model.level_modules.values():
        for name in reversed(list(modules)):
            modules[name] = Counting()
    return model


@pytest.mark.parametrize(
    "way",
    [
        lambda model: model,
        loaded,
        replaced,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.double().requires_grad_(False).eval(),
        lambda model: (model.load_state_dict(copy.deepcopy(model).state_dict(), assign=True), model)[1],
    ],
    ids=["built", "loaded", "replaced", "deepcopy", "pickle", "moved", "assigned"],
)
def test_plain_and_encoded_names_stay_in_the_configs_order(way):
    assert in_order(way(hierarchy(ORDER, ORDER)))


def test_the_checkpoint_of_a_part_and_into_a_dict_is_in_order_too():
    model = hierarchy(ORDER, ORDER)
    modules = model.level_modules["z.h"]
    wanted = [f"{name_key(name)}.linear.{leaf}" for name in ORDER for leaf in ("weight", "bias")]
    assert list(modules.state_dict()) == wanted
    there = {"first": 1}
    assert modules.state_dict(destination=there, prefix="a.b.") is there
    assert list(there) == ["first", *(f"a.b.{key}" for key in wanted)]
    del modules["to"], modules["b"]
    modules["to"] = Counting()
    wanted = ["z.h", "a", "c", "keys", "a.a", "to"]
    assert list(modules) == wanted
    assert [name_of(key.removesuffix(".linear.bias")) for key in modules.state_dict() if "bias" in key] == wanted


def test_the_repr_shows_real_names_in_order():
    plain = {"b": nn.Linear(1, 1), "a": nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()))}
    assert repr(NamedModules(plain)) == repr(nn.ModuleDict(plain)).replace("ModuleDict", "NamedModules")
    assert repr(NamedModules()) == "NamedModules()"
    lines = repr(three()).splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == ["  (to)", "  (de)", "  (zh.Hant)"]


def test_moving_freezing_and_applying_reach_every_module():
    model = hierarchy(["a.b"], ["to", "de"])
    model.double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    model.level_modules["a.b"]["to"].requires_grad_(False)
    output = model(rows().double(), {"a.b": ["to", "de", "to"]})
    output.fused_hidden.sum().backward()
    assert model.level_modules["a.b"]["to"].linear.weight.grad is None
    assert model.level_modules["a.b"]["de"].linear.weight.grad is not None
    seen = []
    model.apply(seen.append)
    assert model.level_modules["a.b"]["to"] in seen
    model.eval()
    assert not model.level_modules["a.b"]["to"].training


def test_functional_call_and_optimizers_use_the_same_keys():
    model = hierarchy(["a.b"], ["to", "de"]).eval()
    routing = {"a.b": ["to", "de", "to"]}
    parameters = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    called = torch.func.functional_call(model, parameters, (rows(), routing)).fused_hidden
    twin = hierarchy(["a.b"], ["to", "de"]).eval()
    twin.load_state_dict(parameters)
    assert torch.equal(called, twin(rows(), routing).fused_hidden)
    optimizer = torch.optim.AdamW(model.parameters())
    model(rows(), routing).fused_hidden.sum().backward()
    optimizer.step()
    again = hierarchy(["a.b"], ["to", "de"])
    other = torch.optim.AdamW(again.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_strict_loading_still_tells_what_is_missing_and_what_is_too_much():
    model = hierarchy(["a.b"], ["to", "de"])
    state = model.state_dict()
    weight = "level_modules..a%2Eb..%74o.linear.weight"
    missing = {key: value for key, value in state.items() if key != weight}
    assert model.load_state_dict(missing, strict=False).missing_keys == [weight]
    too_much = {**state, "level_modules..a%2Eb..%71.linear.weight": state[weight]}
    found = model.load_state_dict(too_much, strict=False)
    assert found.unexpected_keys == ["level_modules..a%2Eb..%71.linear.weight"]
    assert found.missing_keys == []


def test_an_expert_may_be_replaced_under_any_name():
    model = hierarchy(["a.b"], ["to", "de"])
    for name in ("to", "de"):
        new = Counting()
        model.level_modules["a.b"][name] = new
        assert model.level_modules["a.b"][name] is new
        with torch.no_grad():
            new.linear.weight.zero_()
            new.linear.bias.fill_(7.0)
        hidden = model.eval()(rows(), {"a.b": name}).levels["a.b"].hidden
        assert torch.equal(hidden, torch.full((3, WIDTH), 7.0))
    assert model.get_submodule("level_modules..a%2Eb.de") is model.level_modules["a.b"]["de"]
    assert model.get_submodule("level_modules..a%2Eb..%74o") is model.level_modules["a.b"]["to"]


def test_asking_for_many_names_keeps_none_of_them():
    from celmoe import names as module

    modules = three()
    for number in range(20_000):
        assert f"no.{number}" not in modules
    for function in (module.is_plain, module._encoded):
        assert not hasattr(function, "cache_info") or function.cache_info().currsize < 10_000
