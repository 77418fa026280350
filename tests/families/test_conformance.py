"""The conformance suite: what holds for every family of the registry, in every variant of `tiny`."""

import json

import pytest
import torch
import transformers
from conformance import (
    build,
    check_agreement,
    check_branches,
    check_counts_of_cut,
    check_depth,
    check_every_tensor_matters,
    check_gates,
    check_round_trip,
    check_shapes,
    cut_kinds,
    implementations,
    load,
    ragged_gates,
    random_model,
    uniform_gates,
    units_kept,
)
from helpers_tokenizers import corpus, save_word_tokenizer, train_byte_level
from safetensors.torch import load_file
from tiny import VARIANTS, config_of, inert

from llmshearing.checkpoints import checkpoint_to_hf, hf_to_checkpoint
from llmshearing.errors import ShearingError
from llmshearing.families import UNIFORM, table_for
from llmshearing.families.names import EXPERTS, GROUPS, HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCAB
from llmshearing.prune import SequenceOptions, prune
from llmshearing.prune.methods import METHODS
from llmshearing.prune.methods.depth import WAYS

CASES = [
    pytest.param(family, variant, id=f"{family}-{variant}")
    for family in UNIFORM
    for variant in VARIANTS.get(family, ("no entry in tiny.py",))
]
# Methods look at a table's rows, not at the config: a family's first variant and its last have all kinds of rows.
TWO_CASES = [
    pytest.param(family, variant, id=f"{family}-{variant}")
    for family, variants in VARIANTS.items()
    for variant in dict.fromkeys((next(iter(variants)), next(reversed(variants))))
]
every_variant = pytest.mark.parametrize(("family", "variant"), CASES)
both_modes = pytest.mark.parametrize("head_mode", ["group", "query"])


@pytest.fixture
def config(family, variant):
    assert family in VARIANTS, f"family {family} of the registry has no entry in tests/families/tiny.py"
    return config_of(family, variant)


@pytest.mark.parametrize("family", UNIFORM)
def test_every_family_has_tiny_models(family):
    assert VARIANTS.get(family), f"family {family} of the registry has no entry in tests/families/tiny.py"


@every_variant
@both_modes
def test_names_shapes_and_counts(config, head_mode):
    table, model = table_for(config, head_mode), build(config).double()
    check_shapes(table, model)
    check_gates(table)
    check_counts_of_cut(table, model, head_mode)


@every_variant
def test_every_tensor_matters(config):
    check_every_tensor_matters(table_for(config), random_model(config), inert)


@every_variant
@both_modes
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gated_folded_and_oracle_agree(config, head_mode, attention):
    if attention not in implementations(config):
        pytest.skip(f"transformers {transformers.__version__} computes {config.model_type} without {attention}")
    table = table_for(config, head_mode)
    check_agreement(table, random_model(config, attention=attention), uniform_gates(table, cut_kinds(table)))


@every_variant
@both_modes
def test_gated_and_oracle_agree_where_layers_differ(config, head_mode):
    table = table_for(config, head_mode)
    gates = ragged_gates(table, cut_kinds(table), seed=3)
    check_agreement(table, random_model(config, attention=implementations(config)[-1]), gates, fold_too=False)


@every_variant
def test_branches(config):
    check_branches(table_for(config), random_model(config))


@every_variant
def test_config_round_trip(config, tmp_path):
    check_round_trip(table_for(config), random_model(config), tmp_path)


@every_variant
def test_depth(config):
    table = table_for(config)
    if "layers" in table.fixed:
        with pytest.raises(ShearingError, match=table.fixed["layers"]):
            check_depth(table, random_model(config))
    else:
        check_depth(table, random_model(config))


# Pruners and checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture
def source(config, tmp_path):
    """A directory of a model whose tokenizer knows twenty words."""
    folder = tmp_path / "source"
    random_model(config).float().save_pretrained(folder)
    save_word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """JSONL of documents, each of which begins with a word of its own."""
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    words = [" ".join([str(i), *(f"w{(i * k) % 20}" for k in range(1, 9))]) for i in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in words))
    return path


SEQUENCES = SequenceOptions(samples=4, report_samples=3, max_seq_len=12, batch_size=2)
def refusal(method, table):
    """Part of the message with which a method refuses a model; None where it takes it."""
    norms = [spec for spec in table.tensors if spec.axes == ("hidden",) and spec.module.form.endswith("norm")]
    if method == "turn" and any(spec.module.form == "layer_norm" for spec in norms):
        return "subtract the mean"
    if method == "turn" and any(spec.scaled for spec in norms):
        return "behind a branch"
    if method == "tie":  # of random models nothing can be tied; tests/fold/test_tie.py has those that can
        return "is .* already|times a factor|one final RMSNorm"
    if table.experts is not None:
        scored = "does not score intermediate, expert of a mixture of experts"
        return {"obs": "does not prune the units of experts", "activation": scored}.get(method)
    return None


def target_of(table, method):
    """A cut of every size that a method and a family can change."""
    units, sizes = {size: table.keys.get(size) for size in METHODS[method].sizes}, {}
    head = table.kinds["head"]
    kept = units_kept(table, "head")
    if HEADS in units:
        sizes[HEADS] = kept * (table.axes["query"].per_unit // table.head_dim)
        sizes[GROUPS] = kept
    wanted = {HIDDEN: units_kept(table, "hidden"), INTERMEDIATE: 6, LAYERS: table.layers - 1, EXPERTS: 3}
    if table.couplings and HIDDEN not in units:
        sizes.pop(HEADS, None), sizes.pop(GROUPS, None)  # heads cannot be cut without hidden units
    sizes |= {size: value for size, value in wanted.items() if size in units}
    assert head.rows == 1
    return {units[size]: value for size, value in sizes.items() if units.get(size) and size not in table.fixed}


def ways(method):
    return {"depth": [{"by": way} for way in WAYS], "turn": [{"untie": True}]}.get(method, [{}])


@pytest.mark.parametrize(("family", "variant"), TWO_CASES)
@pytest.mark.parametrize("method", [name for name in METHODS if VOCAB not in METHODS[name].sizes])
def test_every_method_runs(config, method, source, text, tmp_path):
    table = table_for(config)
    target, output = target_of(table, method), tmp_path / "refused"
    shared = {"calibration": text, "sequences": SEQUENCES}
    if METHODS[method].sizes and not target:
        return  # the family's number of layers cannot change, and the method changes nothing else
    if reason := refusal(method, table):
        with pytest.raises(ShearingError, match=reason):
            prune(method, source, output, target, **shared)
        assert not output.exists()
        if method != "activation":
            return
        for size in (INTERMEDIATE, EXPERTS):  # all else can be cut
            target.pop(table.keys[size])
    for number, options in enumerate(ways(method)):
        out = prune(method, source, tmp_path / str(number), target, **shared, **options)
        small = load(out.path)
        assert {key: getattr(small.config, key) for key in target} == target
        assert out.after.parameters == sum(p.numel() for p in small.parameters())
        assert out.after.parameters < out.before.parameters or not target


@pytest.mark.parametrize("family", UNIFORM)
def test_the_vocabulary_is_cut(family, tmp_path):
    folder, file = tmp_path / "source", tmp_path / "text.txt"
    file.write_text("".join(corpus()), encoding="utf-8")
    config = config_of(family, next(iter(VARIANTS[family])), vocab_size=430, bos_token_id=422, eos_token_id=422)
    random_model(config).float().save_pretrained(folder)
    train_byte_level(folder)
    out = prune("vocabulary", folder, tmp_path / "out", {"vocab_size": 320}, corpus=file, processes=1)
    assert load(out.path).config.vocab_size == 320


@every_variant
def test_a_checkpoint_and_back_is_bit_identical(source, tmp_path):
    hf_to_checkpoint(source, tmp_path / "model.pt")
    checkpoint_to_hf(tmp_path / "model.pt", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())
