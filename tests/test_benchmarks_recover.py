"""benchmarks/recover runs, tiny, by the commands: what its table says is what transformers finds in the models."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers_runs import NAMES, SEQ, write_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.recover.__main__ import main
from benchmarks.recover.cell import multiplied
from benchmarks.recover.commands import domains
from benchmarks.recover.configuration import Start, configuration
from benchmarks.recover.report import NOT_RUN, spread, table
from benchmarks.recover.rows import DEFAULT, ROWS
from benchmarks.recover.settings import lab as lab_setting
from llmshearing.checkpoints import checkpoint_to_hf
from llmshearing.config import load_config

TARGET = ["hidden_size=20", "num_attention_heads=2", "num_key_value_heads=1", "intermediate_size=28"]
TARGET += ["num_hidden_layers=2"]
BUDGET = 8 * 16 * SEQ


@pytest.fixture(scope="module")
def place(lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the lab's: a source, texts to train on, others to evaluate on."""
    folder = tmp_path_factory.mktemp("recover")
    shutil.copytree(lab.source, folder / "source")
    for name in NAMES:
        lines = (lab.corpus / name / "part.jsonl").read_text().splitlines(keepends=True)
        for split, part in (("train", lines[: len(lines) * 3 // 4]), ("eval", lines[len(lines) * 3 // 4 :])):
            (folder / "corpus" / split / name).mkdir(parents=True)
            (folder / "corpus" / split / name / "part.jsonl").write_text("".join(part))
    return folder


def bench(place: Path, *words: str) -> int:
    given = ["--lab", str(place), "--output", str(place / "out"), "--results", str(place / "results"), "--seeds", "0"]
    given += ["--tokens", str(BUDGET), "--length", str(SEQ), "--samples", "32", "--jobs", "1", "--target", *TARGET]
    return main([*words, *given])


def held_out_loss(place: Path, model: Path) -> float:
    """Mean over domains of the mean loss of the first 48 sequences, packed and evaluated without this package."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer, means = AutoTokenizer.from_pretrained(place / "source"), []
    for name in NAMES:
        ids = []
        for line in (place / "corpus" / "eval" / name / "part.jsonl").read_text().splitlines():
            own = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            ids += [tokenizer.bos_token_id, *own, tokenizer.eos_token_id]
        rows = torch.tensor(ids[: len(ids) // SEQ * SEQ]).view(-1, SEQ)[:48]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = net(input_ids=rows, use_cache=False).logits
        means.append(F.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten()).item())
    return sum(means) / len(means)


@pytest.mark.slow
def test_rows_end_in_models_of_the_loss_that_the_table_says(place, capsys) -> None:
    rows = ["published", "ours-refit"]
    assert bench(place, *rows) == 0
    printed = capsys.readouterr().out
    result = json.loads((place / "results" / "recover.json").read_text())["lab"]
    assert [cell["row"] for cell in result["cells"]] == [row for row in ROWS if row in rows]
    assert (place / "results" / "recover-lab.png").stat().st_size > 10_000
    assert result["source"]["mean"] == pytest.approx(held_out_loss(place, place / "source"), abs=2e-3)
    assert printed.splitlines()[-1].count("`") == 2 * (len(ROWS) - 2)
    cells = {cell["row"]: cell for cell in result["cells"]}
    for row, cell in cells.items():
        folder = place / "out" / "lab" / "cells" / f"{row}-{BUDGET}-s0"
        checkpoint_to_hf(folder / "run" / "latest-rank0.pt", folder / "hf")
        assert cell["loss"] == pytest.approx(held_out_loss(place, folder / "hf"), abs=2e-3)
        assert f"{cell['loss']:.3f}" in printed and cell["tokens"] == BUDGET
        assert [at["tokens"] for at in cell["curve"]] == sorted(at["tokens"] for at in cell["curve"])
        assert cell["curve"][-1] == {"tokens": BUDGET, "loss": cell["loss"]}
    # a quarter of the tokens went into masks, at the source's size; the rest cost what the compact model does
    small = AutoModelForCausalLM.from_pretrained(folder / "hf")
    share = multiplied(small) / multiplied(AutoModelForCausalLM.from_pretrained(place / "source"))
    assert cells["published"]["source_tokens"] == pytest.approx(BUDGET * (0.25 + 0.75 * share), abs=1)
    chosen = 32 * SEQ * ROWS["ours-refit"].seen
    assert cells["ours-refit"]["source_tokens"] == pytest.approx(BUDGET * (share + 1 / 3) + chosen, abs=1)

    # the same command again runs nothing
    before = (place / "out" / "lab" / "cells.jsonl").read_text()
    assert bench(place, *rows) == 0
    assert (place / "out" / "lab" / "cells.jsonl").read_text() == before

    # a cell whose line is lost goes on from its checkpoint, to the same end
    (place / "out" / "lab" / "cells.jsonl").write_text(before.splitlines(keepends=True)[0])
    assert bench(place, *rows) == 0
    again = (place / "out" / "lab" / "cells.jsonl").read_text().splitlines()
    old, new = (json.loads(lines[1]) for lines in (before.splitlines(), again))
    assert {**old, "seconds": None} == {**new, "seconds": None}


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_exit_code_says_so(place, tmp_path, caplog) -> None:
    given = ["random", "--lab", str(place), "--output", str(tmp_path), "--results", str(tmp_path), "--seeds", "0"]
    given += ["--length", str(SEQ), "--tokens", str(BUDGET), "--jobs", "1", "--target", "hidden_size=999"]
    assert main(given) == 1
    assert "random-" in caplog.text and "999" in caplog.text
    assert not (tmp_path / "lab" / "cells.jsonl").exists()


@pytest.mark.parametrize("words", [["nothing"], ["--lab", "/nowhere"], ["--smollm2", "."]])
def test_bad_arguments_are_refused(words, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words if "--lab" in words or "--smollm2" in words else [*words, "--lab", "."])
    assert stopped.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_spread_is_of_the_seeds() -> None:
    assert spread([1.0, 2.0, 4.5]) == "2.500 (1.000 .. 4.500, 3)"
    assert spread([3.14159]) == "3.142 (1 seed)"


def test_the_table_has_every_row_and_counts_compute_in_steps_of_the_source() -> None:
    record = {"row": "scratch", "budget": 1_638_400, "pruned": 8.0, "source_tokens": 4096 * 100}
    records = [{**record, "seed": seed, "loss": 5.0 + seed} for seed in (0, 1)]
    text = table(lab_setting(Path()), records, {"mean": 3.5}).splitlines()
    line = text[2]
    losses = ["8.000", NOT_RUN, "5.500 (5.000 .. 6.000, 2)"]
    assert line.split(" | ") == ["| `scratch`: scratch", *losses, "2.000", "100 |"]
    assert text[-1].startswith("Not run: ") and text[-1].count("`") == 2 * (len(ROWS) - 1)


def test_every_row_is_made_of_tokens_of_its_budget() -> None:
    assert set(DEFAULT) <= set(ROWS)
    for row in ROWS.values():
        spent = 0 if row.masks is None else row.masks.share
        assert 0 <= spent < 1 and (row.cuts or row.masks) and math.isfinite(row.seen)


def test_every_stage_of_every_row_is_a_configuration_that_loads(lab, tmp_path) -> None:
    target = {"hidden_size": 20, "num_attention_heads": 2, "intermediate_size": 28, "num_hidden_layers": 2}
    setting = replace(lab_setting(lab.root), source=lab.source, target=target, length=SEQ)
    shutil.copytree(lab.source, tmp_path / "cut")
    start = Start(tmp_path / "cut", lab.source, tmp_path / "cut" / "selection.safetensors")
    places = {"start": start, "data": lab.data, "held_out": lab.data, "folder": tmp_path, "seed": 0, "steps": 16}
    places |= {"targets": dict.fromkeys(NAMES, 5.0)}
    for name, row in ROWS.items():
        stages = [(row.training, None), (row.short, None), (row.masks, row.l0)]
        for training, l0 in ((training, l0) for training, l0 in stages if training is not None):
            made = configuration(setting, training, l0=l0, **places)
            cfg = load_config(write_yaml(tmp_path / f"{name}.yaml", made), [])
            assert (cfg.model.l0_module is not None) == (l0 is not None)
            assert (cfg.distill is not None) == (training.distill is not None)
            assert cfg.optimizer.lr == training.lr and cfg.global_train_batch_size == training.batch
            assert cfg.callbacks.data_loading.update_type == ("doremi" if training.dynamic else "constant")


def test_domains_are_those_of_the_data(tmp_path) -> None:
    for name in ("b", "a"):
        (tmp_path / "for_ft" / name).mkdir(parents=True)
    assert domains(tmp_path) == ["a", "b"]
