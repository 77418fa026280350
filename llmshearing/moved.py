"""Names of modules before the rooms: scripts that import them go on working.

A finder in the import system's list answers for the old names alone. What it gives has all that stands in
the module, or modules, where the old one's content is now. New code imports from there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
MOVED: dict[str, tuple[str, ...]] = {
    "axes": ("families.table", "fold.selection", "fold.fold",),
    "callbacks": ("training.callbacks",),
    "callbacks.checkpoint_info": ("training.callbacks.checkpoint_info",),
    "callbacks.dynamic_loading": ("training.callbacks.dynamic_loading",),
    "callbacks.first_batch": ("training.resilience.first_batch",),
    "callbacks.gradients": ("training.callbacks.gradients",),
    "callbacks.guard": ("training.resilience.guard",),
    "callbacks.losses": ("training.callbacks.losses",),
    "callbacks.pruning": ("training.callbacks.pruning",),
    "callbacks.samples": ("training.resilience.samples",),
    "callbacks.saver": ("training.resilience.saver",),
    "callbacks.shearing": ("training.callbacks.shearing",),
    "callbacks.stop": ("training.resilience.stop",),
    "checkpoint": ("checkpoints.checkpoint",),
    "convert": ("checkpoints",),
    "convert.arguments": ("checkpoints.arguments",),
    "convert.card": ("checkpoints.card",),
    "convert.cli": ("checkpoints.cli",),
    "convert.equality": ("checkpoints.equality",),
    "convert.export": ("checkpoints.hf_write",),
    "convert.folding": ("checkpoints.folding", "masks.l0",),
    "convert.hf": ("checkpoints.hf_read",),
    "convert.output": ("checkpoints.output",),
    "data.codec": ("data.text.codec",),
    "data.dataset": ("data.mixture.dataset",),
    "data.encoding": ("data.prepare.encoding",),
    "data.frequencies": ("data.text.frequencies",),
    "data.index": ("data.mds.index",),
    "data.inputs": ("data.prepare.inputs",),
    "data.job": ("data.prepare.job",),
    "data.loader": ("data.mixture.loader",),
    "data.manifest": ("data.mds.manifest",),
    "data.options": ("data.prepare.options",),
    "data.order": ("data.mixture.order",),
    "data.packing": ("data.prepare.packing",),
    "data.progress": ("data.prepare.progress",),
    "data.reading": ("data.mixture.reading",),
    "data.remote": ("data.mds.remote",),
    "data.shardfiles": ("data.mds.files",),
    "data.shards": ("data.mds.shards",),
    "data.sources": ("data.text.sources",),
    "data.target_loss": ("data.mixture.target_loss",),
    "data.tokenizer": ("data.text.tokenizer",),
    "data.writing": ("data.prepare.writing",),
    "distributed": ("training.distributed",),
    "durable": ("files",),
    "evaluation": ("training.evaluation",),
    "gather": ("fold.gather",),
    "gating": ("fold.gating",),
    "loss": ("training.loss",),
    "model": ("training.model",),
    "nonuniform": ("families.nonuniform",),
    "nonuniform.config": ("families.nonuniform.config", "families.nonuniform.table",),
    "nonuniform.model": ("families.nonuniform.model",),
    "norm": ("fold.norm",),
    "optimizer": ("training.optimizer",),
    "prune.results": ("prune.apply",),
    "prune.sequences": ("prune.calibration",),
    "pruners": ("prune.methods",),
    "pruners.activation": ("prune.methods.activation",),
    "pruners.base": ("prune.method",),
    "pruners.calibration": ("prune.calibration",),
    "pruners.decoder": ("prune.methods.decoder",),
    "pruners.depth": ("prune.methods.depth",),
    "pruners.linalg": ("prune.methods.obs.linalg",),
    "pruners.obs": ("prune.methods.obs.method",),
    "pruners.obs_layers": ("prune.methods.obs.layers",),
    "pruners.obs_plan": ("prune.methods.obs.plan",),
    "pruners.padding": ("fold.padding",),
    "pruners.random": ("prune.methods.random",),
    "pruners.targets": ("prune.targets",),
    "pruners.vocabulary": ("prune.methods.vocabulary.method",),
    "pruners.vocabulary_files": ("prune.methods.vocabulary.files",),
    "pruners.vocabulary_ids": ("prune.methods.vocabulary.ids",),
    "pruners.vocabulary_write": ("prune.methods.vocabulary.write",),
    "resume": ("training.resilience.resume",),
    "safety": ("training.resilience.build",),
    "selection_io": ("fold.selection",),
    "signals": ("training.resilience.signals",),
    "source": ("training.source",),
    "storage.files": ("files",),
    "watch": ("training.resilience.watch",),
}
"""Old name below the package -> where its content is now."""


class _OldNames(MetaPathFinder, Loader):
    """Finds and makes the modules of MOVED."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self, is_package=True) if package == PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The usual one."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill it with what stands where its content is now."""
        for new in MOVED[module.__name__.partition(".")[2]]:
            content = vars(import_module(f"{PACKAGE}.{new}"))
            vars(module).update({name: value for name, value in content.items() if not name.startswith("__")})


def install() -> None:
    """Make the old names importable, once."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldNames())  # before the folders that an old checkout leaves behind
