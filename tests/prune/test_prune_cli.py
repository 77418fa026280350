"""The prune command: every method and family ends in the gated model, chains, and refuses bad input."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from helpers_prune import VARIANTS, calibration_of, config_of, model_of
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmshearing.compat import EAGER_EXPERTS, LAYER_TUPLES
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.fold import fold
from llmshearing.fold.gating import attach
from llmshearing.fold.selection import load_selection
from llmshearing.prune import SequenceOptions, prune
from llmshearing.prune.__main__ import EXAMPLES, REPLAY, build_parser, main, read_target
from llmshearing.prune.calibration import read_calibration
from llmshearing.prune.methods import METHODS
from llmshearing.prune.targets import resolve_target

WORDS = [f"w{i}" for i in range(20)]
WIDTH = {"num_attention_heads": 2, "intermediate_size": 6}
TARGETS = {
    "random": {**WIDTH, "hidden_size": 8, "num_hidden_layers": 3},
    "activation": {**WIDTH, "hidden_size": 8, "num_hidden_layers": 3},
    "obs": WIDTH,
    "depth": {"num_hidden_layers": 2},
}
SEQUENCES = SequenceOptions(samples=4, report_samples=3, max_seq_len=12, batch_size=2)
IDS = calibration_of().select


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """JSONL of 60 documents, each of which begins with a number of its own."""
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    documents = [" ".join([str(i), *(WORDS[(i * k) % 20] for k in range(1, 9))]) for i in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Family and variant -> a directory with a model in bfloat16 and a tokenizer."""
    root, made = tmp_path_factory.mktemp("sources"), {}

    def make(family, **changes):
        key = f"{family}-{changes}"
        if key not in made:
            made[key] = root / str(len(made))
            model_of(family, torch.bfloat16, **changes).save_pretrained(made[key])
            vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: 3 + i for i, word in enumerate(WORDS)}}
            backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
            backend.pre_tokenizer = pre_tokenizers.Whitespace()
            PreTrainedTokenizerFast(
                tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
            ).save_pretrained(made[key])
        return made[key]

    return make


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def load(path, dtype=torch.float32):
    options = {"dtype": dtype, "output_loading_info": True, **EAGER_EXPERTS}
    model, report = AutoModelForCausalLM.from_pretrained(path, **options)
    assert not any(report.values()), report
    return model.eval()


def check_gated_is_stored(gated, small, table, selection, ids):
    """The gated model computes what the fold does, and the directory holds the fold, rounded once to its dtype."""
    folded = fold(gated.state_dict(), table, selection)
    stored = {name: value.clone() for name, value in small.state_dict().items()}
    assert all(torch.equal(value.bfloat16().float(), stored[name]) for name, value in folded.items())
    small.load_state_dict(folded, strict=True)
    attach(gated, table).set(selection)
    assert (log_probabilities(gated, ids) - log_probabilities(small, ids)).abs().max() < 2e-4
    small.load_state_dict(stored, strict=True)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", [name for name in TARGETS if name in METHODS])
def test_the_directory_is_the_gated_model(method, family, variant, source, text, tmp_path):
    path = source(family, **variant)
    out = prune(method, path, tmp_path / "out", TARGETS[method], calibration=text, sequences=SEQUENCES)
    small = load(out.path)
    gated = load(path)
    mode = "query" if variant.get("num_key_value_heads") else "group"
    if method == "obs":  # it updates weights too: gate the updated ones, rounded as they are stored
        calibration = read_calibration(text, path, 23, 32, SEQUENCES)
        METHODS[method].choose(gated, table_for(gated.config, mode), table_for(small.config).shape(), calibration)
        with torch.no_grad():
            for parameter in gated.parameters():  # not the buffers: rotary frequencies are never rounded
                parameter.copy_(parameter.bfloat16())
    selection, about = load_selection(out.path / "selection.safetensors")
    assert bool(selection.energy) == ("hidden_size" in TARGETS[method])
    ids = calibration_of().select
    check_gated_is_stored(gated, small, table_for(gated.config, mode), selection, ids)
    assert about["method"] == method
    assert {key: getattr(small.config, key) for key in TARGETS[method]} == TARGETS[method]
    assert next(iter(load_file(out.path / "model.safetensors").values())).dtype == torch.bfloat16
    record = json.loads((out.path / "prune.json").read_text())
    assert record["after"]["parameters"] == sum(p.numel() for p in small.parameters()) < record["before"]["parameters"]


def test_methods_chain_and_selections_replay_bit_by_bit(source, tmp_path):
    path = source("qwen2")
    first = prune("depth", path, tmp_path / "a", {"drop_layers": [1]})
    second = prune("random", first.path, tmp_path / "b", {"intermediate_size": 6}, seed=4)
    assert len(json.loads((second.path / "prune.json").read_text())["history"]) == 2
    config = load(second.path).config
    assert (config.num_hidden_layers, config.layer_types) == (3, ["full_attention", *["sliding_attention"] * 2])
    replayed = load_file(path / "model.safetensors")
    for step, selected in ((path, first.path), (first.path, second.path)):
        table = table_for(load(step).config)
        replayed = fold(replayed, table, load_selection(selected / "selection.safetensors")[0])
    written = load_file(second.path / "model.safetensors")
    assert written.keys() == replayed.keys() and all(torch.equal(written[k], replayed[k]) for k in written)


def test_layers_of_unequal_sizes_are_saved_as_such_or_padded(source, text, tmp_path):
    settings = {"calibration": text, "sequences": SEQUENCES, "ratios": "log_increase"}
    out, padded = (
        prune("obs", source("llama"), tmp_path / name, {"intermediate_size": 5}, pad=name == "padded", **settings)
        for name in ("out", "padded")
    )
    small, wide = load(out.path), load(padded.path)
    sizes = [layer.mlp.down_proj.in_features for layer in small.model.layers]
    assert sum(sizes) == 4 * 5 and sizes[0] > sizes[-1]  # the mean is the one asked for
    assert wide.config.model_type == "llama" and wide.config.intermediate_size == max(sizes)
    assert torch.allclose(log_probabilities(small, IDS), log_probabilities(wide, IDS), atol=1e-5)
    assert out.after.parameters == sum(p.numel() for p in small.parameters()) < padded.after.parameters
    assert out.after.perplexity == pytest.approx(padded.after.perplexity)
    assert out.after.flops_per_token < padded.after.flops_per_token
    assert "import llmshearing" in (out.path / "README.md").read_text()


CHAIN = {  # method -> what it makes of layers whose intermediate sizes and KV groups differ
    "random": {"ratio": 0.3},
    "activation": {"hidden_size": 8, "intermediate_size": [4, 2, 4, 1], "num_hidden_layers": 3},
    "obs": {"intermediate_size": 2},
    "depth": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", CHAIN)
def test_methods_chain_through_layers_of_unequal_sizes(method, family, source, text, tmp_path):
    unequal = {"intermediate_size": [9, 7, 4, 2], "num_key_value_heads": [2, 1, 2, 1]}
    first = prune("random", source(family, num_key_value_heads=2), tmp_path / "a", unequal)
    before = load(first.path)
    assert [layer.self_attn.q_proj.out_features // 4 for layer in before.model.layers] == [4, 2, 4, 2]
    second = prune(method, first.path, tmp_path / "b", CHAIN[method], calibration=text, sequences=SEQUENCES)
    small, gated, table = load(second.path), load(first.path), table_for(before.config)
    mode = resolve_target(CHAIN[method], table, METHODS[method]).head_mode  # a ratio may cut heads inside groups
    if method == "obs":
        calibration = read_calibration(text, first.path, 23, 32, SEQUENCES)
        target = {**table.shape(), **unequal, "num_attention_heads": [4, 2, 4, 2], **CHAIN[method]}
        METHODS[method].choose(gated, table, target, calibration)
        for parameter in gated.parameters():
            parameter.data = parameter.data.bfloat16().float()
    selection, _ = load_selection(second.path / "selection.safetensors")
    check_gated_is_stored(gated, small, table_for(before.config, mode), selection, IDS)
    if method == "obs":  # all layers agree again in what was cut, and differ still in the rest
        assert set(small.config.layer_sizes) == {"num_attention_heads", "num_key_value_heads"}
    if method == "random":
        for old, new in zip(before.model.layers, small.model.layers, strict=True):
            counts = [sum(p.numel() for n, p in x.named_parameters() if "norm" not in n) for x in (old, new)]
            width, most = new.mlp.down_proj.in_features, old.mlp.down_proj.in_features
            assert abs(counts[1] - 0.7 * counts[0]) <= 3 * before.config.hidden_size / 2 or width in (1, most)


def test_layers_that_agree_again_are_a_plain_model(source, tmp_path):
    first = prune("random", source("llama"), tmp_path / "a", {"intermediate_size": [9, 7, 7, 9]})
    assert load(first.path).config.model_type == "nonuniform_llama"
    second = prune("depth", first.path, tmp_path / "b", {"drop_layers": [0, 3]})
    config = load(second.path).config
    assert (config.model_type, config.intermediate_size) == ("llama", 7) and not hasattr(config, "layer_sizes")
    assert config.architectures == ["LlamaForCausalLM"]


def test_mistral_keeps_its_sliding_window(source, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {k: v for k, v in config_of("mixtral").to_dict().items() if k in MistralConfig().to_dict()}
    sizes |= {"sliding_window": 4, "model_type": "mistral"}
    MistralForCausalLM(MistralConfig.from_dict(sizes)).save_pretrained(tmp_path / "source")
    out = prune("random", tmp_path / "source", tmp_path / "out", {"hidden_size": 8, "num_hidden_layers": 2})
    assert load(out.path).config.sliding_window == 4


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_decoders_without_a_table_lose_layers(family, source, text, tmp_path):
    path = source(family)
    quark = {"delete_layer_num": 2, "layer_num_field": "num_hidden_layers", "save_gpu_memory": True}
    quark["model_decoder_layers"] = "model.decoder.layers" if family == "opt" else "model.layers"
    out = prune("depth", path, tmp_path / "out", quark, calibration=text, sequences=SEQUENCES)
    small, gated = load(out.path), load(path)
    kept = load_selection(out.path / "selection.safetensors")[0].kept_layers(4)
    assert len(kept) == small.config.num_hidden_layers == 2
    layers = gated.get_submodule(quark["model_decoder_layers"])
    for layer in [layer for layer in range(4) if layer not in kept]:
        forward = (lambda x, *a, **k: (x,)) if family == "opt" and LAYER_TUPLES else (lambda x, *a, **k: x)
        layers[layer].forward = forward
    ids = calibration_of().select
    assert torch.allclose(log_probabilities(small, ids), log_probabilities(gated, ids), atol=1e-4)
    assert out.after.perplexity is not None


def test_the_part_that_selects_shares_no_document_with_the_part_that_reports(source, tmp_path):
    """Words stand for documents here: each occurs in one only."""
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join([word] * 7)}) + "\n" for word in WORDS))
    options = SequenceOptions(samples=4, report_samples=2, max_seq_len=12)
    found = read_calibration(path, source("llama"), 23, 32, options)
    one, other = (set(part.flatten().tolist()) - {1, 2} for part in (found.select, found.report))
    assert one and other and not one & other
    assert found.select.shape == (4, 12) and found.report.shape == (2, 12)


def test_mds_data_gives_its_own_splits(source, text, tmp_path):
    from llmshearing.data.prepare.run import prepare

    (tmp_path / "in" / "d").mkdir(parents=True)
    (tmp_path / "in" / "d" / "a.jsonl").write_bytes(text.read_bytes())
    fractions = {"eval_fraction": 0.4, "for_prune_fraction": 0.4}
    prepare(tmp_path / "in", source("llama"), tmp_path / "mds", 12, progress=False, **fractions)
    options = SequenceOptions(samples=4, report_samples=3)
    found = read_calibration(tmp_path / "mds", source("llama"), 23, 32, options)
    assert found.select.shape == (4, 12) and found.report.shape == (3, 12)
    assert "for_prune" in found.select_name and "eval_merge" in found.report_name
    with pytest.raises(ShearingError, match="cannot both choose and report"):
        read_calibration(tmp_path / "mds", source("llama"), 23, 32, SequenceOptions(select_split="eval_merge"))


def test_the_command_writes_what_it_says(source, text, tmp_path, root):
    target = tmp_path / "target.yaml"
    target.write_text("hidden_size: 8\n")
    command = ["-m", "llmshearing.prune", "activation", "--model", source("llama"), "--output", tmp_path / "out"]
    command += ["--target", target, "intermediate_size=6", "--calibration", text, "--max_seq_len", "12"]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=root, capture_output=True, text=True, check=True)
    said = done.stderr.splitlines()
    assert re.search(r"parameters +[\d,]+ +[\d,]+ +-", done.stderr) and "peak memory" in done.stderr
    assert said[-1] == f"wrote the pruned model and its selection to {tmp_path / 'out'}"
    assert load(tmp_path / "out").config.hidden_size == 8
    assert {"tokenizer.json", "README.md", "selection.safetensors"} <= set(os.listdir(tmp_path / "out"))


def test_commands_of_the_documents_and_of_the_help_parse(root):
    text = (root / "README.md").read_text() + (root / "docs" / "pruners.md").read_text() + EXAMPLES
    commands = re.findall(r"python -m llmshearing\.prune ([a-z].+)", text.replace("\\\n", " "))
    assert len(commands) == 19
    for command in commands:
        options = vars(build_parser().parse_args(shlex.split(command)))
        assert options["method"] == REPLAY or read_target(options) or not METHODS[options["method"]].sizes


BAD = {
    "above": (["random", "--target", "hidden_size=13"], "1 to the source's 12"),
    "equal": (["random", "--target", "hidden_size=12"], "the source's own shape"),
    "heads": (["random", "--target", "num_attention_heads=3", "num_key_value_heads=2"], "whole groups"),
    "tp": (["random", "--target", "intermediate_size=5", "--tp", "2"], "tp = 2 needs numbers that it divides"),
    "nothing": (["random"], "nothing to prune"),
    "no sequences": (["activation", "--ratio", "0.5"], "give --calibration"),
    "short": (["activation", "--ratio", "0.5", "--calibration", "SHORT"], "shorter than one sequence"),
    "singular": (
        ["obs", "--ratio", "0.5", "--calibration", "TEXT", "--samples", "1", "--max_seq_len", "4", "--percdamp", "0"],
        "layer 0, model.layers.0.self_attn.o_proj.weight: the Hessian is singular",
    ),
    "absent": (["activation", "--ratio", "0.5", "--calibration", "/nowhere"], "does not exist"),
    "file": (["random", "--target", "/nowhere.yaml"], "cannot be read as a file"),
    "layers": (["depth", "--drop_layers", "9"], "layers of 0 to 2"),
    "field": (["depth", "--drop_layers", "1", "--model_decoder_layers", "model.h"], "there are model.layers"),
}


@pytest.mark.parametrize(("arguments", "say"), BAD.values(), ids=BAD)
def test_bad_input_is_one_message_and_leaves_nothing(arguments, say, source, text, tmp_path, caplog):
    (tmp_path / "short.txt").write_text("w1 w2 w3\n")
    files = {"SHORT": str(tmp_path / "short.txt"), "TEXT": str(text)}
    kind, *rest = [files.get(argument, argument) for argument in arguments]
    path = source("llama", num_hidden_layers=3)
    with caplog.at_level(logging.INFO):
        assert main([kind, "--model", str(path), "--output", str(tmp_path / "out"), *rest]) == 1
    assert say in caplog.records[-1].getMessage() and caplog.records[-1].exc_info is None
    assert os.listdir(tmp_path) == ["short.txt"]


def test_families_without_a_table_and_outputs_in_use_are_refused(source, tmp_path, caplog):
    with pytest.raises(ShearingError, match="A table names every tensor"):
        prune("random", source("bloom"), tmp_path / "out", {"hidden_size": 8})
    with caplog.at_level(logging.INFO):
        command = ["random", "--model", str(source("bloom")), "--output", str(tmp_path / "out"), "--ratio", "0.5"]
        assert main(command) == 1 and "A table names every tensor" in caplog.records[-1].getMessage()
    path = source("llama")
    with pytest.raises(ShearingError, match="something else in it|holds a model|is the source"):
        prune("random", path, path, {"hidden_size": 8}, overwrite=True)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("years of work")
    with pytest.raises(ShearingError, match="thesis.tex"):
        prune("random", path, tmp_path / "used", {"hidden_size": 8}, overwrite=True)
    prune("random", path, tmp_path / "out", {"hidden_size": 8})
    with pytest.raises(ShearingError, match="--overwrite"):
        prune("random", path, tmp_path / "out", {"hidden_size": 4})
    prune("random", path, tmp_path / "out", {"hidden_size": 4}, overwrite=True)
    assert load(tmp_path / "out").config.hidden_size == 4
