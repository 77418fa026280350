"""`llmshearing evaluate`: models side by side, checkpoints too, files, remarks, and bad input."""

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers_prune import model_of
from helpers_tokenizers import save_word_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmshearing.checkpoints.checkpoint import CheckpointInfo, read_checkpoint, save_checkpoint
from llmshearing.checkpoints.folding import prune_and_save_model
from llmshearing.cli import main
from llmshearing.compat import HEADS_DIVIDE_HIDDEN
from llmshearing.evaluate import lm_eval_tasks
from llmshearing.evaluate.remarks import remarks
from llmshearing.evaluate.results import read_results, table
from llmshearing.evaluate.run import Options, evaluate
from llmshearing.evaluate.speed import SpeedOptions
from llmshearing.evaluate.subjects import short_names, subjects_of
from llmshearing.families import table_for
from llmshearing.masks.l0 import L0Masks

QUICK = SpeedOptions(prompt=4, generate=2, rounds=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two models, text of two domains, and a checkpoint in the middle of pruning."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, seed, changes in (("source", 0, {}), ("small", 1, {"num_hidden_layers": 2})):
        model_of("llama", seed=seed, **changes).save_pretrained(root / name)
        save_word_tokenizer(root / name)
    (root / "text").mkdir()
    for name, step in (("web", 3), ("code", 7)):
        lines = [" ".join(f"w{(step * i + k) % 20}" for i in range(12)) for k in range(5)]
        (root / "text" / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    model = AutoModelForCausalLM.from_pretrained(root / "source")
    table = table_for(model.config)
    masks = L0Masks(table, ["hidden", "intermediate", "layer"], {"hidden": 8, "intermediate": 6, "layer": 2})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for log_alpha in masks.log_alpha.values():  # about a quarter closed so far, which ones differs by row
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator) + 1.5)
        masks.log_alpha["layer"].fill_(3.0)
        if HEADS_DIVIDE_HIDDEN:  # transformers 5 makes no model of the 11 hidden units that this leaves, with 4 heads
            masks.log_alpha["hidden"].fill_(3.0)
    save_run(root / "latest-rank0.pt", model, masks)
    return root


def save_run(path: Path, model: PreTrainedModel, masks: L0Masks) -> None:
    """The checkpoint of a run in the middle of pruning."""
    keys = ("kinds", "target", "target_sparsity", "start_sparsity", "seed")
    about = {key: getattr(masks, key) for key in keys} | {"kinds": list(masks.kinds), "head_mode": "group"}
    info = CheckpointInfo(model.config.to_dict(), masks=about, tokenizer=str(path.parent / "source"))
    save_checkpoint(path, model.state_dict(), info, masks.state_dict())


def test_models_side_by_side(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["evaluate", place / "small", place / "latest-rank0.pt", "--source", place / "source", "--window", 8]
    words += ["--data", place / "text", "--prompt", 4, "--generate", 2, "--rounds", 2, "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr().out
    found = read_results(tmp_path / "out")
    assert [(each["name"], each["kind"]) for each in found["models"]] == [
        ("source", "model"),
        ("small", "model"),
        ("latest-rank0.pt [now]", "now"),
        ("latest-rank0.pt [target]", "target"),
    ]
    source, small, now, target = found["models"]
    assert found["source"] == "source" and source["is_source"] and not small["is_source"]
    assert source["parameters"] > now["parameters"] > target["parameters"]
    assert target["shape"]["hidden_size"] == 8 and target["shape"]["num_hidden_layers"] == 2
    for each in found["models"]:
        assert each["stored_bytes"] == 4 * each["parameters"] and set(each["loss"]["domains"]) == {"web", "code"}
        assert each["speed"]["decode"]["tokens_per_second"] > 0 and len(each["speed"]["prefill"]["rounds"]) == 2
        assert each["name"] in shown
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").open()))
    (row,) = [row for row in rows if row["model"] == "small" and row["measure"] == "loss (web)"]
    assert float(row["value"]) == small["loss"]["domains"]["web"]["loss"] and float(row["stderr"]) > 0
    picture = (tmp_path / "out" / "evaluation.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert "loss in nats per token; windows of 8 tokens, stride 4, no BOS put before" in shown
    assert main([str(word) for word in words]) == 1  # never over an earlier one


def test_a_checkpoint_with_masks_is_what_the_fold_makes(place: Path, tmp_path: Path) -> None:
    ids = torch.arange(12)[None] % 23
    compact = prune_and_save_model(place / "latest-rank0.pt", tmp_path / "compact.pt")
    now, target = subjects_of(str(place / "latest-rank0.pt"))
    (folded,) = subjects_of(str(compact))
    assert folded.kind == "compact checkpoint" and folded.shape() == target.shape()
    with torch.no_grad():
        one, other = (each.load(torch.float64)(ids).logits for each in (target, folded))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        masks = read_checkpoint(place / "latest-rank0.pt")
    model = now.load(torch.float64)
    assert sum(parameter.numel() for parameter in model.parameters()) == now.table.count()
    assert not torch.equal(model(ids).logits, other) and masks.masks


def test_now_is_the_gated_model(place: Path) -> None:
    """The model as the masks have it, against the same gates inside the source's own modules."""
    from llmshearing.checkpoints.checkpoint import load_masks
    from llmshearing.fold.gating import attach

    checkpoint = read_checkpoint(place / "latest-rank0.pt")
    masks = load_masks(checkpoint)
    source = AutoModelForCausalLM.from_pretrained(place / "source").double().eval()
    ids = torch.arange(12)[None] % 23
    now = subjects_of(str(place / "latest-rank0.pt"))[0].load(torch.float64)
    with torch.no_grad():
        gates = {kind: gate.double() for kind, gate in masks.deterministic(to_target=False).items()}
        attach(source, masks.table).set(masks.selection(gates))
        wanted = source(ids, use_cache=False).logits
        torch.testing.assert_close(now(ids, use_cache=False).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_shape_on_the_way_that_transformers_refuses_is_left_out(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """11 hidden units of 4 heads, which transformers 4 takes."""
    model = AutoModelForCausalLM.from_pretrained(place / "source")
    masks = L0Masks(table_for(model.config), ["hidden"], {"hidden": 8})
    masks.log_alpha["hidden"].data.fill_(3.0)[:1] = -3.0
    save_run(tmp_path / "run.pt", model, masks)
    subjects = subjects_of(str(tmp_path / "run.pt"))
    assert [each.kind for each in subjects] == (["target"] if HEADS_DIVIDE_HIDDEN else ["now", "target"])
    assert ("[now] is left out: config of the checkpoint cannot be used" in caplog.text) == HEADS_DIVIDE_HIDDEN


def test_worse_and_slower_are_said() -> None:
    def model(name, loss, rates, parameters=5):
        measured = {"loss": loss, "unigram_loss": 3.0}
        speed = {phase: {"tokens_per_second": rates[1], "rounds": rates} for phase in ("prefill", "decode")}
        parts = {"all": measured, "domains": {"web": {"loss": 2.0, "unigram_loss": 3.0}}}
        return {"name": name, "loss": parts, "speed": speed, "parameters": parameters, "is_source": name == "source"}

    source = model("source", 2.0, [10, 10, 10, 10], 9)
    assert remarks(model("small", 2.9, [9, 11, 12, 9]), source) == []
    said = remarks(model("small", 3.5, [9, 8, 9, 8]), source)
    assert "small is worse than its own unigram baseline: 3.500 against 3.000 nats per token on all data." in said[0]
    assert (
        "small is slower than its source source in prefill: 8.0 against 10.0 tokens per second (0.85 times" in said[1]
    )
    assert "in decode" in said[2] and len(said) == 3
    assert remarks(source, source) == []
    assert "is no smaller than its source" in remarks(model("same", 2.0, [11] * 4, 9), source)[0]


def test_a_random_model_is_worse_than_its_unigrams(place: Path) -> None:
    found = evaluate([str(place / "source")], Options(data=[str(place / "text")], speed=None))
    assert "source is worse than its own unigram baseline" in table(found)


def test_a_model_without_a_table_is_judged(tmp_path: Path) -> None:
    model = model_of("bloom")
    model.save_pretrained(tmp_path)
    found = evaluate([str(tmp_path)], Options(speed=QUICK, length=8))["models"][0]
    assert found["kv_cache_bytes_per_token"] is None and found["parameters"] == model.num_parameters()
    assert found["flops"]["per_sequence"] > 0 and "-" in table({**evaluate_frame(), "models": [found]})


def evaluate_frame() -> dict:
    return {"dtype": "float32", "device": "cpu"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["{root}/none"], "none is no model"),
        (["{root}/bare", "--data", "{root}/text"], "bare has no tokenizer"),
        (["{root}/source", "--data", "{root}/table.csv"], "table.csv is of no known form"),
        (["{root}/source", "--data", "{root}/odd"], "odd is of no known form"),
        (["{root}/source", "--data", "{root}/absent"], "absent does not exist"),
        (["{root}/source", "--data", "{root}/empty.jsonl"], "empty.jsonl is empty"),
        (["{root}/source", "--data", "{root}/blank.jsonl"], "no token to score"),
        (["{root}/source", "--data", "{root}/fields.jsonl"], "fields.jsonl:2 has no"),
        (["{root}/source", "--data", "{root}/text", "{root}/text"], "another domain of the name"),
        (["{root}/source", "--dtype", "int8"], "dtype 'int8': must be one of float32"),
        (["{root}/source", "--prompt", "40"], "positions of source"),
        (["{root}/source", "--rounds", "0"], "rounds = 0"),
        (["{root}/source", "--device", "cuda:7"], "on device cuda:7"),
    ],
)
def test_bad_input(place: Path, caplog: pytest.LogCaptureFixture, words: list[str], wanted: str) -> None:
    model_of("llama").save_pretrained(place / "bare")
    (place / "table.csv").write_text("a,b\n")
    (place / "odd").mkdir(exist_ok=True)
    (place / "odd" / "a.csv").write_text("a")
    (place / "empty.jsonl").write_text("")
    (place / "blank.jsonl").write_text('{"text": "w1"}\n')
    (place / "fields.jsonl").write_text('{"text": "w1 w2"}\n{"txt": "w1 w2"}\n')
    output = place / "never"
    given = [word.format(root=place) for word in words]
    assert main(["evaluate", *given, "--output", str(output), *(["--no_speed"] if "--data" in words else [])]) == 1
    assert wanted in caplog.text and not output.exists()


def test_without_the_extra_the_missing_package_is_named(place: Path, monkeypatch, caplog) -> None:
    def absent(name: str):
        raise ImportError(name=name)

    monkeypatch.setattr(lm_eval_tasks, "import_module", absent)
    items = place / "items.jsonl"
    items.write_text('{"query": "w1", "choices": ["w2", "w3"], "gold": 0}\n')
    assert main(["evaluate", str(place / "source"), "--tasks", f"multiple_choice={items}"]) == 1
    assert "tasks need lm_eval" in caplog.text and "pip install 'llmshearing[eval]'" in caplog.text


def test_short_names() -> None:
    assert short_names(["a/b/c", "a/d"]) == ["c", "d"]
    assert short_names(["a/x/hf", "a/y/hf/"]) == ["x/hf", "y/hf"]
