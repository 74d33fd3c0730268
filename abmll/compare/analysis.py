"""All tables and plots of a comparison, and a report that shows them."""

from __future__ import annotations

from pathlib import Path

from abmll.compare.plots import CAPTIONS, all_plots
from abmll.compare.results import Results, load_results
from abmll.compare.tables import Table, all_tables
from abmll.files import write_whole

SHOWN = ("summary", "against_each", "chosen", "costs")  # in the report itself; it links to the others


def analyse(folder: Path, into: Path | None = None) -> list[Path]:
    """Write INTO/tables, INTO/plots and INTO/report.md from the runs that are finished; returns the files.

    `folder` holds the runs, and `into` (by default the same) comparison.json, which lists them relative to `folder`:
    several comparisons can share runs. Nothing is kept from an earlier analysis: tables and plots of runs that are gone
    go too. ValueError where there is no comparison or nothing of it is finished.
    """
    into = into or folder
    results = load_results(folder, into)
    for name in ("tables", "plots"):
        (into / name).mkdir(exist_ok=True)
        for old in (into / name).glob("*.*"):
            if old.suffix in (".md", ".csv", ".png"):
                old.unlink()
    tables = all_tables(results)
    written = [path for table in tables for path in table.write(into / "tables")]
    plots = all_plots(results, into / "plots")
    write_whole(into / "report.md", report(results, tables, plots))
    return [*written, *plots, into / "report.md"]


def report(results: Results, tables: list[Table], plots: list[Path]) -> str:
    """Markdown: what was compared and what is missing, the main tables, links to the others, and the plots."""
    runs = results.runs
    seeds = ", ".join(
        f"{label} {number}" for label, number in runs.groupby("run_label", sort=False)["seed"].nunique().items()
    )
    parts = [
        f"# {results.name}",
        f"{len(runs)} finished runs; seeds by method: {seeds}. Baselines: {', '.join(results.baselines)}.",
    ]
    if results.skipped:
        parts.append("\n".join(["Left out:", "", *(f"- {note}" for note in results.skipped)]))
    parts += [
        table.text.replace("\n## ", "\n### ").replace("# ", "## ", 1).rstrip()
        for table in tables
        if table.name in SHOWN
    ]
    links = [f"- [{table.name}](tables/{table.name}.md) ([numbers](tables/{table.name}.csv))" for table in tables]
    parts += ["## All tables", "\n".join(links), "## Plots"]
    for kind, caption in CAPTIONS.items():
        if own := [plot for plot in plots if plot.name.startswith(f"{kind}_")]:
            parts += [caption, *(f"![{plot.stem}](plots/{plot.name})" for plot in own)]
    return "\n\n".join(parts) + "\n"
