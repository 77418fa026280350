"""The divergence against float64 and torch's own; a teacher that is never trained or saved; runs that follow it."""

import pytest
import torch
import torch.nn.functional as F
from helpers_runs import make_model, settings, write_yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llmshearing.config import ConfigError, load_config
from llmshearing.errors import ShearingError
from llmshearing.train import train
from llmshearing.training import loss
from llmshearing.training.distillation import Teacher, build_teacher
from llmshearing.training.divergence import distillation_losses
from llmshearing.training.model import ShearingModel
from llmshearing.training.source import read_source


def written_out(logits, teacher, ids, weight, ce, temperature):
    """The obvious way, from torch's own functions."""
    own, other = (values[:, :-1].flatten(0, 1) for values in (logits, teacher))
    hard = F.cross_entropy(own, ids[:, 1:].flatten(), reduction="none")
    soft = F.kl_div(
        (own / temperature).log_softmax(-1), (other / temperature).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    return weight * temperature**2 * soft + ce * hard, hard, temperature**2 * soft


@given(
    st.integers(1, 3), st.integers(2, 7), st.integers(2, 30), st.integers(1, 100), st.integers(0, 2**20),
    st.sampled_from([(1.0, 0.0, 1.0), (0.7, 0.3, 1.0), (1.0, 0.5, 2.5), (2.0, 0.0, 0.5)]),
)  # fmt: skip
def test_objective_and_gradient_are_those_of_torch(batch, length, vocab, chunk, seed, weights):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: 4 * torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64)  # noqa: E731
    logits, teacher = draw(), draw()
    ids = torch.randint(vocab, (batch, length), generator=generator)
    weighing = torch.rand(batch, length - 1, generator=generator, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    kept = teacher.clone()
    options = dict(zip(("weight", "ce", "temperature"), weights, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_ELEMENTS", chunk)
        got = distillation_losses(ours, teacher, ids, **options)
        (got[0] * weighing).sum().backward()
    want = [values.view(batch, -1) for values in written_out(theirs, teacher, ids, *weights)]
    (want[0] * weighing).sum().backward()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(teacher, kept) and not got[1].requires_grad and not got[2].requires_grad


def test_a_token_that_the_teacher_rules_out_counts_for_nothing():
    logits = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 5, dtype=torch.float64)
    teacher[..., 2] = -torch.inf
    objective, _, _ = distillation_losses(logits, teacher, torch.tensor([[0, 1, 3]]))
    objective.sum().backward()
    assert objective.isfinite().all() and logits.grad.isfinite().all() and (objective > 0).all()


def test_bfloat16_sides_lose_no_more_than_their_own_rounding():
    logits, teacher = (torch.randn(2, 9, 40).bfloat16() for _ in range(2))
    ids = torch.randint(40, (2, 9))
    got = distillation_losses(logits.clone().requires_grad_(), teacher, ids)[0]
    want = written_out(logits.double(), teacher.double(), ids, 1.0, 0.0, 1.0)[0].view(2, -1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# In a model ------------------------------------------------------------------------------------------------------


def a_batch():
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(384, (2, 12), generator=generator), "set": torch.tensor([0, 1])}


def test_the_teacher_is_neither_trained_nor_saved():
    student, teacher, batch = make_model(), make_model(), a_batch()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    shearing = ShearingModel(student, domains=2, teacher=Teacher(teacher, ce=0.5)).train()
    plain = set(ShearingModel(make_model(), domains=2).state_dict())
    assert set(shearing.state_dict()) == plain and len(list(shearing.parameters())) == len(list(student.parameters()))
    outputs = shearing(batch)
    shearing.loss(outputs, batch).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with torch.no_grad():
        logits = [model(batch["input_ids"], use_cache=False).logits.double() for model in (make_model(), teacher)]
    want = written_out(*logits, batch["input_ids"], 1.0, 0.5, 1.0)
    torch.testing.assert_close(outputs["objective"].double(), want[0].view(2, -1).mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["sample_loss"].double(), want[1].view(2, -1).mean(-1), rtol=1e-5, atol=1e-5)
    assert set(shearing.eval()(batch)) == {"sample_loss"}  # evaluation is cross-entropy alone


@pytest.mark.slow
def test_a_run_toward_its_source(lab, tmp_path):
    """Shearing with the source as teacher runs through Composer; the checkpoint is a plain one."""
    values = settings(lab, tmp_path / "run")
    values["distill"] = {"ce": 0.2}
    cfg = load_config(write_yaml(tmp_path / "run.yaml", values))
    trainer = train(cfg)
    assert trainer.state.model.teacher is not None
    assert not any("teacher" in name for name in trainer.state.model.state_dict())
    outputs = trainer.state.model.train()(a_batch())  # of the trained masks
    assert outputs["divergence"].isfinite().all() and (outputs["divergence"] > 0).all()


def test_other_vocabularies_tokenizers_and_no_teacher_are_refused(lab, tmp_path):
    values = settings(lab, tmp_path / "run")
    other = make_model().config
    other.vocab_size = 100
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "small")
    cfg = load_config(write_yaml(tmp_path / "a.yaml", {**values, "distill": {"teacher": str(tmp_path / "small")}}))
    with pytest.raises(ShearingError, match="vocab_size 100, .* has 384"):
        build_teacher(cfg, read_source(cfg))
    make_model().save_pretrained(tmp_path / "twin")
    (tmp_path / "twin" / "tokenizer.json").write_text("{}")
    cfg = load_config(write_yaml(tmp_path / "b.yaml", {**values, "distill": {"teacher": str(tmp_path / "twin")}}))
    if (lab.source / "tokenizer.json").is_file():
        with pytest.raises(ShearingError, match="another tokenizer.json"):
            build_teacher(cfg, read_source(cfg))
    plain = {**values, "model": {key: value for key, value in values["model"].items() if key != "l0_module"}}
    with pytest.raises(ConfigError, match="distill.teacher = None: without masks the source is the student"):
        load_config(write_yaml(tmp_path / "c.yaml", {**plain, "distill": {}}))
    with pytest.raises(ConfigError, match="distill.temperature"):
        load_config(write_yaml(tmp_path / "d.yaml", {**values, "distill": {"temperature": 0}}))
