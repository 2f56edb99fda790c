"""A figure of experts' loads, with its numbers in a CSV file beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import InputError, PackageMissingError
from .files import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Names of more experts can't be read.
_MOST_NAMES = 40
_RUN, _RECENT = "#0b6e99", "#e08214"


class Bar(NamedTuple):
    """One expert.

    Attributes:
        expert: The expert's name.
        rows: Its rows in the whole run.
        share: Its share of the level's rows in the whole run.
        recent_share: Its share of the level's recent rows.
        steps_absent: Steps since its last row.
    """

    expert: str
    rows: float
    share: float
    recent_share: float
    steps_absent: int


def save_loads(bars: Mapping[str, Sequence[Bar]], path: Path) -> Path:
    """Draw a panel for each level, and write the numbers beside.

    Args:
        bars: By level, its experts.
        path: The figure's file; its ending tells the format.

    Returns:
        The CSV file's path.

    Raises:
        PackageMissingError: There is no matplotlib.
        InputError: matplotlib writes no such format.
        OSError: A file can't be written.
    """
    try:
        # Only figures need it.
        import matplotlib as mpl  # noqa: PLC0415  # an extra
        from matplotlib.figure import Figure  # noqa: PLC0415  # as above
    except ImportError as error:
        raise PackageMissingError(
            "'matplotlib' must be installed for figures (got no such package; pip install 'celmoe[bench]')"
        ) from error
    # Names are no formulas, whatever the user's own figures hold.
    with mpl.rc_context({"text.usetex": False, "text.parse_math": False, "font.size": 9}):
        # Figure itself, without pyplot: no window system is asked, and nothing has to be closed.
        figure = Figure(figsize=(8, 2.8 * len(bars)), layout="constrained")
        endings = figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in endings:
            raise InputError(f"'path' must end in one of {', '.join(sorted(endings))} (got {str(path)!r})")
        for axes, (level, own) in zip(figure.subplots(len(bars), squeeze=False)[:, 0], bars.items(), strict=True):
            _draw(axes, level, own)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=130)
    numbers = io.StringIO(newline="")
    writer = csv.writer(numbers, lineterminator="\n")
    writer.writerow(["level", *Bar._fields])
    writer.writerows([level, *bar] for level, own in bars.items() for bar in own)
    beside = path.with_suffix(".csv")
    for file_path, content in (
        (path, drawn.getvalue()),
        (beside, numbers.getvalue().encode("utf-8", "surrogatepass")),
    ):
        with replaced(file_path) as file:
            file.write(content)
    return beside


def _draw(axes: Axes, level: str, bars: Sequence[Bar]) -> None:
    """Bars of the whole run, the largest first, with marks of the recent shares."""
    ordered = sorted(bars, key=lambda bar: -bar.share)
    places, size = range(len(ordered)), 4 if len(ordered) <= _MOST_NAMES else 2
    axes.bar(places, [100 * bar.share for bar in ordered], color=_RUN, label="whole run")
    axes.plot(
        places, [100 * bar.recent_share for bar in ordered], "D", color=_RECENT, markersize=size, label="recently"
    )
    axes.axhline(100 / len(ordered), color="#888888", linewidth=0.8, linestyle="--", label="all alike")
    axes.set_title(_shown(level), loc="left")
    axes.set_ylabel("% of rows")
    if len(ordered) <= _MOST_NAMES:
        axes.set_xticks(places, [_shown(bar.expert) for bar in ordered], rotation=90)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(ordered)} experts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))


def _shown(name: str) -> str:
    """The name in one line, with escapes for what can't be drawn."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
