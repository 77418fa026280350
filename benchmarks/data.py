"""Ratios of the data code against the libraries it stands on, in one run.

    python -m benchmarks.data
    python -m benchmarks.data loader scale

loader       samples/s of our training loader / plain StreamingDataset + DataLoader, the same shards and workers
scale        start-up time and memory with 10^9 simulated samples / with 10^6
preparation  tokens/s of `prepare` / of tokenizers' `encode_batch`, the same text and cores; peak memory, input x 16

Results go to benchmarks/results/data.json. Alternating repetitions, medians.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.common import peak_rss, save_part

SEQ, BATCH, SAMPLES, BATCHES, REPEATS = 2048, 16, 3000, 120, 5
MEGABYTES = 10  # of text
LARGE = 16  # times as much, for memory
CORES = len(os.sched_getaffinity(0))


def loader() -> dict[str, float]:
    """Both read SAMPLES shuffled sequences with as many workers as there are cores."""
    import numpy as np
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    from llmshearing.data.mixture.loader import build_train_dataloader

    seconds: dict[str, list[float]] = {"ours": [], "streaming": []}
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        columns = {"tokens": f"ndarray:uint16:{SEQ}", "set": "str"}
        with MDSWriter(out=f"{folder}/a", columns=columns, hashes=["xxh64"], size_limit="4mb") as writer:
            for _ in range(SAMPLES):
                writer.write({"tokens": generator.integers(0, 32000, SEQ, dtype=np.uint16), "set": "a"})
        for _ in range(REPEATS):
            plain = StreamingDataset(local=f"{folder}/a", shuffle=True, batch_size=BATCH, allow_unsafe_types=False)
            seconds["streaming"].append(pace(DataLoader(plain, BATCH, num_workers=CORES, prefetch_factor=4)))
            spec = build_train_dataloader(
                local=folder, split=None, set_names=["a"], proportion=[1.0], batch_size=BATCH, max_seq_len=SEQ,
                vocab_size=32000, seed=0, num_workers=CORES, prefetch_factor=4,
            )  # fmt: skip
            seconds["ours"].append(pace(spec.dataloader))
    rate = {name: BATCH / statistics.median(values) for name, values in seconds.items()}
    return {"ours_samples_per_s": rate["ours"], "streaming_samples_per_s": rate["streaming"],
            "ratio": rate["ours"] / rate["streaming"]}  # fmt: skip


def pace(batches) -> float:
    """Seconds a batch, after the workers have started."""
    iterator = iter(batches)
    for _ in range(20):
        next(iterator)
    start = time.perf_counter()
    for _ in range(BATCHES):
        next(iterator)
    return (time.perf_counter() - start) / BATCHES


SCALE = """
import sys, time
import numpy as np
from benchmarks.common import peak_rss
from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.data.mixture.mixture import Mixture

class Simulated:
    max_seq_len, path, block, masked = 16, "simulated", 8192, False
    def __init__(self, size): self.size = size
    def __len__(self): return self.size
    def read(self, index): return np.zeros(16, np.int64), "ab"[self.size % 2], None

size = int(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far, of the imports, is forgotten
before = peak_rss()
start = time.perf_counter()
streams = [Simulated(size), Simulated(size // 2 * 2 + 1)]
mixture = Mixture(["a", "b"], [len(s) for s in streams], [0.5, 0.5], 0, blocks=[s.block for s in streams])
dataset = MixtureDataset(streams, ["a", "b"], mixture, batch_size=32, rank=0, world_size=1)
iterator = iter(dataset)
next(iterator)
first = time.perf_counter() - start
for _ in range(20000): next(iterator)
print(first, peak_rss() / 1024, (peak_rss() - before) / 1024)
"""


def scale() -> dict[str, float]:
    """Seconds to the first sample and peak memory (KiB) of a fresh process."""
    found: dict[int, list[list[float]]] = {10**6: [], 10**9: []}
    for _ in range(REPEATS):
        for size, runs in found.items():
            runs.append(run("-c", SCALE, size)[0])
    small, large = ([statistics.median(column) for column in zip(*runs, strict=True)] for runs in found.values())
    return {"startup_s_1e6": small[0], "startup_s_1e9": large[0], "startup_ratio": large[0] / small[0],
            "memory_kib_1e6": small[1], "memory_kib_1e9": large[1], "memory_ratio": large[1] / small[1],
            "memory_added_kib_1e6": small[2], "memory_added_kib_1e9": large[2]}  # fmt: skip


PREPARE = """
import sys
from llmshearing.data.prepare.run import prepare
if __name__ == "__main__":
    folder, tokenizer, output, processes = sys.argv[1:]
    manifest = prepare(folder, tokenizer, output, 1024, processes=int(processes), progress=False, shard_size="4mb")
    print(sum(n["tokens"] for split in manifest["splits"].values() for n in split.values()))
"""
ENCODE = """
import json, sys
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
texts = [json.loads(line)["text"] for line in open(sys.argv[1] + "/a/a.jsonl")]
print(sum(len(e.ids) + 2 for e in tokenizer.encode_batch(texts, add_special_tokens=False)))
"""


def preparation() -> dict[str, float]:
    """Both read the same JSONL and tokenize it on all cores; ours packs, hashes and writes too.

    Rates are those of the further tokens of an input four times as large, so that starting Python does not count.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    seconds: dict[str, list[float]] = {f"{name}{times}": [] for name in ("ours", "encode_batch") for times in (1, 4)}
    tokens: dict[int, float] = {}
    memory: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for times in (1, 4, LARGE):
            write_text(folder / f"in{times}" / "a" / "a.jsonl", MEGABYTES * times)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        lines = (folder / "in1" / "a" / "a.jsonl").read_text().splitlines()[:200]
        trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<s>", "</s>"], show_progress=False)
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "prepare_once.py").write_text(PREPARE)

        for i in range(3):
            for times in (1, 4):
                data = folder / f"in{times}"
                start = time.perf_counter()
                words = (folder / "prepare_once.py", data, folder / "tokenizer.json", folder / f"o{times}{i}", CORES)
                [tokens[times]], memory[times] = run(*words)
                seconds[f"ours{times}"].append(time.perf_counter() - start)
                start = time.perf_counter()
                run("-c", ENCODE, data, folder / "tokenizer.json")
                seconds[f"encode_batch{times}"].append(time.perf_counter() - start)
        data = folder / f"in{LARGE}"
        _, memory[LARGE] = run(folder / "prepare_once.py", data, folder / "tokenizer.json", folder / "large", CORES)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    more = tokens[4] - tokens[1]
    ours, theirs = (more / (medians[f"{name}4"] - medians[f"{name}1"]) for name in ("ours", "encode_batch"))
    return {"ours_tokens_per_s": ours, "encode_batch_tokens_per_s": theirs, "ratio": ours / theirs,
            **{f"memory_kib_x{times}": memory[times] for times in memory}, "memory_ratio": memory[LARGE] / memory[1],
            "ratio_with_start_x4": medians["encode_batch4"] / medians["ours4"],
            **{f"seconds_{name}": value for name, value in medians.items()}}  # fmt: skip


def run(*command: object) -> tuple[list[float], float]:
    """The numbers that a Python process prints; KiB: the peaks of it and of all that it started, added up."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(Path(__file__).parents[1])}
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen([sys.executable, *map(str, command)], stdout=output, env=environment)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess, OSError, StopIteration):  # it ended while it was looked at
                for each in (process, *process.children(recursive=True)):
                    peaks[each.pid] = max(peaks.get(each.pid, 0), peak_rss(each.pid))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{command[0]} failed: exit code {process.returncode}")
        output.seek(0)
        return [float(x) for x in output.read().split()], sum(peaks.values()) / 1024


def write_text(path: Path, megabytes: int) -> None:
    """Documents of about 3 kB, of words that are drawn like natural ones (1/rank)."""
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 9))) for _ in range(20000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        written = 0
        while written < megabytes * 10**6:
            written += file.write(json.dumps({"text": " ".join(generator.choices(words, weights, k=500))}) + "\n")


BENCHES = {"loader": loader, "scale": scale, "preparation": preparation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)} (all)")
    chosen = parser.parse_args().benches or list(BENCHES)
    if unknown := sorted(set(chosen) - set(BENCHES)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    for name in chosen:
        found = {key: float(f"{value:.4g}") for key, value in BENCHES[name]().items()}
        print(name, json.dumps(found, indent=1), flush=True)
        print("wrote", save_part("data", name, found))


if __name__ == "__main__":
    main()
