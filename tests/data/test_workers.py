"""Real worker processes: one stream whatever the layout, and no hang when a worker dies."""

import itertools
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mixture.dataset import EvalDataset, MixtureDataset
from llmshearing.data.mixture.loader import build_eval_dataloader, build_train_dataloader
from llmshearing.data.mixture.mixture import Mixture
from llmshearing.data.mixture.reading import join
from llmshearing.errors import ShearingError

SEQ, VOCAB, GLOBAL = 16, 300, 8
# batch -> proportions from there on: what a run recorded is replayed on every layout
HISTORY = {2: [0.6, 0.3, 0.1], 3: [0.0, 1.0, 0.0], 7: [0.3, 0.3, 0.4], 11: [0.3, 0.3, 0.4], 14: [0.1, 0.1, 0.8]}
BATCHES = 20  # the epoch of 64 samples, 8 batches, wraps twice


def layout(domains, ranks, workers, prefetch=None, state=None, mixing="exact", **more):
    """The loaders of all ranks."""
    root, names = domains
    loaders = []
    for rank in range(ranks):
        streams = [MdsDirectory(root / "train" / name, SEQ, VOCAB) for name in names]
        sizes, blocks = [len(s) for s in streams], [s.block for s in streams]
        mixture = Mixture(names, sizes, [0.2, 0.5, 0.3], 1, mixing=mixing, blocks=blocks)
        dataset = MixtureDataset(
            streams, names, mixture, batch_size=GLOBAL // ranks, rank=rank, world_size=ranks,
            workers=workers, prefetch_factor=prefetch, **more,
        )  # fmt: skip
        if state is not None:
            dataset.load_state_dict(state)
        loaders.append(DataLoader(dataset, batch_size=GLOBAL // ranks, collate_fn=join))
    return loaders


def stream(loaders, first=0, last=BATCHES, microbatch=None):
    """(set, sample) of global batches first..last, the history replayed; and the last state."""
    found = []
    iterators = [itertools.chain.from_iterable(itertools.repeat(loader)) for loader in loaders]
    for number in range(first, last):
        if number in HISTORY:
            for loader in loaders:
                loader.dataset.set_proportion(HISTORY[number])
        batch = []
        for iterator in iterators:
            got = next(iterator)
            for start in range(0, len(got["set"]), microbatch or len(got["set"])):
                part = {k: v[start : start + (microbatch or len(got["set"]))] for k, v in got.items()}
                assert torch.equal(part["input_ids"][:, 0], 100 * part["set"] + part["sample"])  # the right tokens
                batch += zip(part["set"].tolist(), part["sample"].tolist(), strict=True)
        found.append(batch)
    states = [loader.dataset.state_dict(last % 8 * GLOBAL, True) for loader in loaders]
    assert all(state == states[0] for state in states)
    return found, json.loads(json.dumps(states[0]))


@pytest.fixture
def expected(domains):
    return stream(layout(domains, 1, 0))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("workers", "prefetch", "microbatch"), [(0, None, 1), (1, 1, None), (1, 5, 2), (3, 2, 1)])
def test_every_layout_gives_the_same_stream(domains, expected, ranks, workers, prefetch, microbatch):
    assert stream(layout(domains, ranks, workers, prefetch), microbatch=microbatch) == expected


def test_the_multinomial_stream_does_not_depend_on_the_layout_either(domains):
    expected = stream(layout(domains, 1, 0, mixing="multinomial"))
    assert stream(layout(domains, 2, 1, 2, mixing="multinomial")) == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_resume_at_a_random_batch_onto_another_layout(domains, expected, seed):
    chosen = np.random.default_rng(seed)
    at = int(chosen.integers(1, BATCHES))
    before, after = ((int(chosen.choice([1, 2, 4])), int(chosen.choice([0, 1, 3]))) for _ in range(2))
    head, state = stream(layout(domains, *before), last=at)
    tail, last = stream(layout(domains, *after, state=state), first=at)
    assert (head + tail, last) == expected


@pytest.mark.slow  # each worker imports torch and Streaming anew
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_may_be_started_afresh(domains, expected, context):
    assert stream(layout(domains, 1, 1, context=context)) == expected


def test_no_process_outlives_its_loader(domains):
    before = set(multiprocessing.active_children())
    loaders = layout(domains, 1, 2)
    iterator = iter(loaders[0])
    next(iterator)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del iterator, loaders
    assert set(multiprocessing.active_children()) - before == set()


def test_a_killed_worker_is_one_clear_error_and_no_hang(domains):
    before = set(multiprocessing.active_children())
    (loader,) = layout(domains, 1, 2)
    iterator = iter(loader)
    next(iterator)
    start = time.monotonic()
    os.kill((set(multiprocessing.active_children()) - before).pop().pid, signal.SIGKILL)
    with pytest.raises(ShearingError, match="2 worker processes failed.*killed.*lower num_workers"):
        for _ in range(50):
            next(iterator)
    assert time.monotonic() - start < 30
    assert set(multiprocessing.active_children()) - before == set()


def test_a_stuck_worker_ends_in_an_error_after_the_timeout(domains):
    before = set(multiprocessing.active_children())
    (loader,) = layout(domains, 1, 1, timeout=2)
    iterator = iter(loader)
    next(iterator)
    process = (set(multiprocessing.active_children()) - before).pop()
    time.sleep(3)  # it has read ahead and waits: one that stops inside a write to its pipe cannot be timed out
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ShearingError, match="timed out"):
            for _ in range(50):
                next(iterator)
    finally:
        os.kill(process.pid, signal.SIGCONT)


def test_bad_data_found_by_a_worker_is_said_without_its_traceback(domains):
    root, names = domains
    spec = build_train_dataloader(
        local=root, split="train", set_names=names, proportion=[0.2, 0.5, 0.3], batch_size=4, max_seq_len=SEQ,
        vocab_size=214, seed=1, num_workers=1,
    )  # fmt: skip
    with pytest.raises(ShearingError) as caught:
        list(spec.dataloader)
    assert "token id 2" in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 3])
def test_evaluation_by_workers_is_the_same_list(domains, workers):
    root, names = domains
    where = {"local": root, "split": "eval", "set_names": names, "max_seq_len": SEQ, "vocab_size": VOCAB}
    for batch_size in (4, 7):
        expected = [b["sample"].tolist() for b in build_eval_dataloader(**where, batch_size=batch_size).dataloader]
        spec = build_eval_dataloader(**where, batch_size=batch_size, num_workers=workers, prefetch_factor=1)
        assert [b["sample"].tolist() for b in spec.dataloader] == expected
        seen = []
        for rank in range(4):
            dataset = EvalDataset(
                MdsDirectory(root / "eval", SEQ, VOCAB), names, batch_size=batch_size, rank=rank, world_size=4
            )
            rows = [int(i) for b in DataLoader(dataset, batch_size, num_workers=workers) for i in b["sample"]]
            seen += [i for i in rows if i >= 0]
        assert sorted(seen) == list(range(101))


def test_domains_of_very_different_size_wrap_and_say_so(domains, caplog):
    with caplog.at_level("INFO"):
        stream(layout(domains, 1, 1))
    said = [record.getMessage() for record in caplog.records if "begins" in record.getMessage()]
    assert said[0] == "domain a: epoch 2 of its 5 samples begins"  # the first pass goes without saying
    assert not any("domain c: epoch 5" in line for line in said)


def test_reading_ahead_leaves_torchs_random_numbers_alone(domains):
    following = []
    for workers in (0, 2):
        torch.manual_seed(0)
        iterator = iter(layout(domains, 1, workers)[0])
        next(iterator)
        following.append(torch.rand(3).tolist())
    assert following[0] == following[1]
