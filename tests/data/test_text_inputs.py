"""Text as dumps and editors write it: odd but legal files give the texts of their plain form; the rest is named."""

import codecs
import gzip
import json
import os
import random

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmshearing.data.mds.manifest import table
from llmshearing.data.prepare.run import prepare
from llmshearing.data.text import sources
from llmshearing.data.text.corpus import corpus_texts
from llmshearing.data.text.lines import FILE, LINE, REST
from llmshearing.data.text.sources import read_chunks
from llmshearing.errors import ShearingError

from .conftest import SEQ

characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\t\r\x1f")
documents = st.lists(st.text(characters, max_size=40), max_size=6)
# What stands beside the text, as JSON; the first ones cannot be understood by Python's own reader.
BESIDE = [
    '"id": ' + "7" * 5000, '"deep": ' + "[" * 5000 + "]" * 5000, '"deep": ' + '{"text":[' * 3000 + "]}" * 3000,
    '"x": NaN', '"x": -Infinity', '"x": 1e99999', '"x": "\\ud800"', '"x": "raw\ttab and \0"', '"text": "earlier"',
    '"x": {"text": "inner"}', '"x": ["a\\"]", "{"]', '"x": "\udcff"',
]  # fmt: skip
SKIPPABLE = b"\x50\x2a\x4d\x18\x05\0\0\0hello"


def raw(text: str) -> str:
    """A text as JSON that escapes no more than it must: control characters stand, but for the end of a line."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


@st.composite
def lines_of(draw, texts: list[str], utf8: bool) -> str:
    """JSON lines of the texts, with surrogate escapes where bytes are no UTF-8."""
    lines = []
    for text in texts:
        beside = draw(st.lists(st.sampled_from(BESIDE if utf8 else BESIDE[:-1]), max_size=2))
        spelled = draw(st.sampled_from([json.dumps(text), json.dumps(text, ensure_ascii=False), raw(text)]))
        members = ", ".join([*beside, f'"text" {draw(st.sampled_from(["", " "]))}: {spelled}'])
        mark = draw(st.sampled_from(["", "\ufeff"]))
        lines += draw(st.lists(st.sampled_from(["", "  ", "\t"]), max_size=1))
        before, after = draw(st.sampled_from(["", " "])), draw(st.sampled_from(["", " ", "\r"]))
        lines.append(f"{mark}{before}{{{members}}}{after}")
    return "\n".join(lines) + draw(st.sampled_from(["", "\n", "\n\n", "\r\n"]))


def cut(data: bytes, at: float) -> tuple[bytes, bytes]:
    return data[: int(at * len(data))], data[int(at * len(data)) :]


def packed(data: bytes, how: str, at: float) -> bytes:
    """Compressed, in two members or frames that begin anywhere in the text."""
    first, second = cut(data, at)
    if how == "gzip":
        return gzip.compress(first) + gzip.compress(second) + bytes(7)  # tapes are filled with zeros
    if how == "zstd":
        settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
        long = zstandard.ZstdCompressor(compression_params=settings).compressobj()
        return SKIPPABLE + long.compress(first) + long.flush() + SKIPPABLE + zstandard.compress(second) + SKIPPABLE
    return data


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that small files are more than one chunk, block and piece."""
    monkeypatch.setattr(sources, "CHUNK", 64)
    monkeypatch.setattr(sources, "BLOCK", 16)


once = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


@given(
    texts=documents, encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"]),
    how=st.sampled_from(["", "gzip", "zstd"]), suffix=st.sampled_from([".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst"]),
    at=st.floats(0, 1), data=st.data(),
)  # fmt: skip
@once
def test_odd_json_lines_are_their_texts(tmp_path, texts, encoding, how, suffix, at, data):
    plain = data.draw(lines_of(texts, encoding.startswith("utf-8")))
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed(mark + plain.encode(encoding, errors), how, at))
    wanted = [text for text in texts if text]
    chunks = list(read_chunks([path], "text", lambda size: None))
    problems: list = []
    found = [text for chunk in chunks for text in chunk.texts("text", problems)]
    empty = not plain  # which is said
    assert found == wanted and (not problems or (empty and "is empty" in problems[0].said))
    for number, chunk in enumerate(chunks):  # reading goes on at the end of any chunk
        rest = read_chunks([path], "text", lambda size: None, chunk.following)
        later = [text for other in chunks[number + 1 :] for text in other.texts("text", [])]
        assert [text for other in rest for text in other.texts("text", [])] == later
    if not empty:
        assert list(corpus_texts(path)) == wanted


@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), min_size=1),
    newline=st.sampled_from(["\n", "\r\n"]), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    how=st.sampled_from(["", "gzip", "zstd"]), at=st.floats(0, 1), last=st.booleans(),
)  # fmt: skip
@once
def test_odd_plain_text_is_its_lines(tmp_path, lines, newline, encoding, how, at, last):
    lines[0] = "x" + lines[0]  # a mark is one at the beginning only
    path = tmp_path / "a.txt"
    path.write_bytes(packed((newline.join(lines) + newline * last).encode(encoding), how, at))
    blocks = list(corpus_texts(path))
    assert "".join(blocks) == "\n".join(lines) + "\n" * last
    assert all(block.endswith("\n") for block in blocks[:-1])


@given(
    texts=documents, kind=st.sampled_from(["string", "large_string", "binary", "dictionary"]), group=st.integers(1, 4)
)
@once
def test_odd_parquet_is_its_column(tmp_path, texts, kind, group):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = [text.encode() for text in texts] if kind == "binary" else texts
    types = {"dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    column = pyarrow.array(values, types.get(kind) or getattr(pyarrow, kind)())
    other = pyarrow.array([[1, None]] * len(texts))
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"other": other, "text": column}), path, row_group_size=group)
    if texts:
        assert list(corpus_texts(path)) == [text for text in texts if text]


@given(seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5)
def test_an_odd_corpus_is_prepared_as_its_plain_form(tmp_path_factory, texts, tokenizer_file, seed):
    """Down to the bytes, also in worker processes, whose stack is another one."""
    draw, root = random.Random(seed), tmp_path_factory.mktemp("odd")
    for form in ("plain", "odd"):
        (root / form / "books").mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in texts["books"]]
    (root / "plain" / "books" / "a.jsonl").write_text("\n".join(lines) + "\n")
    odd = ["{" + draw.choice(BESIDE[:-1]) + ", " + line[1:] + draw.choice(["\r", " ", ""]) for line in lines]
    how = draw.choice(["gzip", "zstd"])
    content = packed("\n\n".join(odd).encode("utf-8-sig"), how, draw.random())
    (root / "odd" / "books" / draw.choice(["a.jsonl", "a.jsonl.gz"])).write_bytes(content)
    for form in ("plain", "odd"):
        prepare(root / form, tokenizer_file, root / f"out-{form}", SEQ, progress=False, eval_fraction=0.3)
    shards = [sorted((root / f"out-{form}").rglob("*.mds")) for form in ("plain", "odd")]
    assert shards[0] and [p.read_bytes() for p in shards[0]] == [p.read_bytes() for p in shards[1]]


# ---- what is no text is named, and counted as what it was


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"text": "cut', "is not JSON: Unterminated string"),
        (b'{"deep": ' + b"[" * 5000 + b', "text": "x"}', "is not JSON"),
        (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", r"no string in field 'text'; it has \['text'\]"),
        (b'{"text": ' + b"1" * 5000 + b"}", "no string in field 'text'"),
        (b'{"text": null}', "no string in field 'text'"),
        (b'{"text": NaN}', "no string in field 'text'"),
        (b'"text"', "no string in field 'text'; it has str"),
        (b'{"text": "\xff"}', "is not UTF-8: invalid start byte at byte 10"),
        (b'{"text": "\\udfff"}', "lone surrogate in field 'text'"),
        (b"\0\0\0", "is not JSON"),
        (json.dumps({f"k{i:03}": i for i in range(50)}).encode(), r"'k009'\] and 40 more"),
    ],
)
def test_a_line_without_a_text_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    problems: list = []
    found = [text for chunk in read_chunks([path], "text", lambda size: None) for text in chunk.texts("text", problems)]
    assert found == ["a", "b"] and [problem.what for problem in problems] == [LINE]
    assert problems[0].said.startswith(f"{path}:2 ")
    with pytest.raises(ShearingError, match=said):
        list(corpus_texts(path))


def truncated(data: bytes) -> bytes:
    return gzip.compress(data)[:-30]


@pytest.mark.parametrize(
    "content, name, what, said",
    [
        (b"BZh91AY", "a.jsonl", FILE, "it is a file of bzip2"),
        (b"\xfd7zXZ\0", "a.jsonl.gz", FILE, "it is a file of xz"),
        (b"PK\x03\x04", "a.jsonl", FILE, "it is a file of zip"),
        (b"no compressed data", "a.jsonl.zst", FILE, "cannot be decompressed after line 0"),
        (gzip.compress(b""), "a.jsonl.gz", FILE, "is empty once decompressed"),
        (b"\xff\xfe{\0\xff", "a.jsonl", FILE, "cannot be read after line 0"),
        (truncated(b'{"text": "a"}\n' * 9000), "a.jsonl.gz", REST, "after line [1-9]"),
        (gzip.compress(b'{"text": "a"}\n' * 9) + b"garbage", "a.jsonl.gz", REST, "after line 9"),
    ],
    # gzip's bytes hold the time: names made of them would differ between test processes
    ids=["bzip2", "xz", "zip", "no zstd", "empty gzip", "half UTF-16", "cut gzip", "gzip and garbage"],
)
def test_a_file_that_cannot_be_read_is_left_out_as_a_file(tmp_path, content, name, what, said):
    path = tmp_path / name
    path.write_bytes(content)
    problems: list = []
    for chunk in read_chunks([path], "text", lambda size: None):
        list(chunk.texts("text", problems))
    assert [problem.what for problem in problems] == [what]
    with pytest.raises(ShearingError, match=said):
        list(corpus_texts(path))


def test_skipping_counts_lines_and_files_apart(tmp_path, corpus, tokenizer_file):
    folder = tmp_path / "in" / "books"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_bytes((corpus / "books" / "a.jsonl").read_bytes() + b'{"text": 1}\n{"text": 2}\n')
    (folder / "b.jsonl").write_bytes(b"PK\x03\x04")
    whole = gzip.compress((corpus / "books" / "b.jsonl").read_bytes() * 20)
    (folder / "c.jsonl.gz").write_bytes(whole[:-9])
    manifest = prepare(tmp_path / "in", tokenizer_file, tmp_path / "out", SEQ, on_error="skip", progress=False)
    skipped = manifest["skipped"]["books"]
    assert skipped["what"] == {LINE: 2, FILE: 1, REST: 1} and skipped["count"] == 4
    assert "skipped in books: 2 lines, 1 whole file, 1 rest of a file, such as" in table(manifest)


def test_text_of_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(ShearingError, match=r"a\.txt:3 is not UTF-8"):
        list(corpus_texts(path))


def test_a_folder_takes_its_text_files_and_leaves_the_rest(tmp_path):
    for name, content in {
        "a.txt": "plain\n", "b.jsonl": '{"text": "line"}\n', "c.json": "{}", "._d.jsonl": "\0\1", "e.md": "# x",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    assert list(corpus_texts(tmp_path)) == list(corpus_texts(tmp_path, in_turn=True)) == ["plain\n", "line"]
    assert list(corpus_texts(tmp_path / "e.md")) == ["# x"]
    with pytest.raises(ShearingError, match=r"c\.json:1 has no string in field 'text'"):
        list(corpus_texts(tmp_path / "c.json"))
    with pytest.raises(ShearingError, match="calibration .*nowhere has no file ending in .txt"):
        list(corpus_texts(tmp_path / "nowhere", what="calibration"))


def test_files_are_read_in_turn_however_many_there_are(tmp_path):
    """More than a process may open."""
    import resource

    for i in range(300):
        (tmp_path / f"{i:03}.jsonl").write_text("".join(f'{{"text": "{i}-{j}"}}\n' for j in range(2)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    already = len(os.listdir("/proc/self/fd"))  # a test process that has run others has many
    resource.setrlimit(resource.RLIMIT_NOFILE, (already + 150, hard))
    try:
        found = list(corpus_texts(tmp_path, in_turn=True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(found) == sorted(f"{i}-{j}" for i in range(300) for j in range(2))
    assert len({text.split("-")[0] for text in found[:100]}) == 100
