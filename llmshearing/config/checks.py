"""Checks across keys. Each yields problems that name the keys, their values and what would be right.

A check lists the keys it reads; it is left out where one of them has already been reported.
"""

import os
from collections.abc import Callable, Iterator
from math import isclose

from llmshearing.config.schema import MUON, OPEN, Config, DataLoading, L0Module, Loader, Optimizer
from llmshearing.config.shapes import FACTS, Shape, source_problems, source_shape, target_shape
from llmshearing.config.values import AUTO, parse_time
from llmshearing.families.names import BLOCK_MASKS, BLOCKS, LAYERS, MASK_OF_SIZE, YAML_KEYS

Check = Callable[[Config], Iterator[str]]
CHECKS: list[tuple[tuple[str, ...], Check]] = []
TARGET = "model.l0_module.target_model"
WARMUP = "model.l0_module.lagrangian_warmup_steps"
FOLD_AT = "model.l0_module.fold_at"


def reads(*keys: str) -> Callable[[Check], Check]:
    """Register a check that reads `keys` (a key stands for all below it)."""

    def register(check: Check) -> Check:
        CHECKS.append((keys, check))
        return check

    return register


def cross_problems(cfg: Config, reported: set[str]) -> list[str]:
    """Problems of all checks that read no key of `reported`; values of reported keys may be None."""

    def touches(key: str, other: str) -> bool:
        return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")

    runnable = [check for keys, check in CHECKS if not any(touches(k, r) for k in keys for r in reported)]
    return [problem for check in runnable for problem in check(cfg)]


# -- data and mixture ------------------------------------------------------------------------------------------


@reads("callbacks.data_loading")
def check_mixture(cfg: Config) -> Iterator[str]:
    """Lists of the mixture: present, of one length, a distribution."""
    data, prefix = cfg.callbacks.data_loading, "callbacks.data_loading"
    if data.dynamic:
        needed = ["set_names", "proportion"] + ["target_loss"] * (data.update_type == "doremi")
        for key in needed:
            if not getattr(data, key):
                doremi = " (or update_type=constant)" if key == "target_loss" else ""
                yield f"missing key {prefix}.{key}: dynamic=true needs a value for each domain{doremi}"
    names = data.set_names or []
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        yield f"{prefix}.set_names = {names}: each domain once, but {', '.join(twice)} comes more than once"
    for key in ("proportion", "target_loss"):
        values = getattr(data, key)
        if values and data.set_names is None:
            yield f"{prefix}.{key} = {values} without {prefix}.set_names: name the domains"
        elif values and len(values) != len(names):
            yield f"{prefix}.{key} = {values} has {len(values)} values for the {len(names)} set_names {names}"
    yield from _proportion_problems(data, f"{prefix}.proportion")


def _proportion_problems(data: DataLoading, key: str) -> Iterator[str]:
    shares = data.proportion or []
    if any(not share >= 0 for share in shares):
        yield f"{key} = {shares}: no share may be negative or NaN"
    elif shares and not isclose(sum(shares), 1, rel_tol=0, abs_tol=1e-6):
        yield f"{key} = {shares} sums to {sum(shares):.6g}, not 1"


@reads("eval_loader", "train_loader", "callbacks.data_loading.dynamic")
def check_splits(cfg: Config) -> Iterator[str]:
    """Where training and evaluation read."""
    if not cfg.eval_loader.dataset.split:
        yield "missing key eval_loader.dataset.split: the merged split of all domains, such as eval_merge"
    if not cfg.callbacks.data_loading.dynamic and not cfg.train_loader.dataset.split:
        yield "missing key train_loader.dataset.split: needed while callbacks.data_loading.dynamic is false"


@reads("train_loader", "eval_loader")
def check_workers(cfg: Config) -> Iterator[str]:
    """Settings that only worker processes can follow."""
    loaders: dict[str, Loader] = {"train_loader": cfg.train_loader, "eval_loader": cfg.eval_loader}
    for key, loader in loaders.items():
        if loader.num_workers == 0 and loader.prefetch_factor is not None:
            yield f"{key}.prefetch_factor = {loader.prefetch_factor} with num_workers = 0: null, or some workers"
        if loader.num_workers == 0 and loader.persistent_workers:
            yield f"{key}.persistent_workers = true with num_workers = 0: false, or some workers"


@reads("max_seq_len", "model.max_seq_len", "train_loader", "eval_loader", "model.l0_module", "tokenizer")
def check_seq_len(cfg: Config) -> Iterator[str]:
    """One sequence length everywhere."""
    keys = ["model.max_seq_len", "train_loader.dataset.max_seq_len", "eval_loader.dataset.max_seq_len"]
    values = {key: _get(cfg, key) for key in keys}
    if cfg.model.l0_module is not None and cfg.model.l0_module.target_model is not None:
        values[f"{TARGET}.max_seq_len"] = cfg.model.l0_module.target_model.max_seq_len
    arguments = (cfg.tokenizer or {}).get("args")
    if isinstance(arguments, dict):
        values["tokenizer.args.max_seq_len"] = arguments.get("max_seq_len")
    for key, value in values.items():
        if value is not None and value != cfg.max_seq_len:
            yield f"{key} = {value}, but max_seq_len = {cfg.max_seq_len}: they must agree; leave the first out"


def _get(cfg: Config, key: str) -> object:
    value: object = cfg
    for part in key.split("."):
        value = getattr(value, part)
    return value


# -- training --------------------------------------------------------------------------------------------------


@reads("global_train_batch_size", "device_train_microbatch_size", "device", "fsdp_config")
def check_batch(cfg: Config) -> Iterator[str]:
    """The global batch splits over ranks and microbatches."""
    batch, micro = cfg.global_train_batch_size, cfg.device_train_microbatch_size
    world = os.environ.get("WORLD_SIZE", "1")
    ranks = int(world) if world.isdecimal() and int(world) else 1
    if batch % ranks:
        yield f"global_train_batch_size = {batch} is not divisible by the {ranks} ranks of this launch"
    if isinstance(micro, int) and batch % micro:
        yield f"global_train_batch_size = {batch} is not divisible by device_train_microbatch_size = {micro}"
    if micro == "auto" and cfg.device == "cpu":
        yield "device_train_microbatch_size = auto: it measures GPU memory; give a number on the CPU"
    elif micro == "auto" and cfg.fsdp_config is not None:
        yield "device_train_microbatch_size = auto with fsdp_config: FSDP 2 cannot measure it; give a number"


@reads("max_duration", "scheduler", "model.l0_module", "global_train_batch_size", "max_seq_len")
def check_times(cfg: Config) -> Iterator[str]:
    """Warm-ups end within the run, as far as their units can be compared."""
    warmup, t_max = cfg.scheduler.t_warmup, cfg.scheduler.t_max
    times = [("scheduler.t_warmup", warmup, "max_duration", cfg.max_duration)]
    if t_max != "1dur":
        times.append(("scheduler.t_warmup", warmup, "scheduler.t_max", t_max))
    if cfg.model.l0_module is not None:
        steps = cfg.model.l0_module.lagrangian_warmup_steps or "0ba"
        times.append((WARMUP, steps, "max_duration", cfg.max_duration))
    for key, value, other, limit in times:
        (short, unit), (long, other_unit) = _comparable(cfg, value), _comparable(cfg, limit)
        if unit == other_unit and short > long:
            yield f"{key} = {value} is longer than {other} = {limit}"


def _comparable(cfg: Config, text: str) -> tuple[float, str]:
    """A time in samples where that can be told before training, else as it stands."""
    value, unit = parse_time(text)
    if unit == "dur":
        whole, unit = _comparable(cfg, cfg.max_duration) if "dur" not in cfg.max_duration else (1.0, "dur")
        return value * whole, unit
    per_unit = {"ba": float(cfg.global_train_batch_size), "sp": 1.0, "tok": 1 / cfg.max_seq_len}
    return (value * per_unit[unit], "sp") if unit in per_unit else (value, unit)


def steps_of(cfg: Config, text: str) -> float | None:
    """A time in optimizer steps; None where that cannot be told before training (epochs, seconds)."""
    value, unit = _comparable(cfg, text)
    return value / cfg.global_train_batch_size if unit == "sp" else None


@reads("optimizer.lag_lr", "max_duration", "model.l0_module", "global_train_batch_size", "max_seq_len")
def check_auto_rate(cfg: Config) -> Iterator[str]:
    """Rates that follow the run's length need one in steps."""
    l0, key = cfg.model.l0_module, "optimizer.lag_lr"
    if cfg.optimizer.lag_lr != AUTO or l0 is None:
        return
    times = {"max_duration": cfg.max_duration, WARMUP: l0.lagrangian_warmup_steps or "0ba"}
    if l0.fold_at is not None:
        times[FOLD_AT] = l0.fold_at
    for name, text in times.items():
        if not text.endswith("dur") and steps_of(cfg, text) is None:
            yield f"{key} = {AUTO} with {name} = {text}: it needs a time in ba, sp or tok, or a number as the rate"


@reads("optimizer")
def check_muon(cfg: Config) -> Iterator[str]:
    """Keys of one optimizer are not given to another."""
    for key in ("muon_lr", "muon_momentum", "muon_relative"):
        value = getattr(cfg.optimizer, key)
        if value != getattr(Optimizer, key) and cfg.optimizer.name != MUON:
            yield f"optimizer.{key} = {value} with optimizer.name = {cfg.optimizer.name}: only {MUON} reads it"


@reads("max_duration")
def check_duration(cfg: Config) -> Iterator[str]:
    """The run's length is no fraction of itself."""
    if cfg.max_duration.endswith("dur"):
        yield f"max_duration = {cfg.max_duration}: a time in ba, ep, sp, tok, iter or sec"


@reads("autoresume", "save_folder", "run_name", "save_filename", "save_latest_filename", "record_samples")
def check_saving(cfg: Config) -> Iterator[str]:
    """Checkpoints are found again by folder and name, and names lead nowhere else."""
    for key in ("autoresume", "record_samples"):
        if getattr(cfg, key) and not cfg.save_folder:
            yield f"missing key save_folder: {key} = true needs it"
    folder = cfg.save_folder or ""
    if "://" in folder or "{" in folder:
        yield f"save_folder = {folder}: must be a local directory, written out (${{run_name}} stands for that key)"
    for key in ("run_name", "save_filename", "save_latest_filename"):
        name = getattr(cfg, key)
        if name is not None and (name in ("", ".", "..") or "/" in name or "\0" in name):
            yield f"{key} = {name}: must be a name without /, all files are written to save_folder"
    if "{batch}" not in cfg.save_filename or not cfg.save_filename.endswith(".pt"):
        yield f"save_filename = {cfg.save_filename}: must have {{batch}} in it and end with .pt"


@reads("fsdp_config", "model.activation_checkpointing", "model.init_device", "precision", "algorithms")
def check_fsdp(cfg: Config) -> Iterator[str]:
    """Legacy keys say the same as the present ones; what FSDP 2 cannot do is not asked for."""
    fsdp, prefix = cfg.fsdp_config, "fsdp_config"
    if fsdp is None:
        return
    if fsdp.activation_cpu_offload:
        yield f"{prefix}.activation_cpu_offload = true: must be false; model.activation_checkpointing saves more memory"
    if cfg.precision == "amp_fp16":
        yield "precision = amp_fp16 with fsdp_config: the loss scale of ranks could part; take amp_bf16, or replicas"
    clip = cfg.algorithms.gradient_clipping
    if clip is not None and clip.clipping_type == "adaptive":
        yield "algorithms.gradient_clipping.clipping_type = adaptive with fsdp_config: norm or value"
    if fsdp.sharding_strategy == "SHARD_GRAD_OP" and fsdp.reshard_after_forward:
        yield (
            f"{prefix}.reshard_after_forward = true, but sharding_strategy = SHARD_GRAD_OP means false: leave one out"
        )
    asked = fsdp.activation_checkpointing
    if asked is not None and asked != cfg.model.activation_checkpointing:
        yield (
            f"{prefix}.activation_checkpointing = {str(asked).lower()}, but model.activation_checkpointing = "
            f"{str(cfg.model.activation_checkpointing).lower()}: leave the first out"
        )
    if fsdp.load_monolith_rank0_only and fsdp.state_dict_type == "sharded":
        yield f"{prefix}.load_monolith_rank0_only = true with state_dict_type = sharded: it is about full checkpoints"
    elif fsdp.load_monolith_rank0_only and cfg.model.init_device == "cpu":
        yield f"{prefix}.load_monolith_rank0_only = true with model.init_device = cpu: the others' weights would stay"


# -- model and masks -------------------------------------------------------------------------------------------


@reads("model.attn_impl", "model.attn_implementation")
def check_attention(cfg: Config) -> Iterator[str]:
    """The legacy key says the same as the new one (which `load` has filled in)."""
    if cfg.model.attn_impl is not None and cfg.model.attn_implementation != ATTENTION[cfg.model.attn_impl]:
        yield (
            f"model.attn_impl = {cfg.model.attn_impl} means {ATTENTION[cfg.model.attn_impl]}, but "
            f"model.attn_implementation = {cfg.model.attn_implementation}: leave attn_impl out"
        )


ATTENTION = {"flash": "flash_attention_2", "torch": "sdpa", "triton": "sdpa"}


@reads("distill", "model.l0_module", "model.path", "model.turn")
def check_distillation(cfg: Config) -> Iterator[str]:
    """Somebody else to follow, and a way to tell which of its hidden states are the student's."""
    asked, masked = cfg.distill, cfg.model.l0_module is not None
    if asked is None:
        return
    if not masked and (asked.teacher == cfg.model.path or (asked.teacher is None and asked.cache is None)):
        yield f"distill.teacher = {asked.teacher}: without masks the source is the student; name another model"
    if asked.hidden and asked.cache is not None:
        yield f"distill.hidden = {asked.hidden} beside distill.cache: a cache has no hidden states; name a teacher"
    if asked.hidden and not masked and asked.selection is None:
        yield (
            f"distill.hidden = {asked.hidden} without distill.selection: name the selection.safetensors that the "
            "pruner wrote beside model.path"
        )
    if asked.hidden and cfg.model.turn is not None and asked.teacher not in (None, cfg.model.path):
        yield (
            f"distill.hidden = {asked.hidden} of distill.teacher = {asked.teacher} with model.turn: its hidden units "
            "are of another basis; leave distill.teacher out"
        )
    if asked.selection is not None and masked:
        yield f"distill.selection = {asked.selection}: while masks train, what they keep is followed; leave it out"
    elif asked.selection is not None and not asked.hidden:
        yield f"distill.selection = {asked.selection} with distill.hidden = 0: nothing reads it"


@reads("model.l0_module")
def check_masks(cfg: Config) -> Iterator[str]:
    """One goal, layer masks of one sort."""
    l0, prefix = cfg.model.l0_module, "model.l0_module"
    if l0 is None:
        return
    apart = [kind for kind in ("head_layer", "mlp") if kind in l0.pruning_modules]
    if "layer" in l0.pruning_modules and apart:
        yield f"{prefix}.pruning_modules = {l0.pruning_modules}: either layer, or head_layer and mlp"
    if l0.target_model is None and l0.target_sparsity is None:
        yield f"missing key {TARGET} (or {prefix}.target_sparsity): what to shear to"
    if l0.target_model is not None and l0.target_sparsity is not None:
        yield (
            f"{prefix}.target_sparsity = {l0.target_sparsity} beside {TARGET}: the shape fixes the sparsity; "
            "leave one of them out (the predecessor ignored target_sparsity)"
        )
    if l0.target_sparsity is not None and not 0 < l0.target_sparsity < 1:
        yield f"{prefix}.target_sparsity = {l0.target_sparsity}: between 0 and 1"
    if l0.constraint == "exact" and l0.target_model is None:
        yield f"{prefix}.constraint = exact without {TARGET}: a target_sparsity alone goes with lagrangian"
    if l0.target_sparsity is not None and l0.start_sparsity > l0.target_sparsity:
        yield f"{prefix}.start_sparsity = {l0.start_sparsity} is above target_sparsity = {l0.target_sparsity}"


@reads("max_duration", "model.l0_module", "save_folder", "fsdp_config", "global_train_batch_size", "max_seq_len")
def check_fold(cfg: Config) -> Iterator[str]:
    """A run that folds itself: after the warm-up, before its end, to a shape that is told, with a file in between."""
    l0 = cfg.model.l0_module
    if l0 is not None and l0.fold_at is None and l0.refit:
        yield f"model.l0_module.refit = true without {FOLD_AT}: it fits what is left after the fold"
    if l0 is None or l0.fold_at is None:
        return
    given = f"{FOLD_AT} = {l0.fold_at}"
    warmup = l0.lagrangian_warmup_steps or "0ba"
    fold, start, end = (_comparable(cfg, text) for text in (l0.fold_at, warmup, cfg.max_duration))
    if start[0] and (fold[1] == start[1] or not fold[0]) and fold[0] < start[0]:
        yield f"{given} is before the warm-up's end, {WARMUP} = {warmup}: fold later, or give a shorter warm-up"
    if fold[1] == end[1] and fold[0] >= end[0]:
        yield f"{given} is not before max_duration = {cfg.max_duration}: fold earlier, or leave {FOLD_AT} out"
    if not fold[0] and l0.start == OPEN:
        yield f"{given} with model.l0_module.start = {OPEN}: nothing has been chosen by then; start from a method"
    if l0.target_model is None:
        yield f"{given} without {TARGET}: the shape to fold to must be told"
    if not cfg.save_folder:
        yield f"missing key save_folder: {given} needs it, for the checkpoints before and after"
    if cfg.fsdp_config is not None and cfg.fsdp_config.state_dict_type == "sharded":
        yield f"{given} with fsdp_config.state_dict_type = sharded: full, or fold by post_pruning_processing"


@reads("model.path", "model.l0_module", *(f"model.{key}" for key in (*YAML_KEYS.values(), *FACTS)))
def check_shapes(cfg: Config) -> Iterator[str]:
    """The source's shape, and the target's where both are known."""
    problems = list(source_problems(cfg))
    yield from problems
    source = source_shape(cfg)
    if not problems and source is not None:
        yield from target_problems(cfg, source)


def target_problems(cfg: Config, source: Shape) -> Iterator[str]:
    """What keeps `source` from being sheared to the configured target (nothing to check without one).

    `load_config` runs it where the source's shape is known; `train` where it comes from the checkpoint.
    """
    l0 = cfg.model.l0_module
    if l0 is None or l0.target_model is None:
        return
    given = {size: number for size, key in YAML_KEYS.items() if (number := getattr(l0.target_model, key)) is not None}
    if not given:
        yield f"{TARGET} names no size: give {', '.join(YAML_KEYS[size] for size in (*MASK_OF_SIZE, LAYERS))}"
    for size, number in given.items():
        old, key = getattr(source, size), YAML_KEYS[size]
        if old is None:
            yield f"{TARGET}.{key} = {number}: the source has none"
        elif size not in (*MASK_OF_SIZE, LAYERS) and number != old:
            yield f"{TARGET}.{key} = {number}: must be the source's {old}, it is not pruned in training"
        elif number > old:
            yield f"{TARGET}.{key} = {number} is larger than the source's {old}"
    if any(number > (getattr(source, size) or 0) for size, number in given.items()):
        return
    try:
        target = target_shape(cfg, source)
    except ValueError as error:
        yield str(error)
        return
    if target is not None:
        yield from _untrained(l0, source, target)


def _untrained(l0: L0Module, source: Shape, target: Shape) -> Iterator[str]:
    """Axes that the target shrinks without a mask that could."""
    modules = f"model.l0_module.pruning_modules = {l0.pruning_modules}"
    reported: set[str] = set()
    for size, mask in MASK_OF_SIZE.items():
        old, new, key = getattr(source, size), getattr(target, size), YAML_KEYS[size]
        if old is not None and new < old and mask not in l0.pruning_modules and mask not in reported:
            reported.add(mask)
            yield f"{TARGET}.{key} = {new} shrinks the source's {old}, which needs the mask {mask} in {modules}"
    gated = {block for mask in l0.pruning_modules for block in BLOCK_MASKS.get(mask, ())}
    if target.layers < source.layers and gated < set(BLOCKS):
        yield (
            f"{TARGET}.n_layers = {target.layers} shrinks the source's {source.layers}, which "
            f"needs the mask layer, or head_layer and mlp, in {modules}"
        )
