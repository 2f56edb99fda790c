"""morphoformer, celmoe-vp's real client, runs unchanged on ours: passes, its own trainer, and checkpoints both ways.

Each run is a process of its own (`tests/morphoformer_client.py`), with celmoe-vp's folder or ours as ``celmoe``. The
specification asks for 1e-5 after a forward and backward and 1e-4 after ten AdamW steps; with ``looped`` the bits are
equal, but for the position-aware fusion.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import celmoe
from benchmarks.harness import peers
from tests import peer
from tests.morphoformer_client import CASES
from tests.slow import slow_but

PEER_OF = {"4.7.7": peer.FIRST, "6.0.0": peer.THIRD}
PROGRAM = Path(__file__).with_name("morphoformer_client.py")
TIME_LIMIT = 120


def start_client(version, library, folder, others_folder):
    """Start the client on the ``celmoe`` in the folder ``library``."""
    client = peer.require_peer(lambda: peers.client_folder(version), f"morphoformer {version}")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(library), str(client)]),
        "CELMOE_ENGINE": "looped",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # The client leaves torch.load its default, of whose change torch 2.4 and 2.5 warn.
    warnings = ["-W", "error", "-W", "ignore:You are using `torch.load` with `weights_only=False`:FutureWarning"]
    command = [sys.executable, "-P", *warnings, PROGRAM, version, folder, others_folder]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture(scope="module", params=slow_but(["6.0.0"], CASES))
def runs(request, tmp_path_factory):
    """The client's files on each library; the two run at once, each resuming from the other's checkpoints."""
    version, base = request.param, tmp_path_factory.mktemp("client")
    peers_folder = peer.require_peer(
        lambda: peers.install_folder(f"celmoe-vp=={PEER_OF[version]}"), f"celmoe-vp {PEER_OF[version]}"
    )
    libraries = {"ours": Path(celmoe.__file__).parent.parent, "theirs": peers_folder}
    results, processes = {"version": version}, {}
    try:
        for name, other in [("ours", "theirs"), ("theirs", "ours")]:
            processes[name] = start_client(version, libraries[name], base / name, base / other)
        for name, process in processes.items():
            _, last_words = process.communicate(timeout=TIME_LIMIT)
            assert process.returncode == 0, f"{name}: {last_words.decode(errors='replace')[-3000:]}"
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    for name, library in libraries.items():
        results[name] = torch.load(base / name / "results.pt", weights_only=True)
        # The comparison is worth nothing unless two libraries ran.
        assert Path(results[name]["celmoe"]).is_relative_to(library)
    return results


def cases_of(runs):
    return CASES[runs["version"]]


def tolerance_of(case, of_others):
    """Nothing but position-aware fusion may differ at all."""
    return of_others if case == "typed" else 0.0


def test_a_pass_is_equal(runs):
    for case in cases_of(runs):
        ours, theirs = runs["ours"][case]["pass"], runs["theirs"][case]["pass"]
        peer.assert_same(ours["initial"], theirs["initial"], where=case)
        peer.assert_same(ours, theirs, tolerance=tolerance_of(case, 1e-5), where=case)
        absent = [name for name, grad in ours["grads"].items() if grad is None and ".language.it." in name]
        assert absent
        assert ours["grads"]["token_embedding.weight"].abs().sum() > 0


def test_ten_steps_of_its_own_trainer_are_equal(runs):
    for case in cases_of(runs):
        ours, theirs = runs["ours"][case]["trained"], runs["theirs"][case]["trained"]
        assert ours["global_step"] == 10
        assert_checkpoints_equal(ours, theirs, case)
        before, after = runs["ours"][case]["pass"]["initial"], ours["model_state"]
        assert list(after) == list(before)


def test_each_resumes_from_the_others_checkpoint(runs):
    for case in cases_of(runs):
        ours, theirs = runs["ours"][case]["resumed"], runs["theirs"][case]["resumed"]
        assert ours["global_step"] == 20
        assert_checkpoints_equal(ours, theirs, case)


def assert_checkpoints_equal(ours, theirs, case):
    tolerance = tolerance_of(case, 1e-4)
    for part in ("model_state", "optimizer_state", "scheduler_state", "best_dev_loss"):
        one, other = ours[part], theirs[part]
        if part == "best_dev_loss":
            one, other = torch.tensor(one), torch.tensor(other)
        peer.assert_same(one, other, tolerance=tolerance, where=f"{case} {part}")
