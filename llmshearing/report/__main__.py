"""The command: `llmshearing report RUN [RUN ...]`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llmshearing.commands import parser, run
from llmshearing.errors import ShearingError
from llmshearing.files import write_text
from llmshearing.report.page import missing, page
from llmshearing.report.read import Run, read_run
from llmshearing.report.record import PAGE_FILE

log = logging.getLogger(__name__)

EXAMPLES = """
python -m llmshearing.report out/prune
python -m llmshearing.report out/prune out/continue --output comparison.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Read the records, draw; the exit status."""
    said = "Draw report.html again from the record of a run, or compare several. Runs draw their own as they go on."
    command = parser("python -m llmshearing.report", said, EXAMPLES)
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder that train, prune, evaluate or finetune wrote to"
    )
    command.add_argument("--output", metavar="FILE", help=f"HTML file (default: {PAGE_FILE} in the folder of one run)")
    given = command.parse_args(argv)
    return run(lambda: _work(given.runs, given.output))


def _work(paths: Sequence[str], output: str | None) -> int:
    if output is None and len(paths) > 1:
        raise ShearingError(f"{len(paths)} runs are compared in a file of their own: give --output FILE.html")
    runs = _read(paths)
    target = Path(output) if output is not None else runs[0].path / PAGE_FILE
    if target.is_dir():
        raise ShearingError(f"--output {target} is a directory; give the name of a file")
    for each in runs:
        for text in missing(each):
            log.warning("%s: %s", each.path, text)
    write_text(target, page(runs))
    log.info("wrote %s", target)
    return 0


def _read(paths: Sequence[str]) -> list[Run]:
    """All runs; what is wrong with any of them in one error."""
    found, problems = [], []
    for path in dict.fromkeys(paths):
        try:
            found.append(read_run(path))
        except ShearingError as error:
            problems.append(str(error))
    if problems:
        raise ShearingError("\n".join(problems))
    called = [each.name for each in found]
    for each in found:
        if called.count(each.name) > 1:
            each.name = str(each.path)
    return found


if __name__ == "__main__":
    sys.exit(main())
