"""Prune or continue to pretrain: one YAML file and overrides in, checkpoints out.

    configuration -> source (config, table, weights) + masks -> domain mixture -> Composer trainer -> checkpoints

    composer -n 8 llmshearing/train.py configs/llama2/7b.yaml data_local=DATA model.path=HF_DIR save_folder=RUN
    python -m llmshearing.train configs/llama2/7b.yaml --dry-run
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from llmshearing.commands import needs_training, parser, run

if __name__ == "__main__":
    needs_training("llmshearing train")  # one error, before an import below fails

import torch
from composer import Trainer
from composer.utils import dist

from llmshearing import files as durable
from llmshearing.config import Config, load_config, to_yaml
from llmshearing.errors import ShearingError, Stopped
from llmshearing.families.readers import verdicts
from llmshearing.training.build import build_trainer
from llmshearing.training.callbacks.fold import FoldAt, FoldDue
from llmshearing.training.handover import Folded, without_masks
from llmshearing.training.onerun import after_fold, reached
from llmshearing.training.resilience.build import restore_random
from llmshearing.training.resilience.resume import check_files
from llmshearing.training.resilience.signals import StoppedEarly, StopRequest, stop_request
from llmshearing.training.resilience.stop import StopOnSignal
from llmshearing.training.resilience.watch import meet, watching
from llmshearing.training.source import Source, build_masks, read_source
from llmshearing.training.start import check_start

log = logging.getLogger("llmshearing.train")


def describe(source: Source, cfg: Config) -> str:
    """Source and target shape with their parameter counts, and what is done on the way."""
    lines = [f"source  {source.table.count():>15,} parameters  {source.table.shape()}"]
    if source.target is not None:
        lines.append(f"target  {source.target_parameters():>15,} parameters  {source.target}")
    l0, turn = cfg.model.l0_module, cfg.model.turn
    if turn is not None:
        untied = " (the head gets a tensor of its own)" if source.stored is not None else ""
        lines.append(f"turn    hidden units by {turn.basis}, from {turn.samples} sequences, before all else{untied}")
    if l0 is not None and l0.fold_at is not None:
        lines.append(f"fold    at {l0.fold_at}, inside the run, which goes on at the target to {cfg.max_duration}")
    return "\n".join(lines)


def save_resolved(cfg: Config) -> None:
    """Write the resolved configuration beside the checkpoints, on the first rank."""
    if cfg.save_folder is None or dist.get_global_rank() != 0:
        return
    durable.write_text(Path(cfg.save_folder) / "config.yaml", to_yaml(cfg))


def train(cfg: Config) -> Trainer:
    """Run a configuration to its end; returns Composer's trainer.

    Raises:
        ShearingError: the source, the data or their combination with the configuration is wrong, or training is.
        Stopped: SIGTERM or SIGUSR1 came; the state is saved. RankLost: another rank died or stalled.
    """
    with stop_request() as request:
        check_files(cfg)
        source = read_source(cfg)
        device = cfg.device or ("gpu" if torch.cuda.is_available() else "cpu")
        meet(device, cfg.dist_timeout)
        log.info("%s", describe(source, cfg))
        folded = reached(cfg)
        if folded is None:
            trainer, last = _stage(cfg, source, device, request)
            if last is None:
                return trainer
            data = trainer.state.train_dataloader.dataset
            del trainer  # its memory is free before another is built
            cfg, folded = after_fold(cfg, source, last, data, device)
        else:
            cfg = without_masks(cfg)
        return _stage(cfg, source, device, request, folded)[0]


def _stage(
    cfg: Config, source: Source, device: str, request: StopRequest, folded: Folded | None = None
) -> tuple[Trainer, Path | None]:
    """Train to the end, or to the fold: then also the checkpoint to be folded. folded: what to go on from after it."""
    last = None
    with watching(cfg.dist_timeout) as watch:
        trainer = build_trainer(cfg, source, device, request, watch, folded)
        if folded is None:
            save_resolved(cfg)
        try:
            fit(trainer, cfg)
        except FoldDue as due:
            last = due.path
        except (Stopped, StoppedEarly):
            trainer.engine.close()
            raise
        if watch is not None:
            watch.stop()
        trainer.close()
    return trainer, last


def fit(trainer: Trainer, cfg: Config) -> None:
    """Train from where the trainer stands to the end, evaluating first where that is due."""
    now, end = trainer.state.timestamp, trainer.state.max_duration
    begun = now.batch.value
    if begun:
        log.info("going on from batch %d of %s, from %s", begun, cfg.max_duration, trainer.state.load_path)
    if end is not None and now.get(end.unit) >= end:
        log.info("the run in %s has ended already: nothing to do", cfg.save_folder)
        return
    interrupted = any(isinstance(each, StopOnSignal) and each.evaluate for each in trainer.state.callbacks)
    due = [each for each in trainer.state.callbacks if isinstance(each, FoldAt) and each.due(trainer.state)]
    if interrupted or (cfg.eval_first and not begun and not due):
        trainer.eval()
    for each in due:
        each.end(trainer.state, trainer.logger, anew=interrupted)
    restore_random(trainer)
    trainer.fit()
    wrote = f"wrote {_latest(cfg)}" if cfg.save_folder else "no save_folder: nothing written"
    log.info("trained %d batches; %s", trainer.state.timestamp.batch.value - begun, wrote)


def _latest(cfg: Config) -> Path:
    return Path(cfg.save_folder or "") / cfg.save_latest_filename.format(rank=0)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parser(
        "llmshearing/train.py",
        "Prune a model toward an exact shape, or continue to pretrain one.",
        "composer -n 8 llmshearing/train.py configs/llama2/7b.yaml run_name=first data_local=DATA",
    )
    options.add_argument("config", help="YAML file; its keys are described in llmshearing/config/schema.py")
    options.add_argument("overrides", nargs="*", help="key=value, e.g. optimizer.lr=1e-4")
    options.add_argument("--dry-run", action="store_true", help="show the resolved configuration and shapes, then stop")
    arguments = options.parse_intermixed_args(argv)

    def command() -> int:
        cfg = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            check_start(cfg.model.l0_module)
            source = read_source(cfg)
            build_masks(source, cfg)
            sys.stdout.write(f"{to_yaml(cfg)}\n{describe(source, cfg)}\n")
            if source.target is not None:
                said = verdicts(source.config, source.table, source.target)
                sys.stdout.write("\n".join(["readers of the target:", *said, ""]))
        else:
            train(cfg)
        return 0

    first = int(os.environ.get("RANK", "0")) == 0
    # an OSError in the middle of a run is not the user's input: its traceback stays
    return run(
        command,
        level=logging.INFO if first else logging.WARNING,
        form="%(levelname)s %(name)s: %(message)s",
        expected=(ShearingError,),
    )


if __name__ == "__main__":
    sys.exit(main())
