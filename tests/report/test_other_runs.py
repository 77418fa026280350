"""What prune and evaluate leave: maps of the selection, tables, the plot's points."""

import json
import logging

import pytest
from helpers_prune import model_of
from helpers_tokenizers import save_word_tokenizer

from llmshearing.cli import main
from llmshearing.evaluate.results import read_results
from llmshearing.evaluate.run import Options, evaluate
from llmshearing.fold.selection import load_selection
from llmshearing.prune import prune, recording
from llmshearing.report.maps import decoded
from llmshearing.report.page import page
from llmshearing.report.read import read_run
from llmshearing.report.record import PAGE_FILE, RUN_FILE

NAME = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "source"
    model_of("llama").save_pretrained(path)
    save_word_tokenizer(path)
    return path


def test_prune_leaves_a_report(source, tmp_path, browser):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"w{i % 20} w{i % 7} " * 40}) + "\n" for i in range(30)))
    out = tmp_path / NAME.replace("/", "")
    shape = json.loads((source / "config.json").read_text())
    target = {"intermediate_size": shape["intermediate_size"] // 2, "num_hidden_layers": shape["num_hidden_layers"] - 1}
    for overwrite in (False, True):  # what it left itself is nothing foreign
        found = prune("random", source, out, target, calibration=text, overwrite=overwrite)
    run = read_run(out)
    rows = {row[0]: row[1:] for row in run.tables["Before and after"]["rows"]}
    assert rows["parameters"] == [found.before.parameters, found.after.parameters, rows["parameters"][2]]
    assert rows["perplexity"][1] == pytest.approx(found.after.perplexity, rel=1e-6)
    selection, _ = load_selection(out / "selection.safetensors")
    maps = run.maps[0]["maps"]["kept"]
    kept = selection.kept_layers(shape["num_hidden_layers"])
    for layer, row in enumerate(decoded(maps["intermediate"]["rows"])):
        want = set(selection.units["intermediate"][layer].index.tolist()) if layer in kept else set()
        assert {unit for unit, value in enumerate(row) if value} == want and set(row) <= {0.0, 1.0}
    assert [row[0] for row in decoded(maps["mlp"]["rows"])] == [float(layer in kept) for layer in range(len(kept) + 1)]
    assert "<script>alert" not in (out / PAGE_FILE).read_text()
    browser.problems.clear()
    browser.open(out / PAGE_FILE)
    assert browser.problems == [] and browser.do("document.querySelector('h1').textContent") == out.name
    assert browser.do("document.querySelectorAll('figure.map path.cell').length") >= 2
    assert browser.do("document.querySelectorAll('input').length") == 0  # one map, no slider


def test_without_calibration_it_says_so(source, tmp_path):
    prune("random", source, tmp_path / "out", {"num_hidden_layers": 1})
    assert any("no --calibration" in note and warns for note, warns in read_run(tmp_path / "out").notes.items())


def test_a_broken_report_costs_no_model(source, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recording, "selection_maps", None)
    with caplog.at_level(logging.WARNING):
        prune("random", source, tmp_path / "out", {"num_hidden_layers": 1})
    assert (tmp_path / "out" / "model.safetensors").is_file() and "the pruned model has no report" in caplog.text


def test_finetune_leaves_a_report(source, tmp_path, browser):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"w{i % 20} w{i % 7} " * 5}) + "\n" for i in range(12)))
    words = ["finetune", source, text, "--output", tmp_path / "out", "--max_steps", 4, "--save_every", 2]
    assert main([str(word) for word in (*words, "--eval_fraction", 0.3)]) == 0
    told = json.loads((tmp_path / "out" / "finetune.json").read_text())
    run = read_run(tmp_path / "out")
    losses = {batch: each["loss"] for batch, each in run.evaluations.items()}
    assert list(losses) == [0, 2, 4]
    assert (losses[0], losses[4]) == pytest.approx((told["held_out_loss"]["before"], told["held_out_loss"]["after"]))
    logged = {entry["step"]: entry["loss"] for entry in told["log"] if "loss" in entry}
    assert {b: step["values"]["loss/train/cross_entropy"] for b, step in run.steps.items()} == pytest.approx(logged)
    browser.problems.clear()
    browser.open(tmp_path / "out" / PAGE_FILE)
    assert browser.problems == [] and browser.do("document.querySelector('h1').textContent") == "out"
    titles = browser.do("[...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    assert [title.split("  ")[0] for title in titles][:2] == ["Loss in training", "Loss at evaluations"]


def test_evaluate_leaves_a_report(source, tmp_path, browser):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"w{i % 20} w{i % 7} " * 10}) + "\n" for i in range(4)))
    model_of("llama", seed=1, num_hidden_layers=1).save_pretrained(tmp_path / NAME.replace("/", ""))
    save_word_tokenizer(tmp_path / NAME.replace("/", ""))
    options = Options(source=str(source), data=[str(text)], speed=None)
    result = evaluate([str(tmp_path / NAME.replace("/", ""))], options, tmp_path / "out")
    assert read_results(tmp_path / "out") == json.loads(json.dumps(result))
    run = read_run(tmp_path / "out")
    names = [model["name"] for model in result["models"]]
    assert run.tables["Results"]["columns"] == names and run.kind == "evaluate"
    rows = {row[0]: row[1:] for row in run.tables["Results"]["rows"]}
    assert rows["parameters"] == [f"{model['parameters']:,}" for model in result["models"]]
    assert [each["x"] for each in run.points[0]["points"]] == [model["parameters"] for model in result["models"]]
    assert [each["marked"] for each in run.points[0]["points"]] == [True, False]
    browser.problems.clear()
    browser.open(tmp_path / "out" / PAGE_FILE)
    assert browser.problems == [] and browser.do("document.querySelectorAll('figure svg circle').length") == 1
    assert browser.do("document.querySelectorAll('figure svg rect').length") == 1  # the source
    assert browser.do("[...document.querySelectorAll('thead th')].map(e => e.textContent)") == names
    assert page([run, run]).count("<h1>") == 1 and (tmp_path / "out" / RUN_FILE).is_file()
