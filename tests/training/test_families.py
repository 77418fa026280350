"""The whole way of a model of each form: shear, fold, continue, convert, load in transformers.

Other tests run the trainer on a LLaMA. These are the forms that a run could trip over: fused projections, Conv1D,
learned positions, dropout, windows in some layers, norms behind the branches, experts.
"""

import shutil

import pytest
import torch
from helpers_runs import SEQ, VOCAB, configured
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmshearing.checkpoints import build_model, checkpoint_to_hf, prune_and_save_model
from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.compat import FIVE
from llmshearing.train import train
from llmshearing.training.source import load_model, read_source

COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.1}
HEADS = {**COMMON, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS |= {"max_position_embeddings": 64}
GROUPS = {**HEADS, "num_key_value_heads": 2}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GPT2 = {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_layer": 3, "n_positions": 64}
OPT = {**HEADS, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.2, "attention_dropout": 0.1}
SOURCES = {
    "gpt_neox": {**HEADS, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "gpt2": {**COMMON, **GPT2},  # transformers' own default is dropout everywhere
    "phi3": {**GROUPS, "resid_pdrop": 0.1},
    "gemma2": {**GROUPS, **WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8},
    "mixtral": {**GROUPS, "num_local_experts": 4, "num_experts_per_tok": 2},
}
LOADED = SOURCES | {
    "opt": OPT,
    "gemma3_text": {**GROUPS, **WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8},
    "smollm3": {**GROUPS, "no_rope_layers": [1, 0, 1]},
    "granite": {**GROUPS, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "stablelm": {**GROUPS, "hidden_dropout": 0.1, "partial_rotary_factor": 0.5},
    "qwen2": {**GROUPS, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}
# Heads of gpt_neox and gpt2 are as wide as hidden units / heads: 8, before and after.
TARGET = {"d_model": 16, "n_heads": 2, "intermediate_size": 28, "n_layers": 2}
MASKS = ["hidden", "head", "intermediate", "layer"]


def source_of(family, lab, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**LOADED[family])).save_pretrained(folder)
    for path in lab.source.iterdir():
        if "token" in path.name:
            shutil.copy(path, folder)
    return folder


def log_probabilities(model):
    ids = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def shorten(lab, folder, **changes):
    return configured(lab, folder, eval_interval="1000ba", eval_subset_num_batches=1, save_interval="3ba", **changes)


@pytest.mark.parametrize("family", LOADED)
def test_a_run_trains_the_function_that_transformers_has(family, lab, tmp_path):
    """In training mode: no dropout, and the run's own attention is the model's, windows and scaling included."""
    path = source_of(family, lab, tmp_path / "source")
    cfg = shorten(lab, tmp_path, model={"path": str(path), "l0_module": None})
    ours = load_model(read_source(cfg), cfg).train()
    theirs = AutoModelForCausalLM.from_pretrained(path, attn_implementation=eager_or_own(family)).eval()
    torch.testing.assert_close(log_probabilities(ours), log_probabilities(theirs), atol=2e-5, rtol=0)


def eager_or_own(family):
    # sdpa leaves Gemma 2's soft cap of scores out, as documented; transformers 5 has none for it.
    return "sdpa" if family == "gemma2" and not FIVE else "eager"


@pytest.mark.parametrize("family", SOURCES)
def test_sheared_folded_continued_converted(family, lab, tmp_path):
    experts = family == "mixtral"
    path, target = source_of(family, lab, tmp_path / "source"), TARGET | ({"n_experts": 3} if experts else {})
    masks = MASKS + (["expert"] if experts else [])
    cfg = shorten(
        lab, tmp_path, model__path=str(path), max_duration="3ba", model__l0_module__target_model=target,
        model__l0_module__pruning_modules=masks, model__l0_module__lagrangian_warmup_steps="2ba",
    )  # fmt: skip
    assert set(train(cfg).state.model.masks.kinds) == set(masks)
    folded = prune_and_save_model(tmp_path / "run" / "latest-rank0.pt")
    # 4 batches: the rate is 0 in the first two, one of warm-up and one by which Composer's schedules lag.
    again = tmp_path / "again"
    train(shorten(lab, again, model={"path": str(folded), "l0_module": None}, max_duration="4ba",
                  train_loader__dataset__split="for_ft"))  # fmt: skip
    stored, before = read_checkpoint(again / "run" / "latest-rank0.pt"), read_checkpoint(folded)
    assert any(not torch.equal(stored.weights[name], before.weights[name]) for name in before.weights)
    checkpoint_to_hf(again / "run" / "latest-rank0.pt", tmp_path / "hf", {})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = loaded.config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (16, 2, 2)
    assert not [key for key, value in config.to_dict().items() if "drop" in key and value]
    ours = build_model(stored.weights, stored.info.config)
    torch.testing.assert_close(log_probabilities(loaded.eval()), log_probabilities(ours), atol=1e-5, rtol=0)
