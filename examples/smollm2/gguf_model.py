"""A LLaMA model in a GGUF file -> weights, config and tokenizer of transformers.

GGUF numbers are row-major with the shape written backwards; quantized blocks of 32 run along a tensor's input axis.
llama.cpp rotates neighbouring elements of a head where transformers rotates its two halves, so its rows of the query
and key projections are interleaved; `unpermute` puts them back:

    GGUF  [heads, head_dim / 2, 2, in]   ->   transformers  [heads, 2, head_dim / 2, in]

Shapes: `in` and `out` are a projection's input and output sizes, weights are [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llmshearing.errors import ShearingError
from llmshearing.families import table_for

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG_KEYS = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "max_position_embeddings": "llama.context_length",
    "rope_theta": "llama.rope.freq_base",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
CONTROL = 3
"""GGUF's token type of tokens that stand for no text."""


def metadata(reader: GGUFReader, keys: list[str]) -> list[Any]:
    """Values of `keys`; raises ShearingError naming every one that the file lacks."""
    if missing := [key for key in keys if key not in reader.fields]:
        raise ShearingError(f"the GGUF file lacks {', '.join(missing)}")
    return [reader.fields[key].contents() for key in keys]


def read_config(reader: GGUFReader) -> LlamaConfig:
    """The config that the file's metadata say; embeddings are tied where there is no tensor `output.weight`."""
    architecture, model = metadata(reader, ["general.architecture", "tokenizer.ggml.model"])
    if (architecture, model) != ("llama", "gpt2"):
        raise ShearingError(f"the GGUF file holds a {architecture} with a {model} tokenizer; llama with gpt2 is read")
    values = dict(zip(CONFIG_KEYS, metadata(reader, list(CONFIG_KEYS.values())), strict=True))
    # stored in float32: the shortest decimal that rounds to it is what was written
    numbers = {key: float(str(np.float32(v))) if isinstance(v, float) else v for key, v in values.items()}
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return LlamaConfig(**numbers, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"])


def hf_name(name: str) -> str:
    """Name in transformers; what is unknown keeps its own, for the check to name."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found and found[2] in LAYER_NAMES:
        return f"model.layers.{found[1]}.{LAYER_NAMES[found[2]]}.weight"
    return OUTER_NAMES.get(name, name)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """[out, in] with interleaved halves of each head -> [out, in] with one half after the other."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def read_weights(reader: GGUFReader, config: LlamaConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Every tensor, dequantized in float32 and rounded once to `dtype`.

    Raises:
        ShearingError: a tensor is missing, unknown, or of another shape than the config says.
    """
    weights = dict(_read(reader, config, dtype))
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    table_for(config).check({name: tuple(value.shape) for name, value in weights.items()})
    return weights


def _read(reader: GGUFReader, config: LlamaConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in tqdm(reader.tensors, desc="dequantizing", unit="tensor"):
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = unpermute(values, heads[part])
        yield hf_name(tensor.name), torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype)


def read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Byte-level BPE with each digit apart (`tokenizer.ggml.pre` = smollm), special tokens and chat template.

    transformers' own GGUF reader ignores `pre` and would let merges run over digits.
    """
    pre, tokens, kinds, merges, length = metadata(
        reader,
        [f"tokenizer.ggml.{key}" for key in ("pre", "tokens", "token_type", "merges")] + ["llama.context_length"],
    )
    if pre != "smollm":
        raise ShearingError(f"tokenizer.ggml.pre is {pre!r}; only smollm (digits apart) is read")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{role}_token": _token(reader, tokens, key) for role, key in _ROLES.items()},
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )
    template = reader.fields.get("tokenizer.chat_template")
    tokenizer.chat_template = template.contents() if template is not None else None
    return tokenizer


_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _token(reader: GGUFReader, tokens: list[str], role: str) -> str:
    return tokens[metadata(reader, [f"tokenizer.ggml.{role}_token_id"])[0]]


def open_gguf(path: Path) -> GGUFReader:
    """Raises ShearingError if the file is no GGUF."""
    try:
        return GGUFReader(path)
    except (OSError, ValueError) as error:
        raise ShearingError(f"{path} is no readable GGUF file: {error}") from None
