"""JSON files beside data and tokenizers: what editors write is read, what is broken is one sentence."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmshearing.data.json_file import read_json
from llmshearing.data.mixture.target_loss import read_models, source_losses
from llmshearing.data.text.frequencies import Frequencies
from llmshearing.data.text.tokenizer import load_tokenizer
from llmshearing.errors import ShearingError
from llmshearing.prune.methods.vocabulary.files import TokenizerJson
from llmshearing.prune.methods.vocabulary.write import added_ids

DEEP = "[" * 100_000 + "]" * 100_000


@given(
    value=st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans()), max_size=4),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]), indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(), after=st.sampled_from(["", "\n", "\r\n \n"]),
)  # fmt: skip
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_spelling_is_its_content(tmp_path, value, encoding, indent, ascii_only, after):
    path = tmp_path / "a.json"
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only) + after
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    assert read_json(path, "file") == value


BROKEN = {
    "cut": '{"a": ', "a list": "[]", "huge": '{"counts": [' + "1" * 5000 + "]}", "deep": '{"a": ' + DEEP + "}",
    "not utf-8": b'{"a": "\xff"}', "empty": "",
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_named_in_every_reader(tmp_path, content, tokenizer_file):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(path.read_bytes())
    for read in (
        lambda: read_json(path, "file"),
        lambda: Frequencies.load(path, "", 1),
        lambda: source_losses(path, ["a"]),
        lambda: load_tokenizer(tmp_path / "tokenizer.json"),
        lambda: load_tokenizer(tmp_path),
        lambda: added_ids(tmp_path),
    ):
        with pytest.raises(ShearingError, match=str(tmp_path)):
            read()
    with pytest.raises(ShearingError, match=str(tmp_path)):
        read_models(path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"counts": [1, -1]}, "must be whole numbers from 0"),
        ({"counts": [1, True]}, "must be whole numbers from 0"),
        ({"counts": {"0": 1}}, "must be whole numbers from 0"),
        ({"counts": [1]}, r"counted with another tokenizer \(1 ids\)"),
        ({"tokenizer": "b"}, "counted with another tokenizer"),
        ({"more": 1}, "cannot be read"),
    ],
)
def test_token_frequencies_of_another_kind(tmp_path, change, said):
    path = tmp_path / "f.json"
    Frequencies([1, 2], 3, "a", "corpus").save(path)
    assert Frequencies.load(path, "a", 2).counts == [1, 2]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ShearingError, match=said):
        Frequencies.load(path, "a", 2)


def test_an_added_token_without_a_number(tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"<x>": "seven"}')
    with pytest.raises(ShearingError, match="no whole number as its id"):
        added_ids(tmp_path)


@given(indent=st.sampled_from([None, 2]), ascii_only=st.booleans(), pairs=st.booleans(), backwards=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tokenizer_spelled_otherwise_is_the_same(tmp_path, tokenizer_file, indent, ascii_only, pairs, backwards):
    plain = json.loads(tokenizer_file.read_bytes())
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in plain["model"]["merges"]]
    odd = plain | {"model": plain["model"] | {"merges": merges if pairs else [" ".join(pair) for pair in merges]}}
    odd = dict(reversed(odd.items())) if backwards else odd
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(odd, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    one, other = load_tokenizer(tokenizer_file), load_tokenizer(path)
    texts = ["the model sheds heads", "café </s> \0 \U0001f600", ""]
    assert (one.encode(texts), one.bos_id, one.eos_id) == (other.encode(texts), other.bos_id, other.eos_id)
    assert one.fingerprint == other.fingerprint and TokenizerJson(path).ids == TokenizerJson(tokenizer_file).ids


@pytest.mark.parametrize(
    "change, said",
    [
        ({"padding": {"pad_id": 9999}}, r"name ids \[9999\] of no token"),
        ({"post_processor": {"special_tokens": {"<s>": {"ids": [777]}}}}, r"name ids \[777\] of no token"),
        ({"post_processor": {"processors": [{"sep": ["</s>", 778], "cls": ["<s>", 0]}]}}, r"name ids \[778\]"),
        ({"model": {"vocab": {"a": "0"}, "merges": []}, "added_tokens": []}, "no vocabulary of whole numbers"),
        ({"model": {"vocab": {}, "merges": []}, "added_tokens": []}, "no vocabulary of whole numbers"),
        ({"padding": {}, "post_processor": {"special_tokens": {"<s>": {}}}}, "is not what tokenizers writes"),
    ],
)
def test_a_tokenizer_that_cannot_be_cut(tmp_path, tokenizer_file, change, said):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer_file.read_bytes()) | change))
    with pytest.raises(ShearingError, match=said):
        TokenizerJson(path)


def test_an_id_that_the_post_processor_adds_stays(tmp_path, tokenizer_file):
    data = json.loads(tokenizer_file.read_bytes())
    common = max(data["model"]["vocab"].values())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data | {"post_processor": {"special_tokens": {"x": {"ids": [common]}}}}))
    assert common in TokenizerJson(path).must and common not in TokenizerJson(tokenizer_file).must


def test_numbers_that_no_float_holds_are_no_losses(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": ' + "9" * 400 + "}")
    with pytest.raises(ShearingError, match="has no loss of"):
        source_losses(path, ["a"])
    path.write_text('[{"parameters": ' + "9" * 400 + ', "losses": {"a": 1}}]')
    with pytest.raises(ShearingError, match="no positive number in 'parameters'"):
        read_models(path)


def test_special_tokens_of_another_kind_are_none(tmp_path, tokenizer_file):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 5, "eos_token": ["</s>"]}')
    assert load_tokenizer(tmp_path / "tokenizer.json").bos_id == 0  # as where nothing is said: by their usual names
