"""Tasks of lm-eval: by their names where a hub can be reached, or offline from local items through task files.

    NAME=FILE.jsonl         a task file of ours (`evaluate/tasks/NAME.yaml`) on local items
    PATH.yaml[=FILE.jsonl]  another task file of lm-eval's form
    NAME                    a task of lm-eval, whose data lm-eval brings

lm-eval asks, scores and computes standard errors; nothing of it is done again here.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmshearing.errors import ShearingError
from llmshearing.evaluate.items import FORMS, check_items
from llmshearing.evaluate.perplexity import bos_id
from llmshearing.progress import tqdm

FOLDER = Path(__file__).parent / "tasks"
NEEDED = ("task", "output_type", "doc_to_text", "doc_to_target", "metric_list")
SPLITS = ("test_split", "validation_split")
ONE_PROCESS = "DISABLE_MULTIPROC"
"""Of lm-eval: its standard errors fork a process for each core, which can hang after torch has started threads."""
WITH_BARS = ("tqdm", "lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")
BOOTSTRAPS = 1000
"""Draws for standard errors that have no closed form."""


def shipped() -> list[str]:
    """Names of our task files."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def need(module: str, extra: str = "eval", what: str = "tasks") -> Any:
    """Import a module of an extra.

    Raises:
        ShearingError: it is not installed; the message says how to.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = error.name or module
        raise ShearingError(
            f"{what} need {name}, which is not installed: pip install 'llmshearing[{extra}]'"
        ) from error


@dataclass(frozen=True)
class TaskSpec:
    """A task to run. config: of a task file; None for a name of lm-eval's."""

    name: str
    config: dict[str, Any] | None = None
    items: int | None = None


def read_tasks(texts: Sequence[str]) -> list[TaskSpec]:
    """What the command line's words mean, checked; needs no lm-eval.

    Raises:
        ShearingError: a task file or its items are absent or wrong, as the message says, or a name is given twice.
    """
    specs = [_read_task(text) for text in texts]
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ShearingError(
            f"task {', '.join(twice)} is given twice; in a task file of its own it can have another name"
        )
    return specs


def _read_task(text: str) -> TaskSpec:
    name, _, data = text.partition("=")
    own = name.endswith((".yaml", ".yml"))
    if not own and not data:
        return TaskSpec(name)
    if not own and name not in shipped():
        raise ShearingError(
            f"task {name!r} has no task file for local items; there are {', '.join(shipped())}. multiple_choice takes "
            "any task of its form, and a task file can be given by its path"
        )
    path = Path(name) if own else FOLDER / f"{name}.yaml"
    config = _read_config(path)
    number = None
    if data:
        form = (config.get("metadata") or {}).get("form")
        if form is not None:
            if form not in FORMS:
                raise ShearingError(f"task file {path}: metadata.form = {form!r}; known are {', '.join(FORMS)}")
            number = check_items(Path(data), form)
        elif not Path(data).is_file():
            raise ShearingError(f"task {name}: there is no file {data}")
        split = next(config[key] for key in SPLITS if config.get(key))
        config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {split: str(Path(data).resolve())}}}
    return TaskSpec(config["task"], config, number)


def _read_config(path: Path) -> dict[str, Any]:
    """A task file, its keys checked."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:  # of YAML's errors each names its line
        raise ShearingError(f"task file {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ShearingError(f"task file {path} holds no keys and values; see {FOLDER / 'multiple_choice.yaml'}")
    problems = [f"no key {key!r}" for key in NEEDED if config.get(key) is None]
    if not any(config.get(key) for key in SPLITS):
        problems.append(f"none of {', '.join(SPLITS)}")
    if problems:
        raise ShearingError(f"task file {path} has {', '.join(problems)}; see {FOLDER / 'multiple_choice.yaml'}")
    return config


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    specs: Sequence[TaskSpec],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bos: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Task -> `items` and its metrics, each with `value` and `stderr`.

    Args:
        limit: items of a task, from the first. bos: as in :class:`.perplexity.LossOptions`.

    Raises:
        ShearingError: lm-eval is not installed, knows no such task, or cannot get its data.
    """
    with _lm_eval() as lm_eval, tempfile.TemporaryDirectory() as cache:
        from lm_eval.tasks import TaskManager

        named = [spec.name for spec in specs if spec.config is None]
        manager = TaskManager(include_defaults=bool(named))
        if unknown := [name for name in named if name not in manager.all_tasks]:
            raise ShearingError(
                f"lm-eval has no task {', '.join(unknown)}; of local items (NAME=FILE.jsonl) there are "
                f"{', '.join(shipped())}, and `lm_eval ls tasks` lists its own"
            )
        lm = _scorer(model, tokenizer, batch_size, bos_id(tokenizer, bos))
        try:
            found = lm_eval.simple_evaluate(
                lm, tasks=[_given(spec, cache) for spec in specs], task_manager=manager, limit=limit,
                num_fewshot=num_fewshot, bootstrap_iters=BOOTSTRAPS, log_samples=False,
            )  # fmt: skip
        except (OSError, ConnectionError, ValueError, KeyError) as error:
            names = ", ".join(spec.name for spec in specs)
            hint = f"; without a hub give local items, as {named[0]}=FILE.jsonl" if named else ""
            raise ShearingError(f"tasks {names} cannot be run: {type(error).__name__}: {error}{hint}") from error
    return {name: _metrics(values, found["n-samples"].get(name, {})) for name, values in found["results"].items()}


def _scorer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, first: int | None) -> Any:
    """lm-eval's model, which puts BOS (or nothing) before each text whatever the tokenizer does by itself.

    Its own `add_bos_token` asks the tokenizer for special tokens: some add none, and some add EOS.
    """
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):
        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **more: Any
        ) -> list[int]:
            ids = self.tokenizer.encode(string, add_special_tokens=False)
            if first is not None and add_special_tokens is not False:
                ids = [first, *ids]
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(self, strings: list[str], *given: Any, **more: Any) -> Any:
            before = self.tokenizer.convert_ids_to_tokens(first) if first is not None else ""
            return super().tok_batch_encode([before + string for string in strings], *given, **more)

    return Scorer(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, add_bos_token=False)


def _given(spec: TaskSpec, cache: str) -> str | dict[str, Any]:
    if spec.config is None:
        return spec.name
    config = dict(spec.config)
    if "data_files" in (config.get("dataset_kwargs") or {}):
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "cache_dir": cache}  # nothing stays behind
    return config


def _metrics(values: dict[str, Any], samples: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's `acc,none` and `acc_stderr,none` as one entry."""
    found: dict[str, Any] = {"items": samples.get("effective")}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = values.get(f"{name}_stderr,{filtered}")
            entry = {"value": float(value), "stderr": float(stderr) if isinstance(stderr, (int, float)) else None}
            found[name if filtered == "none" else f"{name} ({filtered})"] = entry
    return found


@contextmanager
def _lm_eval() -> Iterator[Any]:
    """lm-eval, with its progress as ours, and without what it says of every run."""
    lm_eval = need("lm_eval")
    datasets = need("datasets")
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    modules = [import_module(name) for name in WITH_BARS]
    theirs = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = tqdm  # type: ignore[attr-defined]
    os.environ.setdefault(ONE_PROCESS, "1")
    try:
        with redirect_stdout(sys.stderr):  # it prints, and standard output is our table's
            yield lm_eval
    finally:
        for module, bar in zip(modules, theirs, strict=True):
            module.tqdm = bar  # type: ignore[attr-defined]
