"""Hugging Face models out: checkpoint, or weights and config -> a directory for `AutoModelForCausalLM`.

Tensors pass bit by bit: no dtype changes unless one is asked for. Tied tensors are written once, under the name that
the table says they are.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from llmshearing.checkpoints.arguments import LABEL
from llmshearing.checkpoints.card import model_card, tokenizer_of
from llmshearing.checkpoints.checkpoint import Checkpoint, CheckpointInfo, read_checkpoint
from llmshearing.checkpoints.generation import writable
from llmshearing.checkpoints.hf_config import CONFIG
from llmshearing.checkpoints.hf_read import DTYPES, SETTABLE, check_given, looks_local, model_class
from llmshearing.checkpoints.output import PARITY, TOKENIZER_FILES, check_directory, new_directory
from llmshearing.checkpoints.parity import certify, hf_parity
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.portable import portable
from llmshearing.progress import tqdm
from llmshearing.storage import LazyTensor, find_file, lazily, write_safetensors
from llmshearing.storage.dtypes import cast_lazily, main_dtype

log = logging.getLogger(__name__)

SHARD_NAMES = "model{suffix}.safetensors"


def checkpoint_to_hf(
    path: Path | str,
    output: Path | str,
    given: Mapping[str, Any] | None = None,
    *,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    check: bool = True,
) -> Path:
    """Composer checkpoint -> Hugging Face directory.

    Args:
        given: facts to check against the checkpoint (vocab_size, ...); or model_class, dtype (float32, float16,
            bfloat16; default: as stored), tokenizer (directory, file or name), _name_or_path (the model's name).
        check: load what was written and compare it (:mod:`llmshearing.checkpoints.parity`).

    Raises:
        ShearingError: a fact is wrong or a key unknown; the checkpoint still has masks; the output is not empty; or
            what was written is another function.
    """
    output, given = Path(output), dict(given or {})
    check_directory(output, overwrite)
    foreign = {key: value for key, value in given.items() if key not in (*SETTABLE, LABEL)}
    checkpoint = read_checkpoint(path, foreign=foreign, verify=False)  # each tensor is verified as it is read
    refuse_masks(checkpoint)
    size = max_shard_size
    return export_hf(
        checkpoint.weights, checkpoint.info, output, given, where=str(checkpoint.path), max_shard_size=size,
        overwrite=overwrite, check=check,
    )  # fmt: skip


def export_hf(
    weights: Mapping[str, Tensor],
    info: CheckpointInfo,
    output: Path,
    given: Mapping[str, Any],
    *,
    where: str,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    check: bool = True,
) -> Path:
    """A model and what is known of it -> Hugging Face directory.

    Args:
        given: as :func:`checkpoint_to_hf`. where: what holds the model, for messages.

    Raises:
        ShearingError: as :func:`checkpoint_to_hf`.
    """
    config = info.config
    check_given(given, config, where)
    config.architectures = [given.get("model_class") or model_class(config)]
    config.name_or_path = str(given.get(LABEL) or config.name_or_path)
    tokenizer = given.get("tokenizer")
    return write_hf_directory(
        weights,
        config,
        output,
        dtype=given.get("dtype"),
        tokenizer=tokenizer if tokenizer is not None else tokenizer_of(info),
        tokenizer_required=tokenizer is not None,
        card=model_card(info, name=str(given.get(LABEL) or output.resolve().name)),
        generation_config=info.generation_config,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        check=check,
    )


def refuse_masks(checkpoint: Checkpoint) -> None:
    """An unfolded model is not the model that its masks mean."""
    if checkpoint.masks or checkpoint.info.masks:
        raise ShearingError(
            f"{checkpoint.path} still has its pruning masks; fold it first:\n  python3 -m "
            f"llmshearing.utils.post_pruning_processing prune_and_save_model {checkpoint.path}"
        )


def write_hf_directory(
    weights: Mapping[str, Tensor],
    config: PretrainedConfig,
    directory: Path | str,
    *,
    dtype: torch.dtype | str | Mapping[str, torch.dtype] | None = None,
    tokenizer: Path | str | None = None,
    tokenizer_required: bool = True,
    card: str | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    extra: Callable[[Path], object] | None = None,
    check: bool = False,
    model: PreTrainedModel | None = None,
) -> Path:
    """Write what `AutoModelForCausalLM.from_pretrained` loads, under a temporary name, then rename.

    Args:
        weights: every tensor of the model by its name in transformers; of lazy ones, one at a time is made.
        dtype: of all tensors, or of each by name; None keeps each tensor's.
        tokenizer: directory, file, or name on the hub; None writes none and warns.
        tokenizer_required: whether a tokenizer that cannot be had is an error, or a warning.
        card: text of README.md. generation_config: None makes one from the config.
        extra: writes further files into the folder before it gets its name.
        check: load what was written, compare it with the weights, and write `parity.json`. model: of the weights, in
            float32, where there is one already.

    Raises:
        ShearingError: tensors and config disagree; the directory has something in it; the tokenizer cannot be loaded.
        ParityError: the check failed; what was written is kept under another name.
    """
    directory, config = Path(directory), type(config).from_dict(config.to_dict())
    table = table_for(config)
    entries = lazily(weights).entries
    table.check({name: value.shape for name, value in entries.items()})
    once = {name: entries[name] for name, spec, _ in table.instances() if spec.alias is None}
    wanted = _wanted(once, dtype)
    config.dtype = main_dtype(wanted)
    settings = writable(generation_config, config)
    config.architectures = config.architectures or [model_class(config)]
    if table.head_dim_key:
        setattr(config, table.head_dim_key, table.head_dim)
    with new_directory(directory, overwrite) as folder:
        stored = {name: cast_lazily(name, value, wanted[name]) for name, value in once.items()}
        _write_shards(stored, folder, max_shard_size)
        config.save_pretrained(folder)
        _write_config(folder / CONFIG, type(config)())
        settings.save_pretrained(folder)
        _tokenizer(tokenizer, tokenizer_required, folder, directory)
        (folder / "README.md").write_text(card or model_card(CheckpointInfo(config.to_dict()), name=directory.name))
        if extra is not None:
            extra(folder)
        for file in folder.glob("*.safetensors"):  # safetensors makes files that their owner alone may read
            shutil.copymode(folder / "README.md", file)
        if check:
            parity = hf_parity(folder, stored, config, model)
            certify(parity, folder, directory, folder / PARITY)
    if check:
        log.info("checked: %s", parity.said())
    log.info("wrote a %s (%s parameters) to %s", config.architectures[0], f"{table.count():,}", directory)
    return directory


def _wanted(
    tensors: Mapping[str, LazyTensor], dtype: torch.dtype | str | Mapping[str, torch.dtype] | None
) -> dict[str, torch.dtype]:
    """The dtype to write each tensor in."""
    if isinstance(dtype, Mapping):
        return {name: dtype.get(name, tensor.dtype) for name, tensor in tensors.items()}
    one = DTYPES[dtype] if isinstance(dtype, str) else dtype
    return {name: one or tensor.dtype for name, tensor in tensors.items()}


USUAL = {
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True, "is_decoder": False,
    "add_cross_attention": False,
}  # fmt: skip
"""What a config that does not say otherwise means."""


def _write_config(path: Path, default: PretrainedConfig) -> None:
    """The file again, in the form that transformers 4.57 and 5 both read; all but their version is then the same.

    5 writes the usual values too, 4.57 does so where the family's default is another.
    """
    values = portable(json.loads(path.read_text()))
    needless = {key for key, usual in USUAL.items() if getattr(default, key, usual) == usual}
    values = {key: value for key, value in values.items() if key not in needless or value != USUAL[key]}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_shards(tensors: Mapping[str, LazyTensor], folder: Path, max_shard_size: str) -> None:
    """safetensors files of at most ``max_shard_size``, written tensor by tensor."""
    sizes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in tensors.items()}
    split = split_torch_state_dict_into_shards(sizes, filename_pattern=SHARD_NAMES, max_shard_size=max_shard_size)
    with tqdm(total=len(tensors), desc="writing", unit="tensor") as bar:
        for file, names in split.filename_to_tensors.items():
            write_safetensors(folder / file, {name: tensors[name] for name in names}, bar.update)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _tokenizer(tokenizer: Path | str | None, required: bool, folder: Path, directory: Path) -> None:
    reason = "none is known"
    if tokenizer is not None:
        try:
            return copy_tokenizer(tokenizer, folder)
        except ShearingError as error:
            if required:
                raise
            reason = str(error)
    log.warning("warning: %s has no tokenizer (tokenizer=DIR adds one): %s", directory, reason)


def copy_tokenizer(tokenizer: Path | str, folder: Path) -> None:
    """Files of a tokenizer, as they are: of a directory, beside a file, or of a name on the hub.

    Raises:
        ShearingError: there is no tokenizer.
    """
    path = Path(tokenizer)
    if path.exists():
        source = path if path.is_dir() else path.parent
        _copy([source / name for name in TOKENIZER_FILES if (source / name).is_file()], path, folder)
        return
    if looks_local(tokenizer):
        raise ShearingError(f"tokenizer {tokenizer} does not exist")
    found = [find_file(tokenizer, name) for name in TOKENIZER_FILES]
    _copy([file for file in found if file is not None], tokenizer, folder)


def _copy(files: list[Path], tokenizer: Path | str, folder: Path) -> None:
    """Under names of our own list alone: no name that a tokenizer brings along decides where something is written."""
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        raise ShearingError(f"tokenizer {tokenizer}: there is no tokenizer.json, tokenizer.model or vocab.json")
    for file in files:
        shutil.copyfile(file, folder / file.name)
