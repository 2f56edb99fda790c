"""The multilingual job on two ranks: a step is one process's, runs go on elsewhere, and nobody waits for the dead."""

import contextlib
import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.harness.arguments import OptionError
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.console import Bar, Reporter
from benchmarks.multilingual.job import run
from benchmarks.multilingual.learning import layouts, training
from benchmarks.multilingual.learning.batches import Collator
from benchmarks.multilingual.learning.checkpoint import FILE_NAME
from benchmarks.multilingual.learning.hierarchy import LEVELS, UNIVERSAL, NetworkSettings
from benchmarks.multilingual.learning.layouts import spread
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.learning.ranks import ALONE, LAYOUTS, TIMEOUT, Ranks, joined_ranks
from benchmarks.multilingual.learning.schedule import Deadline
from benchmarks.multilingual.learning.training import make_contender, train_step
from benchmarks.multilingual.options import parse_options
from benchmarks.multilingual.words.evidence import FORM_COUNTS, LEMMA_COUNTS, PROPOSALS
from benchmarks.multilingual.words.rules import EditRule
from benchmarks.multilingual.words.vocabulary import NO_RULE, WINDOW, Vocabulary, WordTable
from tests.slow import slow_but

ROOT = Path(__file__).parents[2]
SMALL = ["--languages", "id,ms", "--batch-size", "256", "--workers", "0"]

# Six words of each language. The last two of each have no rule.
LANGUAGES = ["de", "en", "fi", "id"]
DE, EN, FI, ID = (range(6 * place, 6 * place + 6) for place in range(4))
# Mixed; nothing in common, of unequal length; one rank without a rule, and Finnish on neither.
STEPS = [[0, 6, 12, 18, 1, 7, 13, 19], [*DE[:3], *FI[:4]], [4, 5, 10, 0, 19, 20], [3, 2, 9, 8, 15, 21]]
SETTINGS = NetworkSettings(width=8, character_width=4, universal_width=8, family_width=8, language_width=8)
# Not Adam's blindness to a gradient's size: moments are compared too, and the norm is clipped or is not.
TOLERANCE = 1e-9


def words():
    random = np.random.default_rng(0)
    targets = random.integers(0, 3, 24)
    targets[[rows[place] for rows in (DE, EN, FI, ID) for place in (4, 5)]] = NO_RULE
    return WordTable(
        characters=torch.from_numpy(random.integers(0, 4, (24, WINDOW)).astype(np.int16)),
        language_ids=torch.arange(4, dtype=torch.int16).repeat_interleave(6),
        targets=torch.from_numpy(targets.astype(np.int32)),
        positions=torch.zeros(24, dtype=torch.int32),
        proposals=torch.from_numpy(random.integers(-1, 3, (24, PROPOSALS)).astype(np.int16)),
        counts=torch.from_numpy(random.integers(0, 99, (24, PROPOSALS, FORM_COUNTS + LEMMA_COUNTS)).astype(np.uint8)),
        totals=torch.from_numpy(random.integers(0, 99, (24, FORM_COUNTS)).astype(np.uint8)),
    )


def take_steps(layout, levels, max_norm, folder):
    """The results of each step, and the values of the whole network and its optimizer in the end."""
    vocabulary = Vocabulary(
        languages=LANGUAGES, characters="ab", rules=[EditRule(0, "", 0, "")] * 3, candidates=[[0, 1, 2]] * 4
    )
    torch.manual_seed(0)
    network = Lemmatizer(vocabulary, SETTINGS, levels=levels).double()
    contender = make_contender("experts", network, Losses(network, LossWeights()))
    ranks = ALONE if layout is None else Ranks(dist.get_rank(), dist.get_world_size())
    collator = Collator(words(), vocabulary, rank=ranks.rank, num_ranks=ranks.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CLIP_NORM", max_norm)
        patch.setattr(layouts, "CLIP_NORM", max_norm)
        if layout is not None:
            contender = spread(layout, contender, ranks, folder)
        results = []
        for step, rows in enumerate(STEPS):
            batch = collator(torch.tensor(rows))
            found = train_step(contender, batch, 0.01, done=step / 8, read=True)
            results.append((found.loss, found.terms, found.accuracy, batch.words_by_expert))
            if step == 1:
                contender.whole()
    whole = contender.whole()
    return results, whole.network.state_dict(), whole.optimizer.state_dict()


def assert_like(found, wanted):
    for (loss, terms, accuracy, load), (own_loss, own_terms, own_accuracy, own_load) in zip(
        found[0], wanted[0], strict=True
    ):
        assert loss == pytest.approx(own_loss, abs=TOLERANCE)
        assert terms == pytest.approx(own_terms, abs=TOLERANCE)
        assert (accuracy, load) == (own_accuracy, own_load)
    assert found[2]["state"].keys() == wanted[2]["state"].keys()
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[2], wanted[2], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "levels", "max_norm"),
    slow_but(
        [*((layout, LEVELS, 0.05) for layout in LAYOUTS), ("expert", (UNIVERSAL,), 1e3)],
        [(layout, levels, norm) for layout in LAYOUTS for levels in (LEVELS, (UNIVERSAL,)) for norm in (0.05, 1e3)],
    ),
)
def test_steps_are_those_of_one_process(two, layout, levels, max_norm, tmp_path):
    wanted = take_steps(None, levels, max_norm, tmp_path)
    for found in two.run(take_steps, layout, levels, max_norm, tmp_path):
        assert_like(found, wanted)
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_can_fail(tmp_path):
    wanted = take_steps(None, LEVELS, 1e3, tmp_path)
    for part, name in ((1, "encoder.mix.weight"), (2, "exp_avg")):
        found = copy.deepcopy(wanted)
        state = found[1] if part == 1 else found[2]["state"][0]
        state[name] = state[name] + 2 * TOLERANCE
        with pytest.raises(AssertionError):
            assert_like(found, wanted)
    with pytest.raises(AssertionError):
        assert_like(take_steps(None, LEVELS, 0.05, tmp_path), wanted)


def ask_ranks():
    """One rank's clock is over, and one rank is asked to stop."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    deadline = Deadline(10.0, clock=lambda: 10.0 * ranks.rank, ranks=ranks)
    return deadline.passed(), deadline.steps_that_fit(1.0), ranks.any(ranks.rank == 1), ranks.any(False)


def test_ranks_decide_together(two):
    assert two.run(ask_ranks) == [(True, 0, True, False)] * 2


def test_an_older_pytorch_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "celmoe.distributed", None)
    message = r"^'--parallel' must have a PyTorch that runs celmoe.distributed \(got: "
    with pytest.raises(OptionError, match=message), joined_ranks():
        pytest.fail("there are ranks")


@contextlib.contextmanager
def interrupted(step, here=True):
    """Ctrl-C at the end of a step."""
    move_to = Bar.move_to

    def interrupt(bar, done, total=None, figures=None):
        move_to(bar, done, total, figures)
        if done == step and here:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "move_to", interrupt)
        yield


def run_on_ranks(arguments, stop_at):
    """The job as torchrun would start it; Ctrl-C reaches the second rank alone."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    with pytest.MonkeyPatch.context() as patch, interrupted(stop_at, here=ranks.rank == 1):
        patch.setenv("RANK", str(ranks.rank))
        patch.setenv("WORLD_SIZE", str(ranks.size))
        return run(parse_options(arguments), Reporter(rank=ranks.rank), ranks)


def state_of(folder):
    return torch.load(folder / FILE_NAME, weights_only=True)


def test_a_run_goes_on_on_other_ranks_in_another_layout(two, tmp_path, capsys):
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    assert main([*SMALL, "--steps", "6", "--seed", "5", "--report", str(alone)]) == 0
    start = [*SMALL, "--steps", "6", "--seed", "5", "--report", str(moved), "--parallel", "fsdp"]
    go_on = ["--resume", "--workers", "0", "--report", str(moved)]
    assert two.run(run_on_ranks, start, 2) == [130, 130]
    assert [path.name for path in moved.iterdir()] == [FILE_NAME]
    assert state_of(moved)["progress"]["step"] == 2
    with interrupted(4):
        assert main(go_on) == 130
    assert "resumed at step 2 of 6" in capsys.readouterr().out
    assert two.run(run_on_ranks, [*go_on, "--parallel", "expert"], None) == [0, 0]
    ours, theirs = state_of(moved), state_of(alone)
    for name, contender in theirs["contenders"].items():
        torch.testing.assert_close(ours["contenders"][name]["network"], contender["network"], rtol=0, atol=1e-4)
        moments, wanted = (each["optimizer"]["state"] for each in (ours["contenders"][name], contender))
        torch.testing.assert_close(moments, wanted, rtol=0, atol=1e-4)
    assert ours["progress"]["expert_load"] == theirs["progress"]["expert_load"]
    assert {path.name for path in moved.iterdir()} == {path.name for path in alone.iterdir()}


DIES = """
import os, signal, sys
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.console import Bar

move_to = Bar.move_to

def die(bar, done, *rest):
    move_to(bar, done, *rest)
    if done == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

Bar.move_to = die
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows kills no process by a signal")
def test_who_is_left_says_so_in_time_and_the_checkpoint_is_whole(tmp_path):
    script, report = tmp_path / "dies.py", tmp_path / "report"
    script.write_text(DIES)
    # A checkpoint every second step.
    arguments = [*SMALL, "--steps", "20", "--seed", "5", "--report", str(report), "--parallel", "ddp"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*torchrun, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, err = process.communicate(timeout=2 * TIMEOUT.total_seconds())
    finally:
        # With its ranks, which it would not get to end if it were killed.
        process.terminate()
        process.wait(timeout=2 * TIMEOUT.total_seconds())
    assert process.returncode == 1
    assert "rank 0 of 2 " in err
    assert "; the checkpoint of step 4 is kept: torchrun --nproc-per-node 2 -m benchmarks.multilingual --resume" in err
    assert state_of(report)["progress"]["step"] == 4
    assert [path.name for path in report.iterdir()] == [FILE_NAME]
