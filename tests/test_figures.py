"""README and notes quote figures as the CSV files beside them have them, and tell machine, date and commit."""

import re

import pytest

from benchmarks.workloads.languages import FAMILY_OF
from tests import figures
from tests.figures import FIGURES, MARKER, ROOT, MisquotedError, Quote, agrees, quotes_in, rows_of, table_of, tables_of

NOTES = {path.name: path for path in sorted((ROOT / "notes").glob("*.md"))} | {"README.md": ROOT / "README.md"}
PERFORMANCE = NOTES["performance.md"].read_text(encoding="utf-8")
MULTILINGUAL = NOTES["multilingual.md"].read_text(encoding="utf-8")
SCALING = NOTES["scaling.md"].read_text(encoding="utf-8")
KINDS = {"Linear": "linear", "MLP": "mlp", "GRU, 16 positions": "gru"}


def gmean(rows, column="ratio"):
    return figures._OVER_ROWS["gmean"]([float(row[column]) for row in rows])


def least(rows, column="ratio"):
    return min(float(row[column]) for row in rows)


def most(rows, column="ratio"):
    return max(float(row[column]) for row in rows)


def number(text):
    return text.replace(",", "")


def check(row, cells):
    """Each cell beside the value that it must round."""
    for cell, value in cells:
        assert agrees(cell, float(value)), (row, cell, value)


def check_quotes(text):
    for before, quote in quotes_in(text):
        quote.check(before)


@pytest.mark.parametrize("name", NOTES)
def test_quoted_figures_are_their_files(name):
    check_quotes(NOTES[name].read_text(encoding="utf-8"))


# Files that quote figures in sentences.
QUOTING = ("README.md", "multilingual.md", "performance.md", "scaling.md")


def test_notes_that_tell_of_measurements_say_where_their_figures_are_from():
    assert [name for name in QUOTING if not MARKER.search(NOTES[name].read_text(encoding="utf-8"))] == []


def test_every_file_of_figures_is_quoted_or_shown():
    text = "".join(path.read_text(encoding="utf-8") for path in NOTES.values())
    for path in FIGURES.iterdir():
        assert f"figures/{path.name}" in text, path.name


# The setting of a figure: its date, its commit, its machine.
MEASURED = re.compile(r"[Mm]easured on \d{4}-\d\d-\d\d at commit `[0-9a-f]{7}`")


@pytest.mark.parametrize("name", QUOTING)
def test_every_table_of_figures_carries_date_and_commit(name):
    text = NOTES[name].read_text(encoding="utf-8")
    for heading, section in re.findall(r"^(#+ .+)\n((?:(?!#+ ).*\n?)*)", text, re.MULTILINE):
        cells = [cell for table in tables_of(section) for row in table[1:] for cell in row]
        if any(re.search(r"\d\.\d", cell) for cell in cells):
            assert MEASURED.search(section) or "By the model" in section, heading
            assert re.search(r"Xeon|EPYC|[Cc]ounted, on any machine|By the model", section), heading


def test_steps_by_workload():
    table = table_of(PERFORMANCE, "experts", "H", "B", "E = 4")
    assert len(table) == 1 + 102 / 3
    for row in table[1:]:
        for cell, experts in zip(row[3:], (4, 32, 256), strict=True):
            (found,) = rows_of("steps.csv", experts=row[0], H=row[1], B=number(row[2]), E=experts)
            ratio, bound = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cell).groups()
            check(row, [(ratio, found["ratio"]), (bound, found["bound"])])


def group_of(file, label, **more):
    """``all``, a kind of experts, or ``E = 4`` and the like."""
    column, _, value = label.partition(" = ")
    where = {} if label == "all" else {column: number(value)} if value else {"experts": label}
    return rows_of(file, **where, **more)


def test_steps_by_group():
    for row in table_of(PERFORMANCE, "workloads", "", "geometric mean", "its bound")[1:]:
        found = group_of("steps.csv", row[0])
        check(row, zip(row[1:], [len(found), gmean(found), gmean(found, "bound"), least(found)], strict=True))


def test_the_grouped_grid():
    for row in table_of(PERFORMANCE, "workloads", "", "training: geometric mean")[1:]:
        training, inference = (
            group_of("grouped_grid.csv", row[0], measure=measure, against="celmoe-vp")
            for measure in ("training step", "forward in inference mode")
        )
        values = [len(training), gmean(training), least(training), most(training), gmean(inference), least(inference)]
        check(row, zip(row[1:], values, strict=True))


def test_the_named_lines():
    for row in table_of(PERFORMANCE, "experts", "H", "B", "E", "asked: vs celmoe-vp")[1:]:
        for cells, file, stack in ((row[6:11], "grouped_named.csv", True), (row[11:], "grouped_named_zen3.csv", False)):
            where = {
                "experts": KINDS[row[0]],
                "H": row[1],
                "B": number(row[2]),
                "E": row[3],
                "measure": "training step",
            }
            by_rival = {each["against"]: each for each in rows_of(file, **where)}
            values = [by_rival["celmoe-vp"]["ratio"], by_rival["dense"]["ratio"]]
            if stack:
                values = [by_rival["celmoe-vp"]["celmoe_ms"], *values, by_rival.get("stack", {}).get("ratio")]
            if "stack" in by_rival:
                values.append(float(by_rival["dense"]["against_ms"]) / float(by_rival["stack"]["against_ms"]))
            check(row, [(cell, value) for cell, value in zip(cells, values, strict=False) if cell])


def test_operations():
    for row in table_of(PERFORMANCE, "experts", "uniform", "Zipf")[1:]:
        places = [(where, routes) for where in ("accelerator", "cpu") for routes in ("uniform", "zipf")]
        for cell, (where, routes) in zip(row[1:], places, strict=True):
            (found,) = rows_of("grouped_operations.csv", experts=row[0], arranged_for=where, routes=routes)
            check(row, [(cell, found["ratio"])])


def test_planning():
    for row in table_of(PERFORMANCE, "experts by level", "plan", "look-ups")[1:]:
        (found,) = rows_of("plans.csv", experts=row[0].replace(" / ", "/"))
        columns = ("plan_ms", "look_ups_ms", "plan_by_look_ups", "celmoe_vp_ms", "celmoe_vp_by_plan")
        check(row, [(cell.removesuffix(" ms"), found[column]) for cell, column in zip(row[1:], columns, strict=True)])


# Rows of the suite's tables say in words which workload they are of.
HIERARCHY = ", the job's hierarchy"


def workload_of(words, **more):
    kind, _, rest = words.partition(", ")
    where = {"experts": {"linear": "linear", "low-rank": "low-rank", "MLP": "mlp", "GRU": "gru"}[kind]}
    where |= {"hierarchy": "job" if words.endswith(HIERARCHY) else "tree", "routes": "uniform"}
    where |= {name: number(value) for name, value in re.findall(r"([HBE]) = ([\d,]+)", rest)}
    return where | more


def suite_rows(file, row, head, where):
    names = {"celmoe-vp": "celmoe-vp 1.1.4", "looped": "celmoe looped", "grouped": "celmoe grouped"}
    found = {each["contender"]: each["ratio"] for each in rows_of(file, **where)}
    assert found, row
    for contender, cell in zip(head, row, strict=True):
        assert (cell == "\N{EN DASH}") == (names.get(contender, contender) not in found), (row, contender)
        if cell != "\N{EN DASH}":
            check(row, [(cell, found[names.get(contender, contender)])])


def test_whole_steps():
    head, *rows = table_of(PERFORMANCE, "whole step", "B", "E")
    assert rows
    for row in rows:
        experts, width, routes = row[0].split(", ")
        where = {"experts": experts, "H": width.removeprefix("H = "), "B": number(row[1]), "E": number(row[2])}
        where |= {"routes": routes.removesuffix(" routes")}
        (ms,) = {each["ms"] for each in rows_of("whole_steps_cpu.csv", **where, contender="celmoe-vp")}
        assert (row[3] == "\N{EN DASH}") == (not ms), row
        check(row, [(row[3], ms)] if ms else [])
        for name, cell in zip(head[4:-1], row[4:-1], strict=True):
            found = rows_of("whole_steps_cpu.csv", **where, contender=name, against="celmoe-vp")
            assert (cell == "\N{EN DASH}") == (not found), (row, name)
            for each in found:
                cells = re.fullmatch(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", cell).groups()
                check(
                    row, zip(cells, [each[key] for key in ("ratio", "first_quartile", "third_quartile")], strict=True)
                )


def test_the_suites_training_steps():
    head, *rows = table_of(PERFORMANCE, "training step", "B", "E")
    for row in rows:
        # "The same" is of the row above.
        where = workload_of("MLP, H = 64", routes="zipf") if row[0].startswith("the same") else workload_of(row[0])
        where |= {"B": number(row[1]), "E": row[2]}
        suite_rows("suite_training.csv", row[3:], head[3:], where)


def test_the_suites_inference():
    head, *rows = table_of(PERFORMANCE, "inference", "celmoe-vp")
    first = workload_of(rows[0][0])
    for row in rows:
        words = row[0]
        where = {**first, **workload_of(words.removesuffix("likewise"))} if "likewise" in words else workload_of(words)
        suite_rows("suite_inference.csv", row[1:], head[1:], where)


def test_memory():
    text = " ".join(PERFORMANCE.split())
    grouped = r"takes ([\d.]+) \(linear, E = 256\), ([\d.]+) \(MLP.*?\) and ([\d.]+) \(GRU"
    said = re.search(grouped + r".*?celmoe-vp takes (.+?), (.+?) and (\d\.\d+)", text)
    for place, experts in enumerate(("linear", "mlp", "gru")):
        of = {each["contender"]: int(each["bytes"]) for each in rows_of("suite_memory.csv", experts=experts)}
        check(experts, [(said[place + 1], of["celmoe grouped"] / of["celmoe looped"])])
        check(experts, [(said[place + 4], of["celmoe-vp 1.1.4"] / of["celmoe looped"])])


SYSTEMS = ("experts", "universal", "wide", "table", "identity")


def test_accuracy_by_family():
    found = rows_of("multilingual_by_language.csv")
    table = table_of(MULTILINGUAL, "family", "languages", "experts")
    for family, languages, *cells in table[1:-1]:
        of = [row for row in found if FAMILY_OF[row["language"]] == family]
        means = [sum(float(row[system]) for row in of) / len(of) for system in SYSTEMS]
        check(family, [(languages, len(of)), *zip(cells, [100 * mean for mean in means], strict=True)])
    means = [sum(float(row[system]) for row in found) / len(found) for system in SYSTEMS]
    check("all", zip([cell.strip("*") for cell in table[-1][2:]], [100 * mean for mean in means], strict=True))


def test_what_accuracy_took():
    _, *rows = table_of(MULTILINGUAL, "system", "mean", "parameters")
    assert [row[0] for row in rows] == list(SYSTEMS)
    columns = ("mean", "parameters", "multiply_adds", "training_seconds", "words_trained")
    for row in rows:
        (found,) = rows_of("multilingual_costs.csv", system=row[0])
        for cell, column in zip(row[1:], columns, strict=True):
            assert (cell == "\N{EN DASH}") == (not found[column]), (row, column)
            if found[column]:
                check(row, [(number(cell), 100 * float(found[column]) if column == "mean" else found[column])])


def test_new_languages_by_words():
    head, *rows = table_of(MULTILINGUAL, "language", "from", "words")
    assert rows
    for language, neighbour, words, *cells in rows:
        asked = number(words)
        for system, cell in zip(head[3:], cells, strict=True):
            found = rows_of("multilingual_newcomers.csv", language=language, asked=asked, system=system)
            (end,) = [row for row in found if row["test_accuracy"]]
            assert end["neighbour"] == neighbour
            check((language, words, system), [(cell, 100 * float(end["test_accuracy"]))])


def test_new_languages_by_step():
    head, *rows = table_of(MULTILINGUAL, "words", "step", "warm")
    assert rows
    for words, step, *cells in rows:
        for system, cell in zip(head[2:], cells, strict=True):
            found = rows_of("multilingual_newcomers.csv", asked=number(words), step=step, system=system)
            mean = sum(float(row["validation_accuracy"]) for row in found) / len(found)
            check((words, step, system), [(cell, 100 * mean)])


def test_counted_bytes():
    for row in table_of(SCALING, "ranks", "layout", "experts")[1:]:
        name, _, copies = row[1].partition(", ")
        routes, _, hierarchy = row[6].partition(", ")
        where = {"ranks": row[0], "layout": name.strip("`"), "copies": copies.partition(" ")[0] or 1, "expert": row[2]}
        where |= {"H": row[3], "E": row[4], "B": number(row[5]), "routes": routes, "hierarchy": hierarchy or "tree"}
        found = rows_of("scaling_counted.csv", **where)
        assert found, row
        first = [each for each in found if (each["rank"], each["quantity"]) == ("0", "sent")]
        seen = [each for each in first if each["collective"] != "by TCP"]
        (tcp,) = [each for each in first if each["collective"] == "by TCP"]
        sums = [sum(float(each[column]) for each in seen) for column in ("expected", "counted")]
        # Each collective's mean is rounded by itself.
        for cell, value in zip(row[7:10], [*sums, float(tcp["counted"])], strict=True):
            assert abs(float(number(cell)) - value) <= len(seen), (row, cell, value)


def test_modelled_bytes():
    units = {"GB": 1e9, "MB": 1e6}
    for row in table_of(SCALING, "", "N", "E", "B", "routes")[1:]:
        layouts = [
            ("prepare_ddp", ""),
            ("reduce_gradients", ""),
            ("shard_levels", ""),
            ("shard_levels", "8"),
            ("shard_experts", ""),
            ("shard_experts", "8"),
        ]
        for cell, (layout, copies) in zip(row[5:], layouts, strict=True):
            if cell:
                value, unit = cell.split()
                name = layout if not copies else f"{layout}, 8 by copies"
                where = {
                    "N": number(row[1]),
                    "E": number(row[2]),
                    "B": number(row[3]),
                    "routes": row[4],
                    "layout": name,
                }
                found = {each["sent_busiest"] for each in rows_of("scaling_bytes.csv", **where)}
                assert len(found) == 1, (row, name, found)
                check(row, [(value, float(found.pop()) / units[unit])])


STAGES = {"planning": "plan", "dispatch": "dispatch", "experts": "experts"}
ALONE = {
    "linear": "linear",
    "MLP": "mlp",
    "GRU": "gru",
    "block": "block",
    "low-rank": "low-rank",
    "products alone": "product",
}


def test_one_stage_alone():
    _head, *rows = table_of(PERFORMANCE, "one stage alone", "B", "E")
    for row in rows:
        stage, *words = row[0].split(", ")
        where = {"stage": STAGES[stage], "B": number(row[1]), "E": row[2]}
        where |= {"experts": next((ALONE[word] for word in words if word in ALONE), "untouched")}
        where |= {"routes": "zipf" if "Zipf routes" in words else "uniform"}
        where |= dict(word.split(" = ") for word in words if word.startswith("H = "))
        if stage == "planning":
            where["hierarchy"] = "job" if "the job's hierarchy" in words else "even"
        found = {each["contender"]: each for each in rows_of("suite_alone.csv", **where)}
        names = ["celmoe-vp 1.1.4", "celmoe looped", "stack", "vmap", "dense" if "dense" in found else "look-ups"]
        for cell, name in zip(row[3:], names, strict=True):
            assert (cell == "\N{EN DASH}") == (name not in found), (row, name)
            if name in found:
                cells = re.fullmatch(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", cell).groups()
                values = [found[name][column] for column in ("ratio", "first_quartile", "third_quartile")]
                check(row, zip(cells, values, strict=True))


@pytest.mark.parametrize(
    ("comment", "words"),
    [
        ("<!-- steps.csv: 1.32 = gmean ratio -->", "1.32 must be 1.30861"),
        ("<!-- steps.csv: 1.3 = gmean ratio -->", "must stand before"),
        ("<!-- steps.csv: 1.31 = ratio where experts=linear -->", "of one row"),
        ("<!-- steps.csv: 1.31 = ratio where expert=linear -->", "has no column expert"),
        ("<!-- steps.csv: 103 = rows -->", "103 must be 102"),
        ("<!-- steps.csv: geometric mean -->", "a comment must say"),
    ],
)
def test_a_wrong_quote_is_refused(comment, words):
    text = f"Nothing is 1.3 before.\n\nIt is 1.31 or 1.32 in the mean of 102 or 103.\n{comment}\n"
    with pytest.raises(MisquotedError, match=words):
        check_quotes(text)


def test_a_figure_is_rounded_to_its_own_digits():
    assert agrees("1.31", 1.3149)
    assert not agrees("1.31", 1.3151)
    assert not agrees("1.310", 1.3149)
    assert agrees("1,062", 1062.4)
    assert agrees("74.6 %", 0.74585)
    assert not agrees("74.6", 0.74585)
    assert Quote("102", "steps.csv", "rows", "").value() == 102
    assert Quote("0", "steps.csv", "slower", "E=4").value() == 0
