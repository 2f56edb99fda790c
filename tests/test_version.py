"""A release is a tag ``vX.Y.Z``; the tagged commit's ``celmoe/version.py`` says the same."""

import subprocess
from pathlib import Path

import pytest

from celmoe import __version__

ROOT = Path(__file__).resolve().parent.parent


def git(folder, *words):
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout


def releases_here(folder):
    """The versions that tags give to the present commit."""
    tags = git(folder, "tag", "--points-at", "HEAD").split()
    return [tag.removeprefix("v") for tag in tags if tag.startswith("v")]


def test_a_tag_on_this_commit_names_this_version():
    if not (ROOT / ".git").exists():
        pytest.skip("these files are no clone")
    assert set(releases_here(ROOT)) <= {__version__}


def test_a_tag_of_another_version_is_seen(tmp_path):
    git(tmp_path, "init", "--quiet")
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    git(tmp_path, *identity, "commit", "--quiet", "--allow-empty", "--message", "first")
    assert releases_here(tmp_path) == []
    git(tmp_path, "tag", "v0.0.1")
    git(tmp_path, "tag", "seen-by-a-reviewer")
    assert releases_here(tmp_path) == ["0.0.1"] != [__version__]
