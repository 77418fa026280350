"""Builds what the trainer iterates over. Imported by `train`; knows Composer's DataSpec and its ranks.

A batch is a dict: `input_ids` int64 [B, T], `set` int64 [B] (index into set_names), `sample` int64 [B], and `loss_mask`
bool [B, T] where the data have one.
Evaluation pads: rows with `set` == -1 must count for nothing (see `dataset.EvalDataset`).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader

from llmshearing.data.mds.index import INDEX, broken_json
from llmshearing.data.mds.manifest import MANIFEST, check_model
from llmshearing.data.mds.masks import COLUMN
from llmshearing.data.mds.remote import Remote
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mixture.dataset import EvalDataset, MixtureDataset
from llmshearing.data.mixture.mixture import Mixture
from llmshearing.data.mixture.reading import join
from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)

NOTHING = 1e-30


def build_train_dataloader(
    *,
    local: Path | str,
    split: str | None,
    set_names: Sequence[str],
    proportion: Sequence[float] | np.ndarray,
    batch_size: int,
    max_seq_len: int,
    vocab_size: int,
    seed: int,
    dynamic: bool = True,
    shuffle: bool = True,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    persistent_workers: bool = False,
    pin_memory: bool | None = None,
    timeout: float = 0,
    mixing: str = "exact",
    multiprocessing_context: str | None = None,
    remote: str | None = None,
    download_retry: int = 2,
    download_timeout: float = 60.0,
) -> DataSpec:
    """The endless mixture of `local/<split>/<domain>` (`local/<domain>` without a split) for each of
    set_names.

    `batch_size` is per rank, `proportion` [K] sums to 1. With `dynamic=False`, a `local/<split>` that is
    itself an MDS directory is read as one plain stream. `spec.dataloader.dataset` is the `MixtureDataset`.

    `num_workers` processes of this rank read `prefetch_factor` (2) batches each ahead; what is read does not depend
    on them. They are started once an epoch, so `persistent_workers` changes nothing here. `timeout`: seconds to
    wait for a batch from them, 0 for ever. `mixing`: exact or multinomial.

    `remote` holds the same folders as `local`, which then is where shards are kept once they have been downloaded; one
    attempt takes at most `download_timeout` seconds and is followed by `download_retry` more.

    Raises ShearingError for missing domains, damaged shards, another sequence length or vocabulary, bad
    proportions.
    """
    _check_workers(num_workers, prefetch_factor, persistent_workers)
    source = _open_remote(Path(local), remote, download_retry, download_timeout)
    root, source = _split_directory(local, split, source)
    check_model(Path(local), max_seq_len, vocab_size)
    plain = not dynamic and (source is not None or (root / INDEX).is_file())
    if plain:
        streams, names, proportion = [MdsDirectory(root, max_seq_len, vocab_size, source)], [split or root.name], [1.0]
    else:
        streams, names = _open_domains(root, set_names, max_seq_len, vocab_size, source), list(set_names)
    sizes, blocks = [len(stream) for stream in streams], [stream.block for stream in streams]
    mixture = Mixture(names, sizes, proportion, seed, shuffle, mixing=mixing, blocks=blocks)
    dataset = MixtureDataset(
        streams,
        set_names,
        mixture,
        batch_size=batch_size,
        rank=dist.get_global_rank(),
        world_size=dist.get_world_size(),
        plain=plain,
        workers=num_workers,
        prefetch_factor=prefetch_factor,
        timeout=timeout,
        context=multiprocessing_context,
    )
    counted = {"get_num_tokens_in_batch": token_counts} if dataset.masked else {}
    return DataSpec(_dataloader(dataset, pin_memory, collate_fn=join), **counted)


def build_eval_dataloader(
    *,
    local: Path | str,
    split: str | None,
    set_names: Sequence[str],
    batch_size: int,
    max_seq_len: int,
    vocab_size: int,
    subset_num_batches: int | None = None,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    persistent_workers: bool = False,
    pin_memory: bool | None = None,
    timeout: float = 0,
    multiprocessing_context: str | None = None,
    remote: str | None = None,
    download_retry: int = 2,
    download_timeout: float = 60.0,
) -> DataSpec:
    """The merged evaluation split `local/<split>`: every sample once, over all ranks together.

    `batch_size` is per rank; `subset_num_batches` (global batches; None or -1: all) takes from the domains in
    turn. The spec counts real samples and their tokens only, not padding.

    Raises ShearingError like `build_train_dataloader`, and where the split's domains are not exactly
    set_names.
    """
    _check_workers(num_workers, prefetch_factor, persistent_workers)
    source = _open_remote(Path(local), remote, download_retry, download_timeout)
    root, source = _split_directory(local, split, source)
    check_model(Path(local), max_seq_len, vocab_size)
    dataset = EvalDataset(
        MdsDirectory(root, max_seq_len, vocab_size, source),
        set_names,
        batch_size=batch_size,
        rank=dist.get_global_rank(),
        world_size=dist.get_world_size(),
        subset_num_batches=subset_num_batches,
    )
    workers: dict[str, Any] = {"num_workers": num_workers}
    if num_workers:
        workers |= {"prefetch_factor": prefetch_factor, "persistent_workers": persistent_workers}
        workers |= {"timeout": timeout, "multiprocessing_context": multiprocessing_context}
    return DataSpec(
        _dataloader(dataset, pin_memory, **workers),
        num_samples=len(dataset.order),
        get_num_samples_in_batch=real_samples,
        get_num_tokens_in_batch=lambda batch: real_samples(batch) * batch["input_ids"].shape[1],
    )


def token_counts(batch: Any) -> dict[str, Any]:
    """Tokens of a training batch with a loss mask, by Composer's names: all, and those that count in the loss.

    Composer weighs microbatches and ranks by the latter, and divides by their sum. Where a whole global batch has no
    answer they share it evenly: NOTHING is lost beside a 1, and all NOTHINGs together are no 0.
    """
    answers = int(batch[COLUMN][:, 1:].sum())  # nothing predicts a sequence's first token
    return {"total": batch["input_ids"].numel(), "loss_generating": float(answers) or NOTHING}


def real_samples(batch: Any) -> int:
    """Samples of an evaluation batch that are no padding."""
    return int((batch["set"] >= 0).sum())


def _dataloader(dataset: MixtureDataset | EvalDataset, pin_memory: bool | None, **more: Any) -> DataLoader:
    pin = torch.cuda.is_available() if pin_memory is None else pin_memory
    # A generator of its own: each iteration draws from it, and a resumed run iterates more often.
    generator = torch.Generator()
    return DataLoader(dataset, batch_size=dataset.batch_size, pin_memory=pin, generator=generator, **more)


def _check_workers(num_workers: int, prefetch_factor: int | None, persistent_workers: bool) -> None:
    if num_workers < 0 or (prefetch_factor is not None and prefetch_factor < 1):
        raise ShearingError(
            f"num_workers is {num_workers} and prefetch_factor {prefetch_factor}; at least 0 and at least 1 are needed"
        )
    if not num_workers and (prefetch_factor is not None or persistent_workers):
        raise ShearingError(
            f"prefetch_factor is {prefetch_factor} and persistent_workers {persistent_workers}; "
            "without workers they must be null and false"
        )


def _open_remote(local: Path, url: str | None, retry: int, timeout: float) -> Remote | None:
    """The data's remote directory; its manifest comes to `local`, if there is one."""
    if url is None:
        return None
    remote = Remote(url, retry, timeout)
    if not (local / MANIFEST).is_file():
        try:
            Remote(url, 0, timeout).fetch(MANIFEST, local / MANIFEST, broken_json)
        except ShearingError:  # the predecessor's data have none; they are checked as they are read
            log.warning("%s has no %s that can be read", url, MANIFEST)
    return remote


def _split_directory(local: Path | str, split: str | None, source: Remote | None) -> tuple[Path, Remote | None]:
    """The folder of a split, here and in remote storage."""
    root = Path(local, split) if split else Path(local)
    if source is None and not root.is_dir():
        raise ShearingError(f"data directory {root} does not exist; {Path(local)} has {_folders(Path(local))}")
    return root, source.below(split) if source is not None and split else source


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []


def _open_domains(
    root: Path, set_names: Sequence[str], max_seq_len: int, vocab_size: int, source: Remote | None
) -> list[MdsDirectory]:
    """Every domain's directory, all problems reported at once."""
    if not set_names:
        raise ShearingError(f"set_names is empty; {root} has {_folders(root)}")
    streams, problems = [], []
    for name in set_names:
        if source is None and not (root / name).is_dir():
            problems.append(f"domain {name!r} is not in {root}, which has {_folders(root)}")
            continue
        try:
            inside = source.below(name) if source is not None else None
            streams.append(MdsDirectory(root / name, max_seq_len, vocab_size, inside))
        except ShearingError as error:
            problems.append(str(error))
    if problems:
        raise ShearingError("\n".join(problems))
    return streams
