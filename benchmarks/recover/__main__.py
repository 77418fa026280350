"""Run rows of the bench, all seeds and budgets, and write table, JSON and plot.

What is finished is not run again, and a training that was stopped goes on from its last checkpoint. Rows run side by
side, --jobs at a time, one thread each.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks import common
from benchmarks.recover import commands, report
from benchmarks.recover.cell import Cell, run_cell, source_losses
from benchmarks.recover.rows import DEFAULT, ROWS
from benchmarks.recover.settings import Setting, lab, smollm2
from llmshearing.checkpoints.arguments import parse_pairs
from llmshearing.errors import ShearingError

log = logging.getLogger("recover")
EXAMPLES = """examples:
  python -m benchmarks.recover --lab ../shared/lab
  python -m benchmarks.recover ours --lab ../shared/lab --seeds 0 --tokens 409600
  python -m benchmarks.recover turned-kl --smollm2 out/smollm2 --seeds 0
  python -m benchmarks.recover --lab ../shared/lab --report
"""


def run(setting: Setting, cells: Sequence[Cell], root: Path, jobs: int) -> int:
    """Run what is not finished, one line of JSON for each cell; returns how many failed, which stops no other."""
    file, failed = root / "cells.jsonl", 0
    known = {(done["row"], done["seed"], done["budget"]) for done in report.finished(file)}
    missing = [cell for cell in cells if (cell.row, cell.seed, cell.budget) not in known]
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(run_cell, setting, cell, root): cell for cell in missing}
        for future in tqdm(as_completed(futures), total=len(futures), desc="cells", unit="cell"):
            try:
                record = future.result()
            except ShearingError as error:
                log.error("%s: %s", futures[future].name, error)
                failed += 1
                continue
            with file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            log.info("%s: %.4f", futures[future].name, record["loss"])
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        commands.stop()
        raise
    pool.shutdown()
    return failed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recover", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; without any: {', '.join(DEFAULT)}"
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--lab", type=Path, metavar="PATH", help="folder of the lab: source and corpus")
    place.add_argument("--smollm2", type=Path, metavar="PATH", help="folder of `make smollm2`; rows by name alone")
    parser.add_argument("--output", type=Path, default=Path("out/recover"), help="where cells are kept (%(default)s)")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="where JSON and plot go (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and calibration (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", help="budgets (default: the setting's)")
    parser.add_argument(
        "--target", nargs="+", metavar="KEY=VALUE", help="sizes in the config's keys (default: the setting's)"
    )
    parser.add_argument("--samples", type=int, help="sequences to choose by (default: the setting's)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: the setting's)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (%(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is finished")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.rows) - set(ROWS)):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if arguments.smollm2 and not arguments.rows and not arguments.report:
        parser.error(f"--smollm2 runs rows by name alone; there are {', '.join(ROWS)}")
    for path in filter(None, (arguments.lab, arguments.smollm2)):
        if not (path / "source" / "config.json").is_file():
            parser.error(f"{path} has no source/config.json")
    return arguments


def wanted(arguments: argparse.Namespace) -> Setting:
    """The setting, with what the command line says otherwise."""
    setting = lab(arguments.lab) if arguments.lab else smollm2(arguments.smollm2)
    given = {
        "budgets": tuple(sorted(arguments.tokens or (), reverse=True)), "samples": arguments.samples,
        "length": arguments.length, "target": parse_pairs(arguments.target or ()),
    }  # fmt: skip
    return replace(setting, **{name: value for name, value in given.items() if value})


def interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, interrupted)
    setting = wanted(arguments)
    root, start = arguments.output / setting.name, time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(row, seed, budget)
        for budget in setting.budgets
        for seed in arguments.seeds
        for row in arguments.rows or DEFAULT
    ]
    failed = 0
    try:
        source_losses(setting, root)
        failed = 0 if arguments.report else run(setting, cells, root, arguments.jobs)
    except ShearingError as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        log.error("stopped; the same command goes on")
        return 130
    print(report.write(setting, root, arguments.results))
    log.info("%.0f minutes; wrote recover.json and a plot to %s", (time.monotonic() - start) / 60, arguments.results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
