"""Training on answers alone: losses, gradients and evaluations by sums written out, whatever the microbatches."""

import math

import pytest
import torch
import torch.nn.functional as F
from composer import Callback
from helpers_answers import NAMES, run_settings, write_answers
from helpers_layouts import Job, execute
from helpers_runs import SEQ, TARGET, VOCAB, make_model, trainer_of, write_yaml
from transformers import AutoModelForCausalLM

from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.config import load_config
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.fold.selection import Selection
from llmshearing.train import train
from llmshearing.training.cache.cli import cache_targets
from llmshearing.training.cache.follow import CachedTeacher
from llmshearing.training.cache.read import TeacherCache
from llmshearing.training.distillation import Teacher
from llmshearing.training.evaluation import domain_losses, eval_batches
from llmshearing.training.hidden import HiddenStates
from llmshearing.training.model import DomainLoss, ShearingModel

MASKS = {"lagrangian_warmup_steps": "3ba", "eval_target_model": True, "target_model": dict(TARGET)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_answers(tmp_path_factory.mktemp("answers"))


def a_batch(share=0.4):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(4, 12, generator=generator) < share
    mask[1] = False
    return {
        "input_ids": torch.randint(VOCAB, (4, 12), generator=generator),
        "set": torch.tensor([0, 1, 1, 0]),
        "loss_mask": mask,
    }


def double(seed=0, **changes):
    return make_model(seed, initializer_range=0.2, **changes).double()


def oracle(seed=0):
    """The same model, whose norms compute in float64 as those that are trained do; transformers' own take float32."""
    return ShearingModel(double(seed)).model


def nats(model, ids):
    """Loss of every token after the first, by plain Python sums."""
    with torch.no_grad():
        scores = model(input_ids=ids, use_cache=False).logits.tolist()
    return [
        [
            math.log(math.fsum(math.exp(x) for x in scores[row][at])) - scores[row][at][ids[row, at + 1]]
            for at in range(ids.shape[1] - 1)
        ]
        for row in range(len(ids))
    ]


# In a model --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_over_answers_by_hand():
    model, batch = double(), a_batch()
    told = nats(oracle(), batch["input_ids"])
    marks = batch["loss_mask"].tolist()
    counted = [[told[i][t - 1] for t in range(1, 12) if marks[i][t]] for i in range(4)]
    want = math.fsum(map(math.fsum, counted)) / sum(map(len, counted))
    shearing = ShearingModel(model, domains=2).train()
    outputs = shearing(batch)
    assert shearing.loss(outputs, batch).item() == pytest.approx(want, rel=1e-12)
    assert outputs["counts"].tolist() == list(map(len, counted)) and outputs["sample_loss"][1] == 0
    metric = DomainLoss(2)
    shearing.eval()
    for rows in (slice(0, 3), slice(3, 4)):
        part = {name: value[rows] for name, value in batch.items()}
        shearing.update_metric(part, shearing.eval_forward(part), metric)
    assert metric.compute().item() == pytest.approx(want, rel=1e-12)
    of_domain = [counted[0] + counted[3], counted[1] + counted[2]]
    assert metric.by_domain.tolist() == pytest.approx([math.fsum(x) / len(x) for x in of_domain], rel=1e-12)


def test_a_mask_of_ones_changes_nothing_but_the_order_of_sums():
    batch = a_batch()
    batch["loss_mask"] = torch.ones_like(batch["loss_mask"])
    plain = {name: value for name, value in batch.items() if name != "loss_mask"}
    one, other = ShearingModel(double()), ShearingModel(double())
    torch.testing.assert_close(one.loss(one(batch), batch), other.loss(other(plain), plain), rtol=1e-14, atol=0)
    assert "counts" not in other(plain)


@pytest.mark.parametrize("teacher", [False, True])
def test_a_batch_without_an_answer_has_loss_and_gradient_0(teacher):
    batch = a_batch(share=0.0)
    guide = Teacher(double(1), hidden=HiddenStates(Selection(), 3)) if teacher else None
    shearing = ShearingModel(double(), domains=2, teacher=guide).train()
    loss = shearing.loss(shearing(batch), batch)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in shearing.parameters())


@pytest.mark.parametrize("top_k", [None, 5])
def test_distillation_counts_the_same_positions(top_k):
    """Against the objective of each sequence alone, cut to the positions that count."""
    batch, weight, ce = a_batch(), 0.7, 0.3
    student, teacher = oracle(), double(1)
    guide = Teacher(teacher, weight, ce, top_k=top_k)
    shearing = ShearingModel(double(), domains=2, teacher=guide).train()
    outputs = shearing(batch)
    loss = shearing.loss(outputs, batch)
    loss.backward()
    ids, counted = batch["input_ids"], batch["loss_mask"][:, 1:]
    own = student(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    hard = F.nll_loss(own.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(4, -1)
    if top_k is None:
        theirs = teacher(input_ids=ids, use_cache=False).logits[:, :-1].detach().log_softmax(-1)
        soft = (theirs.exp() * (theirs - own)).sum(-1)
    else:
        targets = guide.ask(batch).targets
        p = targets.probs[:, :-1].double()
        gap = torch.where(p > 0, p.clamp(min=1e-300).log() - own.gather(-1, targets.ids[:, :-1].long()), 0.0)
        soft = (p * gap).sum(-1)
    want = (weight * soft + ce * hard)[counted].mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)
    for mine, its in zip(shearing.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-7, atol=1e-10)


def test_hidden_states_are_compared_before_answers_alone():
    batch, student, teacher = a_batch(), oracle(), double(1)
    states = HiddenStates(Selection(), 3, weight=2.0)
    shearing = ShearingModel(double(), domains=2, teacher=Teacher(teacher, hidden=states)).train()
    found = shearing(batch)["hidden"]
    streams = [[], []]
    for side, model in enumerate((student, teacher)):
        for layer in model.model.layers:
            layer.register_forward_hook(
                lambda module, args, out, side=side: streams[side].append(out[0] if isinstance(out, tuple) else out)
            )
        model(input_ids=batch["input_ids"], use_cache=False)
    for row in range(4):
        at = [t - 1 for t in range(1, 12) if batch["loss_mask"][row, t]]
        far = [
            sum(2 - 2 * (h[row, t] @ g[row, t] / (h[row, t].norm() * g[row, t].norm())).item() for t in at)
            / max(len(at), 1)
            for h, g in zip(*streams, strict=True)
        ]
        assert found[row].item() == pytest.approx(sum(far) / 3, rel=1e-9)


def test_a_cache_of_data_with_masks_gives_what_its_teacher_gives(lab, data, tmp_path):
    cache_targets(str(lab.source), data, tmp_path / "cache", split="train", batch=4, top_k=6)
    read = [MdsDirectory(data / "train" / name, None, None).read(8) for name in NAMES]
    batch = {
        "input_ids": torch.stack([torch.from_numpy(ids) for ids, _, _ in read]),
        "loss_mask": torch.stack([torch.ones(SEQ).bool() if m is None else torch.from_numpy(m) for _, _, m in read]),
        "set": torch.tensor([0, 1]),
        "sample": torch.tensor([8, 8]),
    }
    live = Teacher(AutoModelForCausalLM.from_pretrained(lab.source), 0.7, 0.3, top_k=6)
    outputs = []
    for guide in (live, CachedTeacher(TeacherCache(tmp_path / "cache"), NAMES, 0.7, 0.3)):
        outputs.append(ShearingModel(make_model(1), domains=2, teacher=guide).train()(batch))
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    assert 0 < outputs[0]["counts"][0] < outputs[0]["counts"][1] == SEQ - 1


# Runs --------------------------------------------------------------------------------------------------------------


def by_transformers(source, data, samples):
    """Loss and gradients of a batch of (domain, sample), by transformers' own loss with labels of -100."""
    model = AutoModelForCausalLM.from_pretrained(source).double()
    read = [MdsDirectory(data / "train" / NAMES[domain], None, None).read(sample) for domain, sample in samples]
    ids = torch.stack([torch.from_numpy(ids) for ids, _, _ in read])
    masks = torch.stack([torch.ones(SEQ).bool() if m is None else torch.from_numpy(m) for _, _, m in read])
    loss = model(input_ids=ids, labels=ids.where(masks, -100)).loss
    loss.backward()
    return loss.item(), {f"model.{name}": p.grad for name, p in model.named_parameters()}


def test_a_step_is_the_mean_over_all_answers_whatever_the_microbatches(lab, data, tmp_path):
    """Some microbatches of one sequence have no answer at all."""
    file = write_yaml(tmp_path / "run.yaml", run_settings(data, lab.source, None))
    runs = [
        execute(
            Job(str(file), [f"device_train_microbatch_size={size}", "max_duration=3ba"], double=True, gradients=[0])
        )
        for size in (4, 2, 1)
    ]
    samples = [(domain, sample) for domain, sample, _ in runs[0]["batches"][0]]
    _, want = by_transformers(lab.source, data, samples)
    assert any(loss == 0 for _, _, loss in sum(runs[2]["batches"].values(), []))
    for run in runs:
        assert run["batches"].keys() == runs[0]["batches"].keys()
        for name, gradient in want.items():  # of transformers' norms, which compute in float32
            torch.testing.assert_close(run["gradients"][0][name], gradient, rtol=1e-5, atol=1e-7)
        for name, value in runs[0]["final"].items():  # Adam makes much of gradients near 0
            torch.testing.assert_close(run["final"][name], value, rtol=1e-4, atol=1e-6)
    for name, gradient in runs[0]["gradients"][0].items():
        # Composer adds losses up in float32, and so does the weight of a microbatch go through it
        torch.testing.assert_close(runs[2]["gradients"][0][name], gradient, rtol=1e-6, atol=1e-9)


def test_masks_pay_their_penalty_once_whatever_the_microbatches(lab, data, tmp_path):
    file = write_yaml(tmp_path / "run.yaml", run_settings(data, lab.source, None, MASKS))
    runs = [
        execute(
            Job(str(file), [f"device_train_microbatch_size={size}", "max_duration=3ba"], double=True, gradients=[1])
        )
        for size in (4, 1)
    ]
    for name, gradient in runs[0]["gradients"][1].items():
        torch.testing.assert_close(runs[1]["gradients"][1][name], gradient, rtol=1e-6, atol=1e-9)


def test_evaluations_are_means_over_answers_by_domain(lab, data, tmp_path):
    made = run_settings(data, lab.source, None)
    trainer, _ = trainer_of(load_config(write_yaml(tmp_path / "run.yaml", made), []))
    trainer.eval()
    metric = trainer.state.eval_metrics["eval"]["LanguageCrossEntropy"]
    mean, found = metric.compute().item(), metric.by_domain.tolist()
    trainer.close()
    model = AutoModelForCausalLM.from_pretrained(lab.source)
    total, count = [0.0, 0.0], [0, 0]
    for domain, name in enumerate(NAMES):
        directory = MdsDirectory(data / "apart" / name, None, None)
        for index in range(len(directory)):
            ids, _, mask = directory.read(index)
            told = nats(model, torch.from_numpy(ids)[None])[0]
            at = [t for t in range(1, SEQ) if mask is None or mask[t]]
            total[domain] += math.fsum(told[t - 1] for t in at)
            count[domain] += len(at)
    assert found == pytest.approx([t / n for t, n in zip(total, count, strict=True)], rel=1e-5)
    assert mean == pytest.approx(sum(total) / sum(count), rel=1e-5)
    batches = eval_batches(str(data), "eval", NAMES, SEQ, VOCAB)
    assert domain_losses(model, batches, NAMES) == pytest.approx({**dict(zip(NAMES, found, strict=True)), "mean": mean})


def test_a_run_that_goes_on_ends_where_an_uninterrupted_one_does(lab, data, tmp_path):
    class Stop(Callback):
        def batch_checkpoint(self, state, logger):
            if state.timestamp.batch.value == 5:  # after the checkpoint: that work is lost
                raise KeyboardInterrupt

    def configured(name):
        made = {**run_settings(data, lab.source, tmp_path / name, MASKS), "autoresume": True}
        return load_config(write_yaml(tmp_path / f"{name}.yaml", made), [])

    train(configured("whole"))
    broken, _ = trainer_of(configured("broken"))
    broken.state.callbacks.append(Stop())
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    broken.close()
    train(configured("broken"))
    one, other = (read_checkpoint(tmp_path / name / "latest-rank0.pt") for name in ("whole", "broken"))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)


def test_a_run_without_any_answer_in_a_batch_goes_on(lab, data, tmp_path):
    """Nothing is NaN, nothing is learned."""
    from helpers_answers import rows, write_rows

    silent = [row for row in rows("asked", 30, 0) if not row["loss_mask"].any()]
    write_rows(tmp_path / "data" / "train" / "asked", silent)
    write_rows(tmp_path / "data" / "eval", rows("asked", 6, 1))
    made = run_settings(tmp_path / "data", lab.source, None)
    made["callbacks"]["data_loading"] |= {"set_names": ["asked"], "proportion": [1.0]}
    made |= {"max_duration": "2ba", "eval_interval": "2ba", "device_train_microbatch_size": 1}
    made["optimizer"] |= {"weight_decay": 0.0}
    result = execute(Job(str(write_yaml(tmp_path / "run.yaml", made)), gradients=[0, 1]))
    assert all(not gradient.any() for gradients in result["gradients"].values() for gradient in gradients.values())
    source = AutoModelForCausalLM.from_pretrained(lab.source).state_dict()
    assert all(torch.equal(result["final"][f"model.{name}"], value) for name, value in source.items())
