"""Tensors that stay in memory for the next who ask, and files that are written in step."""

import threading

import torch

from llmshearing.storage import LazyTensor, Recent, write_torch_files


def _counted(size, made):
    """A lazy tensor of so many bytes that notes each time it is made."""
    tensor = torch.zeros(size, dtype=torch.uint8)

    def make():
        made.append(size)
        return tensor

    return LazyTensor((size,), torch.uint8, make)


def test_the_newest_stay_up_to_the_limit():
    made = []
    recent, tensors = Recent(limit=10), {size: _counted(size, made) for size in (3, 4, 5, 100)}
    for size in (3, 4, 3, 4):
        recent.make(tensors[size])
    assert made == [3, 4]
    recent.make(tensors[5])  # 3 was asked for before 4, and goes
    recent.make(tensors[4])
    assert made == [3, 4, 5]
    recent.make(tensors[3])
    assert made == [3, 4, 5, 3]
    for _ in range(2):  # larger than the limit: the newest stays all the same
        recent.make(tensors[100])
    assert made == [3, 4, 5, 3, 100]


def test_threads_that_ask_together_make_it_once():
    made, start = [], threading.Barrier(4)
    recent, tensor = Recent(), _counted(7, made)

    def ask():
        start.wait()
        recent.make(tensor)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [7]


def test_files_in_step_are_each_what_torch_would_write(tmp_path):
    order = []

    def lazy(name, value):
        return LazyTensor(tuple(value.shape), value.dtype, lambda: order.append(name) or value)

    values = {file: [torch.randn(3, file + 1, generator=torch.Generator().manual_seed(file)) for _ in range(2 + file)]
              for file in range(3)}  # fmt: skip
    files = {
        tmp_path / f"{file}.pt": {"number": file, "tensors": [lazy((at, file), t) for at, t in enumerate(tensors)]}
        for file, tensors in values.items()
    }
    write_torch_files(files)
    for file, tensors in values.items():
        loaded = torch.load(tmp_path / f"{file}.pt", weights_only=True)
        assert loaded["number"] == file and len(loaded["tensors"]) == len(tensors)
        assert all(torch.equal(one, other) for one, other in zip(loaded["tensors"], tensors, strict=True))
    rounds = [at for at, _ in sorted(order)]
    assert sorted(order) == sorted((at, file) for file, tensors in values.items() for at in range(len(tensors)))
    assert rounds == sorted(rounds)
