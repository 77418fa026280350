"""What keeps a run safe, put together: saving, stopping, watching over losses, ranks and samples."""

from __future__ import annotations

from typing import Any

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

from llmshearing.config import Config
from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.training.resilience.first_batch import FirstBatch
from llmshearing.training.resilience.guard import Guard
from llmshearing.training.resilience.samples import SampleRecord
from llmshearing.training.resilience.saver import Saver
from llmshearing.training.resilience.signals import StopRequest
from llmshearing.training.resilience.stop import StopOnSignal
from llmshearing.training.resilience.watch import TrainingProgress, Watch


def build_safety(
    cfg: Config,
    dataset: MixtureDataset,
    info: dict[str, Any],
    vocabulary: int,
    request: StopRequest,
    watch: Watch | None,
) -> list[Callback]:
    """The callbacks; ``info`` is the CheckpointInfo that the run saves and loads."""
    saver = None
    if cfg.save_folder is not None:
        saver = Saver(
            cfg.save_folder, cfg.save_filename, cfg.save_latest_filename, cfg.save_interval,
            overwrite=cfg.save_overwrite, num_checkpoints_to_keep=cfg.save_num_checkpoints_to_keep,
        )  # fmt: skip
    chosen: list[Callback] = [Guard(dataset, saver)]
    if cfg.first_batch_tolerance is not None:
        chosen.append(FirstBatch(info, dataset.set_names, vocabulary, cfg.first_batch_tolerance))
    if cfg.record_samples and cfg.save_folder is not None:
        chosen.append(SampleRecord(cfg.save_folder))
    if watch is not None:
        chosen.append(TrainingProgress(watch))
    # After all that may refuse a batch; the request is followed when the saver has had its turn.
    return [*chosen, *([saver] if saver is not None else []), StopOnSignal(request, saver)]


class RestoreRandom(Callback):
    """Puts the generators of random numbers where a checkpoint says, before the first batch.

    Composer does so only for data that it winds forward itself. The gates do not need it (their noise is drawn from
    seed and step); a model with dropout does.
    """

    def __init__(self, states: list[dict[str, Any]]) -> None:
        self.states: list[dict[str, Any]] | None = states

    def batch_start(self, state: State, logger: Logger) -> None:
        """Once."""
        if self.states is not None:
            reproducibility.load_rng_state(self.states)
            self.states = None


def restore_random(trainer: Trainer) -> None:
    """Let training go on with the random numbers of the checkpoint, where one was loaded by as many ranks."""
    states = trainer._rng_state
    if states is not None and len(states) == dist.get_world_size():
        trainer.state.callbacks.append(RestoreRandom(states))
