"""Run by each stack's own interpreter: `python helpers_stacks.py {sources,prune,judge} PLACE NAME`.

sources  models of several families, below PLACE/sources
prune    each of them, to PLACE/NAME
judge    log-probabilities of all that was pruned, by whichever stack, to PLACE/NAME.npz
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tiny import VARIANTS, config_of
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmshearing.cli import main
from llmshearing.compat import EAGER_EXPERTS

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
# name -> (family, variant, what else, target): every way in which 5 says or keeps something otherwise
CASES = {
    "llama": ("llama", "grouped", {"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"intermediate_size": 6}),
    "mistral": ("mistral", "grouped", {"rope_theta": 7e4}, {"num_key_value_heads": 1, "num_attention_heads": 2}),
    "gpt_neox": ("gpt_neox", "parallel", {"rotary_emb_base": 500}, {"intermediate_size": 6}),
    "gemma3": ("gemma3_text", "tied", {"rope_theta": 3e5, "rope_local_base_freq": 700.0}, {"hidden_size": 12}),
    "phi3": ("phi3", "longrope", {}, {"intermediate_size": 6}),
    "mixtral": ("mixtral", "grouped", {"rope_theta": 7e5}, {"num_local_experts": 3, "intermediate_size": 6}),
    "qwen3_moe": ("qwen3_moe", "one dense", {}, {"num_experts": 3, "hidden_size": 12}),
    "stablelm": ("stablelm", "untied", {}, {"num_hidden_layers": 2}),
}


def sources(place, name):
    """Weights large enough that every unit matters; configs in the form of 4.57, which has to make them."""
    for case, (family, variant, more, _) in CASES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(family, variant, **more))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_((1.0 if "norm" in key and "weight" in key else 0.0) + 0.3 * torch.randn_like(parameter))
        model.save_pretrained(place / "sources" / case)
    assert set(CASES) - {"gemma3"} <= set(VARIANTS)


def prune(place, name):
    for case, (*_, target) in CASES.items():
        words = ["prune", "random", "--model", place / "sources" / case, "--output", place / name / case, "--target"]
        words += [f"{key}={value}" for key, value in target.items()]
        assert main([str(word) for word in words]) == 0, case


def judge(place, name):
    found = {}
    ids = torch.randint(23, (3, 12), generator=torch.Generator().manual_seed(0))
    for folder in sorted(path.parent for path in place.glob("*/*/model.safetensors")):
        options = {"output_loading_info": True, "dtype": torch.float32, **EAGER_EXPERTS}
        model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert not any(report.values()), (folder, report)
        with torch.no_grad():
            found["/".join(folder.parts[-2:])] = model.eval()(input_ids=ids).logits.log_softmax(-1).numpy()
    np.savez(place / f"{name}.npz", **found)


if __name__ == "__main__":
    logging.disable_progress_bar()
    {"sources": sources, "prune": prune, "judge": judge}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
