"""LoRA: merged and unmerged are one function, in layers of one size and of several; adapters and their bases."""

import json

import pytest
import torch
from conformance import random_model
from helpers_finetune import write_lines
from safetensors.torch import load_file, save_file
from tiny import VARIANTS, config_of

from llmshearing.checkpoints.hf_read import build_model
from llmshearing.cli import main
from llmshearing.evaluate import lm_eval_tasks
from llmshearing.families import table_for
from llmshearing.families.nonuniform.config import config_of as any_config
from llmshearing.finetune.adapter import default_targets, with_adapter
from llmshearing.finetune.options import LoraOptions
from llmshearing.fold.fold import fold, folded_config
from llmshearing.fold.selection import Selection, Units

peft = pytest.importorskip("peft")


def unequal(model):
    """A model whose layers keep 4, 6 and 8 intermediate units."""
    table = table_for(model.config)
    selection = Selection({"intermediate": tuple(Units(torch.arange(size)) for size in (4, 6, 8))})
    values = folded_config(model.config.to_dict(), table, selection)
    return build_model(fold(model.state_dict(), table, selection), any_config(values))


def randomized(adapted):
    """PEFT starts with B = 0, which would merge to nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "gemma2", "nonuniform"])
def test_merged_is_unmerged(family):
    name = "llama" if family == "nonuniform" else family
    model = random_model(config_of(name, next(iter(VARIANTS[name]))))
    model = unequal(model) if family == "nonuniform" else model
    table = table_for(model.config)
    adapted = with_adapter(model, table, LoraOptions(rank=3)).eval()
    randomized(adapted)
    targets = default_targets(table)
    found = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert found == {f"base_model.model.{name}" for name in targets} and len(targets) >= 4 * table.layers
    ids = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with adapted.disable_adapter():
            base = adapted(ids).logits.log_softmax(-1)
        unmerged = adapted(ids).logits.log_softmax(-1)
        merged = adapted.merge_and_unload()
        after = merged(ids).logits.log_softmax(-1)
    assert after.dtype == torch.float64 and (base - unmerged).abs().max() > 0.1
    torch.testing.assert_close(after, unmerged, atol=1e-10, rtol=0)
    table.check({name: tuple(value.shape) for name, value in merged.state_dict().items()})


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """A result of LoRA, and its adapter."""
    root = tmp_path_factory.mktemp("trained")
    words = ["finetune", place / "source", place / "prompts.jsonl", "--output", root / "out", "--lora", "--rank", 2]
    words += ["--learning_rate", 0.01, "--max_steps", 3, "--gradient_checkpointing"]
    assert run(*words, "--save_adapter", root / "adapter") == 0
    return root


def test_a_kept_adapter_merges_to_the_same_model(place, trained, tmp_path):
    assert run("finetune", place / "source", "--adapter", trained / "adapter", "--output", tmp_path / "merged") == 0
    one, other = (load_file(path / "model.safetensors") for path in (trained / "out", tmp_path / "merged"))
    source = load_file(place / "source" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], source[name]) for name in one)


def test_an_adapter_goes_on(place, trained, tmp_path):
    words = ["finetune", place / "source", place / "prompts.jsonl", "--adapter", trained / "adapter", "--max_steps", 2]
    assert run(*words, "--save_adapter", tmp_path / "more", "--output", tmp_path / "out") == 0
    one, other = (load_file(path / "adapter_model.safetensors") for path in (trained / "adapter", tmp_path / "more"))
    assert one.keys() == other.keys() and not all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_of_another_base_is_refused_by_its_weights(place, trained, tmp_path, caplog):
    assert run("finetune", trained / "out", "--adapter", trained / "adapter", "--output", tmp_path / "o") == 1
    assert "is of another base: it was trained on" in caplog.text and not (tmp_path / "o").exists()


def test_an_adapter_that_others_wrote(place, trained, tmp_path, caplog):
    """Without our file: by the name that PEFT keeps, and by its tensors."""
    import shutil

    shutil.copytree(trained / "adapter", tmp_path / "a")
    (tmp_path / "a" / "llmshearing_base.json").unlink()
    assert run("finetune", place / "source", "--adapter", tmp_path / "a", "--output", tmp_path / "fine") == 0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    named = {**config, "base_model_name_or_path": "other/model"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(named))
    assert run("finetune", place / "source", "--adapter", tmp_path / "a", "--output", tmp_path / "o") == 1
    assert "it was trained on other/model" in caplog.text
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "a" / "adapter_model.safetensors")
    assert run("finetune", place / "source", "--adapter", tmp_path / "a", "--output", tmp_path / "o") == 1
    assert "these tensors are absent or of another shape" in caplog.text
    assert run("finetune", place / "source", "--adapter", tmp_path, "--output", tmp_path / "o") == 1
    assert "it is no adapter of PEFT's" in caplog.text


def test_targets_that_are_none_are_named(place, tmp_path, caplog):
    data = write_lines(tmp_path / "x.jsonl", [{"text": "a b"}])
    words = ["finetune", place / "source", data, "--output", tmp_path / "o", "--lora", "--target_modules", "nothing"]
    assert run(*words) == 1
    assert "LoRA targets nothing" in caplog.text


@pytest.mark.parametrize(
    ("module", "said"), [("peft", "LoRA and adapters need peft"), ("accelerate", "training steps need accelerate")]
)
def test_a_missing_extra_is_named(place, tmp_path, caplog, monkeypatch, module, said):
    real = lm_eval_tasks.import_module

    def absent(name):
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(lm_eval_tasks, "import_module", absent)
    words = ["finetune", place / "source", place / "texts.jsonl", "--output", tmp_path / "o", "--lora"]
    assert run(*words) == 1
    assert said in caplog.text and "pip install 'llmshearing[finetune]'" in caplog.text
