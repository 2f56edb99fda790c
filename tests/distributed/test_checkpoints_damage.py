"""Checkpoints that are missing, damaged, foreign or evil are refused by every rank, and nothing has changed."""

import builtins
import importlib
import json
import os
import pickle
import shutil
import zlib
from contextlib import contextmanager
from itertools import pairwise, product
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

import celmoe
from celmoe.distributed import checkpoints, load_checkpoint, load_file, save_checkpoint, write_file
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_close
from tests.distributed.test_checkpoints import build
from tests.distributed.test_data_parallel import STEPS
from tests.strategies import examples

JOB = Job(STEPS[:1])
CURE = "Give the directory of a finished save_checkpoint, or take an older checkpoint"


def trained(layout="alone"):
    model, optimizer, _ = build(layout, JOB)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, optimizer = trained()
    save_checkpoint(folder / "checkpoint", model, optimizer, extra={"step": 1})
    write_file(folder / "checkpoint", folder / "file.pt")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(saved / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture
def file(saved, tmp_path):
    return Path(shutil.copy(saved / "file.pt", tmp_path / "file.pt"))


def tensors_file(folder):
    return next(folder.glob("data-*/rank-0.bin"))


def manifest(folder):
    return json.loads((folder / "checkpoint.json").read_bytes().splitlines()[1])


def forge(folder, change, **head):
    """Change the manifest as its author could: with a checksum that fits."""
    content = manifest(folder)
    change(content)
    body = json.dumps(content).encode()
    said = {"format": "celmoe checkpoint", "version": 1, "checksum": zlib.crc32(body)} | head
    (folder / "checkpoint.json").write_bytes(json.dumps(said).encode() + b"\n" + body + b"\n")


def state_of(model, optimizer):
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return jobs.seen(model, optimizer), groups


def refused(load, path, model, optimizer):
    """The error of a load after which nothing has changed."""
    before, groups = state_of(model, optimizer)
    tensors = [id(value) for state in optimizer.state.values() for value in state.values()]
    with pytest.raises(celmoe.CheckpointError) as caught:
        load(path, model, optimizer)
    after, after_groups = state_of(model, optimizer)
    assert_close("", after, before, 0.0)
    assert after_groups == groups
    assert [id(value) for state in optimizer.state.values() for value in state.values()] == tensors
    return str(caught.value)


def test_what_is_missing_or_foreign_is_told(folder, tmp_path):
    model, optimizer = trained()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".metadata").write_bytes(b"")
    for name, found in (
        ("nowhere", "none"),
        ("empty", "no 'checkpoint.json'"),
        ("other", "one of torch.distributed.checkpoint, or of an older celmoe"),
        ("checkpoint/checkpoint.json", "none"),
    ):
        text = (
            f"'directory' must hold a checkpoint of save_checkpoint (got {found} in {str(tmp_path / name)!r}). {CURE}"
        )
        assert refused(load_checkpoint, tmp_path / name, model, optimizer) == text
        with pytest.raises(celmoe.CheckpointError) as caught:
            write_file(tmp_path / name, tmp_path / "file.pt")
        assert str(caught.value) == text
    assert not (tmp_path / "file.pt").exists()


def cut(path):
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def flip(path, place=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "tensors cut": lambda folder: cut(tensors_file(folder)),
    "tensors gone": lambda folder: tensors_file(folder).unlink(),
    "tensors empty": lambda folder: tensors_file(folder).write_bytes(b""),
    "first bit": lambda folder: flip(tensors_file(folder), 0),
    "last bit": lambda folder: flip(tensors_file(folder), -1),
    "a bit": lambda folder: flip(tensors_file(folder)),
    "generation gone": lambda folder: shutil.rmtree(tensors_file(folder).parent),
    "manifest cut": lambda folder: cut(folder / "checkpoint.json"),
    "manifest empty": lambda folder: (folder / "checkpoint.json").write_bytes(b""),
    "manifest bit": lambda folder: flip(folder / "checkpoint.json"),
    "manifest head": lambda folder: flip(folder / "checkpoint.json", 3),
    "manifest of another": lambda folder: (folder / "checkpoint.json").write_text('{"format": "theirs"}\n{}\n'),
    "manifest of binary": lambda folder: (folder / "checkpoint.json").write_bytes(bytes(range(256))),
    "manifest a list": lambda folder: (folder / "checkpoint.json").write_text("[1, 2]\n[]"),
    "manifest deep": lambda folder: (folder / "checkpoint.json").write_text(100_000 * "["),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_before_anything_changes(folder, tmp_path, damage):
    DAMAGES[damage](folder)
    model, optimizer = trained()
    text = refused(load_checkpoint, folder, model, optimizer)
    assert text.startswith("'directory' "), text
    assert text.endswith(CURE), text
    with pytest.raises(celmoe.CheckpointError):
        write_file(folder, tmp_path / "file.pt")
    assert not (tmp_path / "file.pt").exists()


def test_a_later_version_is_told(folder):
    forge(folder, lambda content: None, version=2)
    text = refused(load_checkpoint, folder, *trained())
    assert "of version 1 (got version 2 in " in text
    assert text.endswith("Read it with the celmoe that wrote it")


def every_tensor(change):
    def forged(content):
        for entry in content["tensors"]:
            change(entry)

    return forged


def every_piece(place, value):
    return every_tensor(lambda entry: [piece.__setitem__(place, value) for piece in entry[3]])


FORGERIES = {
    "another folder": lambda content: content.update(generation="../elsewhere"),
    "an absolute folder": lambda content: content.update(generation="/etc"),
    "another file": every_piece(2, "../../secret"),
    "a dtype that is none": every_tensor(lambda entry: entry.__setitem__(1, "load")),
    "huge": every_tensor(lambda entry: entry.__setitem__(2, [2**60])),
    "negative": every_tensor(lambda entry: entry.__setitem__(2, [-1])),
    "fractions": every_piece(3, 0.5),
    "before the start": every_piece(3, -8),
    "behind the end": every_piece(3, 2**40),
    "no pieces": every_tensor(lambda entry: entry.__setitem__(3, [])),
    "pieces twice": every_tensor(lambda entry: entry[3].extend(entry[3])),
    "pieces elsewhere": every_piece(0, [2**40]),
    "names that are none": lambda content: content["tensors"].append([["model"], "float32", [], []]),
    "names of numbers": lambda content: content["tensors"].append([["model", 1], "float32", [], []]),
    "no tensors": lambda content: content.pop("tensors"),
    "groups of numbers": lambda content: content.update(groups=[1]),
    "extra that is no mapping": lambda content: content.update(extra=[1]),
    "parameters as hyperparameters": lambda content: content["groups"][0].update(params=[]),
    "hyperparameters of another kind": lambda content: content["groups"][0].update(betas=0.9),
    "optimizer state of a tensor's name": lambda content: content["tensors"][0].__setitem__(0, ["optimizer", "a"]),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest_is_told(folder, forgery):
    forge(folder, FORGERIES[forgery])
    refused(load_checkpoint, folder, *trained())


# Boxes of a tensor of shape (12, 6), as offsets and sizes.
SHAPE = (12, 6)
OVERLAPS = {
    "the same box twice": [((0, 0), (6, 6)), ((0, 0), (6, 6))],
    "a box twice among others": [((0, 0), (4, 6)), ((4, 0), (4, 6)), ((4, 0), (4, 6))],
    "a part twice, and a gap": [((0, 0), (6, 6)), ((5, 0), (6, 6))],
    "a part twice along the second axis": [((0, 0), (12, 3)), ((0, 2), (12, 3))],
    "nested boxes": [((0, 0), (8, 6)), ((2, 1), (4, 4)), ((8, 0), (4, 2))],
    "crossing boxes": [((4, 0), (4, 6)), ((0, 2), (12, 2)), ((0, 0), (4, 2)), ((8, 0), (4, 2)), ((0, 4), (4, 2))],
    "behind a box without elements": [((0, 0), (0, 6)), ((0, 0), (6, 6)), ((0, 0), (6, 6))],
}


@pytest.mark.parametrize("boxes", OVERLAPS.values(), ids=OVERLAPS)
def test_pieces_that_overlap_are_told(folder, boxes):
    """The pieces' sizes add up to the tensor's, and their bytes have the checksums that the manifest names."""
    data = tensors_file(folder).read_bytes()

    def overlap(content):
        entry = next(each for each in content["tensors"] if tuple(each[2]) == SHAPE)
        width = getattr(torch, entry[1]).itemsize
        entry[3] = [[*box, "rank-0.bin", 0, zlib.crc32(data[: width * prod(box[1])])] for box in boxes]

    assert sum(prod(sizes) for _, sizes in boxes) == prod(SHAPE)
    forge(folder, overlap)
    assert "pieces that do not make up a tensor of shape (12, 6)" in refused(load_checkpoint, folder, *trained())


AXES = st.lists(st.integers(0, 4), min_size=0, max_size=3)


@examples(100)
@given(shape=AXES, data=st.data())
def test_pieces_pass_if_each_element_is_in_one(shape, data):
    drawn = data.draw(st.sampled_from([random_boxes, random_grid]))(shape, data)
    boxes = [([span.start for span in box], [len(span) for span in box]) for box in drawn]
    times = torch.zeros(shape)
    for offsets, sizes in boxes:
        times[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))] += 1
    try:
        checkpoints.manifest._tensor("float32", shape, [(*box, "rank-0.bin", 0, 0) for box in boxes])
    except ValueError:
        assert not (times == 1).all()
    else:
        assert (times == 1).all()


def random_boxes(shape, data):
    ends = st.tuples(*(st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted) for size in shape))
    return [[range(*each) for each in box] for box in data.draw(st.lists(ends, max_size=6))]


def random_grid(shape, data):
    """A tensor's axes cut anywhere, the pieces in any order, and perhaps one of them in another's place."""
    cuts = [sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    spans = [[range(*each) for each in pairwise(cut)] or [range(0)] for cut in cuts]
    boxes = data.draw(st.permutations(list(product(*spans))))
    if data.draw(st.booleans()):
        boxes[0] = boxes[-1]
    return boxes


def test_an_honest_manifest_passes(folder):
    model, optimizer, _ = build("alone", JOB)
    forge(folder, lambda content: content["groups"][0].update(initial_lr=0.5))
    assert load_checkpoint(folder, model, optimizer) == {"step": 1}
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    assert_close("", state_of(model, optimizer)[0], state_without_gradients(), 0.0)


def state_without_gradients():
    model, optimizer = trained()
    optimizer.zero_grad()
    return jobs.seen(model, optimizer)


# Nothing that a checkpoint holds may run.


def ran(*args, **options):
    raise SystemExit(f"code of the checkpoint's author ran: {args}")


class Evil:
    """It does as it is told."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


PAYLOADS = {
    "print": Evil(print, "code ran"),
    "eval": Evil(eval, "ran()"),
    "getattr": Evil(getattr, Evil(importlib.import_module, "os"), "system"),
    "system": Evil(os.system, "true"),
    "torch.load": Evil(torch.load, "elsewhere.pt"),
    "nested": Metadata({"a": BytesStorageMetadata()}, {"a": ("a",)}, {MetadataIndex("a"): Evil(print, "code ran")}),
}


@contextmanager
def watched():
    """Fail the test if anything unpickles or evaluates, even if the error is caught on the way."""
    calls = []
    watched_names = {pickle: ["load", "loads", "Unpickler"], builtins: ["eval"], os: ["system"], torch: ["load"]}
    with pytest.MonkeyPatch.context() as patch:
        for module, names in watched_names.items():
            for name in names:
                patch.setattr(module, name, lambda *args, name=name, **options: calls.append(name) or ran(name))
        yield
    assert not calls


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("place", [".metadata", "__0.metadata", "checkpoint.json", "rank-0.bin"])
def test_nothing_in_a_directory_is_unpickled(folder, tmp_path, payload, place, capfd):
    path = folder / place if place != "rank-0.bin" else tensors_file(folder)
    path.write_bytes(pickle.dumps(PAYLOADS[payload]))
    model, optimizer = trained()
    with watched():
        if path.name.endswith(".metadata"):
            # Beside a checkpoint of ours: nobody looks.
            load_checkpoint(folder, model, optimizer)
            (folder / "checkpoint.json").unlink()
        refused(load_checkpoint, folder, model, optimizer)
        with pytest.raises(celmoe.CheckpointError):
            write_file(folder, tmp_path / "file.pt")
    assert "code ran" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("key", [None, "model", "extra", "optimizer", "a tensor"])
@pytest.mark.parametrize("is_zipped", [True, False])
def test_nothing_in_a_file_is_unpickled_but_tensors(tmp_path, payload, key, is_zipped, capfd):
    held = {"model": jobs.make_model(JOB).state_dict(), "extra": "{}", "optimizer": {"state": {}, "groups": {}}}
    if key is None:
        held = PAYLOADS[payload]
    elif key == "a tensor":
        held["model"]["fusion.norm.bias"] = PAYLOADS[payload]
    else:
        held[key] = PAYLOADS[payload]
    torch.save(held, tmp_path / "file.pt", _use_new_zipfile_serialization=is_zipped)
    text = refused(load_file, tmp_path / "file.pt", *trained())
    assert text.startswith("'file' must hold what write_file wrote, or a state_dict (")
    assert "code ran" not in "".join(capfd.readouterr())


def test_the_watch_can_fail(tmp_path, capfd):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(PAYLOADS["print"]))
    with (tmp_path / ".metadata").open("rb") as stream:
        pickle.load(stream)
    assert "code ran" in capfd.readouterr().out
    with pytest.raises(AssertionError), watched(), pytest.raises(SystemExit):
        pickle.loads(b"")


def test_torch_load_is_the_only_way_in():
    sources = [path.read_text(encoding="utf-8") for path in Path(checkpoints.__file__).parent.glob("*.py")]
    calls = [line for source in sources for line in source.splitlines() if "torch.load(" in line and "``" not in line]
    assert len(calls) == 1
    assert "weights_only=True" in calls[0]
    assert not [source for source in sources if "import pickle" in source]


# Files.


def flip_in_tensor(path):
    """A bit that PyTorch itself would load."""
    tensor = torch.load(path, weights_only=True)["model"]["fusion.norm.weight"]
    flip(path, path.read_bytes().index(tensor.numpy().tobytes()))
    torch.load(path, weights_only=True)


FILE_DAMAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "text": lambda path: path.write_text("not a checkpoint"),
    "a bit": flip_in_tensor,
    "a list": lambda path: torch.save([1], path),
    "a tensor": lambda path: torch.save(torch.ones(2), path),
    "numbers": lambda path: torch.save({"model": {"a": 1}, "extra": "{}"}, path),
    "extra that is no JSON": lambda path: torch.save({"model": {}, "extra": "{"}, path),
    "extra that is no mapping": lambda path: torch.save({"model": {}, "extra": "[]"}, path),
    "groups that are none": lambda path: torch.save({"model": {}, "extra": "{}", "optimizer": 3}, path),
}


@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_a_damaged_file_is_told_before_anything_changes(file, damage):
    FILE_DAMAGES[damage](file)
    text = refused(load_file, file, *trained())
    assert text.startswith(f"'file' must hold what write_file wrote, or a state_dict ({str(file)!r}) (got "), text


# Faults that only one rank sees.


def load_where_one_rank_fails(folder, failing):
    """Every rank's error; a fault that one rank alone sees must change nothing on any rank."""
    found = []
    for layout in ("experts", "levels"):
        model, optimizer = trained(layout)
        save_checkpoint(folder / layout, model, optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        directory, file = folder / layout, folder / f"{layout}.pt"
        if dist.get_rank() == 0:
            write_file(directory, file)
        dist.barrier()
        if dist.get_rank() == failing:
            directory = Path(shutil.copytree(directory, folder / f"{layout}-damaged"))
            for each in directory.glob("data-*/*.bin"):
                flip(each, 0)
                flip(each, -1)
            file = Path(shutil.copy(file, folder / f"{layout}-damaged.pt"))
            cut(file)
        found += [refused(load_checkpoint, directory, model, optimizer), refused(load_file, file, model, optimizer)]
    return found


@pytest.mark.parametrize("failing", [0, 1])
def test_damage_that_one_rank_sees_is_told_by_all(two, tmp_path, failing):
    first, second = two.run(load_where_one_rank_fails, tmp_path, failing)
    assert first == second
    assert len(first) == 4
    for text in first:
        assert text.startswith(f"rank {failing}: '")


def load_of_different_checkpoints(folder):
    model, optimizer = trained("experts")
    for value in range(2):
        save_checkpoint(folder / str(value), model, optimizer)
    return refused(load_checkpoint, folder / str(dist.get_rank()), model, optimizer)


def test_ranks_that_read_different_checkpoints_are_told(two, tmp_path):
    first, second = two.run(load_of_different_checkpoints, tmp_path)
    assert first == second
    assert first.startswith("rank 0: 'directory' must hold one checkpoint for all ranks (got 'data-")


def test_out_of_memory_while_loading_changes_nothing(folder, monkeypatch):
    def fails(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    model, optimizer = trained()
    monkeypatch.setattr(checkpoints.optimizer_state, "_placed", fails)
    assert "OutOfMemoryError: no memory" in refused(load_checkpoint, folder, model, optimizer)


def test_a_model_without_memory_is_told(folder):
    with torch.device("meta"):
        model = jobs.make_model(JOB)
    with pytest.raises(celmoe.CheckpointError, match=r"on the meta device\). Call model.to_empty\(device=...\) first$"):
        load_checkpoint(folder, model)
