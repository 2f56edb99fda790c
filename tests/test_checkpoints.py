"""Checkpoints cross between celmoe-vp and celmoe, both ways, through files read with ``weights_only=True``."""

import pytest
import torch

import celmoe
from tests import peer
from tests.peer import FIRST, THIRD, VERSIONS, make_hidden, make_model, routing

LEARNED, POSITION_AWARE = {}, {"fusion_type": "position_aware", "fusion_max_positions": 6}
crossings = pytest.mark.parametrize(
    ("version", "fusion"),
    [*((version, LEARNED) for version in VERSIONS), (THIRD, POSITION_AWARE)],
    ids=[*VERSIONS, f"{THIRD} position-aware"],
)


def through_file(value, tmp_path):
    """The value that another process would read."""
    torch.save(value, tmp_path / "checkpoint.pt")
    return torch.load(tmp_path / "checkpoint.pt", weights_only=True)


def trained(lib, fusion, steps=3, *, start=0, checkpoint=None):
    """A model and its AdamW after some steps, from a checkpoint or from another seed than its reader's."""
    model = make_model(lib, kind="gru", **fusion)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if checkpoint is not None:
        # Zeros erase the old values: a load that does nothing would show.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        result = model.load_state_dict(checkpoint["model"], strict=True)
        assert result.missing_keys == result.unexpected_keys == []
        optimizer.load_state_dict(checkpoint["optimizer"])
    for step in range(start, start + steps):
        optimizer.zero_grad()
        peer.push(model(make_hidden(positions=3, seed=step), routing())).backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


@crossings
def test_the_keys_and_their_order_are_the_peers(version, fusion):
    ours = make_model(celmoe, kind="gru", **fusion).state_dict()
    theirs = make_model(peer.peer(version), kind="gru", **fusion).state_dict()
    assert list(ours) == list(theirs)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@crossings
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_training_goes_on_in_the_other_library(version, fusion, direction, tmp_path):
    """Parameters and AdamW's moments: three steps here and three there are six steps of either."""
    libraries = [peer.peer(version), celmoe]
    if direction == "ours to theirs":
        libraries.reverse()
    checkpoint = trained(libraries[0], fusion)
    # Read anew each time: an optimizer goes on working in the tensors that it loaded.
    crossed = trained(libraries[1], fusion, start=3, checkpoint=through_file(checkpoint, tmp_path))
    stayed = trained(libraries[0], fusion, start=3, checkpoint=through_file(checkpoint, tmp_path))
    peer.assert_same(crossed, stayed, tolerance=0.0 if fusion is LEARNED else 1e-5)
    assert not torch.equal(next(iter(crossed["model"].values())), next(iter(checkpoint["model"].values())))


@crossings
def test_there_and_back_again(version, fusion, tmp_path):
    lib = peer.peer(version)
    start = trained(celmoe, fusion)
    there = trained(lib, fusion, steps=0, checkpoint=through_file(start, tmp_path))
    back = trained(celmoe, fusion, steps=0, checkpoint=through_file(there, tmp_path))
    peer.assert_same(back, start)


@pytest.mark.parametrize("version", [FIRST, THIRD])
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_assign_puts_the_loaded_tensors_in_place(version, direction, tmp_path):
    libraries = [peer.peer(version), celmoe]
    if direction == "ours to theirs":
        libraries.reverse()
    loaded = through_file(make_model(libraries[0]).state_dict(), tmp_path)
    with torch.device("meta"):
        model = make_model(libraries[1])
    model.load_state_dict(loaded, assign=True)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == loaded[name].data_ptr(), name
    expected = make_model(libraries[0])(make_hidden(), routing()).fused_hidden
    peer.assert_same(model(make_hidden(), routing()).fused_hidden, expected)


@pytest.mark.parametrize("version", [FIRST, THIRD])
def test_a_wrong_checkpoint_is_refused_alike(version):
    def program(lib):
        state = make_model(lib).state_dict()
        state["level_modules.language.xx.body.0.weight"] = state.pop("level_modules.language.ru.body.0.weight")
        with pytest.raises(RuntimeError) as error:
            make_model(lib).load_state_dict(state)
        return [line.strip() for line in str(error.value).splitlines()[1:]]

    peer.assert_same(program(celmoe), program(peer.peer(version)))


def test_a_mean_fusion_has_no_keys():
    """``use_learned_fusion=False`` means no ``fusion.*`` keys, so a peer's checkpoint has some to spare."""
    ours = make_model(celmoe, use_learned_fusion=False)
    full = make_model(celmoe).state_dict()
    assert not [key for key in ours.state_dict() if key.startswith("fusion.")]
    result = ours.load_state_dict(full, strict=False)
    assert result.missing_keys == []
    assert set(result.unexpected_keys) == {key for key in full if key.startswith("fusion.")}
