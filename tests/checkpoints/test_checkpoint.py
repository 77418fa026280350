"""Checkpoints: Composer's own files load as plain data; what is wrong with a file is said."""

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.checkpoints.checkpoint import CheckpointInfo, load_masks, read_checkpoint, save_checkpoint
from llmshearing.errors import ShearingError
from llmshearing.fold.selection import Selection, Units, load_selection, save_selection


def test_a_file_of_composers_trainer_loads_without_unpickling_code(tmp_path: Path, make_model: Callable) -> None:
    """RNG states, timestamps and optimizer state and all, as a run on two batches leaves them."""
    from composer import Callback, ComposerModel, Trainer
    from torch.utils.data import DataLoader

    model = make_model("tied")

    class Wrapped(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            return outputs

    told = {"hf_config": model.config.to_dict(), "masks": None, "run_config": None, "tokenizer": None, "history": ["x"]}
    callback = type("CheckpointInfo", (Callback,), {"state_dict": lambda self: dict(told)})()
    Trainer(
        model=Wrapped(),
        train_dataloader=DataLoader([torch.arange(8), torch.arange(8, 16)], batch_size=1),
        optimizers=torch.optim.AdamW(model.parameters()),
        max_duration="2ba",
        save_folder=str(tmp_path / "run"),
        save_latest_filename="latest-rank{rank}.pt",
        callbacks=[callback],
        device="cpu",
        progress_bar=False,
    ).fit()
    checkpoint = read_checkpoint(tmp_path / "run")  # a directory: its newest file
    assert checkpoint.info.history == ["x"] and not checkpoint.masks
    assert checkpoint.weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, checkpoint.weights[name]) for name, value in model.state_dict().items())


def test_what_is_saved_is_read(tmp_path: Path, make_model: Callable, case: str) -> None:
    model = make_model(case, torch.bfloat16)
    info = CheckpointInfo(model.config.to_dict(), run_config="a: 1", tokenizer="t", history=["one"])
    path = save_checkpoint(tmp_path / "deep" / "x.pt", model.state_dict(), info)
    checkpoint = read_checkpoint(path)
    assert checkpoint.info == info
    assert checkpoint.info.config.to_dict() == model.config.to_dict()
    assert all(torch.equal(value, checkpoint.weights[name]) for name, value in model.state_dict().items())
    assert [item.name for item in path.parent.iterdir()] == ["x.pt"]  # no temporary file stays


def test_masks_are_read_strictly(write_pruning: Callable) -> None:
    path, _, masks = write_pruning()
    checkpoint = read_checkpoint(path)
    loaded = load_masks(checkpoint)
    assert loaded.target == masks.target and loaded.kinds == masks.kinds
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in masks.state_dict().items())

    less = {name: value for name, value in checkpoint.masks.items() if name != "log_alpha.head"}
    with pytest.raises(ShearingError, match=r"log_alpha\.head"):
        load_masks(replace(checkpoint, masks=less))
    not_finite = {**checkpoint.masks, "log_alpha.head": torch.full_like(checkpoint.masks["log_alpha.head"], torch.nan)}
    with pytest.raises(ShearingError, match=r"not finite: log_alpha\.head"):
        load_masks(replace(checkpoint, masks=not_finite))
    with pytest.raises(ShearingError, match="checkpoint without masks"):
        load_masks(replace(checkpoint, info=replace(checkpoint.info, masks=None), masks={}))


def test_module_prefixes_are_dropped(write_pruning: Callable) -> None:
    path, model, _ = write_pruning()
    state = torch.load(path, weights_only=True)
    state["state"]["model"] = {f"module.{name}": value for name, value in state["state"]["model"].items()}
    torch.save(state, path)
    assert read_checkpoint(path).weights.keys() == model.state_dict().keys()


class Executes:
    """A pickle that would run code when loaded."""

    def __reduce__(self) -> Any:
        return print, ("executed",)


def spoil_nothing(path: Path) -> None:
    path.unlink()


def spoil_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_byte(path: Path) -> None:
    """Change one byte in the middle of a tensor; the archive stays readable."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 0xFF
    path.write_bytes(data)


def spoil_text(path: Path) -> None:
    path.write_text("not a checkpoint")


def spoil_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state": {"model": {}}}))


def spoil_code(path: Path) -> None:
    torch.save({"state": {"model": {"model.x": Executes()}}}, path)


def spoil_layout(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


def spoil_names(path: Path) -> None:
    torch.save({"state": {"model": {"transformer.wte.weight": torch.zeros(3)}}}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nothing, "no such file"),
        (spoil_cut, "damaged"),
        (spoil_byte, "damaged.*checksum"),
        (spoil_text, "damaged or no checkpoint"),
        (spoil_pickle, "damaged or no checkpoint"),
        (spoil_code, "damaged or no checkpoint"),
        (spoil_layout, "no Composer checkpoint"),
        (spoil_names, "keys .transformer.wte.weight"),
    ],
)
def test_a_spoilt_file_is_one_clear_error(
    write_pruning: Callable, spoil: Callable, message: str, capsys: pytest.CaptureFixture
) -> None:
    path, _, _ = write_pruning()
    spoil(path)
    with pytest.raises(ShearingError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_tensors_that_the_config_does_not_mean_are_named(tmp_path: Path, make_model: Callable) -> None:
    model = make_model("tied")
    info = CheckpointInfo(model.config.to_dict())
    weights = model.state_dict()
    wrong = {**weights, "model.norm.weight": torch.ones(7), "model.extra": torch.ones(1)}
    del wrong["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ShearingError) as error:
        read_checkpoint(save_checkpoint(tmp_path / "a.pt", wrong, info))
    assert all(name in str(error.value) for name in ("model.norm.weight", "model.extra", "2.mlp.up_proj.weight"))
    untied = {**weights, "lm_head.weight": weights["lm_head.weight"] + 1}
    with pytest.raises(ShearingError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        read_checkpoint(save_checkpoint(tmp_path / "b.pt", untied, info))


def test_a_foreign_file_needs_its_shape(tmp_path: Path, make_model: Callable) -> None:
    model = make_model("mha")
    path = tmp_path / "foreign.pt"
    torch.save({"state": {"model": {f"model.{name}": value for name, value in model.state_dict().items()}}}, path)
    with pytest.raises(ShearingError, match="missing: num_attention_heads= intermediate_size="):
        read_checkpoint(path, foreign={"hidden_size": 32, "num_hidden_layers": 4})
    shape = {key: getattr(model.config, key) for key in json.loads(model.config.to_json_string(use_diff=False))}
    told = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    checkpoint = read_checkpoint(path, foreign={key: shape[key] for key in told})
    assert checkpoint.info.config.num_key_value_heads == 4


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    layers = draw(st.integers(1, 3))

    def units(rows: int) -> tuple[Units, ...]:
        kept = [sorted(draw(st.sets(st.integers(0, 9)))) for _ in range(rows)]
        soft = draw(st.booleans())
        return tuple(Units(torch.tensor(k, dtype=torch.int64), torch.rand(len(k)) if soft else None) for k in kept)

    gate = torch.rand(layers)
    blocks = dict.fromkeys(draw(st.sets(st.sampled_from(["attention", "mlp"]))), gate)
    rows = {"hidden": 1, "head": layers, "intermediate": layers}
    return Selection({kind: units(rows[kind]) for kind in draw(st.sets(st.sampled_from(sorted(rows))))}, blocks)


@given(selection=selections())
def test_selections_survive_the_disk(tmp_path_factory: pytest.TempPathFactory, selection: Selection) -> None:
    path = save_selection(tmp_path_factory.mktemp("s") / "x.safetensors", selection, {"why": ["test"]})
    again, about = load_selection(path)
    assert about == {"why": ["test"]}
    assert again.units.keys() == selection.units.keys() and again.blocks.keys() == selection.blocks.keys()
    for kind, rows in selection.units.items():
        for one, other in zip(rows, again.units[kind], strict=True):
            assert torch.equal(one.index, other.index)
            assert (one.gate is None and other.gate is None) or torch.equal(one.gate, other.gate)
    assert all(torch.equal(gate, again.blocks[block]) for block, gate in selection.blocks.items())


def test_no_selection_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{}")
    for path in (tmp_path / "x", tmp_path / "absent"):
        with pytest.raises(ShearingError, match="cannot be read"):
            load_selection(path)
