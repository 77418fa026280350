"""Small data, a teacher and its cache: two domains of some dozen sequences, written by Streaming itself."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from helpers_runs import SEQ, VOCAB, make_model, save_tokenizer
from streaming import MDSWriter

NAMES = ["code", "docs"]
SIZES = {"code": 21, "docs": 34}


def write_domain(folder: Path, name: str, samples: int, seed: int = 0, length: int = SEQ, hashes=("xxh64",)) -> None:
    """An MDS directory; code has low ids, docs high ones."""
    generator = np.random.default_rng([seed, len(name), ord(name[0])])
    low, high = (0, VOCAB // 2) if name == "code" else (VOCAB // 2, VOCAB)
    columns = {"set": "str", "tokens": "ndarray:uint16"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=2000, hashes=list(hashes)) as out:
        for _ in range(samples):
            out.write({"set": name, "tokens": generator.integers(low, high, length).astype(np.uint16)})


def write_data(root: Path, seed: int = 0, length: int = SEQ, sizes: dict[str, int] = SIZES) -> Path:
    """`train/DOMAIN`, and `eval` with both."""
    for name, samples in sizes.items():
        write_domain(root / "train" / name, name, samples, seed, length)
    with MDSWriter(out=str(root / "eval"), columns={"set": "str", "tokens": "ndarray:uint16"}) as out:
        for i in range(6):
            out.write({"set": list(sizes)[i % len(sizes)], "tokens": np.full(length, i, np.uint16)})
    return root


def write_teacher(folder: Path, seed: int = 5, **changes) -> Path:
    """A random model with the lab's tokenizer."""
    make_model(seed, initializer_range=0.2, **changes).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def run_settings(data: Path, source: Path, folder: Path | None, **distill) -> dict:
    """A run of six batches without masks, that follows what ``distill`` says."""
    mixture = {"dynamic": True, "set_names": NAMES, "proportion": [0.5, 0.5], "update_type": "constant"}
    return {
        "data_local": str(data),
        "max_seq_len": SEQ,
        "run_name": "cached",
        "model": {"path": str(source)},
        "distill": distill,
        "train_loader": {"dataset": {"split": "train"}},
        "eval_loader": {"dataset": {"split": "eval"}},
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "1ba"},
        "optimizer": {"lr": 1e-2},
        "max_duration": "6ba",
        "eval_interval": "6ba",
        "global_train_batch_size": 4,
        "device_eval_batch_size": 4,
        "precision": "fp32",
        "device": "cpu",
        "callbacks": {"data_loading": mixture},
        "progress_bar": False,
        "python_log_level": None,
        "save_folder": str(folder) if folder else None,
        "save_interval": "3ba",
    }


def contents(cache: Path) -> dict[str, str]:
    """Hash of every file of a cache."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    return {str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint."""
    from llmshearing.checkpoints.checkpoint import read_checkpoint

    return dict(read_checkpoint(path).weights.items())
