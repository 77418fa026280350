"""Names that the configuration and the tables share: of sizes, of masks, of branches. Plain data, no torch.

A *size* is one number of a model's shape. Families call it by different keys of their configs (``hidden_size``,
``n_embd``); a run's YAML and the tables call it by the names below.
"""

HIDDEN, HEADS, GROUPS, INTERMEDIATE = "hidden", "heads", "groups", "intermediate"
LAYERS, VOCAB, HEAD_DIM, EXPERTS = "layers", "vocab", "head_dim", "experts"

YAML_KEYS = {
    HIDDEN: "d_model",
    HEADS: "n_heads",
    GROUPS: "n_kv_heads",
    HEAD_DIM: "head_dim",
    INTERMEDIATE: "intermediate_size",
    LAYERS: "n_layers",
    VOCAB: "vocab_size",
    EXPERTS: "n_experts",
}
"""Size -> its key under `model` and `model.l0_module.target_model` of a run's YAML."""

WIDTHS = (HEADS, GROUPS, INTERMEDIATE, EXPERTS)
"""Sizes that each layer may have its own of."""

MASK_OF_SIZE = {HIDDEN: "hidden", HEADS: "head", GROUPS: "head", INTERMEDIATE: "intermediate", EXPERTS: "expert"}
"""Size -> the mask that can shrink it. Layers are shrunk by the masks of BLOCK_MASKS."""

ATTENTION, MLP = "attention", "mlp"

BLOCKS = (ATTENTION, MLP)
"""The branches of a layer, in the order in which they run."""

BLOCK_MASKS = {"layer": BLOCKS, "head_layer": (ATTENTION,), "mlp": (MLP,)}
"""Mask on whole branches -> the branches that it gates."""

MASKS = ("hidden", "head", "intermediate", "expert", *BLOCK_MASKS)
"""Every kind of mask. A family has those whose sizes it has."""
