"""Command line of the bench; see `benchmarks.recover`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from benchmarks.recover import commands
from benchmarks.recover.cell import Cell, run_cell, source_losses
from benchmarks.recover.rows import ROWS
from benchmarks.recover.settings import Setting, lab
from llmshearing.errors import ShearingError

log = logging.getLogger("recover")


def finished(file: Path) -> list[dict]:
    """Records of the cells that are done."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def run(setting: Setting, cells: Sequence[Cell], root: Path, jobs: int) -> None:
    """Run what is not finished; one line of JSON for each cell."""
    file = root / "cells.jsonl"
    source_losses(setting, root)
    known = {(done["row"], done["seed"], done["budget"]) for done in finished(file)}
    missing = [cell for cell in cells if (cell.row, cell.seed, cell.budget) not in known]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_cell, setting, cell, root) for cell in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc="cells", unit="cell"):
            record = future.result()
            with file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            log.info("%s seed %d: %.4f", record["row"], record["seed"], record["loss"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recover", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--lab", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("out/recover"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    setting = lab(arguments.lab)
    root = arguments.output / setting.name
    root.mkdir(parents=True, exist_ok=True)
    commands.environment(1)
    cells = [
        Cell(row, seed, budget)
        for budget in arguments.tokens or setting.budgets
        for seed in arguments.seeds
        for row in arguments.rows or ROWS
    ]
    try:
        run(setting, cells, root, arguments.jobs)
    except ShearingError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
