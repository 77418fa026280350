"""The results as files and as a table: `evaluation.json` (all of it), `evaluation.csv`, `evaluation.png`."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.evaluate.plot import cost, plot, quality
from llmshearing.files import whole, write_text
from llmshearing.report.page import leave
from llmshearing.report.record import PAGE_FILE, Recorder

log = logging.getLogger(__name__)

JSON_FILE, CSV_FILE, PLOT_FILE = "evaluation.json", "evaluation.csv", "evaluation.png"
PER = ("loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "unigram_loss")
COUNTS = ("documents", "tokens", "words", "bytes")


def measures(model: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, standard error or None) of everything that was measured of a model."""
    yield "parameters", model["parameters"], None
    yield "stored bytes", model["stored_bytes"], None
    length = model["flops"]["length"]
    yield f"FLOPs/token at {length}", model["flops"]["per_token"], None
    yield f"FLOPs/sequence of {length}", model["flops"]["per_sequence"], None
    yield "KV cache bytes/token", model["kv_cache_bytes_per_token"], None
    for domain, found in _domains(model):
        for name in PER:
            yield f"{name} ({domain})", found[name], found.get(f"{name}_stderr")
    for task, metrics in model.get("tasks", {}).items():
        for name, entry in metrics.items():
            if isinstance(entry, dict):
                yield f"{task} {name}", entry["value"], entry["stderr"]
    for phase, found in model.get("speed", {}).items():
        yield f"{phase} tokens/s", found["tokens_per_second"], None


def _domains(model: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if "loss" in model:
        yield "all", model["loss"]["all"]
        if len(model["loss"]["domains"]) > 1:
            yield from model["loss"]["domains"].items()


def rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names of all measures, and of each a cell for every model."""
    columns = [{name: (value, stderr) for name, value, stderr in measures(model)} for model in result["models"]]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return names, [[_cell(*column.get(name, (None, None))) for column in columns] for name in names]


def table(result: dict[str, Any]) -> str:
    """Models side by side, a measure a line; standard errors behind ±."""
    models, (names, cells) = result["models"], rows(result)
    widths = [max(len(model["name"]), *(len(row[at]) for row in cells)) for at, model in enumerate(models)]
    first = max(map(len, names))
    lines = [" " * first + "".join(f"  {model['name']:>{width}}" for model, width in zip(models, widths, strict=True))]
    for name, row in zip(names, cells, strict=True):
        lines.append(
            f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        )
    return "\n".join([*lines, *_notes(result)])


def _notes(result: dict[str, Any]) -> list[str]:
    """How it was measured, and what is to be said of it."""
    lines = [f"measured in {result['dtype']} on {result['device']}"]
    if losses := [model["loss"] for model in result["models"] if "loss" in model]:
        how = dict.fromkeys(
            f"windows of {each['window']} tokens, stride {each['stride']}, {_bos(each)}" for each in losses
        )
        lines.append(f"loss in nats per token; {'; '.join(how)}")
    return [*lines, *(said for model in result["models"] for said in model["remarks"])]


def _bos(loss: dict[str, Any]) -> str:
    return f"BOS {loss['bos']} before each document" if loss["bos"] else "no BOS put before"


def _cell(value: Any, stderr: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1e5:
        text = f"{value:,.0f}"
    else:
        text = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return text if stderr is None else f"{text} ±{stderr:.2g}"


def csv_text(result: dict[str, Any]) -> str:
    """One line for each model and measure: model, measure, value, stderr."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "kind", "measure", "value", "stderr"])
    for model in result["models"]:
        for name, value, stderr in measures(model):
            writer.writerow([model["name"], model["kind"], name, "" if value is None else value, stderr or ""])
    return text.getvalue()


def write_results(result: dict[str, Any], folder: Path) -> None:
    """Write JSON, CSV and, where matplotlib is installed, the plot; each is whole or absent."""
    write_text(folder / CSV_FILE, csv_text(result))
    try:
        with whole(folder / PLOT_FILE) as temporary:
            drawn = plot(result, temporary)
    except ShearingError as error:  # the figures are there, a picture of them is no reason to fail
        drawn = False
        log.warning("warning: no %s: %s", PLOT_FILE, error)
    write_text(folder / JSON_FILE, json.dumps(result, indent=2) + "\n")
    write_report(result, folder)
    log.info("wrote %s to %s", ", ".join([JSON_FILE, CSV_FILE, *([PLOT_FILE] if drawn else []), PAGE_FILE]), folder)


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Leave the record and `report.html`, the table and the plot as a page."""
    models = result["models"]
    recorder = Recorder(folder).start(
        "evaluate",
        f"{len(models)} models side by side",
        about={"compared with": result["source"], "dtype": result["dtype"], "device": result["device"]}
        | {model["name"]: f"{model['path']}, {model['kind']}" for model in models},
    )
    lines = [[name, *row] for name, row in zip(*rows(result), strict=True)]
    recorder.table("Results", [model["name"] for model in models], lines)
    for y in dict.fromkeys(name for model in models for name in quality(model)):
        for x in dict.fromkeys(name for model in models for name in cost(model)):
            recorder.points(x, y, [point for model in models for point in _points(model, x, y)])
    for said in _notes(result):
        recorder.note(said, warning=any(said in model["remarks"] for model in models))
    recorder.end()
    leave(folder)


def _points(model: dict[str, Any], x: str, y: str) -> Iterator[dict[str, Any]]:
    """The model's place in a plot, if it has one."""
    if y in quality(model) and x in cost(model):
        value, stderr = quality(model)[y]
        found = {"name": model["name"], "x": cost(model)[x], "y": value, "error": stderr}
        yield {**found, "marked": model["is_source"]}


def read_results(path: Path | str) -> dict[str, Any]:
    """An `evaluation.json`, or the one in a directory.

    Raises:
        ShearingError: it is absent or no such file.
    """
    from llmshearing.evaluate.run import FORMAT

    path = Path(path) / JSON_FILE if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ShearingError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ShearingError(f"{path} is no evaluation: its format is not {FORMAT!r}")
    return found
