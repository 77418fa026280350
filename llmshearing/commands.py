"""What all commands share: where they log, how an error is shown, which exit code follows, how their help looks.

A main reads its arguments and gives its work to :func:`run`:

    options = parser("python -m llmshearing.x", "Do x.", "python -m llmshearing.x a b").parse_args(argv)
    return run(lambda: work(options))
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from textwrap import indent
from typing import Any

from llmshearing.errors import ShearingError

log = logging.getLogger("llmshearing")

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + the signal's number, as shells have it
TRAINING = ("composer", "streaming")
"""Modules that the extra `train` brings."""
EXPECTED: tuple[type[Exception], ...] = (ShearingError, OSError)


def run(
    command: Callable[[], int],
    *,
    level: int = logging.INFO,
    form: str = "%(message)s",
    expected: tuple[type[Exception], ...] = EXPECTED,
) -> int:
    """Set up the log (on standard error), run a command, and return the exit code.

    Args:
        command: returns its own exit code.
        level: of the log. form: of its lines. Both count only where the program has set up no log yet.
        expected: errors that become one line and their ``exit_code`` (without one: 1); others keep their traceback.
    """
    from llmshearing.progress import AboveTheLine  # brings tqdm, which help does without

    logging.basicConfig(level=level, format=form, handlers=[AboveTheLine(sys.stderr)])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells every request
    try:
        code = command()
        sys.stdout.flush()  # here, and not at the interpreter's end, a closed pipe can be answered
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return PIPE_CLOSED
        error = lacking(error, _typed.get() or "this command") or error
        if not isinstance(error, expected):
            raise
        log.error("error: %s", error)
        return int(getattr(error, "exit_code", 1))


def lacking(error: Exception, what: str) -> ShearingError | None:
    """What to install, if an import failed that the extra `train` brings; some commands do without."""
    module = (getattr(error, "name", None) or "").partition(".")[0]
    return _absent(module, what) if isinstance(error, ModuleNotFoundError) and module in TRAINING else None


def needs_training(what: str) -> None:
    """End the program with one error where the extra `train` is not installed.

    For modules that are programs themselves and import what it brings: they ask before they do.
    """

    def fail(module: str) -> int:
        raise _absent(module, what)

    if absent := [module for module in TRAINING if find_spec(module) is None]:
        sys.exit(run(lambda: fail(absent[0])))


def _absent(module: str, what: str) -> ShearingError:
    return ShearingError(f"{what} needs {module}, which is not installed: pip install 'llmshearing[train]'")


def _reader_is_gone() -> bool:
    """Whether it is our output that nobody reads any more (`... | head`), and not some other pipe that broke."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # standard output is no file here
        return False
    poll = select.poll()
    poll.register(output, 0)
    if gone := bool(poll.poll(0)):  # POLLERR: a pipe without a reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes once more at its end
    return gone


_typed: ContextVar[str | None] = ContextVar("_typed", default=None)


@contextmanager
def typed(name: str) -> Iterator[None]:
    """Within the block help calls the command by this name, as `llmshearing prune`; its examples do too."""
    token = _typed.set(name)
    try:
        yield
    finally:
        _typed.reset(token)


def parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends with the examples, line by line as they are given; see :func:`typed`."""
    name = _typed.get() or prog
    examples = re.sub(f"^{re.escape(prog)} ", f"{name} ", examples, flags=re.MULTILINE)
    return argparse.ArgumentParser(prog=name, description=description, **layout(examples))


def layout(examples: str) -> dict[str, Any]:
    """The same for ``add_parser`` of sub-commands."""
    lines = indent(examples.strip("\n"), "  ")
    title = "examples" if "\n" in lines else "example"
    return {"epilog": f"{title}:\n{lines}", "formatter_class": argparse.RawDescriptionHelpFormatter}
