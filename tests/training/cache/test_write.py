"""The writer: what it writes, that a killed one goes on to the same bytes, and what it refuses."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_cache import NAMES, SIZES, contents, write_data, write_domain, write_teacher
from helpers_runs import ROOT, SEQ, VOCAB
from transformers import AutoModelForCausalLM

from llmshearing.checkpoints.hf_read import hf_to_checkpoint
from llmshearing.cli import main
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError
from llmshearing.training.cache.cli import cache_targets
from llmshearing.training.cache.index import part_file
from llmshearing.training.cache.read import TeacherCache
from llmshearing.training.cache.teacher import identify

SMALL = 40_000  # bytes of a part: twelve sequences of 32 tokens


def test_the_command_writes_what_the_teacher_says(place, tmp_path, caplog):
    words = ["--teacher", place.teacher, "--data", place.data, "--split", "train", "--output", tmp_path / "cache"]
    with caplog.at_level(logging.INFO, logger="llmshearing"):
        assert main(["distill", "cache", *map(str, words), "--top-k", "24", "--tail", "bucket", "--batch", "5"]) == 0
    last = caplog.records[-1].getMessage()
    assert f"to {tmp_path / 'cache'}: 55 sequences of 32 tokens, code, docs; " in last and "bytes a token" in last
    cache = TeacherCache(tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(place.teacher).eval()
    for name in NAMES:
        data = MdsDirectory(place.data / "train" / name, None, None)
        for sample in (0, 4, SIZES[name] - 1):
            ids = torch.from_numpy(data[sample][0])[None]
            found = cache.targets([name], [sample], ids)
            with torch.no_grad():
                want = model(input_ids=ids).logits[0, :-1].softmax(-1)
            likeliest = want.topk(24)
            assert torch.equal(found.ids[0, :-1], likeliest.indices)
            torch.testing.assert_close(found.probs[0, :-1], likeliest.values, rtol=4e-4, atol=0)
            torch.testing.assert_close(found.rest[0, :-1], 1 - likeliest.values.sum(-1), rtol=1e-3, atol=1e-6)
            assert not found.probs[0, -1].any()  # nothing follows the last token


def test_at_most_130_bytes_a_token_with_everything(place):
    size = sum(file.stat().st_size for file in place.cache.rglob("*.bin"))
    assert size / (sum(SIZES.values()) * SEQ) <= 98
    assert {file.name for file in place.cache.iterdir()} == {"index.json", "request.json", *NAMES}  # no locks


KILLED = """
import os, signal, sys
from llmshearing.training.cache import cli, write
make, calls = write._batch, []
def batch(*arguments):
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return make(*arguments)
write._batch = batch
cli.cache_targets(sys.argv[2], sys.argv[3], sys.argv[4], split="train", batch=4, part_bytes=int(sys.argv[5]))
"""


def start(place, output: Path, number: int) -> subprocess.Popen:
    """A writer in a process of its own that is killed at its batch of that number, in the middle of a part."""
    words = [sys.executable, "-c", KILLED, str(number), place.teacher, place.data, output, SMALL]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, words)), cwd=ROOT, env=variables, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_writers_go_on_and_share_the_work(place, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "cache"
    options = {"split": "train", "batch": 4, "part_bytes": SMALL}
    cache_targets(str(place.teacher), place.data, whole, **options)
    assert len(list(whole.rglob("*.bin"))) == 5
    assert start(place, output, 6).wait(120) == -signal.SIGKILL
    done = {name: value for name, value in contents(output).items() if name.endswith(".bin")}
    assert len(done) == 1 and done.items() < contents(whole).items()
    with pytest.raises(ShearingError, match="is unfinished: run the command that writes it again"):
        TeacherCache(output)
    before = {name: (output / name).stat().st_mtime_ns for name in done}
    two = [start(place, output, 1000) for _ in range(2)]
    assert [process.wait(120) for process in two] == [0, 0]
    assert contents(output) == contents(whole)
    assert before == {name: (output / name).stat().st_mtime_ns for name in done}  # not written again


def test_a_part_that_was_cut_short_is_refused_and_made_anew(place, tmp_path):
    output, options = tmp_path / "cache", {"split": "train", "batch": 4}
    cache_targets(str(place.teacher), place.data, output, **options)
    file, want = part_file(output, "docs", 0), contents(output)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ShearingError, match=f"{file} is missing or cut short"):
        TeacherCache(output)
    cache_targets(str(place.teacher), place.data, output, **options)
    assert contents(output) == want
    file.unlink()
    with pytest.raises(ShearingError, match=f"{file} is missing or cut short"):
        TeacherCache(output)


def test_damaged_bytes_are_found_as_they_are_read(place, tmp_path):
    output = tmp_path / "cache"
    cache_targets(str(place.teacher), place.data, output, split="train", domains=["code"])
    cache, ids = TeacherCache(output), MdsDirectory(place.data / "train" / "code", None, None)[3][0]
    file = part_file(output, "code", 0)
    with file.open("r+b") as part:
        part.seek(3 * cache.index.sample.itemsize + 100)
        part.write(b"\xff\x00\xff")
    with pytest.raises(ShearingError, match="00000.bin: sample 3 is damaged"):
        cache.targets(["code"], [3], torch.from_numpy(ids)[None])
    with pytest.raises(ShearingError, match="sample 2 is of other tokens than the data's"):
        cache.targets(["code"], [2], torch.from_numpy(ids)[None])
    for domain, sample in (("docs", 0), ("code", SIZES["code"]), ("code", -1)):
        with pytest.raises(ShearingError, match=f"has no sample {sample} of domain '{domain}'"):
            cache.targets([domain], [sample], torch.from_numpy(ids)[None])


def test_one_folder_of_all_domains(place, tmp_path):
    write_domain(tmp_path / "flat", "code", 5)
    index = cache_targets(str(place.teacher), tmp_path / "flat", tmp_path / "cache", top_k=8)
    ids = torch.from_numpy(MdsDirectory(tmp_path / "flat", None, None)[4][0])[None]
    assert list(index.domains) == ["."] and (tmp_path / "cache" / "00000.bin").is_file()
    assert TeacherCache(tmp_path / "cache").targets(["."], [4], ids).ids.shape == (1, SEQ, 8)


def test_a_teacher_is_known_by_its_tensors_not_by_its_files(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place.teacher)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    one, other = identify(place.teacher), identify(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert (one["config"], one["weights"]) == (other["config"], other["weights"])
    assert one["tokenizer"].startswith("tokenizer.json ") and "tokenizer" not in other
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.config.rms_norm_eps = 1e-3
    model.save_pretrained(tmp_path / "changed")
    changed = identify(tmp_path / "changed")
    assert one["config"] != changed["config"] and one["weights"] != changed["weights"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": VOCAB + 1}, f"top_k = {VOCAB + 1}: must be from 1 to the vocabulary, {VOCAB}"),
        ({"batch": 0}, "batch = 0"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"split": None}, "has no MDS data of one split; give --split, one of train"),
        ({"split": "absent"}, "has no MDS data"),
        ({"domains": ["code", "mail"]}, "has no domain mail; it has code, docs"),
        ({"teacher": "./absent"}, "absent"),
    ],
)
def test_bad_input_writes_nothing(place, tmp_path, changes, message):
    options = {"teacher": str(place.teacher), "data": place.data, "split": "train", **changes}
    with pytest.raises(ShearingError, match=message):
        cache_targets(output=tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_other_data_or_teachers_and_foreign_folders_are_not_written_over(place, tmp_path):
    output, options = tmp_path / "cache", {"split": "train"}
    cache_targets(str(place.teacher), place.data, output, **options)
    want = contents(output)
    other = write_teacher(tmp_path / "other", 9)
    data = write_data(tmp_path / "data", seed=1)
    for arguments, more, message in (
        ((str(other), place.data), {}, "teacher: "),
        ((str(place.teacher), data), {}, "domains: "),
        ((str(place.teacher), place.data), {"top_k": 16}, "top_k: 32 there, 16 asked for"),
    ):
        with pytest.raises(ShearingError, match=f"(?s)holds another cache; give another name.*{message}"):
            cache_targets(*arguments, output, **options, **more)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(ShearingError, match="exists with something else in it"):
        cache_targets(str(place.teacher), place.data, tmp_path / "mine", **options)
    assert contents(output) == want and list((tmp_path / "mine").iterdir()) == [tmp_path / "mine" / "notes.txt"]


def test_a_teacher_without_numbers_is_refused(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place.teacher)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ShearingError, match="logits for samples 0 to 7 of .*code are no numbers"):
        cache_targets(str(tmp_path / "nan"), place.data, tmp_path / "cache", split="train")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_checkpoint_can_be_the_teacher(place, tmp_path):
    """Its targets are those of the directory that it was made of."""
    hf_to_checkpoint(place.teacher, tmp_path / "teacher.pt")
    cache_targets(str(tmp_path / "teacher.pt"), place.data, tmp_path / "cache", split="train", batch=4)
    kept = [
        {name: value for name, value in contents(cache).items() if ".bin" in name}
        for cache in (tmp_path / "cache", place.cache)
    ]
    assert kept[0] == kept[1]
    assert identify(tmp_path / "teacher.pt")["weights"] == identify(place.teacher)["weights"]


def test_sequences_of_two_lengths_are_refused(place, tmp_path):
    write_domain(tmp_path / "data" / "code", "code", 3)
    write_domain(tmp_path / "data" / "docs", "docs", 3, length=SEQ // 2)
    with pytest.raises(ShearingError, match="of different lengths: {'code': 32, 'docs': 16}"):
        cache_targets(str(place.teacher), tmp_path / "data", tmp_path / "cache")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "x", "its format is 'x'"),
        ("top_k", 0, "top_k is 0"),
        ("top_k", VOCAB + 1, "must be from 1 to the vocabulary"),
        ("temperature", "hot", "temperature is 'hot'"),
        ("tail", "none", "must be one of"),
        ("domains", {}, "domains is no object"),
        ("domains", {"../up": {"samples": 1, "fingerprint": "a"}}, "is no name of a folder"),
        ("domains", {"code": {"samples": -1, "fingerprint": "a"}}, "samples is -1"),
        ("teacher", {"name": "x"}, "teacher lacks config, weights"),
        ("more", 1, "and no others"),
    ],
)
def test_an_index_that_is_none_is_refused(place, tmp_path, key, value, message):
    found = json.loads((place.cache / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**found, key: value}))
    with pytest.raises(ShearingError, match=message):
        TeacherCache(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ShearingError, match="cannot be read"):
        TeacherCache(tmp_path)
