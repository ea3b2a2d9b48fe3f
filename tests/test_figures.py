"""Published figures: each row says how it was made, its command parses, and pages and plots are what the data gives."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mhconvert import api
from mhconvert.cli.main import app, arguments
from tests.donors import make_donor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import figures  # noqa: E402
import speed_table  # noqa: E402

UsageError = typer.BadParameter.__mro__[1]  # typer carries its own click
DATA = figures.load()
ROWS = [
    pytest.param(DATA[name], row, id=f"{name}-{n}")
    for name in DATA
    for n, row in enumerate(DATA[name]["rows"])
]
COMMANDS = sorted(
    {
        line
        for figure in DATA.values()
        for row in (figure, *figure["rows"])
        for line in figures.provenance(figure, row).get("command", [])
    }
)
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def parse(line: str) -> None:
    """Raises what the command line's parser raises, or ValueError for a program that is not ours. Runs nothing."""
    program, *words = shlex.split(line)
    if program == "make":
        if set(words) - set(TARGETS):
            raise ValueError(f"Makefile has no target {words}")
        return
    if program == "python":
        script = ROOT / words[0]
        if not script.is_file():
            raise ValueError(f"there is no {words[0]} in this repository")
        source = script.read_text(encoding="utf-8")
        if unknown := [word for word in words[1:] if word.startswith("-") and f'"{word}"' not in source]:
            raise ValueError(f"{words[0]} has no option {unknown}")
        return
    if program != "mhconvert":
        raise ValueError(f"'{program}' is no command of this repository")
    root: Any = typer.main.get_command(app)
    name, *rest = arguments(words)
    with root.make_context("mhconvert", [name, *rest], resilient_parsing=True) as context:
        root.get_command(context, name).make_context(name, rest, parent=context)


@pytest.mark.parametrize("name", DATA)
def test_a_file_has_what_a_reader_needs(name: str) -> None:
    figure = DATA[name]
    for key in ("title", "about", "command", "commit", "date", "machine", "versions", "columns", "rows"):
        assert figure[key], key
    assert {"torch", "transformers"} <= figure["versions"].keys()
    assert all(re.fullmatch(r"\d+\.\d+(\.\d+)?", version) for version in figure["versions"].values())
    keys = [column["key"] for column in figure["columns"]]
    assert len(set(keys)) == len(keys)
    assert all(any(figures.cell(column, row) for row in figure["rows"]) for column in figure["columns"])
    assert f"| `{name}` |" in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("figure", "row"), ROWS)
def test_a_row_says_how_it_was_made(figure: dict[str, Any], row: dict[str, Any]) -> None:
    assert "source" not in row, "a number that no command of ours gives is no row"
    assert "versions" not in row, "they hold for all rows of a file"
    made = figures.provenance(figure, row)
    assert made["command"]
    assert re.fullmatch(r"[0-9a-f]{7,40}", made["commit"])
    assert date.fromisoformat(made["date"]).isoformat() == made["date"]
    assert "core" in made["machine"] or "GPU" in made["machine"]


@pytest.mark.parametrize(("figure", "row"), ROWS)
def test_a_ratio_is_the_perplexity_over_the_donors(figure: dict[str, Any], row: dict[str, Any]) -> None:
    for perplexity, ratio in (("perplexity", "ratio"), ("perplexity_8", "ratio_8")):
        if perplexity in row and ratio in row:
            expected = row[perplexity] / figure["donor"][perplexity]
            unit = (
                row[ratio].as_tuple().exponent
            )  # the last digit that is published; both parts were rounded too
            assert abs(expected - row[ratio]) <= 10**unit * 0.5 + float(row[ratio]) * 5e-4


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_names_no_place_of_one_machine(line: str) -> None:
    paths = [word for word in shlex.split(line) if "/" in word]
    assert not [word for word in paths if re.search(r"(^|[\s\"'=\[])[/~.]", word)]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("mhconvert smollm2-135m --to mla --kv-bugdet 0.5", UsageError),
        ("mhconvert bench small --batch many", UsageError),
        ("mhconvert eval", UsageError),
        ("make measurements", ValueError),
        ("python quality.py", ValueError),
        ("python benchmarks/vllm_speed.py --pyhton VLLM_PYTHON", ValueError),
    ],
)
def test_a_wrong_command_does_not_parse(line: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse(line)


def test_pages_and_plots_are_what_the_data_gives() -> None:
    assert not figures.stale(), "run make figures"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small repository with one page, in which everything is as the data gives it."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    (tmp_path / "docs").mkdir()
    regions = [f"<!-- figure: {spec} -->\n<!-- /figure -->\n" for spec in ("mla", "speed:method=DHA")]
    page = "# Measured\n\n" + "\nText.\n\n".join(regions)
    (tmp_path / "docs/measured.md").write_text(page, encoding="utf-8")
    (tmp_path / "README.md").write_text("No table.\n", encoding="utf-8")
    pytest.importorskip("matplotlib")
    assert figures.write(tmp_path) == [tmp_path / "docs/measured.md", tmp_path / figures.PLOT]
    assert not figures.stale(tmp_path)
    return tmp_path


def test_tables_are_filled_between_their_markers(tree: Path) -> None:
    page = (tree / "docs/measured.md").read_text(encoding="utf-8")
    assert "| 50 % | high (65k tokens, 180 steps) | 25.90 | 1.14 × | 0.117 | 81.2 % |" in page
    assert "\n\nText.\n\n" in page
    assert page.count("| DHA |") == sum(row["method"] == "DHA" for row in DATA["speed"]["rows"]) > 0
    assert "| MLA |" not in page


def test_a_number_changed_by_hand_is_found_and_mended(tree: Path) -> None:
    page = tree / "docs/measured.md"
    good = page.read_text(encoding="utf-8")
    page.write_text(good.replace("25.90", "24.90"), encoding="utf-8")
    assert list(figures.stale(tree)) == [page]
    figures.write(tree)
    assert page.read_text(encoding="utf-8") == good


def test_a_number_changed_in_the_data_makes_page_and_plot_stale(tree: Path) -> None:
    file = tree / "benchmarks/mla.json"
    file.write_text(file.read_text(encoding="utf-8").replace("27.05", "27.06"), encoding="utf-8")
    assert list(figures.stale(tree)) == [tree / "docs/measured.md", tree / figures.PLOT]


def test_a_missing_plot_is_stale_and_drawn_to_the_same_bytes(tree: Path) -> None:
    plot = tree / figures.PLOT
    drawn = plot.read_bytes()
    plot.unlink()
    assert list(figures.stale(tree)) == [plot]
    figures.write(tree)
    assert plot.read_bytes() == drawn


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mal", "no figure 'mal'; there are coded, coded_texts, conversion_time, cost"),
        ("mla:effort=slow", "no row with effort=slow; effort is one of default, high, quick"),
        ("mla:columns=kv_share|ppl", "no column 'ppl'; there are kv_share"),
        ("mla:effort=high,kv_share=75", "no row of mla is left"),
    ],
)
def test_a_marker_that_names_nothing_is_refused(spec: str, words: str) -> None:
    with pytest.raises(figures.FigureError, match=re.escape(words)):
        figures.table(DATA, spec)


@pytest.mark.parametrize(
    "text",
    ["<!-- figure: mla -->\n", "<!-- /figure -->\n", "<!-- figure: mla -->\n" * 2 + "<!-- /figure -->\n"],
)
def test_a_marker_without_a_partner_is_refused(text: str) -> None:
    with pytest.raises(figures.FigureError, match="no partner"):
        figures.fill(text, DATA)


def test_columns_of_a_rows_making_are_shown_when_named() -> None:
    table = figures.table(
        DATA, "mla:effort=default,kv_share=31.25,columns=perplexity|commit|date|machine|command"
    )
    assert "| 37.21 | 01d5cab | 2026-11-24 | 2 CPU cores, float32 | `mhconvert smollm2-135m --to mla" in table


def test_what_make_bench_runs_are_commands() -> None:
    for _, words in speed_table.CONVERSIONS.values():
        parse(f"mhconvert {speed_table.DONOR} {words} {speed_table.QUICKLY} -o out --force")
    for _, words in speed_table.RIVALS.values():
        parse(f"mhconvert bench {speed_table.DONOR} --against {speed_table.DONOR} {words} --json")
    for options in speed_table.LOADS.values():
        parse(f"mhconvert bench out {options} --json")


def test_what_make_bench_writes_is_a_figure(tmp_path: Path) -> None:
    donor = str(make_donor(tmp_path / "donor"))
    timed = {
        "random": "dha",
        "kv_budget": 0.5,
        "contexts": [24],
        "batch": 2,
        "new_tokens": 2,
        "device": "cpu",
    }
    [found] = api.bench(donor, **timed)["rows"]
    about = {"method": "DHA", "setting": "half", "load": "float32, batch 2"}
    (tmp_path / "benchmarks").mkdir()
    file = tmp_path / "benchmarks/speed.json"
    for method in ("MoH", "MLA", "DHA", "MoH"):  # the second time its rows are replaced
        speed_table.write(file, method, [about | speed_table.row(found) | {"method": method}])
    made = figures.load(tmp_path)
    assert [each["method"] for each in made["speed"]["rows"]] == ["MLA", "DHA", "MoH"]
    row = figures.table(made, "speed").splitlines()[3]
    assert row.startswith("| DHA | half | float32, batch 2 | 24 | ")
    assert f"| {found['ratio']:.2f} × | {found['prefill_ratio']:.2f} × |" in row
    assert figures.provenance(made["speed"], made["speed"]["rows"][0])["command"] == ["make bench"]
