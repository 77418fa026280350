"""Tiny models and pruning checkpoints, made by hand from the checkpoint's contract."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmshearing.checkpoints import cli
from llmshearing.checkpoints.checkpoint import CheckpointInfo, save_checkpoint
from llmshearing.families import table_for
from llmshearing.masks.l0 import L0Masks

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Multi-head; grouped queries with biases, head_dim apart and RoPE scaling; tied.
CASES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rope_scaling": LLAMA3_ROPE},
    "tied": {"tie_word_embeddings": True},
}
SHAPE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
TARGET = {"hidden": 20, "head": 1, "intermediate": 24, "layer": 3}


def tiny_model(case: str = "gqa", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random model whose norms and biases are random too."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **CASES[case]}))
    for name, value in model.named_parameters():
        if value.dim() == 1:
            torch.nn.init.normal_(value, mean=float("norm" in name), std=0.3)
    return model.to(dtype).eval()


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    return tiny_model


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face directory with a tokenizer, in bfloat16."""
    folder = tmp_path / "source"
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(50)} | {"<s>": 50, "</s>": 51, "<unk>": 52}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def write_pruning(tmp_path: Path) -> Callable[..., tuple[Path, LlamaForCausalLM, L0Masks]]:
    """Write what a pruning run saves: source weights, and masks with spread-out log alphas."""

    def write(
        case: str = "gqa",
        target: dict[str, int] | None = TARGET,
        kinds: list[str] | None = None,
        head_mode: str = "group",
        dtype: torch.dtype = torch.float32,
        edit: Callable[[L0Masks], None] | None = None,
        **about: Any,
    ) -> tuple[Path, LlamaForCausalLM, L0Masks]:
        model = tiny_model(case, dtype)
        settings = {
            "kinds": kinds or list(target or TARGET),
            "target": target,
            "target_sparsity": None if target else 0.5,
            "start_sparsity": 0.0,
            "seed": 3,
        }
        masks = L0Masks(table_for(model.config, head_mode), **settings)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for value in masks.log_alpha.values():
                value.copy_(3 * torch.randn(value.shape, generator=generator)).clamp_(-4, 4)
            if edit is not None:
                edit(masks)
        info = CheckpointInfo(
            hf_config=model.config.to_dict(),
            masks={**settings, "head_mode": head_mode},
            history=["started from a random model"],
            **about,
        )
        path = tmp_path / "run" / "latest-rank0.pt"
        save_checkpoint(path, model.state_dict(), info, masks.state_dict())
        return path, model, masks

    return write


@pytest.fixture
def command(root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python3 -m llmshearing.utils.<name> ...` as a user does."""

    def run(name: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, "-m", f"llmshearing.utils.{name}", *map(str, arguments)]
        return subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def main(caplog: pytest.LogCaptureFixture) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same command without a new process; ``stderr`` is what it logged."""

    def run(name: str, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
        caplog.clear()
        with caplog.at_level("INFO"):
            status = getattr(cli, name)([str(argument) for argument in arguments])
        return subprocess.CompletedProcess([name], status, stderr=caplog.text)

    return run
