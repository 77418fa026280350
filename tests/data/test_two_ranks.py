"""Two real gloo processes: together they see one process's stream, and evaluate each sample once."""

import itertools
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp

from llmshearing.data.mixture.loader import build_eval_dataloader, build_train_dataloader

SEQ, VOCAB = 16, 300
CHANGE_AT, LAST = 3, 20  # batches; the epoch of 68 samples wraps in between


def build(root: Path, names: list[str], batch_size: int):
    where = {"local": root, "set_names": names, "max_seq_len": SEQ, "vocab_size": VOCAB, "batch_size": batch_size}
    workers = {"num_workers": 1, "prefetch_factor": 3} if batch_size == 2 else {}  # two ranks read ahead, one does not
    spec = build_train_dataloader(**where, **workers, split="train", proportion=[0.2, 0.5, 0.3], seed=1)
    return spec, build_eval_dataloader(**where, **workers, split="eval")


def train_rows(spec) -> list[list[tuple[int, int]]]:
    """(set, sample) of each batch, with proportions changed on the way and a resume from the state near the end."""
    found = []
    for number, batch in enumerate(itertools.islice(itertools.chain(spec.dataloader, spec.dataloader), LAST)):
        found.append(list(zip(batch["set"].tolist(), batch["sample"].tolist(), strict=True)))
        if number == CHANGE_AT:
            spec.dataloader.dataset.set_proportion([0.5, 0.1, 0.4])
    return found


def work(rank: int, root: Path, names: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    spec, evaluation = build(root, names, 2)
    rows = train_rows(spec)
    state = spec.dataloader.dataset.state_dict(12, True)
    sizes, seen = [], []
    for batch in evaluation.dataloader:
        size = torch.tensor([len(batch["set"])])
        torch_dist.all_reduce(size)  # hangs or misadds if ranks have different numbers of batches
        sizes.append(int(size))
        real = batch["set"] >= 0
        seen += list(zip(batch["set"][real].tolist(), batch["sample"][real].tolist(), strict=True))
    torch.save((rows, seen, sizes, state), root / f"rank{rank}.pt")
    # torch 2.7 can deadlock in ~ProcessGroupGloo while a collective on a Python tensor is being released
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def run_two(root: Path, names: list[str]) -> list:
    """What each rank saved; a rank that hangs fails the test instead of stopping it."""
    processes = mp.start_processes(work, (root, names), nprocs=2, start_method="spawn", join=False)
    deadline = time.monotonic() + 400  # a loaded machine takes a minute to import torch
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise TimeoutError("a rank hangs")
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow  # two processes import torch, Composer and Streaming
def test_two_ranks_are_one_stream(domains):
    root, names = domains
    (rows_0, seen_0, sizes, state_0), (rows_1, seen_1, _, state_1) = run_two(root, names)
    spec, evaluation = build(root, names, 4)
    alone = train_rows(spec)
    assert [a + b for a, b in zip(rows_0, rows_1, strict=True)] == alone
    smallest = [sample for batch in alone for domain, sample in batch if domain == 0]
    assert len(smallest) > 3 * 5  # its five samples have come round more than three times
    assert state_0 == state_1 == spec.dataloader.dataset.state_dict(12, True)
    batches = list(evaluation.dataloader)
    expected = [p for b in batches for p in zip(b["set"].tolist(), b["sample"].tolist(), strict=True)]
    assert len(expected) == 101 and sorted(seen_0 + seen_1) == sorted(expected)
    assert sizes == [4] * 25 + [2]  # 101 samples and one padding
