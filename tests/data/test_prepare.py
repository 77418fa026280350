"""Prepared data against the documents it came from, decoded by Streaming and by the tokenizers library itself."""

import gzip
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from streaming import LocalDataset
from tokenizers import Tokenizer

from llmshearing.data.inspect import main as inspect_main
from llmshearing.data.mds.manifest import check_tokenizer, table
from llmshearing.data.prepare import job
from llmshearing.data.prepare.encoding import Encoders, Recipe, WorkerDied
from llmshearing.data.prepare.packing import Documents, Packer, split_of
from llmshearing.data.prepare.run import main, prepare
from llmshearing.data.text import sources, streams
from llmshearing.data.text.sources import Chunk, Lines, Place
from llmshearing.data.text.tokenizer import load_tokenizer
from llmshearing.errors import ShearingError

SEQ = 16
BOS, EOS = 0, 1


def stream(path: Path) -> list[int]:
    data = LocalDataset(str(path))
    return [int(token) for i in range(len(data)) for token in data[i]["tokens"]]


def documents(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Whole documents in a packed stream; the last one is cut off where the incomplete sequence was dropped."""
    found, current = [], []
    for token in ids:
        if token == BOS:
            current = []
        elif token == EOS:
            found.append(tokenizer.decode(current))
        else:
            current.append(token)
    return found


def test_splits_hold_each_document_once_and_share_none(prepared, texts, tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    seen: dict[str, set[str]] = {}
    for split in ("for_prune", "for_ft", "eval"):
        for domain, originals in texts.items():
            ids = stream(prepared / split / domain)
            whole = documents(ids, tokenizer)
            here = [text for text in originals if split_of(text, 17, 0.3, 0.3) == split]
            assert ids[0] == BOS
            assert whole == here[: len(whole)]  # in order, none missing
            assert len(here) - len(whole) <= 1 + SEQ  # only what the dropped rest held
            seen.setdefault(split, set()).update(whole)
    assert seen["eval"] and seen["for_prune"] and seen["for_ft"]
    assert not seen["eval"] & (seen["for_prune"] | seen["for_ft"]) and not seen["for_prune"] & seen["for_ft"]


def test_merged_evaluation_is_all_of_eval(prepared):
    merged = LocalDataset(str(prepared / "eval_merge"))
    apart = [LocalDataset(str(prepared / "eval" / name)) for name in ("books", "code")]
    rows = [sample for data in apart for sample in (data[i] for i in range(len(data)))]
    assert len(merged) == len(rows)
    for i, row in enumerate(rows):
        assert merged[i]["set"] == row["set"]
        np.testing.assert_array_equal(merged[i]["tokens"], row["tokens"])


def test_manifest_says_what_is_there(prepared, tokenizer_file):
    manifest = json.loads((prepared / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    assert manifest["vocab_size"] == tokenizer.get_vocab_size() > manifest["max_token_id"]
    assert (manifest["bos_id"], manifest["eos_id"], manifest["dtype"]) == (BOS, EOS, "uint16")
    for split, domains in manifest["splits"].items():
        for domain, counts in domains.items():
            data = LocalDataset(str(prepared / split / domain))
            assert counts["sequences"] == len(data) == counts["tokens"] // SEQ
            assert f"{split:<12}{domain:<20}" in table(manifest)
    assert set(manifest["request"]["sources"]["books"]) == {"a.jsonl", "b.jsonl"}
    index = json.loads((prepared / "eval" / "books" / "index.json").read_text())
    assert index["shards"][0]["raw_data"]["hashes"].keys() == {"xxh64"}
    assert str(prepared.parent) not in (prepared / "manifest.json").read_text()


def test_compressed_files_give_the_same_result(tmp_path, corpus, prepared, tokenizer_file):
    for domain in ("books", "code"):
        folder = tmp_path / "in" / domain
        folder.mkdir(parents=True)
        first, second = ((corpus / domain / f"{name}.jsonl").read_bytes() for name in "ab")
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(first[:100]) + gzip.compress(first[100:]))
        frames = [zstandard.ZstdCompressor().compress(part) for part in (second[:100], second[100:])]
        (folder / "b.jsonl.zst").write_bytes(b"".join(frames))
    options = {"eval_fraction": 0.3, "for_prune_fraction": 0.3, "progress": False}
    prepare(tmp_path / "in", tokenizer_file, tmp_path / "out", SEQ, **options)
    for split in ("for_prune/books", "for_ft/code", "eval_merge"):
        assert stream(tmp_path / "out" / split) == stream(prepared / split)


def test_limits_and_absent_splits(tmp_path, corpus, tokenizer_file, prepared):
    options = {"eval_fraction": 0.3, "for_prune_fraction": 0.7, "eval_seqs": 3, "progress": False}
    manifest = prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, **options)
    assert {n["sequences"] for n in manifest["splits"]["eval"].values()} == {3}
    assert not (tmp_path / "out" / "for_ft").exists()
    assert len(LocalDataset(str(tmp_path / "out" / "eval_merge"))) == 6
    assert stream(tmp_path / "out" / "eval" / "code") == stream(prepared / "eval" / "code")[: 3 * SEQ]


@given(st.text(), st.integers(0, 2**40), st.floats(0, 0.5), st.floats(0, 0.5))
def test_larger_fractions_only_add_to_evaluation(text, seed, small, more):
    if split_of(text, seed, small, 0.1) == "eval":
        assert split_of(text, seed, small + more, 0.1) == "eval"


@given(
    st.lists(st.lists(st.integers(2, 50), max_size=30), min_size=1, max_size=12),
    st.integers(1, 5),
    st.sampled_from([None, 1, 3]),
)
def test_packing_does_not_depend_on_chunks(encoded, batch, limit):
    def documents(some):
        flat = np.array([token for ids in some for token in [0, *ids, 1]], np.uint16)
        return Documents(flat, np.array([len(ids) + 2 for ids in some]), np.zeros(len(some), int))

    parts = []
    packer = Packer(lambda sequence: parts.append(sequence.tolist()), 7, "uint16", limit)
    for i in range(0, len(encoded), batch):
        packer.add(documents(encoded[i : i + batch]))
    flat = documents(encoded).tokens.tolist()
    assert parts == [flat[i : i + 7] for i in range(0, len(flat) - 6, 7)][:limit]
    ends = np.cumsum([len(ids) + 2 for ids in encoded])
    needed = len(encoded) if limit is None else min(len(encoded), int(np.searchsorted(ends, 7 * limit)) + 1)
    assert (packer.documents, packer.tokens) == (needed, ends[needed - 1])


# ---- tokenizers


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory, texts) -> Path:
    path = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts["books"]), model_prefix=str(path), vocab_size=100, hard_vocab_limit=False
    )
    return path.with_suffix(".model")


def test_sentencepiece_encodes_as_its_library(sentencepiece_model, texts):
    loaded = load_tokenizer(sentencepiece_model)
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert loaded.encode(texts["code"][:5]) == [model.encode(text) for text in texts["code"][:5]]
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (1, 2, model.get_piece_size())


def test_directory_and_file_agree(tmp_path, tokenizer_file, texts):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    saved = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token="<s>", eos_token="</s>")
    saved.save_pretrained(str(tmp_path))
    directory, file = load_tokenizer(tmp_path), load_tokenizer(tokenizer_file)
    expected = AutoTokenizer.from_pretrained(str(tmp_path))(texts["code"][:5], add_special_tokens=False)["input_ids"]
    assert directory.encode(texts["code"][:5]) == file.encode(texts["code"][:5]) == expected
    assert (directory.bos_id, directory.eos_id) == (file.bos_id, file.eos_id) == (BOS, EOS)


def test_another_tokenizer_than_the_datas_is_refused(tmp_path, prepared, tokenizer_file, texts, train_tokenizer):
    """It is known by what it does: the same one stored in another way is no other one."""
    from transformers import PreTrainedTokenizerFast

    same = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token="<s>", eos_token="</s>", pad_token="x")
    same.save_pretrained(str(tmp_path / "same"))
    check_tokenizer(prepared, tmp_path / "same")
    check_tokenizer(prepared, tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    train_tokenizer(["The quick-brown foxes' jumps"] * 9, ["<s>", "</s>"]).save(str(tmp_path / "other/tokenizer.json"))
    with pytest.raises(ShearingError, match="manifest.json: the data were prepared with another tokenizer"):
        check_tokenizer(prepared, tmp_path / "other")


def test_text_cannot_forge_special_tokens(tokenizer_file):
    loaded = load_tokenizer(tokenizer_file)
    ids = loaded.encode(["a</s><s>b"])[0]
    assert BOS not in ids and EOS not in ids
    assert Tokenizer.from_file(str(tokenizer_file)).decode(ids) == "a</s><s>b"


def test_tokenizer_without_bos_is_refused_until_one_is_named(tmp_path, texts, sentencepiece_model, train_tokenizer):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(texts["books"], ["<end>"]).save(str(path))
    with pytest.raises(ShearingError, match="has no BOS, no EOS; name one with --bos_token"):
        load_tokenizer(path)
    with pytest.raises(ShearingError, match=r"no BOS \('<x>' is not in the vocabulary\)"):
        load_tokenizer(path, "<x>", "<end>")
    assert load_tokenizer(path, "<end>", "<end>").bos_id == 0
    with pytest.raises(ShearingError, match=r"no EOS \('<x>'"):
        load_tokenizer(sentencepiece_model, eos_token="<x>")


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ShearingError, match="tokenizer.json"):
        load_tokenizer(path)


# ---- bad input: one clear error, exit code 1, nothing left behind


def refuse(tmp_path: Path, tokenizer: Path, *more: str, seq: int = SEQ) -> str:
    before = sorted(tmp_path.rglob("*"))
    command = ["--input", str(tmp_path / "in"), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    with pytest.raises(ShearingError) as caught:
        prepare_from(command, seq, more)
    assert main([*command, "--max_seq_len", str(seq), "--no_progress", *more]) == 1
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def prepare_from(command: list[str], seq: int, more: tuple[str, ...]) -> None:
    options = {name[2:]: value for name, value in zip(more[::2], more[1::2], strict=True)}
    if "domains" in options:
        options["domains"] = [options["domains"]]
    prepare(command[1], command[3], command[5], seq, progress=False, **options)


def test_empty_and_missing_domains_are_named_together(tmp_path, tokenizer_file, write_jsonl):
    write_jsonl(tmp_path / "in" / "good" / "a.jsonl", ["text"])
    (tmp_path / "in" / "bare").mkdir()
    (tmp_path / "in" / "hollow").mkdir()
    (tmp_path / "in" / "hollow" / "a.jsonl").touch()
    said = refuse(tmp_path, tokenizer_file)
    assert "domain folder" in said and "bare has no file" in said and "hollow/a.jsonl is empty" in said
    assert "'absent' is not a folder" in refuse(tmp_path, tokenizer_file, "--domains", "absent")


def test_no_domains_at_all(tmp_path, tokenizer_file):
    assert "is no folder" in refuse(tmp_path, tokenizer_file)
    (tmp_path / "in").mkdir()
    assert "has no domain folder" in refuse(tmp_path, tokenizer_file)


def test_every_broken_line_is_named(tmp_path, tokenizer_file):
    lines = [b'{"text": "fine"}', b"", b'{"text": "cut', b'{"body": "x"}', b'{"text": 3}', b"[1]", b'{"text": "\xff"}']
    lines.append(b'{"text": "\\ud800"}')
    path = tmp_path / "in" / "web" / "a.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\n".join(lines))
    said = refuse(tmp_path, tokenizer_file)
    for number, what in (
        (3, "is not JSON"),
        (4, "no string in field 'text'; it has ['body']"),
        (5, "no string in field"),
        (6, "no string in field"),
        (7, "is not UTF-8"),
        (8, "lone surrogate"),
    ):
        assert f"a.jsonl:{number} " in said.splitlines()[number - 3] and what in said.splitlines()[number - 3]
    assert len(said.splitlines()) == 6


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_compression_is_named(tmp_path, tokenizer_file, corpus, name):
    text = (corpus / "books" / "a.jsonl").read_bytes()
    whole = gzip.compress(text) if name.endswith("gz") else zstandard.ZstdCompressor().compress(text)
    path = tmp_path / "in" / "web" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[: len(whole) // 2])
    assert name in refuse(tmp_path, tokenizer_file)
    path.write_bytes(b"no compressed data")
    assert f"{name} cannot be decompressed" in refuse(tmp_path, tokenizer_file)


def test_domain_too_small_for_a_sequence(tmp_path, tokenizer_file, write_jsonl):
    write_jsonl(tmp_path / "in" / "tiny" / "a.jsonl", ["a few words"])
    said = refuse(tmp_path, tokenizer_file, seq=512)
    for split in ("eval", "for_prune", "for_ft"):
        assert f"in split {split}, less than one sequence of 512" in said


def test_tokenizer_larger_than_the_dtype(tmp_path, corpus, write_jsonl):
    from tokenizers import models, pre_tokenizers

    vocabulary = {"<s>": 0, "</s>": 1, "[UNK]": 2} | {f"w{i}": i for i in range(3, 70000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    write_jsonl(tmp_path / "in" / "web" / "a.jsonl", ["w69999 " * 20] * 3 + [f"w{i} " * 20 for i in range(50)])
    assert "dtype is uint16, but the tokenizer has ids up to 69999" in refuse(tmp_path, path, "--dtype", "uint16")
    manifest = prepare(
        tmp_path / "in", path, tmp_path / "out", SEQ, eval_fraction=0.3, for_prune_fraction=0.3, progress=False
    )
    assert (manifest["dtype"], manifest["vocab_size"]) == ("uint32", 70000)
    assert max(max(stream(tmp_path / "out" / split / "web")) for split in ("eval", "for_prune", "for_ft")) == 69999


def test_options_out_of_range_are_named_together(tmp_path, tokenizer_file):
    with pytest.raises(ShearingError) as caught:
        prepare(tmp_path, tokenizer_file, tmp_path / "out", 1, eval_fraction=0.8, for_prune_fraction=0.3, eval_seqs=0,
                seed=-1, shard_size="big", dtype="int8")  # fmt: skip
    said = str(caught.value)
    for what in ("max_seq_len is 1", "eval_fraction 0.8", "eval_seqs is 0", "seed is -1", "'big'", "'int8'"):
        assert what in said


def test_output_in_use_is_refused_and_the_same_result_is_kept(tmp_path, corpus, tokenizer_file, caplog):
    options = {"eval_fraction": 0.3, "for_prune_fraction": 0.3, "progress": False}
    output = tmp_path / "out"
    output.mkdir()  # empty is fine
    first = prepare(corpus, tokenizer_file, output, SEQ, **options)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with caplog.at_level("INFO"):
        assert prepare(corpus, tokenizer_file, output, SEQ, **options) == first
    assert "nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == times
    with pytest.raises(ShearingError, match="prepared with other options, seed; remove it"):
        prepare(corpus, tokenizer_file, output, SEQ, seed=18, **options)
    (output / "eval" / "books" / "index.json").unlink()
    with pytest.raises(ShearingError, match="is incomplete"):
        prepare(corpus, tokenizer_file, output, SEQ, **options)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ShearingError, match="is not prepared data"):
        prepare(corpus, tokenizer_file, other, SEQ, **options)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_command_line(tmp_path, corpus, tokenizer_file):
    command = [
        sys.executable,
        "-m",
        "llmshearing.data.prepare",
        "--input",
        str(corpus),
        "--output",
        str(tmp_path / "o"),
    ]
    command += ["--max_seq_len", str(SEQ), "--eval_fraction", "0.3", "--for_prune_fraction", "0.3"]
    done = subprocess.run([*command, "--tokenizer", str(tokenizer_file)], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1].endswith(f"sequences of {SEQ} tokens to {tmp_path / 'o'}")
    assert "bytes/token" in done.stderr
    failed = subprocess.run([*command, "--tokenizer", "absent"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "tokenizer absent is none of" in failed.stderr


# ---- options, other inputs, processes, interruptions

FRACTIONS = {"eval_fraction": 0.3, "for_prune_fraction": 0.3, "progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow  # each process imports the package
def test_processes_change_no_byte(tmp_path, corpus, prepared, tokenizer_file, monkeypatch):
    monkeypatch.setattr(job, "BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(sources, "CHUNK", 2000)
    monkeypatch.setattr(streams, "PIECE", 300)
    prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, processes=3, **FRACTIONS)
    assert contents(tmp_path / "out") == contents(prepared)


@pytest.mark.slow
def test_a_killed_tokenization_process_is_one_error(tmp_path, corpus, tokenizer_file):
    chunk = Chunk(Lines("a", 1, b'{"text": "a"}'), 13, Place())
    recipe = Recipe(load_tokenizer(tokenizer_file), "text", "uint16", 0, 0.0, 1.0, False)
    with pytest.raises(WorkerDied, match="was killed"), Encoders(recipe, 2) as encoders:
        results = encoders.in_order([chunk] * 50, lambda: frozenset(["for_prune"]))
        next(results)
        for child in multiprocessing.active_children():
            child.kill()
        list(results)


@pytest.mark.parametrize("at", [1, 5, 9, 14])
def test_a_killed_run_goes_on_and_ends_bit_identical(
    tmp_path, corpus, prepared, tokenizer_file, at, caplog, monkeypatch
):
    monkeypatch.setattr(sources, "CHUNK", 2000)
    monkeypatch.setattr(streams, "PIECE", 300)
    monkeypatch.setattr(job, "PART", 4000)

    def killed() -> None:
        calls = iter(range(1000))
        add = Packer.add

        def then_die(*arguments):
            add(*arguments)
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        Packer.add = then_die
        prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, dedup=True, **FRACTIONS)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    with caplog.at_level("INFO"):
        prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, dedup=True, **FRACTIONS)
    assert "going on where" in caplog.text
    prepare(corpus, tokenizer_file, tmp_path / "whole", SEQ, dedup=True, **FRACTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_error_and_finished_work_is_kept(tmp_path, corpus, prepared, tokenizer_file):
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))  # no file may grow beyond: a real OSError
        with pytest.raises(ShearingError, match=r"writing .*out failed: .*make room and run the same command again"):
            prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, **FRACTIONS)
        os._exit(7)

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join(60)
    assert process.exitcode == 7
    prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, **FRACTIONS)
    assert contents(tmp_path / "out") == contents(prepared)


def test_duplicates_are_left_out_over_all_domains(tmp_path, corpus, tokenizer_file, texts):
    manifest = prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, dedup=True, **FRACTIONS)
    assert manifest["duplicates"] == {"code": 40} and "left out of code: 40" in table(manifest)
    kept = sum(n["documents"] for domains in manifest["splits"].values() for n in domains.values())
    assert kept == len({text for domain in texts.values() for text in domain})


def test_broken_lines_are_skipped_counted_and_named(tmp_path, corpus, prepared, tokenizer_file):
    for domain in ("books", "code"):
        for name in "ab":
            lines = (corpus / domain / f"{name}.jsonl").read_bytes().splitlines()
            broken = [b'{"text": "cut', '{"text": "café"}'.encode("latin-1"), b'{"body": "x"}'] * 10
            path = tmp_path / "in" / domain / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\n".join(lines[:20] + broken + lines[20:]) + b"\n")
    manifest = prepare(tmp_path / "in", tokenizer_file, tmp_path / "out", SEQ, on_error="skip", **FRACTIONS)
    assert {domain: n["count"] for domain, n in manifest["skipped"].items()} == {"books": 60, "code": 60}
    assert "a.jsonl:21 is not JSON" in manifest["skipped"]["books"]["first"][0]
    assert "a.jsonl:22 is not UTF-8" in manifest["skipped"]["books"]["first"][1]
    assert "skipped in code: 60 lines" in table(manifest)
    mine, clean = contents(tmp_path / "out"), contents(prepared)
    del mine["manifest.json"], clean["manifest.json"]
    assert mine == clean


def test_parquet_gives_the_same_result(tmp_path, corpus, prepared, tokenizer_file, texts):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for domain, documents in texts.items():
        (tmp_path / "in" / domain).mkdir(parents=True)
        table_of = pyarrow.table({"id": list(range(len(documents))), "text": documents})
        parquet.write_table(table_of, tmp_path / "in" / domain / "a.parquet", row_group_size=30)
    prepare(tmp_path / "in", tokenizer_file, tmp_path / "out", SEQ, **FRACTIONS)
    mine, clean = contents(tmp_path / "out"), contents(prepared)
    del mine["manifest.json"], clean["manifest.json"]
    assert mine == clean


def test_bad_parquet_is_named(tmp_path, tokenizer_file):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "in" / "web" / "a.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": ["fine", None]}), path)
    assert "a.parquet:2 has no string in column 'text' but NoneType" in refuse(tmp_path, tokenizer_file)
    assert "has no column 'body'; it has ['text']" in refuse(tmp_path, tokenizer_file, "--text_field", "body")
    path.write_bytes(path.read_bytes()[:-9])
    assert "a.parquet cannot be read after row 0" in refuse(tmp_path, tokenizer_file)


def test_token_budgets_follow_the_proportions(tmp_path, corpus, tokenizer_file):
    shares = {"books": 0.75, "code": 0.25}
    budget = {"for_prune_tokens": 20 * SEQ, "eval_tokens": 8 * SEQ, "proportions": shares}
    splits = prepare(corpus, tokenizer_file, tmp_path / "out", SEQ, **budget, **FRACTIONS)["splits"]
    assert {d: n["sequences"] for d, n in splits["for_prune"].items()} == {"books": 15, "code": 5}
    assert {d: n["sequences"] for d, n in splits["eval"].items()} == {"books": 6, "code": 2}
    with pytest.raises(ShearingError, match="must be above 0 and sum to 1"):
        prepare(corpus, tokenizer_file, tmp_path / "o", SEQ, eval_tokens=9, proportions={"books": 0.5, "code": 0.6})
    with pytest.raises(ShearingError, match=r"proportions are of \['web'\]; the domains are \['books', 'code'\]"):
        prepare(corpus, tokenizer_file, tmp_path / "o", SEQ, eval_tokens=9, proportions={"web": 1.0})


def test_inspect_shows_and_decodes(tmp_path, prepared, tokenizer_file, capsys):
    assert inspect_main([str(prepared), "--samples", "1", "--tokenizer", str(tokenizer_file)]) == 0
    said = capsys.readouterr().out
    assert f"{'eval_merge':<32}" in said and f"ndarray:uint16:{SEQ}" in said and "[books 0] <s>book" in said
    assert inspect_main([str(tmp_path)]) == 1
