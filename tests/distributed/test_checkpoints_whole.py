"""A checkpoint is whole or not there: ranks that die or fail while they save, and disks that are full."""

import errno
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import celmoe
from celmoe import files
from celmoe.distributed import checkpoints, load_checkpoint, save_checkpoint, write_file
from celmoe.distributed.checkpoints import manifest, pieces, saving
from tests.distributed.jobs import Job, whole
from tests.distributed.test_checkpoints import build
from tests.distributed.test_data_parallel import STEPS
from tests.slow import slow_after

JOB = Job(STEPS[:1], optimizer="SGD")
# Seconds in which who is left has to say so; a hang would last for minutes.
SOON = 20.0
# Windows has neither its limits nor its signals.
resource = pytest.importorskip("resource")
TRACED = {files.__file__, *map(str, Path(checkpoints.__file__).parent.glob("*.py"))}


def kept(model):
    """The parameters that a checkpoint has: not those that stand for others on other ranks."""
    names = model.state_dict().keys()
    return [parameter for name, parameter in model.named_parameters() if name in names]


def fill(model, optimizer, value):
    """One value in every parameter and every state."""
    with torch.no_grad():
        for parameter in kept(model):
            parameter.fill_(value)
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)


def values_of(model, optimizer):
    found = {float(each) for parameter in kept(model) for each in whole(parameter.detach()).unique()}
    states = [whole(each) for parameter in kept(model) for each in optimizer.state[parameter].values()]
    return found | {float(each) for state in states for each in state.unique()}


def values_in(folder):
    """All values of a checkpoint, read by one process: they must be one save's alone."""
    model, optimizer, _ = build("alone", JOB)
    extra = load_checkpoint(folder, model, optimizer)
    assert len(optimizer.state) == len(list(model.parameters()))
    return values_of(model, optimizer) | {extra["value"]}


def save_alone(folder, value, note=""):
    model, optimizer, _ = build("alone", JOB)
    fill(model, optimizer, value)
    save_checkpoint(folder, model, optimizer, extra={"value": value, "note": note})


def names_in(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


@contextmanager
def counted(act=None, at=None):
    """Counts the lines that checkpoints run; at one of them something happens."""
    seen = [0]

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == at:
                act()
        return trace

    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(None)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def saves_twice(layout, folder, victim, share, file_limit=None):
    """A whole save of ones; then one of twos, in which a rank dies at this share of its lines, or bytes."""
    model, optimizer, _ = build(layout, JOB)
    fill(model, optimizer, 1.0)
    with counted() as lines:
        save_checkpoint(folder, model, optimizer, extra={"value": 1.0})
    fill(model, optimizer, 2.0)
    is_victim = dist.get_rank() == victim
    at = int(share * lines[0]) + 1 if is_victim and file_limit is None else None
    if is_victim and file_limit is not None:
        # The kernel ends the process in the midst of a write.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    begun = time.monotonic()
    said = None
    try:
        with counted(kill, at):
            save_checkpoint(folder, model, optimizer, extra={"value": 2.0})
    except celmoe.CheckpointError as error:
        said = str(error)
    told = {"said": said, "seconds": time.monotonic() - begun}
    (folder.parent / f"rank-{dist.get_rank()}.json").write_text(json.dumps(told))


def fork_ranks(folder, cases, size, timeout):
    """Some ranks for each case, forked from a process that has imported all: a start takes no time."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # A first save imports torch's lazy modules once, before the fork.
    save_alone(folder / "first", 1.0)
    values_in(folder / "first")
    # Spreading experts over ranks goes through all objects, to find optimizers.
    gc.freeze()
    for place, case in enumerate(cases):
        (folder / str(place)).mkdir()
        pids = [
            pid for rank in range(size) if (pid := os.fork()) or be_rank(rank, folder / str(place), case, size, timeout)
        ]
        deadline = time.monotonic() + 2 * SOON
        while pids:
            done, _ = os.waitpid(pids[0], os.WNOHANG)
            if done:
                pids.pop(0)
            elif time.monotonic() > deadline:
                os.kill(pids[0], signal.SIGKILL)
            else:
                time.sleep(0.005)


def be_rank(rank, folder, case, size, timeout):
    """Never returns."""
    try:
        store, limit = f"file://{folder}/store", timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
        saves_twice("experts", folder / "checkpoint", *case)
        # Nobody may lean on the end of others that have heard of it.
        wait_for([folder / f"rank-{other}.json" for other in range(size) if other != case[0]])
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    os._exit(0)


def wait_for(paths):
    deadline = time.monotonic() + SOON
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.02)


def run_ranks(folder, cases, size=2, timeout=2 * SOON):
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=fork_ranks, args=(folder, cases, size, timeout))
    process.start()
    process.join()


def assert_whole_after(folder, victim, size=2):
    """One of some ranks died while saving: the others said so in time, and a checkpoint is there, whole."""
    values = values_in(folder / "checkpoint")
    assert values in ({1.0}, {2.0})
    for rank in range(size):
        if rank == victim:
            continue
        told = json.loads((folder / f"rank-{rank}.json").read_text())
        assert told["seconds"] < SOON
        if told["said"] is None:
            assert values == {2.0}
        else:
            assert told["said"].startswith(f"rank {rank}: all {size} ranks must come to a checkpoint (got ")
    # A save that comes to its end clears away the dead one's files.
    save_alone(folder / "checkpoint", 3.0)
    assert values_in(folder / "checkpoint") == {3.0}
    assert names_in(folder / "checkpoint") == ["checkpoint.json", "data"]
    return values


def test_a_rank_is_killed_at_any_moment(tmp_path):
    moments = torch.arange(20).add(torch.rand(20, generator=torch.Generator().manual_seed(0))).div(20).tolist()
    cases = [(place % 2, moment) for place, moment in enumerate(moments)]
    cases += [(victim, 0.0, limit) for victim in (0, 1) for limit in (0, 1000, 5000)]
    run_ranks(tmp_path, cases)
    dead, new = 0, 0
    for place, (victim, *_) in enumerate(cases):
        dead += not (tmp_path / str(place) / f"rank-{victim}.json").exists()
        new += assert_whole_after(tmp_path / str(place), victim) == {2.0}
    # The last lines come after the last thing that ranks tell each other.
    assert dead == len(cases)
    assert 0 < new < len(cases) / 2


@pytest.mark.parametrize("victim", slow_after(1, [0, 2]))
def test_all_of_several_ranks_hear_of_a_killed_one(tmp_path, victim):
    """Ranks that wait for a rank which is alive, but has given up, hear of it at the group's timeout."""
    run_ranks(tmp_path, [(victim, 0.5)], size=4, timeout=SOON / 2)
    assert not (tmp_path / "0" / f"rank-{victim}.json").exists()
    assert_whole_after(tmp_path / "0", victim, size=4)


FAULTS = {
    "disk full": (pieces, "flush", OSError(errno.ENOSPC, "No space left on device")),
    "no such folder": (pieces, "flush", FileNotFoundError(errno.ENOENT, "No such file or directory")),
    "bug": (pieces, "_bytes_of", AttributeError("a bug")),
    "an error that can't be pickled": (saving, "write_pieces", json.JSONDecodeError("bad", "doc", 0)),
    "planning": (saving, "state_by_place", RuntimeError("a state_dict hook failed")),
}


def saves_with_fault(folder, fault, failing):
    """Every rank's error, and that the next save is one as any other."""
    model, optimizer, _ = build("experts", JOB)
    fill(model, optimizer, 1.0)
    save_checkpoint(folder, model, optimizer, extra={"value": 1.0})
    before = sorted(path.name for path in folder.iterdir())
    fill(model, optimizer, 2.0)
    module, name, error = FAULTS[fault]

    def fails(*args):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() in failing:
            patch.setattr(module, name, fails)
        with pytest.raises(celmoe.CheckpointError) as caught:
            save_checkpoint(folder, model, optimizer, extra={"value": 2.0})
    cause = caught.value.__cause__
    after = [sorted(path.name for path in folder.iterdir())] if dist.get_rank() == 0 else [before]
    dist.barrier()
    was = values_in_quietly(folder)
    save_checkpoint(folder, model, optimizer, extra={"value": 2.0})
    return str(caught.value), type(cause).__name__, after == [before], was


def values_in_quietly(folder):
    """The values that several ranks find in the folder."""
    model, optimizer, _ = build("experts", JOB)
    extra = load_checkpoint(folder, model, optimizer)
    return sorted(values_of(model, optimizer) | {extra["value"]})


@pytest.mark.parametrize("failing", [[0], [1], [0, 1]])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_is_told_by_all_and_keeps_the_checkpoint(two, tmp_path, fault, failing):
    found = two.run(saves_with_fault, tmp_path / "checkpoint", fault, failing)
    error = FAULTS[fault][2]
    text = (
        f"rank {failing[0]}: 'directory' must take all of a checkpoint (got {type(error).__name__}: {error}). Mend the "
        f"cause, and save again: the checkpoint that was there before is kept whole"
    )
    for rank, (said, cause, is_swept, values) in enumerate(found):
        assert said == text
        assert cause == (type(error).__name__ if rank in failing else "NoneType")
        assert is_swept
        assert values == [1.0]
    assert values_in(tmp_path / "checkpoint") == {2.0}


def interrupted_save(folder):
    model, optimizer, _ = build("experts", JOB)
    fill(model, optimizer, 1.0)

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(pieces, "flush", interrupt)
        try:
            save_checkpoint(folder, model, optimizer)
        except BaseException as error:  # noqa: BLE001
            return type(error).__name__, str(error)


def test_ctrl_c_on_one_rank_ends_the_save_of_all(two, tmp_path):
    found = two.run(interrupted_save, tmp_path / "checkpoint")
    assert found == [("CheckpointError", "rank 1: KeyboardInterrupt"), ("KeyboardInterrupt", "")]
    assert names_in(tmp_path / "checkpoint") == []


def other_directories(folder):
    model, optimizer, _ = build("experts", JOB)
    with pytest.raises(celmoe.CheckpointError) as caught:
        save_checkpoint(folder / str(dist.get_rank()), model, optimizer)
    return str(caught.value)


def test_directories_that_ranks_do_not_share_are_refused(two, tmp_path):
    first, second = two.run(other_directories, tmp_path)
    assert first == second
    assert first.startswith("rank 1: 'directory' must take all of a checkpoint (got FileNotFoundError: ")


@pytest.mark.parametrize("change", [-1, 1, None], ids=["cut", "longer", "empty"])
def test_a_file_that_the_first_rank_sees_otherwise_is_not_committed(tmp_path, monkeypatch, change):
    save_alone(tmp_path, 1.0)
    size = next(tmp_path.rglob("*.bin")).stat().st_size
    found = 0 if change is None else size + change
    flush = pieces.flush

    def flush_and_change(file):
        flush(file)
        os.truncate(file.name, found)

    monkeypatch.setattr(pieces, "flush", flush_and_change)
    with pytest.raises(celmoe.CheckpointError) as caught:
        save_alone(tmp_path, 2.0)
    assert f"(got {found} bytes of 'rank-0.bin' on rank 0, not {size})" in str(caught.value)
    assert names_in(tmp_path) == ["checkpoint.json", "data"]
    assert values_in(tmp_path) == {1.0}


@contextmanager
def full_disk(limit):
    """Writes beyond so many bytes of a file fail."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


# At the very start; in the tensors; in the manifest.
@pytest.mark.parametrize("limit", [0, 1000, 30_000])
def test_a_full_disk_keeps_the_checkpoint(tmp_path, limit):
    note = 20_000 * "x"
    save_alone(tmp_path, 1.0, note)
    before = sorted(path.name for path in tmp_path.iterdir())
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.bin")]
    assert max(sizes) > 1000
    assert max(sizes) < 30_000 < (tmp_path / "checkpoint.json").stat().st_size
    with full_disk(limit), pytest.raises(celmoe.CheckpointError, match="File too large"):
        save_alone(tmp_path, 2.0, note)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert values_in(tmp_path) == {1.0}


def test_a_full_disk_keeps_the_one_file(tmp_path):
    save_alone(tmp_path / "checkpoint", 1.0)
    write_file(tmp_path / "checkpoint", tmp_path / "file.pt")
    before = (tmp_path / "file.pt").read_bytes()
    save_alone(tmp_path / "checkpoint", 2.0)
    with (
        full_disk(1000),
        pytest.raises(celmoe.CheckpointError, match=r"^'file' must take all of it \(got OSError: .*File too large"),
    ):
        write_file(tmp_path / "checkpoint", tmp_path / "file.pt")
    assert (tmp_path / "file.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "file.pt"]


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("something")
    with pytest.raises(celmoe.CheckpointError, match="FileExistsError"):
        save_alone(tmp_path / "file", 1.0)
    assert (tmp_path / "file").read_text() == "something"


def test_other_files_in_the_directory_are_left_alone(tmp_path):
    (tmp_path / "data-mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    save_alone(tmp_path, 1.0)
    save_alone(tmp_path, 2.0)
    assert names_in(tmp_path) == ["checkpoint.json", "data", "data", "notes.txt"]
    assert values_in(tmp_path) == {2.0}


def test_all_is_on_the_disk_before_it_is_named(tmp_path, monkeypatch):
    """Events reach the disk in order: files, their folder, the manifest beside, its name; then the old ones go."""
    save_alone(tmp_path, 1.0)
    done = []
    fsync, replace, rmtree = os.fsync, Path.replace, saving.shutil.rmtree

    def name(path):
        return str(Path(path).relative_to(tmp_path)).split("-")[0] if Path(path).is_relative_to(tmp_path) else "above"

    def told(verb, path, act, *args):
        done.append(f"{verb} {name(path)}")
        act(*args)

    monkeypatch.setattr(os, "fsync", lambda fd: told("flush", Path(f"/proc/self/fd/{fd}").readlink(), fsync, fd))
    monkeypatch.setattr(Path, "replace", lambda path, to: told("rename", to, replace, path, to))
    monkeypatch.setattr(saving.shutil, "rmtree", lambda path, **rest: told("delete", path, rmtree, path))
    save_alone(tmp_path, 2.0)
    assert done == [
        *("flush data", "flush data", "flush above", "flush checkpoint.json.part", "rename checkpoint.json", "flush ."),
        "delete data",
    ]


def test_what_can_not_be_deleted_is_left_to_the_next_save(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "rmtree", lambda path, **rest: None)
        save_alone(tmp_path, 1.0)
        save_alone(tmp_path, 2.0)
    assert names_in(tmp_path) == ["checkpoint.json", "data", "data"]
    assert values_in(tmp_path) == {2.0}
    save_alone(tmp_path, 3.0)
    assert names_in(tmp_path) == ["checkpoint.json", "data"]


def test_a_manifest_that_can_not_be_read_loses_nothing(tmp_path):
    """Its folder may still be somebody's only copy: it goes with the next save, which is whole, and not before."""
    save_alone(tmp_path, 1.0)
    (tmp_path / manifest.FILE_NAME).write_text("damaged")
    with full_disk(1000), pytest.raises(celmoe.CheckpointError):
        save_alone(tmp_path, 2.0)
    assert names_in(tmp_path)[:2] == ["checkpoint.json", "data"]
    save_alone(tmp_path, 3.0)
    assert names_in(tmp_path) == ["checkpoint.json", "data"]
    assert values_in(tmp_path) == {3.0}


def test_the_comparison_can_fail(tmp_path):
    model, optimizer, _ = build("alone", JOB)
    fill(model, optimizer, 1.0)
    with torch.no_grad():
        next(model.parameters())[0] = 2.0
    save_checkpoint(tmp_path, model, optimizer, extra={"value": 1.0})
    assert values_in(tmp_path) == {1.0, 2.0}
