"""Which programs read what is written: every method x family x reader that is asked for, on tiny models, as a table.

    python -m benchmarks.readers                                                    every family, every method
    python -m benchmarks.readers --methods random obs --families llama qwen2
    python -m benchmarks.readers --transformers5 other/bin/python --output docs/readers.md

Each model is pruned by the command's own function and written. Then each reader loads the directory (or a file that
was converted from it) and computes the log-probabilities of the same tokens. A cell says their largest difference from
transformers', in nats. A reader that is not installed, or was not asked for, is said to be that: no cell says "works"
that was not run.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.readers_checks import FIVE, NOT_RUN, READERS, TOLERANCE, forget
from benchmarks.readers_models import METHODS, attention_of, make
from llmshearing.checkpoints.parity import largest_difference, scores_of, token_ids
from llmshearing.families import UNIFORM

Row = tuple[str, str, Path | None, dict[str, str]]
"""(method, family, directory, reader -> cell)."""
FIRST = next(iter(READERS))
IMPORTED_ONCE = ("torch._dynamo", "peft", "lm_eval.models.huggingface", "torchao.quantization", "ctranslate2")
"""For all processes: what takes seconds to import."""
IN_FIVE = """
import json, sys, torch, llmshearing
from transformers import AutoModelForCausalLM
said = {}
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.load(folder + "/ids.pt")
        with torch.no_grad():
            torch.save(model(input_ids=ids, use_cache=False).logits.log_softmax(-1), folder + "/five.pt")
        said[folder] = None
    except Exception as error:
        said[folder] = f"{type(error).__name__}: {error}"
json.dump(said, open(sys.argv[1], "w"))
"""


def cell(difference: float, tolerance: float = TOLERANCE, note: str = "") -> str:
    if difference <= tolerance and math.isfinite(difference):
        return f"works, {difference:.0e}{note}"
    return f"**differs**, {difference:.2g}{note}"


def row_of(family: str, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Reader -> what it did with a directory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **attention_of(family)).eval()
    ids = token_ids(model.config)
    torch.save(ids, folder / "ids.pt")
    wanted, found = scores_of(model, ids), {}
    torch.save(wanted, folder / "wanted.pt")
    for name, reader in READERS.items():
        if name not in names:
            found[name] = "not run"
        elif reader.package is not None and find_spec(reader.package) is None:
            found[name] = "not installed"
        else:
            try:
                with redirect_stdout(sys.stderr):  # readers talk
                    told = reader.check(folder, model, ids)
                difference = told if isinstance(told, float) else largest_difference(told, wanted)
                found[name] = cell(difference, reader.tolerance, reader.note)
            except Exception as error:  # each reader raises its own kinds
                found[name] = f"refuses: {_short(str(error) or type(error).__name__)}"
    return found


def rows_of(family: str, methods: Sequence[str], names: Sequence[str], five: str | None, scratch: Path) -> list[Row]:
    """The rows of a family, one a method. five: an interpreter that has transformers 5."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # in processes of its own too; readers log what the table says
    try:
        return _rows_of(family, methods, names, five, scratch)
    finally:
        logging.disable(before)


def _rows_of(family: str, methods: Sequence[str], names: Sequence[str], five: str | None, scratch: Path) -> list[Row]:
    rows: list[Row] = []
    for method in methods:
        try:
            folder = make(family, method, scratch / f"{family}-{method}")
            rows.append((method, family, folder, row_of(family, folder, names)))
        except Exception as error:
            rows.append((method, family, None, {FIRST: f"the method refuses: {_short(str(error))}"}))
        sys.stderr.write(f"{method} {family}: {rows[-1][3]}\n")
    forget()
    if five:
        said = in_five(five, [folder for _, _, folder, _ in rows if folder is not None], scratch / f"{family}.json")
        for _, _, folder, found in rows:
            found[FIVE] = said.get(folder, "-")
    return rows


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 110 else line[:107] + "..."


def in_five(python: str, folders: Sequence[Path], told: Path) -> dict[Path | None, str]:
    """Directory -> what transformers 5 did with it, in an interpreter of its own, which writes to the file ``told``."""
    subprocess.run([python, "-c", IN_FIVE, str(told), *map(str, folders)], check=True, stderr=subprocess.DEVNULL)
    found: dict[Path | None, str] = {}
    for folder in folders:
        if error := json.loads(told.read_text())[str(folder)]:
            found[folder] = f"refuses: {_short(error)}"
        else:
            scores, wanted = (torch.load(folder / name, weights_only=True) for name in ("five.pt", "wanted.pt"))
            found[folder] = cell(largest_difference(scores, wanted))
    return found


def version_in(python: str) -> str:
    code = "from importlib.metadata import version; print(version('transformers'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def versions(names: Iterable[str]) -> str:
    said = []
    for name in names:
        try:
            said.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if find_spec("llama_cpp") is not None:
        import llama_cpp

        said.append(f"llama-cpp-python {llama_cpp.__version__}")
    return ", ".join(said)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(UNIFORM), choices=list(UNIFORM))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS))
    parser.add_argument("--transformers5", metavar="PYTHON", help="an interpreter that has transformers 5")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time, each in a process (%(default)s)")
    parser.add_argument("--output", type=Path, help="a Markdown file; else standard output")
    options = parser.parse_args(argv)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # processes for a compiler that is not used here
    rows: list[Row] = []
    python = options.transformers5
    five = version_in(python) if python else None
    with tempfile.TemporaryDirectory() as scratch:
        each = partial(rows_of, methods=options.methods, names=options.readers, five=python, scratch=Path(scratch))
        for made in _mapped(each, options.families, options.jobs):
            rows += made
            if options.output:  # what is interrupted keeps its rows
                options.output.write_text(table(rows, five))
    text = table(rows, five)
    if options.output:
        options.output.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


def _mapped(work: Callable[[str], list[Row]], families: Sequence[str], jobs: int) -> Iterator[list[Row]]:
    if jobs == 1:
        yield from map(work, families)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.readers", *IMPORTED_ONCE])  # those that are not there are left out
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(work, families)


HEAD = """# Readers of what is written

Printed by `python -m benchmarks.readers`: do not edit. Tiny models, float32, one CPU thread. A cell says the largest
difference of a log-probability from transformers' own, in nats; up to 0.01 is "works". `not run` and `not installed`
mean that. What each reader asks of a shape is known to `llmshearing prune --dry-run` (`families/readers.py`).

Methods: `turn` turns hidden units and `fisher` then cuts them to 3/4, where heads stay as wide as they were.
`vocabulary` cuts 64 tokens to 48. `unequal` is `fisher` with a number of intermediate units for each layer. `tie` is
not run: it needs a turned model whose head and embedding lie in one space, and writes the form that others write.

What cells mean:

- **torch.compile, torch.export**: the program is made once for each shape, and given the weights of each row. It is
  made whole, with `backend="aot_eager"` and with `strict=False`. Mixtures of experts of transformers 4.57 loop over the
  experts that tokens chose, which cannot be exported.
- **PEFT**: a LoRA adapter on all linear layers changes nothing at first. With random weights it is saved, loaded and
  merged; the cell is the largest of the three differences.
- **lm-eval**: `HFLM`'s log-likelihood of each token of the sequences.
- **torchao**: linear layers in int8, weights alone. Its difference is that of rounding random weights of a tiny model,
  which is large where experts are chosen by a router. "works" means that it is within 0.01 of the same weights rounded
  to int8 by other code. GPT-2's layers are no `nn.Linear`: of it only the head is rounded.
- **Gemma 2**: transformers 4.57 runs it with SDPA by default, which leaves out `attn_logit_softcapping` without a word:
  about 1e-3 here. transformers 5 always takes the eager attention. The reference is 4.57's eager attention.
- **ctranslate2, Gemma 2**: its converter leaves out `attn_logit_softcapping`, `final_logit_softcapping`,
  `query_pre_attn_scalar` and `sliding_window`; it agrees to 2e-6 where none of them changes anything. A window of 4
  tokens makes 3 nats. Gemma 3's `final_logit_softcapping` and `query_pre_attn_scalar`, and the windows of Qwen2 and
  Qwen3, are left out too. `--readers ctranslate2` refuses such models.
- **llama.cpp, GELU**: it reads GELU from a table in float16, which is about 1e-3 (docs/gguf.md).
- **transformers 5, mixtures of experts**: up to 1e-6, with `experts_implementation="eager"` too: rounding of float32.
"""


def table(rows: Sequence[Row], five: str | None) -> str:
    """The document. five: version of transformers 5."""
    used = versions(("transformers", "torch", "accelerate", "peft", "lm_eval", "torchao", "ctranslate2", "gguf"))
    columns = [*READERS, FIVE]
    lines = [
        HEAD,
        f"Versions: {used}" + (f"; transformers 5: {five}." if five else "."),
        f"Not run at all: {', '.join(NOT_RUN)}.",
        "",
        "| method | family | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for method, family, folder, found in rows:
        cells = (found.get(name, "not run" if folder else "-") for name in columns)
        lines.append(f"| {method} | `{family}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
