"""What the commands of the core work on, made without Composer and Streaming: a model, MDS data, a run's checkpoint."""

import json
from pathlib import Path

import numpy as np
import torch
from helpers_prune import model_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmshearing.checkpoints.checkpoint import CheckpointInfo, save_checkpoint
from llmshearing.families import table_for
from llmshearing.masks.l0 import L0Masks

LENGTH = 12


def build(place):
    """Everything below a folder."""
    place = Path(place)
    save_source(place / "source")
    for name, seed in (("for_prune", 1), ("eval_merge", 2)):
        write_mds(place / "mds" / name, np.random.default_rng(seed).integers(3, 23, (8, LENGTH)).astype("uint16"))
    save_pruning_run(place / "run")


def save_source(folder):
    """A LLaMA and a tokenizer of one token a word."""
    model_of("llama").save_pretrained(folder)
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(20))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def write_mds(folder, rows):
    """One uncompressed shard of rows [N, T], byte by byte as the format says."""
    folder.mkdir(parents=True)
    samples = [np.uint32(3).tobytes() + b"web" + row.tobytes() for row in rows]
    about = b"{}"
    begins = 4 * (2 + len(samples)) + len(about) + np.cumsum([0, *map(len, samples)])
    data = np.uint32(len(samples)).tobytes() + begins.astype("<u4").tobytes() + about + b"".join(samples)
    (folder / "shard.00000.mds").write_bytes(data)
    shard = {
        "column_names": ["set", "tokens"], "column_encodings": ["str", f"ndarray:uint16:{rows.shape[1]}"],
        "column_sizes": [None, 2 * rows.shape[1]], "compression": None, "format": "mds", "hashes": [],
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(data), "hashes": {}}, "samples": len(rows),
        "size_limit": 1 << 26, "version": 2, "zip_data": None,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))


def save_pruning_run(folder):
    """A checkpoint in the middle of pruning, with masks."""
    model = model_of("llama")
    settings = {
        "kinds": ["hidden", "intermediate", "layer"], "target": {"hidden": 8, "intermediate": 6, "layer": 2},
        "target_sparsity": None, "start_sparsity": 0.0, "seed": 3,
    }  # fmt: skip
    masks = L0Masks(table_for(model.config), **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in masks.log_alpha.values():
            value.copy_(3 * torch.randn(value.shape, generator=generator)).clamp_(-4, 4)
    about = {**settings, "head_mode": "group"}
    info = CheckpointInfo(hf_config=model.config.to_dict(), masks=about, history=["made by hand"])
    save_checkpoint(folder / "latest-rank0.pt", model.state_dict(), info, masks.state_dict())
