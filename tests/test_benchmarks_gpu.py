"""benchmarks/gpu.py runs, tiny, on a CPU: its JSON has what the table is made of."""

import json

from benchmarks.gpu import main


def test_a_tiny_run_measures_every_step(tmp_path, capsys):
    main(["--shapes", "tiny", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "gpu.json")])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["gated_minus_folded_float64"] < 1e-10
    found = result["shapes"]["tiny"]
    assert found["target_parameters"] < found["parameters"]
    table = capsys.readouterr().out
    for step in ("dense", "open", "target", "plain", "distilled"):
        assert found[step]["seconds"] > 0 and found[step]["mfu"] > 0 and step in table
    assert 0 < sum(event["share"] for event in found["profile"]) <= 1 + 1e-9
