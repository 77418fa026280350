"""Memory does not grow with the model: each conversion in a process of its own, of a small and of a larger model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from llmshearing.checkpoints import write_hf_directory
from llmshearing.checkpoints.checkpoint import CheckpointInfo, save_checkpoint
from llmshearing.families import table_for
from llmshearing.masks.l0 import L0Masks
from llmshearing.storage import LazyTensor, LazyTensors

CONVERT = """
import sys
from llmshearing.checkpoints import checkpoint_to_hf, hf_to_checkpoint, prune_and_save_model
folder = sys.argv[1]
prune_and_save_model(folder + "/pruning.pt", folder + "/folded.pt")
checkpoint_to_hf(folder + "/folded.pt", folder + "/exported", check=False)  # the check holds a whole model
hf_to_checkpoint(folder + "/hf", folder + "/imported.pt")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write_model(folder: Path, layers: int) -> int:
    """Bytes of the weights. One layer more is 8 MB more; the largest tensor is the same."""
    folder.mkdir()
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1152, num_hidden_layers=layers, num_attention_heads=8, vocab_size=1000
    )
    table = table_for(config)
    weights = LazyTensors({
        name: LazyTensor(shape, torch.bfloat16, lambda shape=shape: torch.randn(shape).bfloat16())
        for name, spec, layer in table.instances()
        for shape in [table.tensor_shape(spec, layer)]
    })  # fmt: skip
    about = {"kinds": ["hidden", "intermediate"], "target": {"hidden": 448, "intermediate": 1024}, "seed": 1}
    about |= {"target_sparsity": None, "start_sparsity": 0.0}
    masks = L0Masks(table, **about)
    info = CheckpointInfo(config.to_dict(), masks={**about, "head_mode": "group"})
    save_checkpoint(folder / "pruning.pt", weights, info, masks.state_dict())
    write_hf_directory(weights, config, folder / "hf")
    return sum(entry.nbytes for entry in weights.entries.values())


def peak(folder: Path) -> int:
    """Bytes, as the process itself sees them: what wait4 tells begins at the size of this one."""
    words = [sys.executable, "-c", CONVERT, str(folder)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.slow
def test_a_model_four_times_as_large_takes_no_more_memory(tmp_path: Path) -> None:
    small, large = write_model(tmp_path / "small", 10), write_model(tmp_path / "large", 40)
    assert large - small > 160 << 20
    more = peak(tmp_path / "large") - peak(tmp_path / "small")
    assert more < 32 << 20, f"{more / 2**20:.0f} MiB more for a model {(large - small) / 2**20:.0f} MiB larger"
