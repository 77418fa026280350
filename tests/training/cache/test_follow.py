"""Runs that follow a cache: the bits of a live teacher, under any mixture, number of ranks and resume."""

import json
import shutil

import pytest
import torch
from helpers_cache import NAMES, SIZES, run_settings, weights_of, write_data, write_domain, write_teacher
from helpers_layouts import Job, execute, on_ranks
from helpers_runs import SEQ, VOCAB, make_model, write_yaml
from transformers import AutoModelForCausalLM

from llmshearing.config import ConfigError, load_config
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError
from llmshearing.train import train
from llmshearing.training.build import build_trainer
from llmshearing.training.cache.cli import cache_targets
from llmshearing.training.cache.follow import CachedTeacher
from llmshearing.training.cache.read import TeacherCache
from llmshearing.training.distillation import Teacher
from llmshearing.training.model import ShearingModel
from llmshearing.training.source import read_source
from llmshearing.training.targets import View


@pytest.mark.parametrize(("top_k", "tail"), [(32, "sampled"), (7, "bucket"), (VOCAB, "bucket"), (VOCAB, "sampled")])
def test_a_step_by_the_cache_is_a_step_by_the_teacher_bit_for_bit(place, tmp_path, top_k, tail):
    """Other samples side by side than when the cache was written, and other domains too."""
    cache_targets(str(place.teacher), place.data, tmp_path, split="train", batch=4, top_k=top_k, tail=tail)
    wanted = [("docs", 33), ("code", 0), ("docs", 2), ("code", 20)]
    data = {name: MdsDirectory(place.data / "train" / name, None, None) for name in NAMES}
    batch = {
        "input_ids": torch.stack([torch.from_numpy(data[name][sample][0]) for name, sample in wanted]),
        "set": torch.tensor([NAMES.index(name) for name, _ in wanted]),
        "sample": torch.tensor([sample for _, sample in wanted]),
    }
    teacher = AutoModelForCausalLM.from_pretrained(place.teacher)
    live = Teacher(teacher, 0.7, 0.3, top_k=top_k, tail=tail)
    cached = CachedTeacher(TeacherCache(tmp_path), NAMES, 0.7, 0.3)
    results = []
    for guide in (live, cached):
        model = ShearingModel(make_model(1), domains=2, teacher=guide).train()
        outputs = model(batch)
        model.loss(outputs, batch).backward()
        results.append((outputs, [parameter.grad for parameter in model.parameters()]))
    (one, gradients), (other, others) = results
    assert set(one) == {"objective", "sample_loss", "divergence"} == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    if top_k == VOCAB:  # and that is what whole logits say
        whole = ShearingModel(make_model(1), domains=2, teacher=Teacher(teacher, 0.7, 0.3)).train()(batch)
        torch.testing.assert_close(whole["objective"], one["objective"], rtol=1e-6, atol=1e-6)


def configured(place, folder, name, *, distill, **changes):
    values = {**run_settings(place.data, place.source, folder / name, **distill), **changes}
    return write_yaml(folder / f"{name}.yaml", values)


@pytest.mark.slow
def test_another_mixture_two_ranks_shards_and_a_resume_follow_the_same_targets(place, tmp_path):
    """All against one process with a live teacher, whose targets nobody has stored."""
    mixture = {"dynamic": True, "set_names": NAMES[::-1], "proportion": [0.7, 0.3], "update_type": "constant"}
    changes = {"callbacks": {"data_loading": mixture}, "precision": "fp32"}
    live = {"teacher": str(place.teacher), "top_k": 32, "ce": 0.2}
    cached = {"cache": str(place.cache), "ce": 0.2}
    one = execute(Job(str(configured(place, tmp_path, "live", distill=live, **changes))))
    assert len(one["batches"]) == 6 and {row[0] for rows in one["batches"].values() for row in rows} == {0, 1}

    workers = {"dataset": {"split": "train"}, "num_workers": 1, "prefetch_factor": 2}
    fsdp = {"sharding_strategy": "FULL_SHARD", "state_dict_type": "full"}
    jobs = {
        "two": Job(str(configured(place, tmp_path, "two", distill=cached, **changes, train_loader=workers))),
        "shards": Job(str(configured(place, tmp_path, "shards", distill=cached, **changes, fsdp_config=fsdp))),
    }
    for name, ranks in on_ranks(2, jobs, tmp_path / "ranks").items():
        for batch, rows in one["batches"].items():
            found = [(*row[:2],) for rank in ranks for row in rank["batches"][batch]]
            assert found == [(*row[:2],) for row in rows]
        assert bool(ranks[0]["sharded"]) == (name == "shards")
        for key, value in one["final"].items():
            torch.testing.assert_close(ranks[0]["final"][key], value, rtol=1e-4, atol=1e-5)

    same = execute(Job(str(configured(place, tmp_path, "same", distill=cached, **changes))))
    assert all(torch.equal(same["final"][key], value) for key, value in one["final"].items())  # bit for bit
    first = configured(place, tmp_path, "parts", distill=cached, **changes)
    train(load_config(first, ["max_duration=3ba", "scheduler.t_warmup=1ba"]))
    train(load_config(first, ["autoresume=true"]))
    latest = weights_of(tmp_path / "parts" / "latest-rank0.pt")
    assert all(torch.equal(latest[key.removeprefix("model.")], value) for key, value in one["final"].items())


def build(place, tmp_path, *, data=None, source=None, **distill):
    values = run_settings(data or place.data, source or place.source, None, **distill)
    if data is not None:
        length = MdsDirectory(data / "train" / "code", None, None).max_seq_len
        values |= {"max_seq_len": length}
    cfg = load_config(write_yaml(tmp_path / "run.yaml", values))
    return build_trainer(cfg, read_source(cfg), "cpu")


def refused(place, tmp_path, message, **changes):
    with pytest.raises(ShearingError, match=message):
        build(place, tmp_path, **{"cache": str(place.cache), **changes})


def test_a_cache_of_other_data_is_refused(place, tmp_path):
    refused(
        place, tmp_path, "written for other data than .*code .another index.json", data=write_data(tmp_path / "a", 1)
    )
    more = write_data(tmp_path / "b", sizes={**SIZES, "docs": 35})
    refused(place, tmp_path, "written for other data than .*docs .34 samples, not 35", data=more)
    short = write_data(tmp_path / "c", length=SEQ // 2)
    refused(place, tmp_path, "its sequences are 32 tokens long, those of .*code 16", data=short)


def test_a_cache_that_lacks_a_domain_is_refused(place, tmp_path):
    cache_targets(str(place.teacher), place.data, tmp_path / "code", split="train", domains=["code"])
    refused(place, tmp_path, "it has no targets for docs; it has code", cache=str(tmp_path / "code"))


def test_other_tokens_under_the_same_index_are_found_at_the_sample(place, tmp_path):
    """Shards without hashes: their index says nothing of what is in them."""
    data = shutil.copytree(place.data, tmp_path / "data")
    for name in NAMES:
        shutil.rmtree(data / "train" / name)
        write_domain(data / "train" / name, name, SIZES[name], hashes=())
    cache_targets(str(place.teacher), data, tmp_path / "cache", split="train")
    shutil.rmtree(data / "train" / "code")
    write_domain(data / "train" / "code", "code", SIZES["code"], seed=3, hashes=())
    trainer = build(place, tmp_path, data=data, cache=str(tmp_path / "cache"))
    with pytest.raises(ShearingError, match="is of other tokens than the data's: the cache was written for other data"):
        trainer.fit()


def test_a_cache_of_another_teacher_is_refused(place, tmp_path):
    other = write_teacher(tmp_path / "other", 9)
    refused(
        place,
        tmp_path,
        f"another teacher .{place.teacher}. than distill.teacher = {other}: weights differ",
        teacher=str(other),
    )
    config = write_teacher(tmp_path / "eps", 5, rms_norm_eps=1e-3)
    refused(place, tmp_path, "config differ", teacher=str(config))
    twin = shutil.copytree(place.teacher, tmp_path / "twin")
    assert build(place, tmp_path, cache=str(place.cache), teacher=str(twin)).state.model.teacher is not None


def test_a_cache_of_another_vocabulary_is_refused(place, tmp_path):
    small = write_teacher(tmp_path / "small", vocab_size=VOCAB + 16)
    refused(place, tmp_path, f"its teacher has vocab_size {VOCAB}, the model has {VOCAB + 16}", source=small)
    other = write_teacher(tmp_path / "tokens")
    file = other / "tokenizer.json"
    file.write_text(file.read_text() + "\n")  # the same tokens, written again
    build(place, tmp_path, cache=str(place.cache), source=other)
    said = json.loads(file.read_text())
    vocab = said["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(said))
    refused(place, tmp_path, "its teacher has another tokenizer.json than", source=other)


def test_other_settings_than_the_cache_has_are_refused(place, tmp_path):
    refused(place, tmp_path, "its temperature is 1.0, distill.temperature is 2.0", temperature=2.0)
    refused(place, tmp_path, "its top_k is 32, distill.top_k is 16", top_k=16)
    refused(place, tmp_path, "its tail is sampled, distill.tail is bucket", top_k=32, tail="bucket")
    refused(place, tmp_path, f"teacher cache {tmp_path} has no index.json", cache=str(tmp_path))


def test_hidden_states_need_a_live_teacher(place, tmp_path):
    with pytest.raises(ConfigError, match="distill.hidden = 1.0 beside distill.cache: a cache has no hidden states"):
        build(place, tmp_path, cache=str(place.cache), hidden=1.0)
    guide, view = CachedTeacher(TeacherCache(place.cache), NAMES), View((0,))
    with pytest.raises(ShearingError, match="no hidden states in a teacher's cache"):
        guide.ask({"set": torch.tensor([0])}, view)


def test_a_plain_split_is_one_folder(place, tmp_path):
    """With dynamic=false a split without folders for its domains is read as it is."""
    root = tmp_path / "data"
    write_domain(root / "train", "code", 9)
    write_domain(root / "eval", "code", 4)
    cache_targets(str(place.teacher), root, tmp_path / "cache", split="train")
    values = run_settings(root, place.source, None, cache=str(tmp_path / "cache"))
    values["callbacks"] = {"data_loading": {"dynamic": False, "set_names": ["code"]}}
    cfg = load_config(write_yaml(tmp_path / "run.yaml", values), ["max_duration=3ba"])
    trainer = build_trainer(cfg, read_source(cfg), "cpu")
    trainer.fit()
    assert trainer.state.model.teacher.set_names is None
