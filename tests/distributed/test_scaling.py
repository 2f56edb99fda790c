"""The model of moved bytes, by hand with small numbers; its growth; and its command.

`tests.distributed.test_traffic` compares real steps with the model.
"""

import csv
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.tables.scaling import command, growth, layouts, report
from benchmarks.tables.scaling.collectives import all_gather, all_reduce, all_to_all, by_kind, reduce_scatter, total
from benchmarks.tables.scaling.load import Load, expected_load, spread
from benchmarks.tables.scaling.sizes import LevelSizes, ModelSizes, Parameter, bytes_of, sizes_of_workload
from benchmarks.workloads.hierarchies import EVEN, HIERARCHIES, JOB, ONE_LEVEL, shares_of
from benchmarks.workloads.languages import FAMILY_OF
from benchmarks.workloads.workload import Workload

# An expert of 3 numbers for all, and three of 4; a fusion of 2. Numbers have 4 bytes.
SIZES = ModelSizes(
    (
        LevelSizes("all", ((Parameter((3,), 4),),)),
        LevelSizes("some", ((Parameter((2, 2), 4),),) * 3),
    ),
    (Parameter((2,), 4),),
)
LOAD = Load(
    {"all": np.array([1.0]), "some": np.array([0.5, 0.5, 0.0])},
    {"all": np.array([1.0]), "some": np.array([1.0, 0.5, 0.0])},
)
LOSS = all_reduce("samples of the loss", 8, 4)


def test_data_parallel_by_hand():
    gradients, used = 12 + 48 + 8 + 4, 4 * (1 + 3 + 1 + 1)
    assert layouts.data_parallel(SIZES, 4) == [
        LOSS,
        all_reduce("gradients", gradients, 4),
        all_reduce("used parameters", used, 4),
    ]


def test_reduction_by_hand():
    assert layouts.reduced(SIZES, LOAD, 4) == [
        LOSS,
        all_reduce("existing gradients", 5, 4),
        all_reduce("gradients", 12 + 16 + 8 + 8, 4),
    ]


def test_levels_by_hand():
    """Three rows in two parts are four, and so are two rows in four parts."""
    parts = layouts.fully_sharded(SIZES, 2, 2)
    assert parts == [
        LOSS,
        *[all_gather("all parameters", 16, 2)] * 2,
        *(reduce_scatter("all gradients", 16, 2), all_reduce("all gradients", 8, 2)),
        *[all_gather("some parameters", 48, 2)] * 2,
        *(reduce_scatter("some gradients", 48, 2), all_reduce("some gradients", 24, 2)),
        all_gather("other parameters", 8, 2),
        *(reduce_scatter("other gradients", 8, 2), all_reduce("other gradients", 4, 2)),
        *[all_reduce("used parameters", 4, 2)] * 2,
    ]
    assert total(layouts.fully_sharded(SIZES, 4)).given == 8 + 16 * 1.5 + 96 * 1.5 + 16 * 1.25 + 4


def test_experts_by_hand():
    """The first rank has the first and the third of three equal experts, to which half of all samples go."""
    where = spread(SIZES, LOAD, 2)
    assert where.owners["some"].tolist() == [0, 1, 0]
    assert where.shares["some"].tolist() == [0.5, 0.5]
    rows = layouts.Rows(10, 16, 2)
    assert layouts.expert_parallel(SIZES, LOAD, rows, where, 2, 2) == [
        LOSS,
        all_gather("counts", 8 * 7 * 2, 2),
        all_to_all("rows to experts", 180, 180, 90),
        all_to_all("rows back", 160, 160, 80),
        all_to_all("gradients to experts", 160, 160, 80),
        all_to_all("gradients back", 160, 160, 80),
        all_gather("dtypes", 8 * 3 * 2, 2),
        *[all_reduce("existing gradients", 2, 2)] * 2,
        *[all_reduce("gradients", 20, 2)] * 2,
        all_gather("gradients' norms", 16 * 3 * 2, 2),
        all_reduce("existing gradients", 2, 2),
        all_reduce("gradients", 16, 2),
    ]


def test_a_ring_by_hand():
    assert all_reduce("", 40, 4)[2:] == (40, 40, 60, 60)
    assert all_gather("", 40, 4)[2:] == (10, 40, 30, 30)
    assert reduce_scatter("", 40, 4)[2:] == (40, 10, 30, 30)
    assert all_to_all("", 40, 50, 8)[2:] == (40, 50, 32, 42)
    # An all-reduce is a reduce-scatter and an all-gather.
    assert total([all_gather("", 40, 4), reduce_scatter("", 40, 4)])[4:] == all_reduce("", 40, 4)[4:]
    assert total([])[2:] == (0, 0, 0, 0)
    assert list(by_kind([all_gather("", 4, 2), all_reduce("", 4, 2)])) == ["all-reduce", "all-gather"]


@pytest.mark.parametrize("routes", growth.ROUTES)
@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_shares_are_those_of_drawn_routes(hierarchy, routes):
    num_experts = len(FAMILY_OF) if hierarchy == JOB else 9
    workload = Workload("linear", 8, 20_000, num_experts, routes, hierarchy)
    for level, names in workload.routing().items():
        shares, found = shares_of(hierarchy, num_experts, routes)[level], Counter(names)
        assert list(shares) == workload.levels()[level]
        assert sum(shares.values()) == pytest.approx(1)
        assert all(found[name] / 20_000 == pytest.approx(share, abs=0.015) for name, share in shares.items())


def test_presence_is_that_of_drawn_routes():
    workload = Workload("linear", 8, 50, 100, "zipf")
    drawn = [{name for rank in (0, 1) for name in workload.routing(2 * step + rank)["language"]} for step in range(100)]
    found = [sum(name in each for each in drawn) / 100 for name in workload.levels()["language"]]
    expected = expected_load(workload, 2)
    assert np.abs(np.array(found) - expected.present["language"]).mean() < 0.05
    assert expected.present["universal"].tolist() == [1.0]


def test_sizes_are_those_of_the_model():
    workload = Workload("two-widths", 8, 3, 5)
    sizes = sizes_of_workload(workload)
    experts = [parameter for level in sizes.levels for parameter in level.parameters]
    assert bytes_of(experts) == 4 * workload.parameters_of_experts()
    assert {len(level.experts) for level in sizes.levels} == {len(names) for names in workload.levels().values()}
    assert sizes.others


def test_samples_can_be_balanced_but_for_one_expert_s():
    workload = Workload("linear", 8, 64, 64, "zipf", ONE_LEVEL)
    sizes, load = sizes_of_workload(workload), expected_load(workload, 4)
    by_bytes, by_load = (spread(sizes, load, 4, by_load=by_load).shares["language"] for by_load in (False, True))
    assert by_load.max() < 0.26 < 0.3 < by_bytes.max()
    assert by_bytes.sum() == pytest.approx(1)
    many = spread(sizes, load, 32, by_load=True)
    assert many.shares["language"].max() == load.shares["language"][0]
    assert many.busiest == 0


def test_rows_of_workloads():
    assert not layouts.rows_of(Workload("linear", 8, 64, 8, hierarchy=EVEN)).has_input_gradient
    assert layouts.rows_of(Workload("gru", 8, 64, 8)) == layouts.Rows(64, 16 * 8 * 4)
    assert layouts.rows_of(Workload("masked-block", 8, 64, 8)) == layouts.Rows(64, 16 * 8 * 4, 16)


def test_the_command(tmp_path, monkeypatch, capsys):
    few = [each for each in growth.grown() if each[2] in (2, 64) and each[1].num_experts in (8, 256)]
    few = [(axis, replace(workload, hidden_size=16), ranks) for axis, workload, ranks in few]
    monkeypatch.setattr(command, "grown", lambda: iter(few))
    assert command.main(["--report", str(tmp_path)]) == 0
    assert "shard_experts" in capsys.readouterr().out
    assert (tmp_path / "scaling_bytes.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "scaling_bytes.csv").read_text().splitlines()))
    assert {row["axis"] for row in rows} == {"N", "E", "B"}
    assert all(int(row["sent_busiest"]) >= int(row["sent_mean"]) - 1 for row in rows)


@pytest.mark.parametrize("count", [["1"], ["2", "1"]])
def test_the_command_refuses_one_rank(count, capsys):
    assert command.main(["--count", *count]) == 2
    assert capsys.readouterr().err == "'--count' must be a whole number, at least 2 (got '1')\n"


def test_bytes_in_words():
    assert [report.in_units(each) for each in (8, 999.6, 1e6, 20_709_800_000)] == ["8 B", "1 kB", "1 MB", "20.7 GB"]
