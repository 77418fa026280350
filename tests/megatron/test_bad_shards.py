"""Bad checkpoints and bad wishes: one error each, and nothing written."""

import logging
import os
import shutil

import pytest
import torch
from helpers_megatron import save_hf, save_shards, shard

from llmshearing.cli import main

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


class Runs:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Hugging Face directory, and its shards of 2 x 2 ranks."""
    root = tmp_path_factory.mktemp("made")
    hf = save_hf(root / "hf")
    return hf, save_shards(hf, root / "shards", 2, 2)


def _rewrite(folder, change, rank=1, stage=1):
    state = shard(folder, rank, stage)
    change(state)
    torch.save(state, folder / "release" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt")


def _argument(name, value):
    return lambda folder: _rewrite(folder, lambda state: setattr(state["args"], name, value))


def _everywhere(name, value, alone=False):
    """The argument in the files of all ranks; ``alone``: without what our own export told beside it."""

    def change(folder):
        for rank in range(2):
            for stage in range(2):
                _rewrite(folder, set_argument, rank, stage)

    def set_argument(state):
        setattr(state["args"], name, value)
        if alone:
            del state["llmshearing"]

    return change


def _state(key, value):
    return lambda folder: _rewrite(folder, lambda state: state.__setitem__(key, value))


def _model(change):
    return lambda folder: _rewrite(folder, lambda state: change(state["model"]))


def _truncate(folder):
    file = folder / "release" / "mp_rank_01_000" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-5000])


def _move(folder, one, other):
    (folder / one).rename(folder / other)


NORM = "decoder.final_layernorm.weight"
BAD = {
    "a rank's file is missing": (
        lambda folder: (folder / "release/mp_rank_01_000/model_optim_rng.pt").unlink(),
        "mp_rank_01_000/model_optim_rng.pt missing; its arguments say 2 tensor-parallel ranks and 2 pipeline stages",
    ),
    "a rank's folder is missing": (
        lambda folder: shutil.rmtree(folder / "release/mp_rank_01_001"), "mp_rank_01_001/model_optim_rng.pt missing"
    ),
    "a rank too many": (
        lambda folder: shutil.copytree(folder / "release/mp_rank_01_001", folder / "release/mp_rank_02_001"),
        "mp_rank_02_001 too many",
    ),
    "a rank of experts": (
        lambda folder: _move(folder, "release/mp_rank_01_001", "release/mp_rank_01_001_000"), "expert parallelism"
    ),
    "the first rank is missing": (
        lambda folder: shutil.rmtree(folder / "release/mp_rank_00_000"), "mp_rank_00_000/model_optim_rng.pt missing"
    ),
    "no iteration": (lambda folder: _move(folder, "release", "iter_0000001"), "there is no folder release"),
    "an odd iteration": (
        lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("../elsewhere"),
        "it must be a number or 'release'",
    ),
    "ranks tell different sizes": (_argument("ffn_hidden_size", 96), "ffn_hidden_size = 96, not 48"),
    "ranks tell different numbers of ranks": (
        _argument("tensor_model_parallel_size", 4), "tensor_model_parallel_size = 4, not 2"
    ),
    "ranks hold different norms": (
        _model(lambda model: model[NORM].add_(1)), "ranks 0 and 1 hold different values of what all ranks share"
    ),
    "ranks hold parts of different shapes": (
        _model(lambda model: model.update({QKV: model[QKV][:-3]})), "has the shape [21, 32], not [24, 32]"
    ),
    "ranks hold parts of different dtypes": (
        _model(lambda model: model.update({QKV: model[QKV].half()})), "is torch.float16, of rank 0 torch.float32"
    ),
    "a tensor is missing": (_model(lambda model: model.pop(QKV)), f"rank 1 of stage 1: {QKV} is missing"),
    "a tensor is unknown": (_model(lambda model: model.update(new=model[QKV])), "rank 1 of stage 1: new is unknown"),
    "no tensor": (_model(lambda model: model.update(new=3)), "new is no tensor"),
    "another version": (_state("checkpoint_version", 2.0), "checkpoint_version = 2.0; only 3.0 can be read"),
    "no arguments": (_state("args", None), "has no arguments of Megatron"),
    "virtual stages": (
        lambda folder: _rewrite(folder, lambda state: state.update(model0=state.pop("model"))),
        "it has model0: virtual pipeline stages",
    ),
    "names of Megatron before core": (
        lambda folder: _rewrite(folder, lambda state: state.update(model={"language_model.encoder": torch.ones(1)})),
        "not named as megatron-core names them",
    ),
    "a pickle that runs something": (_state("more", Runs()), "system, which is no plain data"),
    "arguments that run something": (_argument("more", Runs()), "system, which is no plain data"),
    "a file is cut off": (_truncate, "damaged"),
    "sizes that make no equal parts": (
        _everywhere("ffn_hidden_size", 49, alone=True), "intermediate_size = 49 does not divide by 2"
    ),
    "a model that is none of ours": (
        _everywhere("normalization", "LayerNorm"), "normalization = LayerNorm (only RMSNorm)"
    ),
    "arguments of another function": (_everywhere("norm_epsilon", 0.1), "norm_epsilon = 0.1, the config means 1e-06"),
    "fewer layers than told": (_everywhere("num_layers", 5, alone=True), "its stages have [2, 2] layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_one_error_and_nothing_is_written(case, made, tmp_path, caplog, monkeypatch):
    damage, say = BAD[case]
    folder = shutil.copytree(made[1], tmp_path / "shards")
    damage(folder)
    monkeypatch.chdir(tmp_path)
    for words in (["convert", str(folder), "out"], ["convert", str(folder), "out", "--tp", "1"]):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert main(words) == 1
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert len(errors) == 1 and say in errors[0], errors
        assert sorted(item.name for item in tmp_path.iterdir()) == ["shards"]


WISHES = {
    "ranks that heads do not divide by": (["--tp", "3"], "num_attention_heads = 8 does not divide by 3"),
    "stages that layers do not divide by": (["--pp", "3"], "num_hidden_layers = 4 does not divide by 3"),
    "no rank": (["--tp", "0"], "0 tensor-parallel ranks"),
    "a dtype that is none": (["--tp", "2", "dtype=int8"], "dtype=int8: must be one of"),
    "a fact that is wrong": (["--tp", "2", "vocab_size=301"], "vocab_size=301 was given"),
}


@pytest.mark.parametrize("wish", WISHES)
def test_a_bad_wish_is_one_error_and_nothing_is_written(wish, made, tmp_path, caplog):
    words, say = WISHES[wish]
    assert main(["convert", str(made[0]), str(tmp_path / "out"), *words]) == 1
    assert say in caplog.records[-1].getMessage() and not list(tmp_path.iterdir())


ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
UNHELD = {
    "biases": ("llama", {"attention_bias": True}, "self_attn.o_proj.bias"),
    "yarn": ("llama", {"rope_scaling": ROPE}, "rope_scaling of type yarn"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu (only silu)"),
    "layers of two types": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, "in one model"
    ),
    "a family without a layout": ("granite", {}, "Megatron cannot hold a model of the granite family"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNHELD)
def test_what_megatron_cannot_hold_is_refused_by_name(case, tmp_path, caplog):
    family, changes, say = UNHELD[case]
    hf = save_hf(tmp_path / "hf", family, **changes)
    assert main(["convert", str(hf), str(tmp_path / "out"), "--tp", "2"]) == 1
    assert say in caplog.records[-1].getMessage() and not (tmp_path / "out").exists()


def test_groups_that_ranks_cannot_share_are_refused(tmp_path, caplog):
    hf = save_hf(tmp_path / "hf", num_attention_heads=12, num_key_value_heads=4, head_dim=4, intermediate_size=36,
                 hidden_size=48)  # fmt: skip
    assert main(["convert", str(hf), str(tmp_path / "out"), "--tp", "6"]) == 1
    assert "num_key_value_heads = 4: neither a multiple nor a divisor of 6" in caplog.records[-1].getMessage()


def test_nothing_foreign_is_overwritten(made, tmp_path, caplog):
    out = tmp_path / "out"
    assert not main(["convert", str(made[1]), str(out), "--tp", "4"])
    assert main(["convert", str(made[1]), str(out), "--tp", "1"]) == 1
    assert "--overwrite" in caplog.records[-1].getMessage()
    assert not main(["convert", str(made[1]), str(out), "--tp", "1", "--overwrite"])
    assert len(list(out.glob("release/mp_rank_*"))) == 1
    (out / "mine.txt").write_text("mine")
    assert main(["convert", str(made[1]), str(out), "--tp", "1", "--overwrite"]) == 1
    assert "something else in it: mine.txt" in caplog.records[-1].getMessage()
    assert main(["convert", str(made[1]), str(made[1]), "--tp", "1", "--overwrite"]) == 1
    assert "is the source" in caplog.records[-1].getMessage()
