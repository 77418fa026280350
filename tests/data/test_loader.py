"""What the loaders give, on one process: order, live proportions, resuming, evaluation, and every refusal."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import MDSWriter

from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mixture.dataset import EvalDataset, MixtureDataset, fair_subset
from llmshearing.data.mixture.loader import build_eval_dataloader, build_train_dataloader, real_samples
from llmshearing.data.mixture.mixture import Mixture
from llmshearing.errors import ShearingError

SEQ, VOCAB = 16, 300


def train(domains, **changes):
    root, names = domains
    arguments = {"split": "train", "set_names": names, "proportion": [0.2, 0.5, 0.3], "batch_size": 4}
    arguments |= {"max_seq_len": SEQ, "vocab_size": VOCAB, "seed": 1, "local": root}
    return build_train_dataloader(**(arguments | changes))


def evaluate(domains, **changes):
    root, names = domains
    arguments = {"split": "eval", "set_names": names, "batch_size": 4, "max_seq_len": SEQ, "vocab_size": VOCAB}
    return build_eval_dataloader(**({"local": root} | arguments | changes))


def pairs(batches) -> list[tuple[int, int]]:
    return [pair for b in batches for pair in zip(b["set"].tolist(), b["sample"].tolist(), strict=True)]


def take(spec, batches: int) -> list[tuple[int, int]]:
    return pairs(itertools.islice(spec.dataloader, batches))


def test_a_batch_holds_what_is_on_disk(domains):
    spec = train(domains)
    batch = next(iter(spec.dataloader))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "input_ids": (torch.int64, (4, SEQ)),
        "set": (torch.int64, (4,)),
        "sample": (torch.int64, (4,)),
    }
    expected = 100 * batch["set"] + batch["sample"]  # how the fixture numbers its tokens
    assert torch.equal(batch["input_ids"], expected[:, None].expand(4, SEQ))
    assert (spec.get_num_samples_in_batch(batch), spec.get_num_tokens_in_batch(batch)) == (4, 4 * SEQ)


def test_small_domains_wrap_and_counts_follow_the_proportions(domains):
    spec = train(domains)
    assert len(spec.dataloader) == 17 and len(spec.dataloader.dataset) == 68  # 5 + 40 + 23 samples
    epochs = [pairs(spec.dataloader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [68] * 3
    flat = sum(epochs, [])
    for end in range(1, len(flat) + 1):
        counts = Counter(domain for domain, _ in flat[:end])
        assert all(abs(counts[k] - end * q) < 1 for k, q in enumerate([0.2, 0.5, 0.3]))
    smallest = [sample for domain, sample in flat if domain == 0]
    for first in range(0, len(smallest) - 4, 5):
        assert sorted(smallest[first : first + 5]) == [0, 1, 2, 3, 4]


def test_proportions_hold_from_the_very_next_batch(domains):
    spec = train(domains)
    dataset, batches = spec.dataloader.dataset, iter(spec.dataloader)
    next(batches)
    dataset.set_proportion([0.0, 1.0, 0.0])
    assert dataset.proportion.dtype == np.float64 and dataset.proportion.tolist() == [0, 1, 0]
    assert next(batches)["set"].tolist() == [1, 1, 1, 1]
    with pytest.raises(ShearingError, match="sums to"):
        dataset.set_proportion([0.5, 0.2, 0.2])


@pytest.mark.parametrize("consumed", [0, 1, 9, 17, 25])
def test_resuming_continues_at_the_exact_next_sample(domains, consumed):
    spec = train(domains)
    batches = itertools.chain(*(spec.dataloader for _ in range(4)))
    for number in range(consumed):
        if number == 5:
            spec.dataloader.dataset.set_proportion([0.6, 0.3, 0.1])
        next(batches)
    in_epoch = consumed % 17 * 4
    state = json.loads(json.dumps(spec.dataloader.dataset.state_dict(in_epoch, True)))
    copy = train(domains)
    copy.dataloader.dataset.load_state_dict(state)
    rest = pairs(copy.dataloader)
    assert len(rest) == 68 - in_epoch  # the epoch ends where it would have
    assert rest == pairs(itertools.islice(batches, len(rest) // 4))
    assert take(copy, 3) == pairs(itertools.islice(batches, 3))


def test_state_is_a_few_numbers_a_domain(domains):
    state = train(domains).dataloader.dataset.state_dict(0, True)
    assert all(isinstance(v, int) or len(v) == 3 for v in state.values() if v != "exact")


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_global_sequence_does_not_depend_on_ranks(domains, ranks):
    root, names = domains

    def stream(rank, world_size, batch_size, state=None):
        directories = [MdsDirectory(root / "train" / name, SEQ, VOCAB) for name in names]
        mixture = Mixture(names, [len(d) for d in directories], [0.2, 0.5, 0.3], 1)
        dataset = MixtureDataset(directories, names, mixture, batch_size=batch_size, rank=rank, world_size=world_size)
        if state:
            dataset.load_state_dict(state)
        found = [(int(s["set"]), int(s["sample"])) for s in itertools.islice(dataset, 5 * batch_size)]
        return found, dataset.state_dict(5 * batch_size * world_size, True)

    def together(state=None):
        apart = [stream(rank, ranks, 2, state) for rank in range(ranks)]
        assert all(after == apart[0][1] for _, after in apart)
        return [pair for b in range(5) for rows, _ in apart for pair in rows[2 * b : 2 * b + 2]], apart[0][1]

    alone, state = stream(0, 1, 2 * ranks)
    assert together() == (alone, state)
    assert together(state)[0] == stream(0, 1, 2 * ranks, state)[0]


def test_a_checkpoint_without_a_position_starts_at_the_beginning(domains, caplog):
    spec = train(domains)
    spec.dataloader.dataset.load_state_dict(None)
    assert "no data position" in caplog.text
    assert take(spec, 2) == take(train(domains), 2)


def test_without_shuffling_samples_come_in_order(domains):
    drawn = take(train(domains, shuffle=False), 10)
    assert [sample for domain, sample in drawn if domain == 1] == list(range(20))


def test_a_plain_split_reads_domains_from_the_column(domains):
    spec = train(domains, split="eval", dynamic=False)
    flat = pairs(spec.dataloader)
    assert len(set(flat)) == len(flat) == 100  # one epoch in whole batches
    assert all(domain == (sample >= 70) + (sample >= 98) for domain, sample in flat)
    with pytest.raises(ShearingError, match="plain stream"):
        spec.dataloader.dataset.set_proportion([1.0])
    spec = train(domains, split="eval", dynamic=False, set_names=["a", "b"])
    with pytest.raises(ShearingError, match=r"domain 'c'; set_names has \['a', 'b'\]"):
        pairs(spec.dataloader)


def test_evaluation_is_every_sample_once_in_order_each_time(domains):
    spec = evaluate(domains)
    for _ in range(2):
        batches = list(spec.dataloader)
        assert [sample for _, sample in pairs(batches)] == list(range(101))
        assert len(batches) == len(spec.dataloader) == 26
    assert torch.equal(batches[-1]["input_ids"], torch.full((1, SEQ), 100))


@given(st.integers(1, 7), st.integers(1, 5), st.integers(-1, 12))
def test_ranks_evaluate_each_sample_once_and_meet_in_each_batch(ranks, batch_size, subset):
    class Directory:
        max_seq_len, path, masked = SEQ, "memory", False

        def __len__(self):
            return 29

        def names(self):
            return ["a"] * 20 + ["b"] * 9

        def read(self, index):
            return np.zeros(SEQ, np.int64), "ab"[index >= 20], None

    seen, shapes = [], set()
    for rank in range(ranks):
        dataset = EvalDataset(
            Directory(), ["a", "b"], batch_size=batch_size, rank=rank, world_size=ranks, subset_num_batches=subset
        )
        rows = [(s["set"], s["sample"]) for s in dataset]
        assert len(rows) == len(dataset)
        assert all(domain == (sample >= 20) if sample >= 0 else domain == -1 for domain, sample in rows)
        seen += [sample for _, sample in rows if sample >= 0]
        shapes.add(len(rows))
    assert len(shapes) == 1  # as many rows, so as many batches of the same sizes
    wanted = 29 if subset < 0 else min(29, subset * batch_size * ranks)
    assert len(seen) == len(set(seen)) == wanted


def test_padding_counts_for_nothing(domains):
    spec = evaluate(domains)
    batch = {"input_ids": torch.zeros(3, SEQ), "set": torch.tensor([2, -1, 0]), "sample": torch.tensor([1, -1, 3])}
    assert spec.get_num_samples_in_batch(batch) == real_samples(batch) == 2
    assert spec.get_num_tokens_in_batch(batch) == 2 * SEQ
    assert spec.num_samples == 101


def test_a_subset_takes_from_the_domains_in_turn(domains):
    counts = Counter(domain for domain, _ in pairs(evaluate(domains, subset_num_batches=5).dataloader))
    assert counts == {0: 9, 1: 8, 2: 3}
    sets = np.array([0] * 5 + [1] * 2)
    assert fair_subset(sets, 5).tolist() == [0, 5, 1, 6, 2]


def test_prepared_data_trains_and_evaluates(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    where = {"local": prepared, "set_names": ["books", "code"], "batch_size": 3, "max_seq_len": SEQ}
    where["vocab_size"] = manifest["vocab_size"]
    spec = build_train_dataloader(**where, split="for_prune", proportion=[0.5, 0.5], seed=0)
    assert take(spec, 2)
    rows = pairs(build_eval_dataloader(**where, split="eval_merge").dataloader)
    counts = Counter(domain for domain, _ in rows)
    assert [counts[0], counts[1]] == [n["sequences"] for n in manifest["splits"]["eval"].values()]
    with pytest.raises(ShearingError, match="the model's vocab_size is 299; prepare"):
        build_eval_dataloader(**(where | {"vocab_size": 299}), split="eval_merge")


def test_the_predecessors_layout_loads(tmp_path):
    for directory, rows in (("cc", 9), ("github", 6), ("eval_merge", 4)):
        columns = {"tokens": "bytes", "set": "str"}
        with MDSWriter(out=str(tmp_path / directory), columns=columns) as writer:
            for i in range(rows):
                name = directory if directory != "eval_merge" else ["cc", "github"][i % 2]
                writer.write({"tokens": np.full(SEQ, 60000 + i, np.uint16).tobytes(), "set": name})
    where = {"local": tmp_path, "set_names": ["cc", "github"], "max_seq_len": SEQ, "vocab_size": 65000}
    spec = build_train_dataloader(**where, split=None, proportion=[0.5, 0.5], batch_size=4, seed=0)
    batch = next(iter(spec.dataloader))
    assert torch.equal(batch["input_ids"][:, 0], 60000 + batch["sample"])
    rows = pairs(build_eval_dataloader(**where, split="eval_merge", batch_size=4).dataloader)
    assert rows == [(0, 0), (1, 1), (0, 2), (1, 3)]


# ---- refusals


def test_missing_domains_are_named_together(domains):
    with pytest.raises(ShearingError) as caught:
        train(domains, set_names=["a", "x", "y"])
    said = str(caught.value)
    assert "domain 'x' is not in" in said and "domain 'y' is not in" in said and "which has ['a', 'b', 'c']" in said
    with pytest.raises(ShearingError, match=r"nowhere does not exist; .* has \['eval', 'train'\]"):
        train(domains, split="nowhere")
    with pytest.raises(ShearingError, match="set_names is empty"):
        train(domains, set_names=[])


def test_bad_proportions(domains):
    with pytest.raises(ShearingError, match="2 values for 3 domains"):
        train(domains, proportion=[0.5, 0.5])
    with pytest.raises(ShearingError, match="sums to 0.9"):
        train(domains, proportion=[0.5, 0.2, 0.2])


def test_evaluation_domains_must_be_those_of_set_names(domains):
    with pytest.raises(ShearingError, match=r"has samples of \['c'\], which set_names \['a', 'b'\] lacks"):
        evaluate(domains, set_names=["a", "b"])
    with pytest.raises(ShearingError, match=r"has no sample of \['d'\]; it has \['a', 'b', 'c'\]"):
        evaluate(domains, set_names=["a", "b", "c", "d"])


def test_a_folder_with_another_domains_data(domains, write_domain):
    root, _ = domains
    write_domain(root / "train" / "d", "other", 3)
    with pytest.raises(ShearingError, match="is of domain 'other', not 'd'|domain 'other'; set_names"):
        list(train(domains, set_names=["d"], proportion=[1.0]).dataloader)


def test_another_sequence_length(domains):
    with pytest.raises(ShearingError, match="sequences are 16 tokens long, max_seq_len is 32"):
        train(domains, max_seq_len=32)
    with pytest.raises(ShearingError, match="sequences are 16 tokens long, max_seq_len is 32"):
        evaluate(domains, max_seq_len=32)


def test_ids_beyond_the_models_vocabulary(domains):
    with pytest.raises(ShearingError, match=r"train/c: sample 0 has token id 200, the model's vocab_size is 150"):
        train(domains, vocab_size=150)


def test_settings_of_workers_are_checked(domains):
    with pytest.raises(ShearingError, match="num_workers is -1"):
        train(domains, num_workers=-1)
    with pytest.raises(ShearingError, match="prefetch_factor is 2"):
        evaluate(domains, prefetch_factor=2)
    train(domains, prefetch_factor=None, persistent_workers=False)
    dataset = train(domains).dataloader.dataset
    with pytest.raises(ShearingError, match="give the workers to the data set"):
        next(iter(torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1)))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index", "no index"])
def test_damaged_shards_are_named(domains, write_domain, damage):
    root, names = domains
    write_domain(root / "train" / "b2", "b2", 200, shard="2kb")
    shard = root / "train" / "b2" / "shard.00002.mds"
    index = root / "train" / "b2" / "index.json"
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif damage == "gone":
        shard.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:-30])
    else:
        index.unlink()
    with pytest.raises(ShearingError, match="index.json" if "index" in damage else "shard.00002.mds"):
        list(train(domains, set_names=["a", "b2"], proportion=[0.1, 0.9]).dataloader)


def test_a_damaged_shard_without_a_hash_is_named(tmp_path):
    with MDSWriter(out=str(tmp_path / "a"), columns={"tokens": "bytes", "set": "str"}) as writer:
        for _ in range(3):
            writer.write({"tokens": np.zeros(SEQ, np.uint16).tobytes(), "set": "a"})
    shard = tmp_path / "a" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[12:16] = b"\xff\xff\xff\xff"  # where the offsets are
    shard.write_bytes(content)
    with pytest.raises(ShearingError, match="shard.00000.mds cannot be read|sequences are"):
        list(train((tmp_path, ["a"]), split=None, proportion=[1.0]).dataloader)


def test_foreign_columns_and_pickles_are_refused(tmp_path):
    for name, columns, sample in (
        ("text", {"text": "str"}, {"text": "x"}),
        ("floats", {"tokens": "float32", "set": "str"}, {"tokens": np.float32(1), "set": "x"}),
        ("pickled", {"tokens": "pkl", "set": "str"}, {"tokens": [1], "set": "x"}),
    ):
        with MDSWriter(out=str(tmp_path / name), columns=columns) as writer:
            writer.write(sample)
    with pytest.raises(ShearingError) as caught:
        train((tmp_path, ["text", "floats", "pickled"]), split=None)
    said = str(caught.value)
    assert "['tokens', 'set'] is missing" in said and "'float32'" in said and "would run code" in said
