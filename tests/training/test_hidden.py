"""Hidden states against the formula written out; whose units and layers they are; runs that follow them."""

import pytest
import torch
from composer import Callback
from composer.core import Event
from helpers_runs import make_model, settings, trainer_of, write_yaml
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.config import ConfigError, load_config
from llmshearing.config.schema import Distill
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.fold.selection import Selection, Units, layer_gates, save_selection
from llmshearing.prune.run import prune
from llmshearing.train import train
from llmshearing.training.distillation import Teacher
from llmshearing.training.hidden import HiddenStates, build_hidden, pairs
from llmshearing.training.model import ShearingModel

HIDDEN_UNITS = torch.tensor([0, 2, 3, 5, 8, 13, 21, 30])


@given(st.lists(st.booleans(), min_size=1, max_size=7))
def test_a_kept_layer_follows_the_one_before_the_next_kept(is_open):
    kept, ends = pairs(Selection(blocks={"attention": (g := torch.tensor(is_open).float()), "mlp": g}), len(is_open))
    slow, layer = [], 0
    for layer in range(len(is_open)):
        if is_open[layer]:
            end = layer
            while end + 1 < len(is_open) and not is_open[end + 1]:
                end += 1
            slow.append((layer, end))
    assert list(zip(kept, ends, strict=True)) == slow


def streams(model, ids):
    """Residual stream after each layer, before the final norm, by transformers' own outputs and a hook on the last."""
    last = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda module, args, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        found = model(ids, use_cache=False, output_hidden_states=True).hidden_states[1:-1]
    hook.remove()
    return [*found, *last]


def batch_of(model):
    ids = torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "set": torch.tensor([0, 1])}


def small_and_selection():
    """(a student, the selection of the teacher's units and layers that it is said to have)."""
    student = make_model(hidden_size=8, num_hidden_layers=2, num_attention_heads=4)
    return student, Selection({"hidden": (Units(HIDDEN_UNITS),)}, layer_gates(3, [1]))


def test_the_objective_has_the_distance_written_out():
    teacher = make_model(num_hidden_layers=3)
    assert teacher.config.hidden_size == 32
    student, selection = small_and_selection()
    batch = batch_of(teacher)
    own, theirs = streams(student, batch["input_ids"]), streams(teacher, batch["input_ids"])
    distances = []
    for mine, end in ((own[0], theirs[1]), (own[1], theirs[2])):
        target = end[..., HIDDEN_UNITS].double()
        tokens = [
            2 - 2 * (m @ t) / (m.norm() * t.norm())
            for m, t in zip(mine.double().flatten(0, 1), target.flatten(0, 1), strict=True)
        ]
        distances.append(torch.stack(tokens).unflatten(0, target.shape[:2]).mean(1))
    want = torch.stack(distances).mean(0)

    def objective(hidden):
        return ShearingModel(student_copy(student), domains=2, teacher=Teacher(teacher, 0.5, 0.1, 1.0, hidden)).train()(
            batch
        )

    states = HiddenStates(selection, 3, weight=2.0)
    states.progress = 0.25
    with_states, without = objective(states), objective(None)
    torch.testing.assert_close(with_states["hidden"].double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        with_states["objective"].double(), without["objective"].double() + 1.5 * want, rtol=1e-5, atol=1e-5
    )
    states.progress = 1.0
    assert "hidden" not in objective(states)


def student_copy(model):
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_an_uncut_student_is_where_its_teacher_is():
    states = HiddenStates(Selection(), 3)
    model = ShearingModel(
        make_model(num_hidden_layers=3), domains=2, teacher=Teacher(make_model(num_hidden_layers=3), hidden=states)
    )
    outputs = model.train()(batch_of(model.model))
    assert outputs["hidden"].abs().max() < 1e-9 and outputs["divergence"].abs().max() < 1e-5


def test_states_reach_the_student_and_not_the_teacher():
    student, selection = small_and_selection()
    teacher = make_model(num_hidden_layers=3)
    model = ShearingModel(student, domains=2, teacher=Teacher(teacher, 1e-9, 0.0, 1.0, HiddenStates(selection, 3, 5.0)))
    batch = batch_of(teacher)
    model.loss(model.train()(batch), batch).backward()
    assert student.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 1e-3
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_selections_of_others_are_refused(tmp_path):
    teacher, student = make_model(num_hidden_layers=3).config, table_for(small_and_selection()[0].config)
    right = save_selection(tmp_path / "right.safetensors", small_and_selection()[1])
    asked = lambda path: Distill(hidden=1.0, selection=str(path))  # noqa: E731
    assert build_hidden(asked(right), teacher, student).selection is not None
    assert build_hidden(Distill(), teacher, student) is None
    wrong = save_selection(tmp_path / "a.safetensors", Selection({"hidden": (Units(torch.tensor([3, 99])),)}))
    with pytest.raises(ShearingError, match="(?s)is not one of the teacher: .*hidden, row 0"):
        build_hidden(asked(wrong), teacher, student)
    other = save_selection(tmp_path / "b.safetensors", Selection({"hidden": (Units(torch.arange(9)),)}))
    with pytest.raises(ShearingError, match="keeps 9 hidden units and 3 layers of the teacher, the model has 8 and 2"):
        build_hidden(asked(other), teacher, student)
    with pytest.raises(ShearingError, match="absent.safetensors cannot be read"):
        build_hidden(asked(tmp_path / "absent.safetensors"), teacher, student)
    with pytest.raises(ShearingError, match="has 3 layers of 32 hidden units, the model under masks 2 of 8"):
        build_hidden(Distill(hidden=1.0), teacher, student)


def test_configs_that_cannot_tell_whose_states_are_refused(lab, tmp_path):
    values = settings(lab, tmp_path / "run")
    plain = {**values, "model": {"path": values["model"]["path"]}}
    for base, distill, said in (
        (values, {"hidden": 1.0, "cache": "somewhere"}, "distill.hidden = 1.0 beside distill.cache"),
        (values, {"hidden": 1.0, "selection": "file"}, "while masks train, what they keep is followed"),
        (plain, {"hidden": 1.0, "teacher": "other"}, "distill.hidden = 1.0 without distill.selection"),
        (plain, {"selection": "file", "teacher": "other"}, "with distill.hidden = 0: nothing reads it"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(write_yaml(tmp_path / "a.yaml", {**base, "distill": distill}))


# Runs --------------------------------------------------------------------------------------------------------------


class Stop(Callback):
    def run_event(self, event, state, logger):
        if event == Event.BATCH_CHECKPOINT and state.timestamp.batch.value == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def cut(lab, tmp_path_factory):
    """A compact model beside its selection."""
    out = tmp_path_factory.mktemp("cut") / "small"
    prune("random", lab.source, out, {"hidden_size": 16, "num_hidden_layers": 2})
    return out


def following(lab, cut, folder, **changes):
    values = settings(lab, folder)
    values["model"] = {"path": str(cut)}
    values["distill"] = {
        "teacher": str(lab.source), "ce": 0.3, "hidden": 3.0, "hidden_until": "4ba",
        "selection": str(cut / "selection.safetensors"),
    }  # fmt: skip
    values |= {"max_duration": "6ba", "save_interval": "1ba", "autoresume": True, "run_name": "follow", **changes}
    return values


def test_a_resumed_run_ends_in_the_same_bits_and_states_come_nearer(lab, cut, tmp_path):
    cfg = load_config(write_yaml(tmp_path / "a.yaml", following(lab, cut, tmp_path / "whole")))
    trainer, memory = trainer_of(cfg)
    trainer.fit()
    trainer.close()
    weights = [value for _, value in memory.data["distill/hidden_weight"]]
    assert weights == pytest.approx([3.0, 2.25, 1.5, 0.75, 0.0, 0.0])
    assert len(memory.data["loss/train/hidden"]) == 4  # where they count
    assert len(memory.data["loss/train/divergence"]) == 6

    cfg = load_config(write_yaml(tmp_path / "b.yaml", following(lab, cut, tmp_path / "parts")))
    broken, _ = trainer_of(cfg)
    broken.state.callbacks.append(Stop())
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    broken.close()
    train(cfg)
    whole, parts = (dict(read_checkpoint(tmp_path / name / "latest-rank0.pt").weights) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_masks_follow_the_states_of_what_they_keep(lab, tmp_path):
    values = settings(lab, tmp_path / "run")
    values["distill"] = {"ce": 0.2, "hidden": 1.0}
    trainer = train(load_config(write_yaml(tmp_path / "run.yaml", {**values, "max_duration": "4ba"})))
    model = trainer.state.model.train()
    model.teacher.hidden.progress = 0.0
    outputs = model(batch_of(model.model))
    assert outputs["hidden"].isfinite().all() and (outputs["hidden"] > 0).all()
