"""`report.html`: one file that needs no other, drawn from the records of one run or several.

Python writes text and tables, the script in `web/` draws the figures from the JSON in the page. All that comes from a
record is escaped in both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmshearing.files import write_text
from llmshearing.report.figures import compared, figures, outcome
from llmshearing.report.read import Run, read_run
from llmshearing.report.record import PAGE_FILE, plain

log = logging.getLogger(__name__)

FRAMES = 60
"""Mask maps of a run on the page, evenly spread; the last is always among them."""
VIEWS = {"kept": "kept, without noise", "open": "chance to be open"}
NO_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def draw(folder: Path | str, name: str | None = None) -> Path:
    """Draw the report of a run into its folder, from its record there. name: the folder's, where it will get another.

    Raises:
        ShearingError: see :func:`read_run`. OSError: it cannot be written.
    """
    path = Path(folder) / PAGE_FILE
    run = read_run(folder)
    run.name = name or run.name
    write_text(path, page([run]))
    return path


def leave(folder: Path | str, name: str | None = None) -> None:
    """:func:`draw` where work is done that must not be lost by it: what fails is a warning."""
    try:
        draw(folder, name)
    except Exception:
        log.warning("warning: %s was not drawn", Path(folder) / PAGE_FILE, exc_info=True)


def page(runs: Sequence[Run]) -> str:
    """The whole page; with several runs it begins with their comparison."""
    title = " · ".join(run.name for run in runs)
    data: dict[str, Any] = {
        "runs": [{"figures": figures(run), "points": run.points, "maps": frames(run)} for run in runs]
    }
    body = []
    if len(runs) > 1:
        data["compared"] = compared(runs)
        body.append(_comparison(runs))
    body += [_run(run, number, alone=len(runs) == 1) for number, run in enumerate(runs)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} – llmshearing</title>",
            f"<style>{_web('page.css')}</style></head><body><main>",
            *body,
            '</main><div id="tip" role="status" hidden></div>',
            "<noscript><p>The figures are drawn by a script in this page, which is switched off.</p></noscript>",
            f'<script type="application/json" id="data">{embedded(data)}</script>',
            f"<script>{_web('page.js')}</script>",
            "</body></html>\n",
        ]
    )


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: no character in it ends the element, and no number is NaN."""
    text = json.dumps(plain(data), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def frames(run: Run) -> dict[str, Any] | None:
    """The mask maps of a run, at most FRAMES of them; None without any."""
    every = list(run.maps.values())
    if not every:
        return None
    number = min(len(every), FRAMES)
    chosen = [every[round(at * (len(every) - 1) / max(1, number - 1))] for at in range(number)]
    views = dict.fromkeys(view for frame in chosen for view in frame["maps"])
    shown = [{"batch": frame["batch"], "maps": frame["maps"]} for frame in chosen]
    return {"views": {view: VIEWS.get(view, view) for view in views}, "frames": shown, "step": run.kind != "prune"}


def missing(run: Run) -> list[str]:
    """What the page cannot show, in words."""
    said = []
    if run.kind in ("train", "finetune") and not run.evaluations:
        said.append(
            "This run was never evaluated: there are no losses by domain and no mask maps. "
            + {
                "train": "It evaluates every eval_interval, and before the first batch with eval_first",
                "finetune": "Give --eval FILES or --eval_fraction to hold data out",
            }[run.kind]
            + "; llmshearing evaluate judges what it has saved."
        )
    if run.kind in ("train", "finetune") and not run.steps:
        said.append("No batch of this run was finished.")
    return said


def _web(name: str) -> str:
    return (files("llmshearing.report") / "web" / name).read_text(encoding="utf-8")


def _run(run: Run, number: int, alone: bool) -> str:
    first, last = run.starts[0], run.starts[-1]
    heading = "h1" if alone else "h2"
    tables = [f"<h3>{escape(title)}</h3>{table(each['columns'], each['rows'])}" for title, each in run.tables.items()]
    remarks = {**run.notes, **dict.fromkeys(missing(run), True)}
    said = "".join(f'<p class="{"remark" if warns else "note"}">{escape(text)}</p>' for text, warns in remarks.items())
    history = "".join(f"<li>{escape(str(text))}</li>" for text in last["history"])
    config = last.get("config")
    parts = [
        f'<section class="run"><header><p class="kind">llmshearing {escape(run.kind)}</p>',
        f"<{heading}>{escape(run.name)}</{heading}><p>{escape(last['title'])}</p>",
        f'<p class="state">{escape(state(run))}</p></header>',
        said,
        "".join(tables[:1]),
        f'<div class="figures" data-run="{number}"></div>',
        f'<div class="maps" data-run="{number}"></div>' if run.maps else "",
        *tables[1:],
        "<h3>Facts</h3>",
        facts({**last["about"], "begun": first.get("time"), "versions": _pairs(last["versions"])}),
        "<h3>Commands</h3>",
        "".join(f"<pre>{escape(_started(start))}</pre>" for start in run.starts),
        f"<h3>How it was made</h3><ol>{history}</ol>" if history else "",
        f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>"
        if isinstance(config, str)
        else "",
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def state(run: Run) -> str:
    """How far it is, in words."""
    where = f" at batch {run.last_batch:,}" if run.steps else ""
    if run.end is None:
        return f"Not ended{where}: it is running, or was cut off."
    return f"{run.end['state'].capitalize()}{where}, {run.end.get('time', '')}."


def _started(start: Mapping[str, Any]) -> str:
    where = f"# went on from batch {start['batch']}, {start.get('time')}\n" if start["batch"] else ""
    return f"{where}{start.get('command') or ''}"


def _comparison(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    ends = [outcome(run) for run in runs]
    rows = [[name, *(end.get(name) for end in ends)] for name in dict.fromkeys(name for end in ends for name in end)]
    parts = ['<section class="run"><header><h1>', escape(" · ".join(names)), "</h1></header>", table(names, rows)]
    for title in dict.fromkeys(title for run in runs for title in run.tables):
        parts.append(f"<h3>{escape(title)}</h3>{_joined(runs, title)}")
    return "".join([*parts, '<div class="figures" data-compared="yes"></div></section>'])


def _joined(runs: Sequence[Run], title: str) -> str:
    """The tables of one title side by side."""
    having = [run for run in runs if title in run.tables]
    columns = [f"{run.name}: {column}" for run in having for column in run.tables[title]["columns"]]
    lines = dict.fromkeys(str(row[0]) for run in having for row in run.tables[title]["rows"])
    rows = []
    for name in lines:
        cells: list[Any] = []
        for run in having:
            own = run.tables[title]
            row = next((row for row in own["rows"] if str(row[0]) == name), [name])
            cells += [*row[1:], *[None] * len(own["columns"])][: len(own["columns"])]
        rows.append([name, *cells])
    return table(columns, rows)


def table(columns: Iterable[Any], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table whose first column names the lines."""
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in columns)
    lines = "".join(f'<tr><th scope="row">{escape(str(row[0]))}</th>{"".join(map(_td, row[1:]))}</tr>' for row in rows)
    return f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _td(value: Any) -> str:
    text = cell(value)
    return f'<td class="text">{escape(text)}</td>' if len(text) > 30 else f"<td>{escape(text)}</td>"


def facts(found: Mapping[str, Any]) -> str:
    """Names and values."""
    lines = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(cell(value))}</dd>" for name, value in found.items())
    return f"<dl>{lines}</dl>"


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return _pairs(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,.5g}" if abs(value) < 1e4 else f"{value:,.1f}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _pairs(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {cell(value)}" for name, value in found.items() if value is not None)
