"""Loss masks: from conversations through packing and MDS to batches, against the answers that went in."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from helpers_tokenizers import train_byte_level
from hypothesis import given
from hypothesis import strategies as st
from streaming import LocalDataset
from transformers import AutoTokenizer

from llmshearing.data.inspect import inspect
from llmshearing.data.mds.masks import COLUMN, encoding, packed, unpacked
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mixture.loader import build_eval_dataloader, build_train_dataloader
from llmshearing.data.prepare.packing import Documents, Packer, split_of
from llmshearing.data.prepare.run import main, prepare
from llmshearing.errors import ShearingError

SEQ = 24
CHATML = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m['role']) }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    train_byte_level(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = CHATML
    loaded.save_pretrained(folder)
    return folder


def chats(number: int = 40) -> list[dict]:
    """Of one to three turns each; every answer is another."""
    made = []
    for i in range(number):
        turns = [{"role": "system", "content": "be short"}] if i % 3 == 0 else []
        for turn in range(1 + i % 3):
            turns.append({"role": "user", "content": f"the jumps {i} and {turn} " * (1 + i % 4)})
            turns.append({"role": "assistant", "content": f"painted {i} cooked {turn} times" * (1 + i % 2)})
        made.append({"messages": turns, "source": {"id": 10**30 + i}})
    return made


def prompts(number: int = 40) -> list[dict]:
    return [{"prompt": f"walk {i} " * (1 + i % 5), "completion": f"talked {i} and printed"} for i in range(number)]


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> Path:
    """Data of a domain of chats, one of prompts and texts in two files, and one of plain text."""
    root = tmp_path_factory.mktemp("answers")
    write(root / "in" / "chat" / "a.jsonl", chats())
    write(root / "in" / "mixed" / "a.jsonl", prompts())
    write(root / "in" / "mixed" / "b.jsonl", [{"text": f"the walking stick {i} jumped"} for i in range(40)])
    write(root / "in" / "plain" / "a.jsonl", [{"text": f"naïve café {i} cooks"} for i in range(60)])
    prepare(root / "in", tokenizer, root / "out", SEQ, progress=False, eval_fraction=0.3, for_prune_fraction=0.3)
    return root / "out"


def bits(stored: np.ndarray, length: int) -> list[bool]:
    return [bool(int(stored[at // 8]) >> (at % 8) & 1) for at in range(length)]


def stream(path: Path) -> tuple[list[int], list[bool]]:
    data = LocalDataset(str(path))  # Streaming's own reader
    rows = [data[i] for i in range(len(data))]
    ids = [int(token) for row in rows for token in row["tokens"]]
    return ids, [bit for row in rows for bit in bits(row[COLUMN], SEQ)]


def answers(ids: list[int], mask: list[bool], tokenizer) -> list[str]:
    """Texts of the runs of answers; the last one may be cut off."""
    found, current = [], []
    for token, counts in [*zip(ids, mask, strict=True), (0, False)]:
        if counts:
            current.append(token)
        elif current:
            found.append(tokenizer.decode(current))
            current = []
    return found


# Prepared data -----------------------------------------------------------------------------------------------------


def test_what_counts_is_what_the_assistant_said(made, tokenizer):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    for split in ("for_prune", "for_ft", "eval"):
        ids, mask = stream(made / split / "chat")
        whole = "".join(loaded.apply_chat_template(chat["messages"], tokenize=False) for chat in own(split, chats()))
        assert whole.startswith(loaded.decode(ids)) and len(ids) > SEQ  # nothing between conversations, none missing
        want = [t["content"] + "<|im_end|>" for c in own(split, chats()) for t in c["messages"] if t["role"][0] == "a"]
        got = answers(ids, mask, loaded)
        assert got[:-1] == want[: len(got) - 1] and want[len(got) - 1].startswith(got[-1]) and len(got) > 2
        starts = ids.count(loaded.convert_tokens_to_ids("<|im_start|>"))
        assert starts == loaded.decode(ids).count("<|im_start|>")  # one id each, not the characters it is made of


def own(split: str, records: list[dict]) -> list[dict]:
    """The records of a split, by what they say alone."""
    key = ("messages", "prompt", "completion")
    said = [json.dumps({k: r[k] for k in key if k in r}, sort_keys=True, ensure_ascii=False) for r in records]
    return [r for r, text in zip(records, said, strict=True) if split_of(text, 17, 0.3, 0.3) == split]


def test_prompts_and_texts_share_a_domain(made, tokenizer):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    ids, mask = stream(made / "for_ft" / "mixed")
    got = answers(ids, mask, loaded)
    completions = [record["completion"] + "<|endoftext|>" for record in own("for_ft", prompts())]
    assert got[: len(completions) - 1] == completions[:-1]
    assert got[len(completions) - 1].startswith(completions[-1])  # a text counts wholly, so that they run together
    assert got[-1].count("the walking stick") > 3


def test_plain_domains_have_no_mask_and_the_manifest_says_which_have(made):
    assert set(LocalDataset(str(made / "for_ft" / "plain"))[0]) == {"tokens", "set"}
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["loss_mask"] == {"chat": ["chat"], "mixed": ["prompt", "text"]}
    for split, domains in manifest["splits"].items():
        assert "answer_tokens" not in domains["plain"]
        data = MdsDirectory(made / split / "chat", None, None)
        masks = [data.read(i)[2] for i in range(len(data))]
        assert domains["chat"]["answer_tokens"] == sum(int(mask[1:].sum()) for mask in masks)
        assert domains["chat"]["unanswered_sequences"] == sum(not mask[1:].any() for mask in masks)
        assert domains["chat"]["longer_documents"] > 0


def test_text_alone_gives_the_manifest_of_before(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert "loss_mask" not in manifest and "form" not in manifest["request"]["options"]
    assert "chat_template" not in manifest["request"]
    assert {name for domains in manifest["splits"].values() for counts in domains.values() for name in counts} == {
        "documents", "tokens", "sequences", "bytes",
    }  # fmt: skip


def test_the_same_request_again_does_nothing(made, tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        same = prepare(
            made.parent / "in", tokenizer, made, SEQ, progress=False, eval_fraction=0.3, for_prune_fraction=0.3
        )
    assert "nothing to do" in caplog.text and same["loss_mask"]


def test_inspect_shows_the_share_and_the_answers(made, tokenizer):
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    said = inspect(made, 5, decode).split("\n")
    counts = json.loads((made / "manifest.json").read_text())["splits"]["for_ft"]["chat"]
    line = next(line for line in said if line.startswith("for_ft/chat"))
    assert f"{counts['answer_tokens'] / (counts['sequences'] * SEQ):.1%} answers" in line
    assert "answers" not in next(line for line in said if line.startswith("for_ft/plain"))
    assert "[[painted" in "".join(said)


def test_worker_processes_change_no_byte(made, tokenizer, tmp_path, monkeypatch):
    from llmshearing.data.prepare import job

    monkeypatch.setattr(job, "BYTES_PER_PROCESS", 1)
    options = {"progress": False, "eval_fraction": 0.3, "for_prune_fraction": 0.3}
    prepare(made.parent / "in", tokenizer, tmp_path / "out", SEQ, processes=2, **options)
    for path in (file for file in made.rglob("*") if file.is_file()):
        assert (tmp_path / "out" / path.relative_to(made)).read_bytes() == path.read_bytes()


def test_a_text_beside_messages_is_the_text_unless_asked(tmp_path, tokenizer, caplog):
    both = [{**chat, "text": f"the jump {i} " * 5} for i, chat in enumerate(chats())]
    write(tmp_path / "in" / "one" / "a.jsonl", both)
    shares = {"eval_fraction": 0.0, "for_prune_fraction": 0.5, "progress": False}
    assert "loss_mask" not in prepare(tmp_path / "in", tokenizer, tmp_path / "text", SEQ, **shares)
    assert "the text is read; --form chooses" in caplog.text
    assert "loss_mask" in prepare(tmp_path / "in", tokenizer, tmp_path / "chat", SEQ, form="chat", **shares)


@pytest.mark.parametrize(
    "record, form, said",
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "auto", "a.jsonl:41 has no turn of the assistant"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, "auto", "a.jsonl:41: turn 1 has no"),
        (
            {"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "a"}]},
            "auto",
            "a.jsonl:41: the chat template cannot render .* no role judge",
        ),
        (
            {"prompt": "a", "completion": "b"},
            "auto",
            r"a.jsonl:41 has no list in the field 'messages' .*it has \['comp",
        ),
        ({"prompt": "a"}, "chat", r"a.jsonl:41 has no list in the field 'messages' .form chat.; it has \['prompt'\]"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "auto", "a.jsonl:41 has a lone surrogate"),
        ({"messages": [], "n": "x"}, "prompt", "a.jsonl:1 has no strings in the fields 'prompt' and 'completion'"),
    ],
)
def test_what_is_no_conversation_is_one_error_with_its_line(tmp_path, tokenizer, caplog, record, form, said):
    write(tmp_path / "in" / "one" / "a.jsonl", [*chats(), record])
    where = ["--input", str(tmp_path / "in"), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    options = ["--max_seq_len", str(SEQ), "--form", form, "--no_progress", "--processes", "1"]
    assert main([*where, *options]) == 1
    assert re.search(said, caplog.text) and "Traceback" not in caplog.text
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_records_are_strict_json(tmp_path, tokenizer, caplog):
    """Texts take control characters as they are; programs write records, and escape them."""
    write(tmp_path / "in" / "one" / "a.jsonl", prompts())
    with (tmp_path / "in" / "one" / "a.jsonl").open("a") as file:
        file.write('{"prompt": "a\tb", "completion": "c"}\n')
    where = ["--input", str(tmp_path / "in"), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    assert main([*where, "--max_seq_len", str(SEQ), "--no_progress", "--processes", "1"]) == 1
    assert "a.jsonl:41 is not JSON: Invalid control character at column 14" in caplog.text


def test_bad_records_can_be_left_out_and_are_counted(tmp_path, tokenizer):
    write(tmp_path / "in" / "one" / "a.jsonl", [*chats(), {"messages": [{"role": "user", "content": "a"}]}])
    shares = {"eval_fraction": 0.0, "for_prune_fraction": 0.5, "progress": False, "on_error": "skip"}
    manifest = prepare(tmp_path / "in", tokenizer, tmp_path / "out", SEQ, **shares)
    assert manifest["skipped"]["one"]["count"] == 1


def test_equal_conversations_are_known_whatever_stands_beside_them(tmp_path, tokenizer):
    again = [{"messages": chat["messages"], "rating": i} for i, chat in enumerate(chats()[:10])]
    write(tmp_path / "in" / "one" / "a.jsonl", [*chats(), *again])
    shares = {"eval_fraction": 0.0, "for_prune_fraction": 0.5, "progress": False}
    manifest = prepare(tmp_path / "in", tokenizer, tmp_path / "out", SEQ, dedup=True, **shares)
    assert manifest["duplicates"] == {"one": 10}
    assert sum(counts["one"]["documents"] for counts in manifest["splits"].values()) == 40


@pytest.mark.parametrize("what", ["file", "template", "form", "ambiguous", "parquet"])
def test_what_cannot_be_prepared_is_refused_before_the_work(tmp_path, tokenizer, tokenizer_file, what):
    write(tmp_path / "in" / "one" / "a.jsonl", chats())
    given, options, said = tokenizer, {}, ""
    if what == "file":
        given, said = tokenizer_file, r"a.jsonl is of the form chat, which needs a Hugging Face directory"
    elif what == "template":
        given, said = tmp_path / "bare", r"a.jsonl is of the form chat: tokenizer .* has no chat template"
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        loaded.chat_template = None
        loaded.save_pretrained(given)
    elif what == "form":
        options, said = {"form": "dialogue"}, "form is 'dialogue'; known are auto, text, prompt, chat"
    elif what == "ambiguous":
        write(tmp_path / "in" / "one" / "a.jsonl", [{**chats()[0], **prompts()[0]}])
        said = "its first record is of the forms prompt and chat; choose by --form"
    else:
        (tmp_path / "in" / "one" / "b.parquet").write_bytes(b"PAR1")
        options, said = {"form": "chat"}, "b.parquet is Parquet, of which text alone is read"
    with pytest.raises(ShearingError, match=said):
        prepare(tmp_path / "in", given, tmp_path / "out", SEQ, progress=False, **options)
    assert not (tmp_path / "out").exists()


# Packing and storage -----------------------------------------------------------------------------------------------


@st.composite
def documents(draw):
    """Chunks of documents: tokens with a mask, or without one."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
        tokens = draw(st.lists(st.integers(0, 99), min_size=sum(lengths), max_size=sum(lengths)))
        mask = draw(st.none() | st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
        made.append((lengths, tokens, mask))
    return made


@given(documents(), st.integers(2, 9), st.none() | st.integers(1, 6))
def test_masks_stay_with_their_tokens_across_all_borders(chunks, length, limit):
    rows = []
    packer = Packer(lambda ids, mask: rows.append((ids.tolist(), mask.tolist())), length, "uint16", limit, masked=True)
    for lengths, tokens, mask in chunks:
        made = Documents(np.array(tokens, np.uint16), np.array(lengths), np.array(lengths))
        made.mask = None if mask is None else np.array(mask)
        packer.add(made)
        again = Packer(packer.write, length, "uint16", limit, masked=True)
        again.restore(json.loads(json.dumps(packer.state())))  # as after a kill
        packer = again
    ids = [token for _, tokens, _ in chunks for token in tokens]
    marks = [mark for _, tokens, mask in chunks for mark in (mask or [True] * len(tokens))]
    whole = [(ids[at : at + length], marks[at : at + length]) for at in range(0, len(ids) - length + 1, length)]
    assert rows == whole[:limit]
    assert packer.answer_tokens == sum(sum(mask[1:]) for _, mask in rows)
    assert packer.unanswered_sequences == sum(not any(mask[1:]) for _, mask in rows)
    if limit is None:
        ends = np.cumsum([n for lengths, _, _ in chunks for n in lengths])
        spans = list(zip([0, *ends], ends, strict=False))
        assert packer.split_documents == sum((end - 1) // length > first // length for first, end in spans)


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_a_mask_comes_back_from_its_bits_and_from_numbers(mask):
    values = np.array(mask)
    stored = packed(values)
    assert encoding(len(mask)) == f"ndarray:uint8:{len(stored)}"
    for given_as in (stored, stored.tobytes(), values, values.astype(np.int64), values.astype(np.uint8).tobytes()):
        assert unpacked(given_as, len(mask)).tolist() == mask


@pytest.mark.parametrize("stored", [np.zeros(5, np.uint8), np.full(16, 2), np.zeros((2, 8)), b"", np.zeros(16)])
def test_what_is_no_mask_is_refused(stored):
    with pytest.raises(ValueError, match="column loss_mask holds"):
        unpacked(stored, 16)


# Batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "prefetch_factor": 2}])
def test_batches_of_mixed_domains_have_the_masks_of_their_samples(made, workers):
    names = ["chat", "plain"]
    spec = build_train_dataloader(
        local=made, split="for_ft", set_names=names, proportion=[0.5, 0.5], batch_size=4, max_seq_len=SEQ,
        vocab_size=500, seed=1, **workers,
    )  # fmt: skip
    data = [MdsDirectory(made / "for_ft" / name, SEQ, None) for name in names]
    seen = set()
    for _, batch in zip(range(6), spec.dataloader, strict=False):
        for domain, sample, ids, mask in zip(*(batch[k] for k in ("set", "sample", "input_ids", COLUMN)), strict=True):
            want, _, bits_of = data[domain].read(int(sample))
            assert ids.tolist() == want.tolist()
            assert mask.tolist() == ([True] * SEQ if bits_of is None else bits_of.tolist())
            seen.add(int(domain))
        counted = spec.get_num_tokens_in_batch(batch, token_type="loss_generating")
        assert counted == int(batch[COLUMN][:, 1:].sum()) and spec.get_num_tokens_in_batch(batch) == 4 * SEQ
    assert seen == {0, 1}


def test_evaluation_reads_shards_with_and_without_masks(made):
    names = ["chat", "mixed", "plain"]
    where = {"local": made, "split": "eval_merge", "set_names": names, "max_seq_len": SEQ, "vocab_size": 500}
    loader = build_eval_dataloader(**where, batch_size=4).dataloader
    rows = [row for batch in loader for row in zip(batch["set"].tolist(), batch[COLUMN].tolist(), strict=True)]
    assert {domain for domain, _ in rows} == {0, 1, 2}
    assert all(all(mask) == (domain == 2) for domain, mask in rows if domain != 1)


def test_batches_of_plain_data_have_no_mask(made):
    spec = build_train_dataloader(
        local=made, split="for_ft", set_names=["plain"], proportion=[1.0], batch_size=2, max_seq_len=SEQ,
        vocab_size=500, seed=1,
    )  # fmt: skip
    assert set(next(iter(spec.dataloader))) == {"input_ids", "set", "sample"}
    assert spec.get_num_tokens_in_batch({"input_ids": np.zeros((2, SEQ))}, token_type="loss_generating") == 2 * SEQ
