"""Price of following a teacher: a step with a live teacher, or with its cache, over a plain step.

    python -m benchmarks.distill                             times and memory
    python -m benchmarks.distill --parts ratios --repeats 9

The teacher is the judged model of `benchmarks.step`, the student a model of half its widths and three quarters of its
layers; both with a vocabulary of 4,096 and of 32,000. plain: cross-entropy. live: the teacher's whole logits. sparse:
a live teacher's 32 entries. cache, bucket: the same entries from files that `llmshearing distill cache` wrote, with a
sampled tail and with a bucket. All take turns in one run; medians; a step is forward, backward and optimizer on the
product's model. The reading of sequences is in none of them, that of targets is in the last two.

memory: peak resident memory of each, in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import alternate, peak_rss, save_part
from benchmarks.models import add_options, autocast_dtype, config, precision_note
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.training.cache.cli import cache_targets
from llmshearing.training.cache.follow import CachedTeacher
from llmshearing.training.cache.read import TeacherCache
from llmshearing.training.distillation import Teacher
from llmshearing.training.model import CAUSAL_SDPA, ShearingModel
from llmshearing.training.optimizer import FusedDecoupledAdamW
from llmshearing.training.targets import Guide

PARTS = ("ratios", "memory")
VOCABULARIES = (4096, 32_000)
CASES = ("plain", "live", "sparse", "cache", "bucket")
TAILS = {"cache": "sampled", "bucket": "bucket"}
STUDENT = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 688, "num_hidden_layers": 6}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # larger blocks are the system's again once they are freed


def lay_out(root: Path, vocabulary: int, arguments: argparse.Namespace, autocast: torch.dtype | None) -> None:
    """A teacher, twice a batch of sequences, and the caches of both tails."""
    torch.manual_seed(0)
    LlamaForCausalLM(config(vocab_size=vocabulary)).save_pretrained(root / "teacher")
    generator = np.random.default_rng(0)
    with MDSWriter(out=str(root / "data" / "one"), columns={"set": "str", "tokens": "ndarray:uint16"}) as out:
        for _ in range(2 * arguments.batch):
            out.write({"set": "one", "tokens": generator.integers(0, vocabulary, arguments.length).astype(np.uint16)})
    precision = "fp32" if autocast is None else "amp_bf16"
    for name, tail in TAILS.items():
        cache_targets(str(root / "teacher"), root / "data", root / name, tail=tail, precision=precision)


def guide(name: str, root: Path) -> Guide | None:
    """What the student of a case follows."""
    if name == "plain":
        return None
    if name in TAILS:
        return CachedTeacher(TeacherCache(root / name), ["one"], ce=0.3)
    model = LlamaForCausalLM.from_pretrained(root / "teacher")
    return Teacher(model, ce=0.3, top_k=32 if name == "sparse" else None)


def batches(root: Path, arguments: argparse.Namespace) -> list[dict[str, Tensor]]:
    """All sequences, in two batches, as the data set makes them."""
    data = MdsDirectory(root / "data" / "one", None, None)
    rows = torch.arange(len(data)).split(arguments.batch)
    ids = [torch.stack([torch.from_numpy(data[int(i)][0]) for i in part]) for part in rows]
    return [
        {"input_ids": tokens, "set": torch.zeros_like(part), "sample": part}
        for tokens, part in zip(ids, rows, strict=True)
    ]


def stepper(name: str, root: Path, arguments: argparse.Namespace, autocast: torch.dtype | None) -> Callable[[], None]:
    """A function that trains on the next batch."""
    feed = batches(root, arguments)
    vocabulary = LlamaConfig.from_pretrained(root / "teacher").vocab_size
    model = LlamaForCausalLM(config(vocab_size=vocabulary, **STUDENT))
    model.set_attn_implementation(CAUSAL_SDPA)
    student = ShearingModel(model, autocast=autocast, teacher=guide(name, root)).train()
    optimizer = FusedDecoupledAdamW(student.parameters(), lr=1e-4, weight_decay=0.0)

    def step() -> None:
        feed.append(feed.pop(0))
        student.loss(student(feed[0]), feed[0]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ratios(arguments: argparse.Namespace, autocast: torch.dtype | None) -> dict[str, Any]:
    """Seconds of each case, and over the plain step."""
    found: dict[str, Any] = {}
    print(f"{'vocabulary':>10} {'case':8} {'seconds':>9} {'/ plain':>8}")
    for vocabulary in VOCABULARIES:
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder), vocabulary, arguments, autocast)
            cases = {name: stepper(name, Path(folder), arguments, autocast) for name in CASES}
            seconds = alternate(cases, arguments.repeats, warmup=2)
        for name, value in seconds.items():
            print(f"{vocabulary:10} {name:8} {value:9.4f} {value / seconds['plain']:8.3f}")
        shares = {f"{name} / plain": value / seconds["plain"] for name, value in seconds.items()}
        found[str(vocabulary)] = {"seconds": seconds, "ratios": shares}
    return found


def memory(arguments: argparse.Namespace, autocast: torch.dtype | None) -> dict[str, Any]:
    """Peak resident memory of three steps of each case, MB."""
    found: dict[str, Any] = {}
    for vocabulary in VOCABULARIES:
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder), vocabulary, arguments, autocast)
            found[str(vocabulary)] = {name: peak_of(arguments, name, folder) for name in CASES}
        for name, value in found[str(vocabulary)].items():
            print(f"{vocabulary:10} {name:8} {value:9.0f} MB, {value - found[str(vocabulary)]['plain']:+.0f}")
    return found


def peak_of(arguments: argparse.Namespace, name: str, folder: str) -> float:
    """MB, measured by a process that does nothing else."""
    options = {"batch": arguments.batch, "length": arguments.length, "precision": arguments.precision}
    command = [sys.executable, "-m", "benchmarks.distill", "--measure", name, folder]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
    return int(done.stdout.split()[-1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    autocast = autocast_dtype(arguments.precision)
    if arguments.measure:
        name, folder = arguments.measure
        step = stepper(name, Path(folder), arguments, autocast)
        for _ in range(3):
            step()
        print(peak_rss())
        return
    print(f"{arguments.batch} x {arguments.length} tokens, {precision_note(autocast)}")
    for part in arguments.parts:
        result = {"ratios": ratios, "memory": memory}[part](arguments, autocast)
        setting = {name: getattr(arguments, name) for name in ("batch", "length", "repeats")}
        print("wrote", save_part("distill", part, {"precision": precision_note(autocast), **setting, **result}))


if __name__ == "__main__":
    main()
