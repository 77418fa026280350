"""The configuration's schema: every key of a YAML file, its type, default and unit. No torch, no logic.

Keys are those of the predecessor's YAML files. "Legacy" keys are accepted so that old files load; each says
what becomes of it. Defaults made by `II("key")` follow that key. A time is a Composer time string
(`values.parse_time`).
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

from llmshearing.config.values import (
    checked,
    choice,
    count,
    number,
    parse_betas,
    parse_microbatch,
    parse_momentum,
    parse_rate,
    parse_subset,
    time,
)
from llmshearing.families.names import MASKS

MASK_KINDS = MASKS
FREE_MAPPING = dict[str, Any]
MUON = "muon"
OPEN = "open"
"""`model.l0_module.start` without information."""


@dataclass
class TargetModel:
    """Shape to shear to. An axis left out keeps the source's size."""

    d_model: int | None = count(None)
    """Hidden units."""
    n_heads: int | None = count(None)
    """Query heads."""
    n_kv_heads: int | None = count(None)
    """KV groups. Left out with grouped queries: whole groups are cut."""
    n_layers: int | None = count(None)
    """Layers."""
    intermediate_size: int | None = count(None)
    """Units between the MLP's projections, or between each expert's."""
    n_experts: int | None = count(None)
    """Experts of each layer, where the source has some."""
    head_dim: int | None = count(None)
    """Legacy: must be the source's, heads are never made narrower."""
    vocab_size: int | None = count(None)
    """Legacy: must be the source's, the vocabulary is not pruned in training."""
    max_seq_len: int | None = count(None)
    """Legacy: must be `max_seq_len`."""


@dataclass
class L0Module:
    """Learned masks. Either `target_model` (multipliers per mask kind) or `target_sparsity` (one pair)."""

    pruning_modules: list[str] = field(
        default_factory=lambda: ["head", "intermediate", "hidden", "layer"],
        metadata={"parse": parse_subset(*MASK_KINDS)},
    )
    """Mask kinds to train: hidden, head, intermediate, expert, and layer or (apart) head_layer and mlp."""
    target_model: TargetModel | None = None
    """Shape to reach exactly."""
    target_sparsity: float | None = number(None, low=0, high=1)
    """Share of the source's prunable parameters to remove, in (0, 1), where the shape is left to training."""
    start_sparsity: float = number(0.0, low=0, high=1)
    """Sparsity the warm-up starts from, 0 to 1."""
    lagrangian_warmup_steps: str | None = time(None)
    """Time over which the sparsity asked for rises from start to target; not the learning rate's warm-up. null: a fifth
    of the run (with fold_at: of the time to it); with an informed start 0ba, since a row that is to be open first
    forgets what it was told."""
    start: str = OPEN
    """Where the masks start (docs/masks.md). open: all units open; a method of `llmshearing.prune`, such as activation:
    it chooses once, before training; or the path of a selection.safetensors."""
    start_spread: float = number(2.0, low=0, above=True)
    """How sure an informed start is: 1 puts the first and the last unit of a row at the ends of log alpha's range,
    2 half of the units."""
    start_samples: int = count(64)
    """Sequences of the training split that a method sees."""
    constraint: str = choice("lagrangian", "lagrangian", "exact")
    """How the target is kept. lagrangian: multipliers pull toward it; exact: log alpha is shifted onto it after every
    step (needs target_model)."""
    noise: float = number(1.0, low=0)
    """Scale of the noise of the sampled gates; 0: none."""
    norms: str = choice("auto", "auto", "units", "energy")
    """What RMSNorms count of the hidden units that are open. units: their number; energy: the energy that they carried
    in the source, measured at the start; auto: energy with model.turn and with an informed start, else units."""
    fold_at: str | None = time(None)
    """When the run folds itself and goes on at the compact size (docs/onerun.md), such as 640ba. 0ba with an informed
    start: choose once, cut, train the compact model. null: the masks stay to the end, and a command folds them."""
    refit: bool = False
    """At fold_at take the choice alone: cut the run's source by it, and fit what stays to the source in closed form
    (docs/pruners.md). Training of the weights up to there then only served the choice."""
    refit_samples: int = count(128, low=2)
    """Sequences of the training split that are fitted to."""
    refit_ridge: float = number(0.1, low=0, above=True)
    """Ridge of the fit, a share of the mean square of what a tensor reads."""
    eval_target_model: bool = False
    """Evaluate the model cut to the target shape (true) or sized by the current masks (false)."""
    seed: int = count(II("seed"), low=0)
    """Seed of the masks' noise."""
    round_to: int = count(8)
    """Open elements of each axis are rounded up to a multiple of this many, which are quicker to multiply (64 suits
    GPU tiles); the extra units have gate 0, so that nothing changes but the time. 1: no rounding."""


@dataclass
class Turn:
    """Hidden units turned into directions before anything else: the same function (docs/onerun.md)."""

    samples: int = count(128)
    """Sequences of the training split that the directions are found by."""
    basis: str = choice("energy", "energy", "output")
    """energy: directions in which the inputs of the norms vary most; output: those first from which what reads them is
    predicted best, for the number of hidden units of target_model."""
    untie: bool = False
    """Give a head that is the embedding a tensor of its own, as turning needs."""


@dataclass
class Model:
    """The source model. Shape keys may be left out where `path` is a Hugging Face directory, else must agree."""

    path: str = MISSING
    """Hugging Face directory or name, or a `.pt` written by the converters."""
    name: str | None = None
    """Legacy label such as mosaic_llama2_7b; ignored."""
    init_device: str = choice("mixed", "cpu", "meta", "mixed")
    """Which ranks read the source under fsdp_config. mixed (meta is the same): the first rank, which hands the others
    their shards, so that one copy is in memory; cpu: every rank. Replicas always read it each."""
    tokenizer_name: str | None = II("tokenizer_name")
    """Tokenizer to save beside the model."""
    d_model: int | None = count(None)
    """Hidden units of the source."""
    n_heads: int | None = count(None)
    """Query heads."""
    n_kv_heads: int | None = count(None)
    """KV groups; as many as query heads where left out."""
    n_layers: int | None = count(None)
    """Layers."""
    intermediate_size: int | None = count(None)
    """Units between the MLP's projections, or between each expert's."""
    n_experts: int | None = count(None)
    """Experts of each layer that has some."""
    head_dim: int | None = count(None)
    """Width of one head; d_model / n_heads where left out."""
    vocab_size: int | None = count(None)
    """Tokens in the vocabulary."""
    max_seq_len: int = count(II("max_seq_len"))
    """Tokens in a sequence; the top-level key's."""
    rms_norm_eps: float | None = number(None, low=0, above=True)
    """Added to the mean square in the norms."""
    rope_theta: float | None = number(None, low=0, above=True)
    """Base of the rotary frequencies."""
    tie_word_embeddings: bool | None = None
    """Whether the output head shares the embedding's weight."""
    init_std: float | None = number(None, low=0)
    """Legacy; weights are loaded, never drawn. Ignored."""
    attn_pdrop: float = number(0.0, low=0, high=0)
    """Legacy; dropout is refused: a resumed run could not repeat it."""
    resid_pdrop: float = number(0.0, low=0, high=0)
    """Legacy, as attn_pdrop."""
    emb_pdrop: float = number(0.0, low=0, high=0)
    """Legacy, as attn_pdrop."""
    attn_impl: str | None = choice(None, "flash", "torch", "triton")
    """Legacy: flash means attn_implementation flash_attention_2; torch and triton mean sdpa."""
    attn_implementation: str | None = choice(None, "sdpa", "flash_attention_2", "eager")
    """Attention of transformers; filled in from attn_impl, else sdpa."""
    activation_checkpointing: bool | None = None
    """Recompute layers in the backward pass to save memory; null: as fsdp_config.activation_checkpointing, or false."""
    l0_module: L0Module | None = None
    """Masks to train; null in continued pretraining."""
    turn: Turn | None = None
    """Turn hidden units before anything else; null: leave them."""


@dataclass
class Dataset:
    """One split on disk: `local/split/<domain>`, or `local/<domain>` without a split."""

    local: str = II("data_local")
    """Directory."""
    remote: str | None = II("data_remote")
    """Address of the same folders in remote storage; `local` keeps what was downloaded. null: all is in `local`."""
    download_retry: int = count(2, low=0)
    """Attempts after a download has failed."""
    download_timeout: float = number(60.0, low=0, above=True)
    """Seconds for one attempt to download a shard."""
    split: str | None = None
    """Folder inside `local`. Evaluation needs one (all domains merged); training, unless data_loading.dynamic."""
    shuffle: bool = True
    """Whether training order is shuffled within a domain (evaluation order never is)."""
    tokenizer_name: str | None = II("tokenizer_name")
    """Legacy; the data are tokens already."""
    max_seq_len: int = count(II("max_seq_len"))
    """Tokens in a sequence; the top-level key's."""
    shuffle_seed: int = count(II("global_seed"), low=0)
    """Seed of the order within domains and of the mixture."""
    is_uint16: bool | None = None
    """Legacy; the data record their dtype. Ignored."""


@dataclass
class Loader:
    """A data loader's settings, as in torch's DataLoader."""

    name: str = choice("text", "text")
    """Legacy label."""
    dataset: Dataset = field(default_factory=Dataset)
    """What is read."""
    drop_last: bool = True
    """Drop the last incomplete batch (training; evaluation always sees each sample once)."""
    num_workers: int = count(0, low=0)
    """Worker processes per rank."""
    prefetch_factor: int | None = count(None)
    """Batches each worker reads ahead."""
    persistent_workers: bool = False
    """Keep workers between epochs."""
    pin_memory: bool | None = None
    """Page-locked host memory; null decides by the device."""
    timeout: float = number(0.0, low=0)
    """Seconds to wait for a batch before failing; 0 waits for ever."""


@dataclass
class Scheduler:
    """Learning rate over time."""

    name: str = choice("cosine_with_warmup", "cosine_with_warmup", "constant_with_warmup", "linear_decay_with_warmup")
    """Shape after the warm-up."""
    t_warmup: str = time("0ba")
    """Time of the linear warm-up from 0."""
    alpha_f: float = number(0.1, low=0, high=1)
    """Final learning rate as a share of `optimizer.lr`."""
    t_max: str = time("1dur", positive=True)
    """Time at which alpha_f is reached."""


@dataclass
class Optimizer:
    """Weights, masks and multipliers (which ascend). Only the weights decay."""

    name: str = choice("decoupled_adamw", "decoupled_adamw", "adamw", MUON)
    """decoupled_adamw: decay not scaled by the learning rate (Composer's); adamw: torch's; muon: orthogonal steps for
    the matrices inside the layers, decoupled_adamw for all else (docs/optimizers.md)."""
    lr: float = number(1e-4, low=0)
    """Peak learning rate of the weights; with muon, of those that are no matrices inside layers."""
    muon_lr: float | None = number(None, low=0)
    """Peak learning rate of the matrices inside layers, on AdamW's scale; null: lr. Only with muon."""
    muon_momentum: float = checked(0.95, parse_momentum)
    """Decay rate of their momentum (Nesterov's). Only with muon."""
    muon_relative: bool = False
    """Their steps are relative: a rate of 0.01 moves a matrix by 1 % of its own size. Only with muon."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"parse": parse_betas})
    """Decay rates of the two moments."""
    eps: float = number(1e-8, low=0, above=True)
    """Added to the root of the second moment."""
    weight_decay: float = number(0.0, low=0)
    """Decay of the weights, per step."""
    lag_lr: int | float | str = checked(1.0, parse_rate)
    """Learning rate of masks and multipliers; auto: rates that follow the length of the run and of the masks' warm-up
    (docs/masks.md). The published 1.0 is made for 3200 steps."""
    schedule_masks: bool = True
    """Masks and multipliers follow the weights' schedule, as in the predecessor; false keeps lag_lr constant. auto
    follows no schedule."""


@dataclass
class GradientClipping:
    """Gradient clipping. Masks and multipliers are clipped with the weights, as in the predecessor."""

    clipping_type: str = choice("norm", "norm", "value", "adaptive")
    """By total norm, by value, or by each parameter's own norm."""
    clipping_threshold: float = number(1.0, low=0, above=True)
    """Largest norm, absolute value, or ratio of gradient norm to weight norm."""


@dataclass
class Algorithms:
    """Composer algorithms."""

    gradient_clipping: GradientClipping | None = None
    """Null does not clip."""


@dataclass
class DataLoading:
    """Domain mixture. Lists follow the order of `set_names`."""

    dynamic: bool = False
    """Update the mixture after each evaluation. false: training needs `train_loader.dataset.split`."""
    set_names: list[str] | None = None
    """Domains: names of folders, and of the evaluation's per-domain losses."""
    proportion: list[float] | None = None
    """Share of the samples from each domain at the start; sums to 1."""
    update_type: str = choice("doremi", "doremi", "constant")
    """doremi: exponential ascent on the excess loss; constant: proportions stay."""
    target_loss: list[float] | None = None
    """Each domain's loss to reach, nats per token (doremi)."""
    mixing: str = choice("exact", "exact", "multinomial")
    """exact: counts follow the proportions within 1; multinomial: independent draws, as the predecessor's."""
    clamp_excess: bool = False
    """Count a domain below its target loss as excess 0, as the paper writes it."""
    eta: float = number(1.0, low=0)
    """Step size of the update."""
    c: float = number(1e-4, low=0, high=1)
    """Weight of the uniform mixture blended in."""


@dataclass
class Callbacks:
    """`data_loading` is ours; the others are mappings of arguments for Composer's callbacks; null: off."""

    data_loading: DataLoading = field(default_factory=DataLoading)
    """Domain mixture."""
    speed_monitor: FREE_MAPPING | None = None
    """Throughput; `window_size` in batches."""
    lr_monitor: FREE_MAPPING | None = None
    """Learning rates."""
    memory_monitor: FREE_MAPPING | None = None
    """GPU memory."""
    runtime_estimator: FREE_MAPPING | None = None
    """Time left."""
    optimizer_monitor: FREE_MAPPING | None = None
    """Norms of gradients and moments."""


@dataclass
class Loggers:
    """Mappings of arguments for Composer's loggers; null: off."""

    wandb: FREE_MAPPING | None = None
    """Weights & Biases: project, name, entity, group, tags, init_kwargs."""
    tensorboard: FREE_MAPPING | None = None
    """TensorBoard: log_dir, flush_interval."""
    file_logger: FREE_MAPPING | None = None
    """Text file: filename, buffer_size, flush_interval."""


@dataclass
class Fsdp:
    """FSDP 2: every rank holds a part of the weights, gradients and optimizer state; the masks stay whole."""

    reshard_after_forward: bool | None = None
    """Give a layer's weights up after its forward pass (true; least memory) or keep them for the backward pass (false:
    less communication). null: as sharding_strategy says."""
    sharding_strategy: str = choice("FULL_SHARD", "FULL_SHARD", "SHARD_GRAD_OP")
    """FSDP 1's name for the same: FULL_SHARD reshards after the forward pass, SHARD_GRAD_OP does not."""
    mixed_precision: str = choice("DEFAULT", "DEFAULT", "PURE", "FULL")
    """DEFAULT: weights gathered in `precision`, gradients reduced in float32; PURE: both in `precision`; FULL: in the
    weights' own dtype. Masks stay float32 always."""
    state_dict_type: str = choice("full", "full", "sharded")
    """full: one file, which any layout loads; sharded: a directory to which every rank writes its part
    (torch.distributed.checkpoint), for any number of ranks with fsdp_config."""
    load_monolith_rank0_only: bool = False
    """Read a full checkpoint on the first rank alone and hand the others their shards: one copy in memory, not one a
    rank."""
    activation_checkpointing: bool | None = None
    """The predecessor's place for model.activation_checkpointing, which it sets."""
    activation_cpu_offload: bool = False
    """Legacy; only false."""
    verbose: bool = False
    """Log how the model was sharded."""
    backward_prefetch: str | None = None
    """Legacy (FSDP 1); ignored, as are the next four: FSDP 2 has one way."""
    forward_prefetch: bool | None = None
    """Legacy; ignored."""
    limit_all_gathers: bool | None = None
    """Legacy; ignored."""
    sync_module_states: bool | None = None
    """Legacy; ignored, see model.init_device."""
    use_orig_params: bool | None = None
    """Legacy; ignored."""


@dataclass
class Distill:
    """Training toward a teacher: weight x divergence + ce x cross-entropy + hidden x distance of hidden states."""

    teacher: str | None = None
    """Hugging Face directory or name, or `.pt`, of the teacher; null, while masks train: the run's own source."""
    cache: str | None = None
    """Directory that `llmshearing distill cache` wrote on this run's training split, in place of a live teacher. With
    `teacher` too it must be that teacher's."""
    weight: float = number(1.0, low=0, above=True)
    """Of the forward KL divergence from the teacher, nats a token."""
    ce: float = number(0.0, low=0)
    """Of the cross-entropy with the data beside it."""
    temperature: float = number(1.0, low=0, above=True)
    """Both sides' logits are divided by it."""
    top_k: int | None = count(None)
    """Entries of the teacher's distribution that count, as a cache has them; null: all, or what the cache has."""
    tail: str = choice("sampled", "sampled", "bucket")
    """What stands for the others beside `top_k`. sampled: half of the entries are drawn; bucket: their mass alone."""
    hidden: float = number(0.0, low=0)
    """Weight, at the start, of the distance between the student's hidden states and the teacher's; 0: they do not
    count. Needs a live teacher that is the model which was cut."""
    hidden_until: str = time("1dur", positive=True)
    """When that weight has fallen to 0, in a straight line."""
    selection: str | None = None
    """The `selection.safetensors` that the pruner wrote beside the student: which units and layers of the teacher it
    has. null, while masks train: what the masks keep in each step."""


@dataclass
class Config:
    """A run of `train.py`."""

    data_local: str = MISSING
    """Directory of the MDS data."""
    data_remote: str | None = None
    """Address that `data_local` is filled from, e.g. s3://bucket/data (see docs/data.md); null: all is there."""
    tokenizer_name: str | None = None
    """Hugging Face tokenizer directory or name, saved beside exported models."""
    max_seq_len: int = count()
    """Tokens in a sequence, in the data and in the model."""
    global_seed: int = count(17, low=0)
    """Seed from which the others follow."""
    seed: int = count(II("global_seed"), low=0)
    """Seed of the training process."""
    run_name: str | None = "${oc.env:COMPOSER_RUN_NAME,null}"
    """Name of the run."""
    model: Model = field(default_factory=Model)
    """Source model and masks."""
    tokenizer: FREE_MAPPING | None = None
    """Legacy block {type, args}; ignored except that args.max_seq_len must agree."""
    train_loader: Loader = field(default_factory=Loader)
    """Training data."""
    eval_loader: Loader = field(default_factory=Loader)
    """Evaluation data."""
    scheduler: Scheduler = field(default_factory=Scheduler)
    """Learning-rate schedule."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """Optimizer."""
    algorithms: Algorithms = field(default_factory=Algorithms)
    """Composer algorithms."""
    max_duration: str = time(positive=True)
    """Length of the run."""
    eval_interval: str = time("100ba", positive=True)
    """Time between evaluations; a dynamic mixture is updated after each."""
    eval_subset_num_batches: int = count(-1, low=-1)
    """Batches per evaluation and rank; -1 takes the whole split."""
    eval_first: bool = False
    """Evaluate before the first step."""
    global_train_batch_size: int = count()
    """Samples per optimizer step, over all ranks."""
    device_train_microbatch_size: int | str | None = checked(None, parse_microbatch)
    """Samples per forward pass and rank; auto: the most that fit a GPU; null: the rank's whole batch."""
    device_eval_batch_size: int = count(8)
    """Evaluation samples per forward pass and rank."""
    precision: str = choice("amp_bf16", "fp32", "amp_bf16", "amp_fp16")
    """Arithmetic of forward and backward; masks stay fp32."""
    device: str | None = choice(None, "cpu", "gpu")
    """Null: a GPU where there is one."""
    dist_timeout: float = number(600.0, low=0, above=True)
    """Seconds that a rank waits for the others."""
    fsdp_config: Fsdp | None = None
    """Shard the model over the ranks (FSDP 2, on GPUs and on the CPU); null: replicas (DDP). docs/distributed.md."""
    progress_bar: bool = True
    """Show how far the run is: one line in a terminal, plain lines now and then in a file."""
    log_to_console: bool = False
    """Log metrics to the console."""
    console_log_interval: str = time("1ba", positive=True)
    """Time between console logs."""
    python_log_level: str | None = choice("info", "debug", "info", "warning", "error")
    """Level of Python's logging; null leaves it."""
    distill: Distill | None = None
    """Follow a teacher; null: the data alone. docs/distillation.md."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    """Domain mixture and Composer's monitors."""
    loggers: Loggers = field(default_factory=Loggers)
    """Where metrics go."""
    save_folder: str | None = None
    """Local directory of checkpoints and of the resolved configuration; null saves nothing."""
    save_interval: str = time("1000ba", positive=True)
    """Time between checkpoints; the end of the run is always saved."""
    save_overwrite: bool = False
    """Replace checkpoints of the same name."""
    save_num_checkpoints_to_keep: int = count(-1, low=-1)
    """Checkpoints kept, -1: all."""
    save_filename: str = "ep{epoch}-ba{batch}-rank{rank}.pt"
    """Name of a checkpoint; Composer's placeholders."""
    save_latest_filename: str = "latest-rank{rank}.pt"
    """Name of the link to the newest checkpoint."""
    load_path: str | None = None
    """Checkpoint to start from."""
    trust_checkpoint: bool = False
    """Load a checkpoint even where that could run code hidden in it (a pickle)."""
    load_weights_only: bool = False
    """Take only the weights of load_path, not the optimizer's state and the clock."""
    autoresume: bool = False
    """Continue from save_folder's newest whole checkpoint, where there is one; needs save_folder."""
    first_batch_tolerance: float | None = number(1.0, low=0)
    """Stop where the first batch's loss is this much (nats) above the one recorded with the weights; null: never."""
    record_samples: bool = False
    """Write the ids of the samples that each batch was trained on to save_folder/samples-rank<rank>.jsonl."""
