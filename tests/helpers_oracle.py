"""The activation-gating oracle: a LLaMA that multiplies activations by gates, one head at a time, from the maths alone.

Nothing is cut, and nothing of `llmshearing` takes part. Everything is float64. Gates are full-size, by mask kind:
hidden [d], head [L, groups or heads], intermediate [L, f], layer, head_layer and mlp [L]; an absent kind is open.

Shape legend: B batch, T tokens, H query heads, D head_dim, d hidden, f intermediate, L layers.
"""

import contextlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from llmshearing.compat import HEADS_DIVIDE_HIDDEN
from llmshearing.families import table_for


def hidden_sizes(heads, largest=16):
    """Numbers of hidden units of which the installed transformers makes a config."""
    step = heads if HEADS_DIVIDE_HIDDEN else 1
    return range(step, max(largest, step) + 1, step)


def tiny_config(**changes):
    """A LLaMA of a few thousand parameters."""
    base = {
        "vocab_size": 23,
        "hidden_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "intermediate_size": 10,
        "num_hidden_layers": 3,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    return LlamaConfig(**{**base, **changes})


def tiny_table(head_mode="group", **changes):
    """The table of :func:`tiny_config`, also of sizes of which the installed transformers makes no config."""
    return table_for(SimpleNamespace(**{**tiny_config().to_dict(), **changes}), head_mode)


def random_model(config, seed=0):
    """transformers' own LLaMA in float64; biases and norm weights random too, weights large enough to matter."""
    model = LlamaForCausalLM(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * values if "norm" in name else 0.5 * values)
    return model


def _wide_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def widen_norms(model):
    """Replace transformers' norm, which computes in float32, by the same formula in the type of its input."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = _wide_norm.__get__(module)
    return model


@contextlib.contextmanager
def wide_softmax():
    """transformers' eager attention asks for a float32 softmax; keep the type of the input instead."""
    narrow = F.softmax
    F.softmax = lambda x, dim=None, dtype=None, **kwargs: narrow(x, dim=dim, **kwargs)
    try:
        yield
    finally:
        F.softmax = narrow


def _norm(norm, x, gate):
    """RMSNorm whose statistics run over the open units only, and whose output is gated."""
    is_open = (gate != 0).to(x.dtype)
    mean_square = (x.square() * is_open).sum(-1, keepdim=True) / is_open.sum().clamp(min=1)
    return norm.weight * x * torch.rsqrt(mean_square + norm.variance_epsilon) * gate


def _rotate(x, cos, sin):
    """x: [B, T, D]; its halves are the two coordinates of each rotated pair."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [
            first * cos[..., :half] - second * sin[..., :half],
            second * cos[..., half:] + first * sin[..., half:],
        ],
        -1,
    )


def _attention(attention, x, cos, sin, allowed, head_gate):
    """head_gate: [H]; allowed: [B, T, T]. The output of each head is multiplied by its gate before o_proj."""
    size = attention.head_dim
    query, key, value = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    heads, groups = query.shape[-1] // size, key.shape[-1] // size
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        q = _rotate(query[..., head * size : (head + 1) * size], cos, sin)
        k = _rotate(key[..., group * size : (group + 1) * size], cos, sin)
        v = value[..., group * size : (group + 1) * size]
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~allowed, float("-inf"))
        outputs.append(head_gate[head] * (scores.softmax(-1) @ v))
    return attention.o_proj(torch.cat(outputs, -1))


def _mlp(mlp, x, gate):
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) * gate)


def oracle_logits(model, gates, ids, padding=None):
    """Logits [B, T, vocab] of transformers' own (unswapped) model under gates. padding: [B, T], 0 where padded."""
    config, body = model.config, model.model
    layers, one = config.num_hidden_layers, torch.ones((), dtype=torch.float64)
    hidden = gates.get("hidden", one.expand(config.hidden_size))
    head = gates.get("head", one.expand(layers, config.num_attention_heads))
    head = head.repeat_interleave(config.num_attention_heads // head.shape[-1], -1)  # a gate of a group: all its heads
    intermediate = gates.get("intermediate", one.expand(layers, config.intermediate_size))
    layer = gates.get("layer", one.expand(layers))
    attention_gate = layer * gates.get("head_layer", one.expand(layers))
    mlp_gate = layer * gates.get("mlp", one.expand(layers))

    allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(len(ids), -1, -1)
    if padding is not None:
        allowed = allowed & padding.bool()[:, None, :]
    x = body.embed_tokens.weight[ids] * hidden
    cos, sin = body.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for i, block in enumerate(body.layers):
        normed = _norm(block.input_layernorm, x, hidden)
        x = x + attention_gate[i] * hidden * _attention(block.self_attn, normed, cos, sin, allowed, head[i])
        normed = _norm(block.post_attention_layernorm, x, hidden)
        x = x + mlp_gate[i] * hidden * _mlp(block.mlp, normed, intermediate[i])
    # The hidden gate acts once between the final norm and the logits, tied or not.
    return _norm(body.norm, x, hidden) @ model.lm_head.weight.T


def random_gates(config, kinds, head_mode, seed, closed=0.35):
    """Soft gates by kind: some exactly 0, some exactly 1, the others in between. Leaves that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    layers = config.num_hidden_layers
    heads = config.num_key_value_heads if head_mode == "group" else config.num_attention_heads
    shapes = {
        "hidden": (config.hidden_size,),
        "head": (layers, heads),
        "intermediate": (layers, config.intermediate_size),
    }
    gates = {}
    for kind in kinds:
        shape = shapes.get(kind, (layers,))
        draw, value = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        soft = 0.2 + 0.7 * value
        gates[kind] = torch.where(draw < closed, 0.0, torch.where(draw > 0.85, 1.0, soft))
    return gates
