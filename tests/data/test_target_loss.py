"""Target losses: curves whose numbers are known, files of an evaluation, every refusal, and the plots."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import LocalDataset
from transformers import LlamaConfig, LlamaForCausalLM

from llmshearing.config import load_config
from llmshearing.data.mixture.target_loss import fit, predict, source_losses
from llmshearing.data.plots import SETTINGS, simulate
from llmshearing.data.plots import main as plots_main
from llmshearing.errors import ShearingError
from llmshearing.utils.target_loss import main

SIZES = [7e7, 4e8, 1.3e9, 7e9, 7e10]


@given(st.floats(0.05, 1.0), st.floats(0.2, 2.0), st.floats(0.2, 3.0))
def test_a_fit_finds_the_curve_it_was_drawn_from(b, gain, c):
    a = gain * SIZES[0] ** b
    losses = [a * n**-b + c for n in SIZES]
    found = fit(SIZES, losses)
    np.testing.assert_allclose([predict(found, n) for n in SIZES], losses, atol=1e-5)
    assert found[1] == pytest.approx(b, rel=1e-2) and found[2] == pytest.approx(c, abs=1e-2)


def test_a_fit_is_a_minimum_under_noise():
    noise = np.random.default_rng(0).normal(0, 0.01, len(SIZES))
    losses = [40 * n**-0.2 + 1.5 + e for n, e in zip(SIZES, noise, strict=True)]
    best = fit(SIZES, losses)

    def error(curve):
        return sum((predict(curve, n) - x) ** 2 for n, x in zip(SIZES, losses, strict=True))

    for step in np.random.default_rng(1).normal(0, 1e-3, (200, 3)):
        assert error(tuple(np.array(best) * (1 + step))) >= error(best) * (1 - 1e-6)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ShearingError, match="at least 3 sizes"):
        fit([1e9, 1e9, 2e9], [3, 3, 2])
    with pytest.raises(ShearingError, match="do not fall"):
        fit(SIZES, [1, 2, 3, 4, 5])
    with pytest.raises(ShearingError, match="must be positive"):
        fit(SIZES, [1, 2, float("nan"), 4, 5])


def test_source_losses_come_in_the_configurations_order(tmp_path):
    (tmp_path / "a.json").write_text('{"cc": 2.5, "code": 1.25, "mean": 2}')
    assert source_losses(tmp_path / "a.json", ["code", "cc"]) == [1.25, 2.5]
    lines = [
        {"batch": 0, "loss": 9, "domains": {"cc": 9, "code": 9}},
        {"batch": 8, "loss": 2, "domains": {"cc": 2, "code": 1}},
    ]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert source_losses(tmp_path / "evaluations.jsonl", ["cc", "code"]) == [2, 1]
    with pytest.raises(ShearingError, match=r"a.json has no loss of \['books'\]; it has \['cc', 'code', 'mean'\]"):
        source_losses(tmp_path / "a.json", ["cc", "books"])
    with pytest.raises(ShearingError, match="absent.json cannot be read"):
        source_losses(tmp_path / "absent.json", ["cc"])


def test_the_command_fits_plots_and_prints_overrides(tmp_path, capsys, root):
    names = ["cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4"]
    models = [{"parameters": n, "losses": {d: 40 * n**-0.2 + 1 + i / 10 for i, d in enumerate(names)}} for n in SIZES]
    (tmp_path / "sizes.json").write_text(json.dumps(models))
    command = ["fit", "--losses", str(tmp_path / "sizes.json"), "--parameters", "2.7e9"]
    assert main([*command, "--plot", str(tmp_path / "fit.png")]) == 0
    overrides = capsys.readouterr().out.split()
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    cfg = load_config(str(root / "configs" / "llama2" / "7b.yaml"), [*overrides, "data_local=x"])
    expected = [40 * 2.7e9**-0.2 + 1 + i / 10 for i in range(7)]
    np.testing.assert_allclose(cfg.callbacks.data_loading.target_loss, expected, rtol=1e-4)
    models[2]["losses"].pop("cc")
    models[3]["parameters"] = "7B"
    (tmp_path / "sizes.json").write_text(json.dumps(models))
    assert main(command) == 1


def test_a_simulated_run_does_what_the_documents_say(tmp_path):
    for name, options in SETTINGS.items():
        proportions, losses = simulate(**options)
        np.testing.assert_allclose(proportions.sum(1), 1)
        assert np.ptp(proportions[:, 2]) < 1e-6 if name == "constant" else proportions[5, 2] > 0.15
        assert (np.diff(losses, axis=0) <= 0).all()
    assert plots_main([str(tmp_path / "simulation.png")]) == 0
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")
    assert plots_main([str(tmp_path / "simulation.png" / "below-a-file.png")]) == 1


def test_the_source_model_is_evaluated_on_prepared_data(tmp_path, prepared, capsys):
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    assert main(["source", "--model", str(tmp_path / "model"), "--data", str(prepared)]) == 0
    said = capsys.readouterr().out.split("target_loss=[")[1].rstrip("]\n").split(",")
    for name, loss in zip(("books", "code"), said, strict=True):
        data = LocalDataset(str(prepared / "eval" / name))
        ids = torch.from_numpy(np.stack([data[i]["tokens"].astype(np.int64) for i in range(len(data))]))
        assert float(loss) == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
    assert main(["source", "--model", str(tmp_path / "model"), "--data", str(tmp_path)]) == 1
    assert main(["source", "--losses", "x.json"]) == 1
