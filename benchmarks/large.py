"""The largest model that shears here: FSDP 2 on several ranks, saved in shards, folded, converted.

    python -m benchmarks.large --folder /tmp/large                       # 1.03 billion parameters on two ranks
    python -m benchmarks.large --folder /tmp/large --layers 12 --stages train

Weights and tokens are random: it is about memory and time, and about every stage going through. fp32 weights, gradients
and two moments are 16 bytes a parameter over all ranks. Each stage is a process of its own, whose peak resident memory
is reported; a rank's holds pages of the files that it maps, too. The folder is left for a look: delete it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from composer.utils import dist
from safetensors.torch import save_file
from streaming import MDSWriter
from tqdm import tqdm
from transformers import LlamaConfig

from benchmarks.common import machine, peak_rss, save
from llmshearing.config import load_config
from llmshearing.families import table_for
from llmshearing.train import train

STAGES = ("source", "train", "fold", "convert")
GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
DOMAIN = "random"


def config_of(arguments: argparse.Namespace) -> LlamaConfig:
    """Grouped queries, head_dim 64, tied embeddings."""
    return LlamaConfig(
        hidden_size=arguments.hidden, num_hidden_layers=arguments.layers, intermediate_size=arguments.intermediate,
        num_attention_heads=arguments.hidden // 64, num_key_value_heads=arguments.hidden // 512, head_dim=64,
        vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def write_source(config: LlamaConfig, folder: Path) -> None:
    """A Hugging Face directory of random weights, a file for each layer: no more than one is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    table, files = table_for(config), {}
    by_layer: dict[Any, list[Any]] = {}
    for name, spec, layer in table.instances():
        if spec.alias is None:
            by_layer.setdefault(layer, []).append((name, table.tensor_shape(spec)))
    for layer, tensors in tqdm(by_layer.items(), desc="source", unit="file"):
        file = f"model-{'rest' if layer is None else layer}.safetensors"
        made = {name: torch.ones(s) if len(s) == 1 else torch.randn(s).mul_(0.02) for name, s in tensors}
        save_file(made, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(made, file)
    index = {"metadata": {"total_size": 4 * table.count()}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def write_data(folder: Path, length: int) -> None:
    """Random tokens: a training and an evaluation split of one domain."""
    columns = {"tokens": f"ndarray:uint16:{length}", "set": "str"}
    generator = np.random.default_rng(0)
    for place, samples in ((f"for_prune/{DOMAIN}", 64), ("eval_merge", 2)):
        with MDSWriter(out=str(folder / place), columns=columns, hashes=["xxh64"], exist_ok=True) as writer:
            for _ in range(samples):
                writer.write({"tokens": generator.integers(0, 32000, length).astype(np.uint16), "set": DOMAIN})


def write_yaml(arguments: argparse.Namespace, path: Path) -> None:
    """A pruning run to half of every axis."""
    half = {
        "d_model": arguments.hidden // 2,
        "n_heads": arguments.hidden // 128,
        "n_kv_heads": arguments.hidden // 1024,
    }
    half |= {"intermediate_size": arguments.intermediate // 2, "n_layers": arguments.layers // 2}
    run = {
        "data_local": str(path.parent / "data"),
        "max_seq_len": arguments.length,
        "run_name": "large",
        "model": {
            "path": str(path.parent / "source"),
            "activation_checkpointing": True,
            "l0_module": {"target_model": half, "lagrangian_warmup_steps": "1ba", "eval_target_model": True},
        },
        "train_loader": {"dataset": {"split": "for_prune"}},
        "eval_loader": {"dataset": {"split": "eval_merge"}},
        "optimizer": {"lr": 1e-5, "lag_lr": 0.5},
        "algorithms": {"gradient_clipping": {}},
        "callbacks": {"data_loading": {"dynamic": True, "set_names": [DOMAIN], "proportion": [1.0]}},
        "max_duration": f"{arguments.steps}ba",
        "eval_interval": "1000ba",
        "save_interval": f"{arguments.steps}ba",
        "global_train_batch_size": arguments.ranks,
        "device_eval_batch_size": 1,
        "precision": "fp32",
        "fsdp_config": {"state_dict_type": "sharded"},
        "progress_bar": False,
        "save_folder": str(path.parent / "run"),
        "save_overwrite": True,
    }
    run["callbacks"]["data_loading"]["update_type"] = "constant"  # type: ignore[index]
    path.write_text(yaml.safe_dump(run, sort_keys=False))


def one_rank(path: Path) -> None:
    """Train as one of the ranks; leave this rank's memory and speed beside the configuration."""
    cfg = load_config(path)
    state = train(cfg).state
    seconds = state.timestamp.batch_wct.total_seconds() if state.timestamp.batch_wct is not None else float("nan")
    told = {"peak_rss": peak_rss(), "last_step_seconds": seconds}
    told["tokens_per_second"] = cfg.global_train_batch_size * cfg.max_seq_len / seconds
    path.with_name(f"rank{dist.get_global_rank()}.json").write_text(json.dumps(told))


def measured(*words: str | Path) -> dict[str, float]:
    """Run a command; its seconds and the peak memory of its largest process."""
    start = time.perf_counter()
    # The launcher runs this file as a script, whose own folder is then on the path and the checkout is not.
    changed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, *map(str, words)], env={**os.environ, **changed})
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"failed: {' '.join(map(str, words))}")
    return {"seconds": time.perf_counter() - start, "peak_rss": usage.ru_maxrss * 1024}


def stage(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Go through one stage; what it took."""
    folder: Path = arguments.folder
    if name == "source":
        start = time.perf_counter()
        write_source(config_of(arguments), folder / "source")
        write_data(folder / "data", arguments.length)
        return {"seconds": time.perf_counter() - start, "peak_rss": peak_rss()}
    if name == "train":
        write_yaml(arguments, folder / "run.yaml")
        launcher = ("-m", "composer.cli", "-n", str(arguments.ranks), Path(__file__), "--rank", folder / "run.yaml")
        result: dict[str, Any] = measured(*launcher)
        result["ranks"] = [json.loads((folder / f"rank{n}.json").read_text()) for n in range(arguments.ranks)]
        return result
    if name == "fold":
        command = ("-m", "llmshearing.utils.post_pruning_processing", "prune_and_save_model", "--overwrite")
        return measured(*command, folder / "run/latest-rank0.pt", "--output", folder / "folded.pt")
    return measured("-m", "llmshearing.utils.composer_to_hf", "--overwrite", folder / "folded.pt", folder / "hf")


def show(name: str, result: dict[str, Any]) -> None:
    """One line for each process."""
    print(f"{name:8} {result['seconds']:8.1f} s   largest process {result['peak_rss'] / GIB:6.2f} GiB")
    for number, rank in enumerate(result.get("ranks", [])):
        speed = f"last step {rank['last_step_seconds']:.1f} s, {rank['tokens_per_second']:.1f} tokens/s"
        print(f"  rank {number}   peak RSS {rank['peak_rss'] / GIB:6.2f} GiB   {speed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where source, data and results are written (25 bytes a parameter)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 1024")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence; one sequence a rank and step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=Path, metavar="YAML", help=argparse.SUPPRESS)  # how the launcher calls this file
    arguments = parser.parse_args()
    if arguments.rank is not None:
        one_rank(arguments.rank)
        return
    if arguments.folder is None:
        parser.error("--folder is missing")
    parameters = table_for(config_of(arguments)).count()
    print(machine(), f"{parameters:,} parameters")
    so_far = arguments.folder / "results.json"  # stages may be run one by one
    results: dict[str, Any] = json.loads(so_far.read_text()) if so_far.is_file() else {}
    results |= {"parameters": parameters, "length": arguments.length, "steps": arguments.steps}
    for name in arguments.stages:
        results[name] = stage(name, arguments)
        show(name, results[name])
        so_far.write_text(json.dumps(results))
    print("wrote", save("large", results))


if __name__ == "__main__":
    main()
