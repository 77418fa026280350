"""Everything of a training run, built from its configuration: Composer's trainer with our model, data and callbacks."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from composer import Trainer, callbacks, loggers, optim
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmshearing.config import Config, to_yaml
from llmshearing.data.mds.manifest import check_tokenizer
from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.data.mixture.loader import build_eval_dataloader, build_train_dataloader
from llmshearing.errors import ShearingError
from llmshearing.families.portable import portable
from llmshearing.masks.l0 import L0Masks
from llmshearing.training.cache.follow import build_cached
from llmshearing.training.callbacks.checkpoint_info import SelfDescription
from llmshearing.training.callbacks.dynamic_loading import DynamicLoadingCallback
from llmshearing.training.callbacks.fold import FoldAt, FoldedInRun
from llmshearing.training.callbacks.gradients import Gradients
from llmshearing.training.callbacks.hidden import HiddenWeight
from llmshearing.training.callbacks.losses import LossMonitor
from llmshearing.training.callbacks.progress import ProgressLine
from llmshearing.training.callbacks.pruning import PruningCallback
from llmshearing.training.callbacks.shearing import Shearing
from llmshearing.training.devices import has_bfloat16
from llmshearing.training.distillation import build_teacher
from llmshearing.training.distributed import fsdp2
from llmshearing.training.groups import build_optimizer, optimizer_groups
from llmshearing.training.handover import Folded
from llmshearing.training.model import ShearingModel
from llmshearing.training.rates import build_rates
from llmshearing.training.recording import build_record
from llmshearing.training.resilience.build import build_safety
from llmshearing.training.resilience.resume import plain_data_only, prepare
from llmshearing.training.resilience.saver import Saver
from llmshearing.training.resilience.signals import StopRequest
from llmshearing.training.resilience.watch import Watch
from llmshearing.training.source import Source, build_masks, load_model, mask_info
from llmshearing.training.start import start_masks
from llmshearing.training.targets import Guide
from llmshearing.training.turning import TurnedBasis, turned

log = logging.getLogger(__name__)

SCHEDULERS = {
    "cosine_with_warmup": optim.CosineAnnealingWithWarmupScheduler,
    "constant_with_warmup": optim.ConstantWithWarmupScheduler,
    "linear_decay_with_warmup": optim.LinearWithWarmupScheduler,
}
MONITORS = {
    "speed_monitor": callbacks.SpeedMonitor,
    "lr_monitor": callbacks.LRMonitor,
    "memory_monitor": callbacks.MemoryMonitor,
    "runtime_estimator": callbacks.RuntimeEstimator,
    "optimizer_monitor": callbacks.OptimizerMonitor,
}
LOGGERS = {
    "wandb": loggers.WandBLogger,
    "tensorboard": loggers.TensorboardLogger,
    "file_logger": loggers.FileLogger,
}


def build_scheduler(cfg: Config) -> Any:
    """Composer's scheduler of that name."""
    s = cfg.scheduler
    options = {} if s.name == "constant_with_warmup" else {"t_max": s.t_max, "alpha_f": s.alpha_f}
    return SCHEDULERS[s.name](t_warmup=s.t_warmup, **options)


def build_algorithms(masks: L0Masks | None, cfg: Config) -> list[Algorithm]:
    """The gradients' averaging and clipping, and the masks' driver."""
    clip = cfg.algorithms.gradient_clipping
    clipping = (clip.clipping_type, clip.clipping_threshold) if clip is not None else ()
    chosen: list[Algorithm] = [Gradients(masks, *clipping)]
    if masks is not None and cfg.model.l0_module is not None:
        rates = build_rates(cfg)
        constant = None if cfg.optimizer.schedule_masks or rates is not None else float(cfg.optimizer.lag_lr)
        chosen.append(Shearing(masks, cfg.model.l0_module.lagrangian_warmup_steps or "0ba", constant, rates))
    return chosen


def build_callbacks(
    cfg: Config, masks: L0Masks | None, dataset: Any, info: dict[str, Any], guide: Guide | None = None
) -> list[Callback]:
    """Ours, then Composer's monitors."""
    d = cfg.callbacks.data_loading
    folder = Path(cfg.save_folder) if cfg.save_folder else None
    l0, names = cfg.model.l0_module, d.set_names or []
    ours: list[Callback] = [SelfDescription(info, names, comparable=l0 is None or l0.eval_target_model)]
    ours.append(LossMonitor(names, folder / "evaluations.jsonl" if folder else None))
    if masks is not None and l0 is not None:
        ours.append(PruningCallback(masks, l0.eval_target_model, folder / "gates" if folder else None))
    if guide is not None and guide.hidden is not None:
        ours.append(HiddenWeight(guide.hidden))
    ours.append(
        DynamicLoadingCallback(
            dataset, d.target_loss, dynamic=d.dynamic, update_type=d.update_type, eta=d.eta, c=d.c,
            clamp_excess=d.clamp_excess,
        )  # fmt: skip
    )
    wanted = {name: getattr(cfg.callbacks, name) for name in MONITORS}
    return ours + [MONITORS[name](**options) for name, options in wanted.items() if options is not None]


class AppendingFileLogger(loggers.FileLogger):
    """Writes on behind what the run wrote before its fold; Composer's own empties the file, whatever it is told."""

    def init(self, state: State, logger: Logger) -> None:
        """Open the file, with what was in it first."""
        self._run_name = state.run_name
        waiting = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        if (path := Path(self.filename)).is_file():
            waiting.insert(0, path.read_text(encoding="utf-8"))
        for text in waiting:
            self._queue.put_nowait(text)
        super().init(state, logger)


def build_loggers(cfg: Config, go_on: bool = False) -> list[Any]:
    """Our line of progress, and Composer's loggers of these names. go_on: with the files of the run's stage before."""
    kinds = {**LOGGERS, **({"file_logger": AppendingFileLogger} if go_on else {})}
    wanted = {name: getattr(cfg.loggers, name) for name in LOGGERS}
    line = [ProgressLine()] if cfg.progress_bar else []
    return line + [kinds[name](**options) for name, options in wanted.items() if options is not None]


def cpu_autocast(cfg: Config, device: str) -> torch.dtype | None:
    """dtype of CPU autocast: bfloat16 where it is asked for and the processor has instructions for it."""
    if device != "cpu" or cfg.precision != "amp_bf16":
        return None
    if not has_bfloat16(device):
        log.warning("precision amp_bf16: this processor has no bfloat16 arithmetic; training in fp32")
        return None
    return torch.bfloat16


def run_info(
    cfg: Config, source: Source, masks: L0Masks | None, generation_config: dict[str, Any] | None
) -> dict[str, Any]:
    """What the run's checkpoints say of themselves."""
    before = source.checkpoint.info if source.checkpoint is not None else None
    if before is not None and source.same_run:
        return {item.name: getattr(before, item.name) for item in fields(before)}
    directory = cfg.model.path if before is None else before.tokenizer
    step = "pruned" if masks is not None else "continued pretraining"
    name = f" ({cfg.run_name})" if cfg.run_name else ""
    turn = cfg.model.turn if source.basis is not None else None
    turned_so = [] if turn is None else [f"turned hidden units into directions by {turn.basis}"]
    return {
        "hf_config": portable(source.config.to_dict()),
        "masks": mask_info(masks, source.head_mode),
        "run_config": to_yaml(cfg),
        "tokenizer": cfg.tokenizer_name or directory,
        "history": [
            *(before.history if before is not None else []),
            *turned_so,
            f"{step} from {cfg.model.path} for {cfg.max_duration}{name}",
        ],
        "generation_config": before.generation_config if before is not None else generation_config,
        "evaluation": before.evaluation if before is not None and masks is None else None,
    }


def build_data(cfg: Config, source: Source) -> tuple[Any, Any]:
    """Training and evaluation data of this rank."""
    d, ranks = cfg.callbacks.data_loading, dist.get_world_size()
    if cfg.global_train_batch_size % ranks:
        raise ShearingError(
            f"global_train_batch_size = {cfg.global_train_batch_size} is not divisible by the {ranks} ranks"
        )
    shared: dict[str, Any] = {"max_seq_len": cfg.max_seq_len, "vocab_size": source.config.vocab_size}
    shared["set_names"] = d.set_names or []

    def loading(loader: Any) -> dict[str, Any]:
        names = ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory", "timeout")
        places = ("local", "remote", "split", "download_retry", "download_timeout")
        where = {name: getattr(loader.dataset, name) for name in places}
        return {**shared, **where, **{name: getattr(loader, name) for name in names}}

    train = build_train_dataloader(
        **loading(cfg.train_loader),
        proportion=d.proportion or [1.0],
        batch_size=cfg.global_train_batch_size // ranks,
        seed=cfg.train_loader.dataset.shuffle_seed,
        dynamic=d.dynamic,
        mixing=d.mixing,
        shuffle=cfg.train_loader.dataset.shuffle,
    )
    subset = None if cfg.eval_subset_num_batches < 0 else cfg.eval_subset_num_batches
    evaluation = build_eval_dataloader(
        **loading(cfg.eval_loader), batch_size=cfg.device_eval_batch_size, subset_num_batches=subset
    )
    recorded = source.checkpoint.info.tokenizer if source.checkpoint is not None else cfg.model.path
    check_tokenizer(Path(cfg.data_local), Path(cfg.tokenizer_name or recorded or ""))
    return train, evaluation


def build_guide(cfg: Config, source: Source, data: MixtureDataset) -> Guide | None:
    """What training follows beside the data: a teacher's cache, a live teacher, or None."""
    cached = cfg.distill is not None and cfg.distill.cache is not None
    return build_cached(cfg, source, data) if cached else build_teacher(cfg, source)


def trainer_options(cfg: Config, device: str) -> dict[str, Any]:
    """Options that Composer's Trainer takes as they are."""
    passed = (
        "max_duration", "eval_interval", "log_to_console", "console_log_interval", "load_path",
        "load_weights_only", "save_folder", "save_latest_filename", "autoresume", "dist_timeout", "seed",
        "python_log_level",
    )  # fmt: skip
    options = {name: getattr(cfg, name) for name in passed}
    # Composer finds what to go on from by this name, so that it must be the same each time
    options["run_name"] = cfg.run_name or (Path(cfg.save_folder).name if cfg.autoresume and cfg.save_folder else None)
    options["device_train_microbatch_size"] = cfg.device_train_microbatch_size
    options["progress_bar"] = False  # ours is one line, see build_loggers
    options["precision"] = "fp32" if device == "cpu" else cfg.precision
    if (sharding := fsdp2(cfg, dist.get_world_size())) is not None:
        options["parallelism_config"] = {"fsdp": sharding}
    return options


def build_trainer(
    cfg: Config,
    source: Source,
    device: str,
    request: StopRequest | None = None,
    watch: Watch | None = None,
    folded: Folded | None = None,
) -> Trainer:
    """Everything of a run, ready to fit; with ``autoresume`` it stands where the newest checkpoint was made.

    folded: what the run goes on from after its fold; ``cfg`` then has no masks.
    """
    masks = build_masks(source, cfg)
    found = prepare(cfg, source if folded is None else folded.source, masks)
    train, evaluation = build_data(cfg, source)
    source = turned(source, cfg, train.dataloader.dataset, device, found)
    l0 = cfg.model.l0_module
    if masks is not None:
        start_masks(masks, source, cfg, train.dataloader.dataset, device, found)
    guide = build_guide(cfg, source, train.dataloader.dataset)
    basis = [TurnedBasis(source.basis)] if source.basis is not None else []
    stage: list[Callback] = []
    if folded is not None:
        source = folded.source  # from here on: what is trained
        stage = [FoldedInRun(folded.selection)]
        if guide is not None and guide.hidden is not None:
            guide.hidden.selection = folded.selection
    hf_model = load_model(source, cfg)
    model = ShearingModel(
        hf_model,
        masks,
        domains=len(cfg.callbacks.data_loading.set_names or []),
        eval_target_model=l0.eval_target_model if l0 else False,
        round_to=l0.round_to if l0 else 1,
        autocast=cpu_autocast(cfg, device),
        teacher=guide,
    )
    generation = getattr(hf_model, "generation_config", None)
    info = run_info(cfg, source, masks, generation.to_dict() if generation is not None else None)
    dataset = train.dataloader.dataset
    safety = build_safety(cfg, dataset, info, source.config.vocab_size, request or StopRequest(), watch)
    stage += [FoldAt(l0.fold_at, each) for each in safety if l0 and l0.fold_at and isinstance(each, Saver)]
    record = build_record(cfg, source, masks, info, device, goes_on=folded is not None)
    with plain_data_only(cfg.trust_checkpoint):
        return Trainer(
            model=model,
            train_dataloader=train,
            eval_dataloader=evaluation,
            optimizers=build_optimizer(optimizer_groups(hf_model, source.table, masks, cfg), cfg),
            schedulers=build_scheduler(cfg),
            algorithms=build_algorithms(masks, cfg),
            callbacks=[*build_callbacks(cfg, masks, dataset, info, guide), *basis, *safety, *stage],
            loggers=[*build_loggers(cfg, go_on=folded is not None), *record],
            device=device,
            # Microbatches and ranks weigh by the tokens that count, so that the loss is the mean over all of them.
            accumulate_train_batch_on_tokens=dataset.masked,
            **trainer_options(cfg, device),
        )
