"""Tiny models as shards, Megatron's own way to cut a model (an oracle), and megatron-core in processes of its own.

As a program (`helpers_megatron.py JOBS.json`) it is one rank, which goes through a list of jobs with the others:
starting a rank and importing megatron-core takes far longer than a tiny model.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmshearing.checkpoints.hf_read import load_hf_weights, read_hf
from llmshearing.families.megatron import Parallel
from llmshearing.megatron.convert import write_megatron

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OWN = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen3": {"head_dim": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
FAMILIES = ("llama", *OWN)
TIMEOUT = 600  # seconds: a rank that waits for another one is killed


def config_of(family, **changes):
    changes.pop("model_type", None)
    return AutoConfig.for_model(family, **{**SIZES, **OWN.get(family, {}), **changes})


def save_hf(folder, family="llama", dtype=torch.float32, **changes):
    """A model in which every unit matters; the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes))
    for value in model.parameters():
        value.data.normal_(0.0, 0.3) if value.dim() > 1 else value.data.normal_(1.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def save_shards(hf, folder, tp=1, pp=1, spec="local"):
    weights, info = read_hf(hf, {})
    return write_megatron(weights, info, folder, Parallel(tp, pp, spec))


def assert_same_model(one, other):
    """Two Hugging Face folders hold the same tensors, bit by bit."""
    first, second = load_hf_weights(one)[0], load_hf_weights(other)[0]
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


def shard(folder, rank=0, stage=None):
    """The tensors of one rank's file, as torch reads them."""
    name = f"mp_rank_{rank:02d}" + ("" if stage is None else f"_{stage:03d}")
    file = next(folder.glob(f"*/{name}/model_optim_rng.pt"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)


def megatron_cuts(state, config, tp):
    """The shards of a dense model, by the formulas of Megatron-LM's converter (tools/checkpoint), on whole tensors."""
    groups, hidden = config.num_key_value_heads, config.hidden_size
    ranks = [{} for _ in range(tp)]

    def spread(name, parts):
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part

    def padded(table):
        rows = -(-len(table) // (128 * tp)) * 128 * tp
        return torch.cat([table, table.new_zeros(rows - len(table), hidden)]).chunk(tp)

    spread("embedding.word_embeddings.weight", padded(state["model.embed_tokens.weight"]))
    if not config.tie_word_embeddings:
        spread("output_layer.weight", padded(state["lm_head.weight"]))
    spread("decoder.final_layernorm.weight", [state["model.norm.weight"]] * tp)
    for layer in range(config.num_hidden_layers):
        here, there = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{here}self_attn.q_proj.{kind}" in state:
                qkv = [state[f"{here}self_attn.{name}_proj.{kind}"].unflatten(0, (groups, -1)) for name in "qkv"]
                spread(f"{there}self_attention.linear_qkv.{kind}", torch.cat(qkv, 1).flatten(0, 1).chunk(tp))
        spread(f"{there}self_attention.linear_proj.weight", state[f"{here}self_attn.o_proj.weight"].chunk(tp, 1))
        gate, up = (state[f"{here}mlp.{name}_proj.weight"].chunk(tp) for name in ("gate", "up"))
        spread(f"{there}mlp.linear_fc1.weight", [torch.cat(both) for both in zip(gate, up, strict=True)])
        spread(f"{there}mlp.linear_fc2.weight", state[f"{here}mlp.down_proj.weight"].chunk(tp, 1))
        spread(f"{there}input_layernorm.weight", [state[f"{here}input_layernorm.weight"]] * tp)
        spread(f"{there}pre_mlp_layernorm.weight", [state[f"{here}post_attention_layernorm.weight"]] * tp)
        for name in "qk":
            if f"{here}self_attn.{name}_norm.weight" in state:
                value = state[f"{here}self_attn.{name}_norm.weight"]
                spread(f"{there}self_attention.{name}_layernorm.weight", [value] * tp)
    return ranks


def in_megatron_core(folder, tp, jobs):
    """Do jobs in megatron-core on as many processes; what they found, in order.

    A job: ``shards`` (folder), and what to do: ``ids`` and ``steps``, or ``save`` (folder for a torch_dist checkpoint).
    """
    if importlib.util.find_spec("megatron") is None:
        raise RuntimeError("megatron-core is not installed: it is part of the extra `dev` (and of `megatron`)")
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / f"jobs-{tp}.json"
    told.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(tp)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = told.with_suffix(".err")
    with said.open("w") as errors:
        ranks = subprocess.Popen(
            [*command, __file__, str(told)], env=environment, stdout=errors, stderr=errors, start_new_session=True
        )
        try:
            code = ranks.wait(TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
    assert code == 0, said.read_text()[-6000:]
    return json.loads(told.with_suffix(".out").read_text())


def main():
    import psutil
    import torch.distributed as dist

    from llmshearing.megatron.core import load, train

    torch.set_num_threads(1)
    told, found = Path(sys.argv[1]), []
    for job in json.loads(told.read_text()):
        core = load(job["shards"])
        if "save" in job:
            found.append(save_distributed(core, Path(job["save"])))
            continue
        ids = torch.tensor(job["ids"])
        core.model.eval()
        with torch.no_grad():
            logits = core.logits(ids)[..., : core.tokens]
        losses = train(core, [ids] * job["steps"], 1e-2) if job["steps"] else []
        found.append({"logits": logits.tolist(), "losses": losses})
    if dist.get_rank() == 0:
        told.with_suffix(".out").write_text(json.dumps(found))
    dist.barrier()
    for child in psutil.Process().children(recursive=True):  # megatron-core leaves those that wrote its files waiting
        child.kill()
    os._exit(0)  # taking gloo's groups apart may wait for ever


def save_distributed(core, folder):
    """A torch_dist checkpoint by megatron-core itself, with values beside the model as Megatron-LM has them."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.enums import AttnBackend

    from llmshearing.megatron.core import _device

    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    arguments = argparse.Namespace(**core.arguments, attention_backend=AttnBackend.auto)
    state = {"args": arguments, "checkpoint_version": 3.0, "iteration": 7, "model": core.model.sharded_state_dict()}
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *of: None
    with _device(core.device):
        dist_checkpointing.save(state, str(folder))
    dist.barrier()
    return {}


if __name__ == "__main__":
    main()
