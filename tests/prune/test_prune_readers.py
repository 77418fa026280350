"""A target against the programs that read the result: their rules against what these programs do."""

import json
from importlib.util import find_spec

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import VARIANTS, config_of
from transformers import AutoModelForCausalLM

from benchmarks.readers_checks import READERS as CHECKS
from benchmarks.readers_models import tiny_config, tiny_model
from llmshearing.checkpoints.parity import largest_difference, scores_of, token_ids
from llmshearing.cli import main
from llmshearing.compat import HEADS_DIVIDE_HIDDEN, INSTALLED
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.megatron import Parallel, arguments_of, layout_of
from llmshearing.families.readers import READERS, hints, nearest, refusals, with_shape
from llmshearing.gguf.write import check_held

SOURCE = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "intermediate_size": 24}
ODD = {"hidden_size": 18, "num_attention_heads": 4, "num_key_value_heads": 2}


def source_of(family="llama", **changes):
    config = config_of(family, next(iter(VARIANTS[family])), **{**SOURCE, **changes})
    return config, table_for(config)


def refuses(work):
    try:
        work()
    except (ShearingError, ValueError, StrictDataclassError):
        return True
    return False


@pytest.mark.parametrize(
    "shape", [ODD, {**ODD, "hidden_size": 16}, {"num_attention_heads": 6, "num_key_value_heads": 3}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "granite"])
def test_rules_are_what_the_readers_do(family, shape):
    """Those that run here: the writers of GGUF and of shards, and whichever transformers is installed."""
    config, table = source_of(family)
    changed, small = with_shape(config, table, {**table.shape(), **shape})
    found = refusals(changed, small)
    real = type(config)(**{**config.to_dict(), **shape}) if not HEADS_DIVIDE_HIDDEN else changed
    assert ("gguf" in found) == refuses(lambda: check_held(real, small))
    for name, tp in (("megatron", 1), ("megatron-tp2", 2), ("megatron-tp4", 4)):
        held = refuses(lambda tp=tp: (layout_of(small), arguments_of(changed, small, Parallel(tp))))
        assert (name in found) == held
    loads = not refuses(lambda: type(config)(**{**config.to_dict(), **shape}))
    assert loads == (("transformers5" if HEADS_DIVIDE_HIDDEN else "transformers4") not in found)


def test_each_refusal_names_the_keys_and_values():
    config, table = source_of()
    found = refusals(*with_shape(config, table, {**table.shape(), **ODD}))
    assert set(found) == {"transformers5", "ctranslate2", "megatron-tp8"}
    assert found["transformers5"] == [
        "hidden_size = 18 is no multiple of num_attention_heads = 4, which its configs ask for"
    ]
    assert "hidden_size = 18 is not num_attention_heads = 4 of 4 each" in found["ctranslate2"][0]


@pytest.mark.parametrize(
    "names", [["transformers5"], ["ctranslate2"], ["transformers5", "gguf", "megatron-tp4"], [*READERS]]
)
def test_the_nearest_shape_is_taken_and_none_is_nearer(names):
    config, table = source_of()
    found = nearest(config, table, {**table.shape(), **ODD}, names)
    assert not refusals(*with_shape(config, table, found), names)
    if names == ["transformers5"]:  # 18 is between 16 and 20, multiples of 4
        assert found == {**table.shape(), **ODD, "hidden_size": 20}
    if names == ["ctranslate2"]:
        assert found["hidden_size"] == 4 * found["num_attention_heads"]


def test_layers_that_differ_in_size():
    config, table = source_of()
    shape = {**table.shape(), "intermediate_size": [24, 16, 8]}
    found = refusals(*with_shape(config, table, shape))
    assert "gguf" not in found and found["ctranslate2"] == ["layers differ in size"]
    assert "layers differ in size" in found["megatron"][0]
    config, table = source_of("qwen2", head_dim=4)
    assert (
        "layers differ in size"
        in refusals(*with_shape(config, table, {**table.shape(), "intermediate_size": [24, 16, 8]}))["gguf"][0]
    )


GEMMA2 = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 64}


@pytest.mark.parametrize(
    ("family", "changes", "left_out"),
    [
        ("gemma2", {**GEMMA2, "attn_logit_softcapping": 1.0}, "attn_logit_softcapping = 1.0"),
        ("gemma2", {**GEMMA2, "final_logit_softcapping": 5.0}, "final_logit_softcapping = 5.0"),
        ("gemma2", {**GEMMA2, "sliding_window": 4}, "sliding_window = 4"),
        ("gemma2", {**GEMMA2, "query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
        ("gemma2", GEMMA2, None),
        ("gemma3_text", {"final_logit_softcapping": 5.0}, "final_logit_softcapping = 5.0"),
        ("gemma3_text", {}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding_window = 4"),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}, None),
    ],
)
def test_what_ctranslate2_leaves_out_is_refused(tmp_path, family, changes, left_out):
    """Where it is installed, it does compute another function then, and the same one where the rule lets it through."""
    config = tiny_config(family, **changes)
    said = refusals(config, table_for(config), ["ctranslate2"])
    if left_out is None:
        assert not said
    else:
        expected = f"its converter leaves out {left_out}: it would compute another function"
        assert said == {"ctranslate2": [expected]}
    if find_spec("ctranslate2") is None:
        return
    model = tiny_model(config, tmp_path)
    ids = token_ids(model.config)
    found = largest_difference(CHECKS["ctranslate2"].check(tmp_path, model, ids), scores_of(model, ids))
    assert found > 1e-3 if left_out else found < 1e-4


@pytest.mark.parametrize("family", VARIANTS)
def test_every_family_has_an_answer_of_every_reader(family):
    config = config_of(family, next(iter(VARIANTS[family])))
    found = refusals(config, table_for(config))
    assert found.keys() <= READERS.keys() and all(reason for reasons in found.values() for reason in reasons)
    assert all("is a multiple of" in hint for hint in hints(table_for(config)))


@pytest.fixture
def folder(tmp_path):
    config, _ = source_of()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def prune(folder, *words, hidden=18):
    target = [f"hidden_size={hidden}", "num_attention_heads=4", "num_key_value_heads=2"]
    out = folder.parent / "out"
    return main(["prune", "random", "--model", str(folder), "--output", str(out), "--target", *target, *words])


def test_a_dry_run_says_who_refuses_and_the_nearest_shape(folder, capsys):
    assert prune(folder, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "transformers4: takes it" in said and "transformers5: refuses: hidden_size = 18" in said
    assert "nearest shape that" in said and not (folder.parent / "out").exists()


def test_a_named_reader_makes_it_an_error(folder, caplog):
    assert prune(folder, "--readers", "transformers5") == 1
    assert "transformers5 would refuse the result: hidden_size = 18 is no multiple" in caplog.text
    assert "nearest shape that transformers5 take: hidden_size=20" in caplog.text
    assert not (folder.parent / "out").exists()


def test_what_the_installed_transformers_refuses_is_refused_before_the_work(folder, caplog):
    """The weights are broken, and nobody has read them yet."""
    (folder / "model.safetensors").write_bytes(b"text")
    assert prune(folder) == 1
    said = "transformers5 would refuse the result: hidden_size = 18 is no multiple"
    assert (said if HEADS_DIVIDE_HIDDEN else "safetensors") in caplog.text
    assert ("nearest shape that transformers5 take: hidden_size=20" in caplog.text) == HEADS_DIVIDE_HIDDEN


def test_a_reader_that_takes_it_lets_it_through(folder):
    takes = {"hidden": 20} if HEADS_DIVIDE_HIDDEN else {}
    assert prune(folder, "--readers", INSTALLED, "gguf", **takes) == 0
    assert json.loads((folder.parent / "out" / "parity.json").read_text())["passed"]


def test_an_unknown_reader_is_wrong_usage(folder):
    with pytest.raises(SystemExit) as ended:
        prune(folder, "--readers", "word")
    assert ended.value.code == 2


def test_keys_that_repeat_another_follow_it():
    """OPT tells its hidden units twice."""
    config = config_of("opt", "tied")
    changed, table = with_shape(config, table_for(config), {"hidden_size": 12})
    assert (changed.hidden_size, changed.word_embed_proj_dim, table.axes["hidden"].length) == (12, 12, 12)
