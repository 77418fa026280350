"""Peak memory and speed of fold and conversion, beside copying the same bytes.

    python -m benchmarks.memory                                  the 1B and the 7B shape; needs 30 GB of disk
    python -m benchmarks.memory --shapes 1b --folder /scratch --repeats 3
    python -m benchmarks.memory --parts fold --shapes 7b --prepare     only write the input, for a later run

Inputs are random bfloat16 weights, written tensor by tensor. Each command runs in a process of its own: its peak is
that process's ru_maxrss (interpreter and libraries, 0.4 GiB, included), its time from start to exit, output synced to
the disk. Before each command its input is dropped from the page cache; `cp` of the same input, synced too, takes turns
with it. `--parts steps` is `benchmarks.step --parts memory`: training steps A, B, at the target.

    fold      checkpoint of a pruning run (.pt)       -> compact checkpoint
    sharded   the same state as a sharded checkpoint  -> compact checkpoint
    export    checkpoint (.pt)                        -> Hugging Face directory
    import    Hugging Face directory                  -> checkpoint (.pt)
    shards    Hugging Face directory                  -> Megatron's shards of 8 ranks
    reshard   Megatron's shards of 8 ranks            -> of 2 ranks
    unshard   Megatron's shards of 8 ranks            -> Hugging Face directory
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.common import RESULTS, save_part
from llmshearing.checkpoints import write_hf_directory
from llmshearing.checkpoints.checkpoint import CheckpointInfo, read_checkpoint, save_checkpoint
from llmshearing.families import table_for
from llmshearing.families.megatron import Parallel
from llmshearing.masks.l0 import L0Masks
from llmshearing.megatron.convert import write_megatron
from llmshearing.storage import LazyTensor, LazyTensors

KINDS = ("hidden", "head", "intermediate", "layer")
# Sizes of the source, and of the target by mask kind: LLaMA-2-7B to Sheared-LLaMA-2.7B, TinyLlama-1.1B to a half.
SHAPES: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "7b": ({"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "intermediate_size": 11008},
           (2560, 20, 6912, 32)),
    "1b": ({"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 22,
            "intermediate_size": 5632}, (1024, 2, 2816, 16)),
    "tiny": ({"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 4, "intermediate_size": 688},
             (128, 4, 344, 3)),
}  # fmt: skip
COPY = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'


def random_weights(config: LlamaConfig) -> LazyTensors:
    """bfloat16 of the usual size, each made when it is written: stretches of one block of random numbers."""
    block = (torch.randn(1 << 24) * 0.02).bfloat16()
    table = table_for(config)

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        number = torch.Size(shape).numel()
        return block.repeat(-(-number // len(block)))[:number].view(shape)

    return LazyTensors({
        name: LazyTensor(shape, torch.bfloat16, lambda shape=shape: make(shape))
        for name, spec, layer in table.instances()
        for shape in [table.tensor_shape(spec, layer)]
    })  # fmt: skip


def write_hf(path: Path, config: LlamaConfig) -> None:
    write_hf_directory(random_weights(config), config, path)


def write_plain(path: Path, config: LlamaConfig) -> None:
    save_checkpoint(path, random_weights(config), CheckpointInfo(config.to_dict(), history=["random"]))


def write_pruning(path: Path, config: LlamaConfig, target: dict[str, int]) -> None:
    """A pruning run's checkpoint, its masks spread out."""
    masks = L0Masks(table_for(config), list(target), target)
    with torch.no_grad():
        for value in masks.log_alpha.values():
            value.uniform_(-4, 4)
    about = {"kinds": list(target), "target": target, "target_sparsity": None, "start_sparsity": 0.0, "seed": 17}
    info = CheckpointInfo(config.to_dict(), masks={**about, "head_mode": "group"}, history=["random"])
    save_checkpoint(path, random_weights(config), info, masks.state_dict())


def write_sharded(path: Path, config: LlamaConfig, target: dict[str, int]) -> None:
    """The same by torch.distributed.checkpoint, which takes the model in memory."""
    import torch.distributed.checkpoint as dcp

    write_pruning(whole := path.with_suffix(".pt"), config, target)
    read = read_checkpoint(whole, verify=False)
    model = {f"model.{name}": tensor for name, tensor in read.weights.items()}
    model |= {f"masks.{name}": tensor for name, tensor in read.masks.items()}
    state = {"state": {"model": model, "callbacks": {"CheckpointInfo": vars(read.info)}}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path))
    whole.unlink()


def write_shards(path: Path, config: LlamaConfig) -> None:
    write_megatron(random_weights(config), CheckpointInfo(config.to_dict(), history=["random"]), path, Parallel(8))


FOLD = ["-m", "llmshearing.utils.post_pruning_processing", "prune_and_save_model"]
CONVERT = ["-m", "llmshearing.utils.composer_to_hf"]
SHARDS = ["-m", "llmshearing", "convert"]
# part -> its input, what writes that, command, name of the output
CASES: dict[str, tuple[str, Callable[..., None], list[str], str]] = {
    "fold": ("pruning.pt", write_pruning, FOLD, "folded.pt"),
    "sharded": ("sharded", write_sharded, FOLD, "folded.pt"),
    "export": ("plain.pt", write_plain, [*CONVERT, "--no-check"], "exported"),
    "import": ("hf", write_hf, CONVERT, "imported.pt"),
    "shards": ("hf", write_hf, [*SHARDS, "--tp=8"], "to_shards"),
    "reshard": ("from_shards", write_shards, [*SHARDS, "--tp=2"], "to_shards"),
    "unshard": ("from_shards", write_shards, [*SHARDS, "--no-check"], "exported"),
}


def measured(words: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(words)} failed:\n{errors.read().decode()}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def in_process(write: Callable[..., None], *words: Any) -> None:
    """Write an input elsewhere: the peak of a process starts at the size of the one that started it, which is ours."""
    process = multiprocessing.get_context("spawn").Process(target=write, args=words)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"writing {words[0]} failed: exit code {process.exitcode}")


def files(path: Path) -> Iterator[Path]:
    return (file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in files(path))


def forget(path: Path) -> None:
    """Drop a path's pages from the page cache: they must come from the disk again."""
    for file in files(path):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.with_suffix(".selection.safetensors").unlink(missing_ok=True)


def compare(source: Path, output: Path, words: list[str], repeats: int) -> dict[str, Any]:
    """A command and a copy of its input, taking turns; medians."""
    seconds, copies, peaks, written = [], [], [], 0
    for _ in range(repeats):
        for path in (copied := source.with_name("copied"), output):
            remove(path)
        forget(source)
        copies.append(measured(["sh", "-c", COPY, "sh", str(source), str(copied)])[0])
        remove(copied)
        forget(source)
        took, peak = measured(words)
        seconds.append(took)
        peaks.append(peak)
        written = size_of(output)
        remove(output)
    median, copy = statistics.median(seconds), statistics.median(copies)
    return {
        "input_bytes": size_of(source), "output_bytes": written, "peak_rss_bytes": max(peaks),
        "seconds": round(median, 2), "copy_seconds": round(copy, 2), "speed_of_copying": round(copy / median, 3),
    }  # fmt: skip


def run(part: str, shape: str, arguments: argparse.Namespace) -> None:
    sizes, targets = SHAPES[shape]
    config, target = LlamaConfig(**sizes, vocab_size=32000), dict(zip(KINDS, targets, strict=True))
    name, write, words, output = CASES[part]
    folder = Path(arguments.folder) / shape
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / name
    if not source.exists():
        in_process(write, source, config, *([target] if words is FOLD else []))
    if arguments.prepare:
        return
    flag = ["--output"] if words is FOLD else []
    command = [sys.executable, *words, str(source), *flag, str(folder / output)]
    found = compare(source, folder / output, command, arguments.repeats)
    print(
        f"{part:8} {shape:5} {found['input_bytes'] / 1e9:6.2f} GB in {found['output_bytes'] / 1e9:6.2f} GB out"
        f"  peak {found['peak_rss_bytes'] / 2**30:5.2f} GiB {found['seconds']:7.1f} s"
        f"  copy {found['copy_seconds']:7.1f} s  {found['speed_of_copying']:5.2f} x the speed of copying"
    )
    save_part("memory", f"{part} {shape}", found)
    if not arguments.keep:
        remove(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*CASES, "steps"], default=list(CASES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "7b"])
    parser.add_argument("--folder", default="out/memory", help="for the files, which are large (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--prepare", action="store_true", help="only write the inputs")
    parser.add_argument("--keep", action="store_true", help="leave the inputs there for the next run")
    arguments = parser.parse_args()
    if "steps" in arguments.parts:
        subprocess.run([sys.executable, "-m", "benchmarks.step", "--parts", "memory"], check=True)
    for shape in arguments.shapes:
        for part in CASES:
            if part in arguments.parts and (part, shape) != ("sharded", "7b"):  # writing it takes the model in memory
                run(part, shape, arguments)
    print("wrote", RESULTS / "memory.json")


if __name__ == "__main__":
    main()
