"""Units by OBS, the choice alone: against inverting again each round; weights stay; the command; what is refused."""

import copy

import pytest
import torch
from helpers_oracle import random_model, tiny_config
from helpers_prune import calibration_of, model_of
from transformers import AutoConfig, AutoModelForCausalLM

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.selection import load_selection
from llmshearing.prune import SequenceOptions, prune
from llmshearing.prune.methods.fisher import choose
from llmshearing.prune.methods.obs.choice import choose_units
from llmshearing.prune.targets import rows_to_cut

WIDE, KEEP = 26, 7  # 19 go: 8, 8, 3
DOWN = {"llama": "model.layers.{}.mlp.down_proj", "opt": "model.decoder.layers.{}.fc2"}


def model_and_rows(family):
    wide = {"ffn_dim": WIDE} if family == "opt" else {"intermediate_size": WIDE}
    if family == "opt":
        torch.manual_seed(0)
        sizes = {"vocab_size": 23, "hidden_size": 12, "word_embed_proj_dim": 12, "num_hidden_layers": 3, **wide}
        config = AutoConfig.for_model("opt", num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    else:
        model = model_of(family, **wide).eval()
    table = table_for(model.config)
    [key] = wide
    return model, table, rows_to_cut(table, {**table.shape(), key: KEEP})["intermediate"]


def inputs_of(model, name, ids):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return torch.cat([rows.flatten(0, -2) for rows in seen]).double()


def slow(weight, read, keep):
    """The same with every weight fitted, and every Hessian inverted, anew in each round."""
    square = read.T @ read
    square += 0.01 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    units = list(range(weight.shape[1]))
    while len(units) > keep:
        left = square[units][:, units]
        moved = weight @ square[:, units] @ torch.linalg.inv(left)  # least damped error with these columns alone
        cost = moved.square().sum(0) / torch.linalg.inv(left).diagonal()
        gone = cost.argsort()[: min(8, len(units) - keep)].tolist()
        units = [unit for at, unit in enumerate(units) if at not in gone]
    return units


@pytest.mark.parametrize("family", DOWN)
@pytest.mark.parametrize("some_rows", [False, True])
def test_it_is_what_inverting_again_chooses(family, some_rows):
    model, table, rows = model_and_rows(family)
    before = copy.deepcopy(model.state_dict())
    hidden = torch.tensor([0, 2, 3, 7, 9]) if some_rows else None
    data = calibration_of(10)
    found = choose_units(model, table, rows, data, hidden)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(found) == table.layers
    for layer, units in enumerate(found):
        name = DOWN[family].format(layer)
        weight = model.get_submodule(name).weight.detach().double()
        weight = weight if hidden is None else weight[hidden]
        assert units.index.tolist() == slow(weight, inputs_of(model, name, data.select), KEEP)


def test_it_differs_from_fisher_s_and_leaves_the_rest_to_it(tmp_path):
    model, table, _ = model_and_rows("llama")
    target = {**table.shape(), "hidden_size": 6, "intermediate_size": KEEP, "num_hidden_layers": 3}
    data = calibration_of(10)
    one, other = (choose(model, table, target, data, units=units) for units in ("fisher", "obs"))
    assert torch.equal(one.selection.units["hidden"][0].index, other.selection.units["hidden"][0].index)
    assert one.selection.blocks["mlp"].tolist() == other.selection.blocks["mlp"].tolist()
    assert one.about["scores"] == other.about["scores"]
    kept = [[units.index.tolist() for units in of.selection.units["intermediate"]] for of in (one, other)]
    assert kept[0] != kept[1]
    hidden = other.selection.units["hidden"][0].index
    again = choose_units(model, table, rows_to_cut(table, target)["intermediate"], data, hidden, tmp_path)
    assert kept[1] == [units.index.tolist() for units in again]  # in files as in memory
    assert not list(tmp_path.iterdir())


def test_what_cannot_is_refused():
    model = model_of("mixtral").eval()
    table = table_for(model.config)
    with pytest.raises(ShearingError, match="units by obs: those of the mixtral family belong to experts"):
        choose(model, table, {**table.shape(), "intermediate_size": 5}, calibration_of(4), units="obs")
    model = random_model(tiny_config()).float()
    table = table_for(model.config)
    with pytest.raises(ShearingError, match="--units obs: the target cuts no intermediate units"):
        choose(model, table, {**table.shape(), "hidden_size": 6}, calibration_of(4), units="obs")


def test_the_whole_chain_leaves_a_selection_of_the_turned_model(tmp_path):
    """turn, then fisher --units obs --refit: the selection beside the result cuts the turned model to its shape."""
    from helpers_tokenizers import save_word_tokenizer

    random_model(tiny_config()).float().save_pretrained(tmp_path / "source")
    save_word_tokenizer(tmp_path / "source")
    words = [f"w{i}" for i in range(20)]
    lines = [" ".join(words[(3 * i + j * j) % 20] for j in range(11)) for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    given = {
        "calibration": tmp_path / "text.txt",
        "sequences": SequenceOptions(samples=12, report_samples=4, max_seq_len=12),
    }
    turned = prune("turn", tmp_path / "source", tmp_path / "turned", {}, **given, basis="output", keep=8)
    target = {"hidden_size": 8, "intermediate_size": 5, "num_hidden_layers": 2}
    small = prune("fisher", turned.path, tmp_path / "small", target, **given, units="obs", refit=True)

    selection, about = load_selection(small.path / "selection.safetensors")
    teacher, student = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (turned.path, small.path))
    assert about["units"] == "obs" and set(about["refit"]) == {"ridge", "before", "after", "kept"}
    kept = selection.units["hidden"][0].index
    assert kept.tolist() == list(range(8)) and len(selection.kept_layers(table_for(teacher.config).layers)) == 2
    # The embedding is neither refitted nor gated: its columns tell which units of the teacher the student has.
    theirs, own = (model.get_input_embeddings().weight for model in (teacher, student))
    torch.testing.assert_close(own, theirs[:, kept], rtol=0, atol=0)
