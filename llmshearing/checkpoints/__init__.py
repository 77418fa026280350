"""From one form of a model to another: Hugging Face directory, Composer checkpoint, pruned checkpoint.

`hf_read` reads Hugging Face models, `hf_write` writes them. `checkpoint` is the form of a run. `folding` makes the
compact model of a pruning run. `equality` compares log-probabilities. `card` writes the README of an exported model,
`generation` its generation settings. `arguments` reads `key=value`, `output` guards what exists, `cli` has the
commands.
"""

from llmshearing.checkpoints.card import model_card
from llmshearing.checkpoints.equality import Comparison, compare
from llmshearing.checkpoints.folding import fold_checkpoint, prune_and_save_model
from llmshearing.checkpoints.hf_read import build_model, hf_to_checkpoint, load_hf_weights
from llmshearing.checkpoints.hf_write import checkpoint_to_hf, write_hf_directory

__all__ = [
    "Comparison",
    "build_model",
    "checkpoint_to_hf",
    "compare",
    "fold_checkpoint",
    "hf_to_checkpoint",
    "load_hf_weights",
    "model_card",
    "prune_and_save_model",
    "write_hf_directory",
]
