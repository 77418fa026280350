"""How each reader computes log-probabilities of what was written: one function a reader, and the table of them.

Each takes (directory, the model of it in transformers, token ids [B, T]). It returns log-probabilities [B, T, V], which
are held against transformers', or, where a reader gives no such thing, the largest difference itself, in nats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmshearing.checkpoints.parity import largest_difference, scores_of

TOLERANCE = 1e-2
EXPORTABLE = "sdpa_without_vmap"
"""transformers' own name for SDPA whose masks can be exported."""
Check = Callable[[Path, PreTrainedModel, Tensor], Tensor | float]


class ReaderError(Exception):
    """A reader took a model and did nothing with it."""


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _plain(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    return scores_of(load(folder), ids)


def _generate(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The last position after a static cache has seen the others."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        last = model(
            input_ids=ids[:, -1:],
            past_key_values=cache,
            use_cache=True,
            cache_position=torch.tensor([ids.shape[1] - 1]),
        )
    whole = scores_of(model, ids)
    return torch.cat([whole[:, :-1], last.logits.float().log_softmax(-1)], dim=1)


_PROGRAMS: dict[str, nn.Module] = {}


def _once(kind: str, model: PreTrainedModel, make: Callable[[], nn.Module]) -> nn.Module:
    """A program of ``model``, which takes seconds to make: made once for all models of a shape, and given weights."""
    shape = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    name = f"{kind} {json.dumps(shape, sort_keys=True, default=str)}"
    if name not in _PROGRAMS:
        _PROGRAMS[name] = make()
    return _PROGRAMS[name]


def forget() -> None:
    """Drop the programs: before another family."""
    _PROGRAMS.clear()
    torch._dynamo.reset()


def _compiled(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    program = _once("compiled", model, lambda: cast(nn.Module, torch.compile(deepcopy(model), backend="aot_eager")))
    program.get_submodule("_orig_mod").load_state_dict(model.state_dict())
    with torch.no_grad():
        return program(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


class _Logits(nn.Module):
    """Token ids to logits alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def _exported(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The program is run on the tokens in another order too: it must not have kept those that it was made with."""

    def export() -> nn.Module:
        from transformers.integrations.executorch import sdpa_mask_without_vmap  # gone in transformers 5

        own = load(folder)
        ALL_MASK_ATTENTION_FUNCTIONS.register(EXPORTABLE, sdpa_mask_without_vmap)
        ALL_ATTENTION_FUNCTIONS.register(EXPORTABLE, ALL_ATTENTION_FUNCTIONS["sdpa"])
        own.config._attn_implementation = EXPORTABLE
        return torch.export.export(_Logits(own), (ids,), strict=False).module()

    program = _once("exported", model, export)
    program.load_state_dict(_Logits(model).state_dict())
    turned = ids.flip(1)
    difference = largest_difference(program(turned).float().log_softmax(-1), scores_of(model, turned))
    if difference > TOLERANCE:
        raise ReaderError(f"the program differs by {difference:.2g} on tokens that it was not made with")
    return program(ids).float().log_softmax(-1)


def _accelerate(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    return scores_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto"), ids)


def _peft(folder: Path, model: PreTrainedModel, ids: Tensor) -> float:
    """LoRA on all linear layers: no change at first; a random adapter, saved, loaded and merged, is one function."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = load(folder)
    plain = scores_of(base, ids)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    first = largest_difference(scores_of(wrapped, ids), plain)
    torch.manual_seed(0)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.normal_(std=0.1)
    apart = scores_of(wrapped, ids)
    if largest_difference(apart, plain) <= TOLERANCE:
        raise ReaderError("a random adapter changes nothing")
    wrapped.save_pretrained(folder / "adapter")
    read = PeftModel.from_pretrained(load(folder), folder / "adapter")
    loaded = largest_difference(scores_of(read, ids), apart)
    return max(first, loaded, largest_difference(scores_of(read.merge_and_unload(), ids), apart))


def _lm_eval(folder: Path, model: PreTrainedModel, ids: Tensor) -> float:
    """Log-likelihood of each token behind those before it, as the harness asks its model for it."""
    from lm_eval.models.huggingface import HFLM

    judge = HFLM(
        pretrained=load(folder), tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4, max_length=ids.shape[1]
    )
    wanted = scores_of(model, ids)
    rows, found = ids.tolist(), []
    places = [(row, at) for row in range(len(rows)) for at in range(1, ids.shape[1])]
    requests = [((f"{row} {at}", ""), rows[row][:at], [rows[row][at]]) for row, at in places]
    found = [likelihood for likelihood, _ in judge._loglikelihood_tokens(requests, disable_tqdm=True)]
    asked = torch.stack([wanted[row, at - 1, rows[row][at]] for row, at in places])
    return largest_difference(torch.tensor(found), asked)


def _torchao(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Weights of linear layers in int8, one scale a row: the model with weights that are rounded so here."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    small, rounded = load(folder), load(folder)
    layers = [layer for layer in rounded.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ReaderError("no linear layer was quantized")
    for layer in layers:
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127.5
        whole = (layer.weight.detach() * (1 / scale)).round().clamp(-128, 127)
        layer.weight = nn.Parameter(whole * scale)  # a head of its own, where it was the embedding
    quantize_(small, Int8WeightOnlyConfig())
    found = scores_of(small, ids)
    if (difference := largest_difference(found, scores_of(rounded, ids))) > TOLERANCE:
        raise ReaderError(f"differs by {difference:.2g} from the same weights rounded to int8")
    return found


def _ctranslate2(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    import ctranslate2
    import numpy as np

    out = str(folder / "ctranslate2")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(out, force=True)
    generator = ctranslate2.Generator(out, device="cpu", compute_type="float32", inter_threads=1, intra_threads=1)
    found = generator.forward_batch([row.tolist() for row in ids], return_log_probs=True)
    return torch.from_numpy(np.array(found))[..., : model.config.vocab_size]


def _llama_cpp(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    from llmshearing.checkpoints.hf_read import read_hf
    from llmshearing.gguf.check import llama_cpp_scores
    from llmshearing.gguf.convert import export_gguf

    weights, info = read_hf(folder, {})
    info = replace(info, tokenizer=None)  # words with numbers, which are no pairs to merge
    file = export_gguf(weights, info, folder / "model.gguf", {}, where=str(folder), overwrite=True, check=False)
    return llama_cpp_scores(file, ids)


@dataclass(frozen=True)
class Reader:
    """A program."""

    check: Check
    package: str | None = None
    """What it needs beside torch and transformers."""
    tolerance: float = TOLERANCE
    """Largest difference that is rounding."""
    note: str = ""
    """Behind a difference that is of another kind."""


READERS: dict[str, Reader] = {
    "transformers": Reader(_plain),
    "static cache": Reader(_generate),
    "torch.compile": Reader(_compiled),
    "torch.export": Reader(_exported),
    "accelerate": Reader(_accelerate, "accelerate"),
    "PEFT": Reader(_peft, "peft"),
    "lm-eval": Reader(_lm_eval, "lm_eval"),
    "torchao": Reader(_torchao, "torchao", math.inf, " (int8)"),  # it is held to its own rounding
    "ctranslate2": Reader(_ctranslate2, "ctranslate2"),
    "llama.cpp": Reader(_llama_cpp, "llama_cpp"),
}
FIVE = "transformers 5"
NOT_RUN = ("vLLM", "TensorRT-LLM", "ExLlama", "MLX")
