"""The scripts by LLaMA-Pruner's names, one after another, on real shards and prepared data."""

import os
import subprocess
import sys

from helpers_megatron import assert_same_model

SCRIPTS = ("hf_to_megatron.sh", "prune_llama.sh", "transfer.sh", "check_model.sh")


def _script(root, name, *words, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {key: str(value) for key, value in variables.items()}
    script = ["bash", str(root / "llmshearing" / "scripts" / name), *map(str, words)]
    return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)


def test_from_hugging_face_through_pruned_shards_to_a_training(root, lab, tmp_path):
    shards, pruned, one, hf = (tmp_path / name for name in ("shards", "pruned", "one", "hf"))
    steps = [
        ("hf_to_megatron.sh", {"HF_MODEL": lab.source, "MEGATRON_MODEL": shards, "TENSOR_PARALLEL_SIZE": 2}),
        ("prune_llama.sh", {"LOAD": shards, "SAVE": pruned, "HIDDEN_SIZE_REMAIN": 24, "NUM_ATTENTION_HEADS_REMAIN": 2,
                            "FFN_HIDDEN_SIZE_REMAIN": 32, "DROP_LAYERS": "1"}),
        ("transfer.sh", {"LOAD": pruned, "SAVE": one}),
        ("transfer.sh", {"LOAD": pruned, "SAVE": hf, "TO": "hf"}),
        ("transfer.sh", {"LOAD": one, "SAVE": tmp_path / "hf1", "TO": "hf"}),
    ]  # fmt: skip
    for name, variables in steps:
        words = ["--spec", "local"] if name == "hf_to_megatron.sh" else []
        ended = _script(root, name, *words, **variables)
        assert ended.returncode == 0, (name, ended.stderr[-3000:])
    assert_same_model(hf, tmp_path / "hf1")
    ended = _script(root, "check_model.sh", "--steps", 10, "--lr", 1e-2, LOAD=one, DATA=lab.data)
    assert ended.returncode == 0 and "PASS: 10 steps of 4 sequences on 1 ranks" in ended.stderr, ended.stderr[-3000:]


def test_help_and_wrong_use(root, tmp_path):
    for name in SCRIPTS:
        ended = _script(root, name, "--help")
        assert ended.returncode == 0 and f"[VARIABLE=value ...] {name}" in ended.stdout
    assert _script(root, "transfer.sh", TO="elsewhere").returncode == 1
    ended = _script(root, "transfer.sh", LOAD=tmp_path / "none", SAVE=tmp_path / "out")
    assert ended.returncode == 1 and not (tmp_path / "out").exists()
