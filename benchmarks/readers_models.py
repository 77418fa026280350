"""Tiny models of every family, pruned by every method, for `python -m benchmarks.readers`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from llmshearing.families import UNIFORM
from llmshearing.families.names import HIDDEN, INTERMEDIATE, LAYERS, VOCAB
from llmshearing.prune.calibration import SequenceOptions
from llmshearing.prune.run import prune

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
BASE = {**SIZES, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32, "tie_word_embeddings": True}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 64, "n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "gemma2": GEMMA, "gemma3_text": GEMMA,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True,
    },
}  # fmt: skip
CAPPED = ("gemma2",)
"""Families whose attention scores are capped, which SDPA of transformers 4.57 leaves out without a word."""
TEXT = "text.txt"
FEW = SequenceOptions(max_seq_len=16, samples=8, report_samples=4)


def tiny_config(family: str, **changes: Any) -> Any:
    return CONFIG_MAPPING[family](**{**BASE, **IDS, "tie_word_embeddings": False, **OWN.get(family, {}), **changes})


def attention_of(family: str) -> dict[str, str]:
    """Options of from_pretrained under which transformers 4.57 computes what the config says."""
    return {"attn_implementation": "eager"} if family in CAPPED else {}


# Each: (source, text, keys of the family's config, new directory) -> the directory ------------------------------------

Make = Callable[[Path, Path, dict[str, str], Path], Path]


def _plain(method: str, size: str = INTERMEDIATE, target: int | list[int] = 32) -> Make:
    def make(source: Path, text: Path, keys: dict[str, str], folder: Path) -> Path:
        return prune(method, source, folder, {keys[size]: target}, calibration=text, sequences=FEW).path

    return make


def _turned(source: Path, text: Path, keys: dict[str, str], folder: Path) -> Path:
    """Turned, then cut in the directions of least energy."""
    turned = prune("turn", source, folder.with_name("turned"), {}, calibration=text, sequences=FEW).path
    return _plain("fisher", HIDDEN, 48)(turned, text, keys, folder)


def _vocabulary(source: Path, text: Path, keys: dict[str, str], folder: Path) -> Path:
    return prune("vocabulary", source, folder, {keys[VOCAB]: 48}, corpus=text, processes=1).path


METHODS: dict[str, Make] = {
    **{method: _plain(method) for method in ("random", "activation", "fisher", "obs")},
    "depth": _plain("depth", LAYERS, 2),
    "turn": _turned,
    "vocabulary": _vocabulary,
    "unequal": _plain("fisher", INTERMEDIATE, [40, 24, 32]),
}
"""Name -> how; `turn` is followed by `fisher` on hidden units, and `unequal` is `fisher` with a size for each layer."""


def make(family: str, method: str, folder: Path) -> Path:
    """A tiny model of a family, pruned by a method, in a directory."""
    tiny_model(tiny_config(family), folder / "source")
    return METHODS[method](folder / "source", folder / "source" / TEXT, UNIFORM[family].keys, folder / "pruned")


def tiny_model(config: Any, folder: Path) -> PreTrainedModel:
    """A model of random weights, with a tokenizer and text, written to a directory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    lines = (" ".join(f"w{(3 * line + word) % 60}" for word in range(24)) for line in range(200))
    (folder / TEXT).write_text("\n".join(lines))
    _tokenizer(folder, folder / TEXT, config.vocab_size)
    return model


def _tokenizer(folder: Path, text: Path, tokens: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=tokens, special_tokens=[*special.values()], show_progress=False)
    backend.train([str(text)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
