"""Calibration with a loss mask: what goes by the loss goes by the tokens that count, against sums written out."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers_answers import NAMES, rows, write_answers, write_rows
from helpers_oracle import oracle_logits, random_model, tiny_config
from helpers_prune import calibration_of, model_of
from helpers_runs import SEQ, VOCAB
from torch import nn

from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.prune.basis import norm_statistics
from llmshearing.prune.calibration import IGNORED, Calibration, SequenceOptions, read_calibration
from llmshearing.prune.methods.decoder import find_decoder
from llmshearing.prune.methods.depth import greedy, window_losses
from llmshearing.prune.methods.fisher import fisher_scores
from llmshearing.prune.report import perplexity_of


def masked(number=5, batch_size=2):
    """Sequences of which about a third counts; nothing of the second, which is alone in no batch, and of the last."""
    data = calibration_of(number=number, batch_size=batch_size)
    mask = torch.rand(data.select.shape, generator=torch.Generator().manual_seed(7)) < 0.35
    mask[1], mask[-1] = False, False
    return replace(data, select_mask=mask, report=data.select, report_mask=mask)


def counted_loss(model, data):
    """transformers' own loss with labels of -100: the mean over all tokens that count."""
    with torch.no_grad():
        return model(input_ids=data.select, labels=data.select.where(data.select_mask, IGNORED), use_cache=False).loss


def test_fisher_scores_are_of_the_answers():
    config, data = tiny_config(), masked(4)
    table, kinds = table_for(config), ["hidden", "head", "intermediate", "layer"]
    shapes = {kind: (3,) if kind == "layer" else table.kinds[kind].shape(3) for kind in kinds}
    want = {kind: torch.zeros(shape, dtype=torch.float64) for kind, shape in shapes.items()}
    for ids, mask in zip(data.select, data.select_mask, strict=True):
        gates = {kind: torch.ones(shape, dtype=torch.float64, requires_grad=True) for kind, shape in shapes.items()}
        logits = oracle_logits(random_model(config), gates, ids[None])[0, :-1]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        loss = sum(losses[at - 1] for at in range(1, len(ids)) if mask[at]) / (len(ids) - 1)
        if mask[1:].any():
            for kind, gradient in zip(kinds, torch.autograd.grad(loss, gates.values()), strict=True):
                want[kind] += gradient.square()
    found = fisher_scores(random_model(config), table, data, kinds)
    for kind in kinds:
        torch.testing.assert_close(found[kind], want[kind], rtol=1e-9, atol=1e-14)
    assert not torch.equal(fisher_scores(random_model(config), table, calibration_of(4), kinds)["head"], found["head"])


def without(model, drop):
    model = copy.deepcopy(model)
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in drop]
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(kept), len(kept)
    return model


def test_layers_go_by_the_loss_of_the_answers():
    model, data = model_of("llama"), masked()
    want = [counted_loss(without(model, range(at, at + 2)), data).item() for at in range(3)]
    assert window_losses(find_decoder(model), data, 2).tolist() == pytest.approx(want, rel=1e-5)
    (dropped,), (loss,) = greedy(find_decoder(model), data, 1)
    alone = {layer: counted_loss(without(model, [layer]), data).item() for layer in (1, 2)}
    assert dropped == min(alone, key=alone.__getitem__) and loss == pytest.approx(alone[dropped], rel=1e-5)


def test_perplexity_is_that_of_the_answers_in_another_tokenizer_too():
    model, data = model_of("llama"), masked()
    want = math.exp(counted_loss(model, data).item())
    assert perplexity_of(model, data) == pytest.approx(want, rel=1e-5)
    assert perplexity_of(model, data, lambda ids: ids) == pytest.approx(want, rel=1e-5)
    twice = perplexity_of(model, data, lambda ids: [token for token in ids for _ in range(2)])
    nats, number = 0.0, 0
    for ids, mask in zip(data.report, data.report_mask, strict=True):
        long, marks = ids.repeat_interleave(2)[None], mask.repeat_interleave(2)
        with torch.no_grad():
            losses = F.cross_entropy(model(long, use_cache=False).logits[0, :-1], long[0, 1:], reduction="none")
        nats += losses[marks[1:]].sum().item()
        number += int(mask[1:].sum())
    assert twice == pytest.approx(math.exp(nats / number), rel=1e-5)  # for the source's tokens


def test_gradients_at_norms_are_those_of_the_answers():
    model, data = model_of("llama"), masked(2)
    table = table_for(model.config)
    found = norm_statistics(model, table, data)
    name = next(reversed(found))
    sums = found[name]
    assert sums.tokens == data.select.numel()  # states are those of all tokens
    silent = norm_statistics(model, table, replace(data, select=data.select[:1], select_mask=data.select_mask[:1]))
    torch.testing.assert_close(silent[name].gradients, sums.gradients, rtol=1e-4, atol=1e-6)  # the second says nothing


# From files --------------------------------------------------------------------------------------------------------


def test_masks_of_prepared_data_come_with_their_sequences(tmp_path):
    root = write_answers(tmp_path)
    options = SequenceOptions(samples=10, report_samples=8, select_split="train", report_split="eval")
    found = read_calibration(root, "unused", VOCAB, SEQ, options)
    opened = [MdsDirectory(root / "train" / name, SEQ, None) for name in NAMES]
    known = {tuple(d.read(i)[0].tolist()): d.read(i)[2] for d in opened for i in range(len(d))}
    for ids, mask in zip(found.select, found.select_mask, strict=True):
        want = known[tuple(ids.tolist())]
        assert mask.tolist() == ([True] * SEQ if want is None else want.tolist())
    assert found.report_mask.shape == found.report.shape
    batches = [*found.labelled()]
    assert all(torch.equal(labels[labels != IGNORED], ids[labels != IGNORED]) for ids, labels in batches)


def test_plain_data_have_labels_that_are_their_ids():
    data = calibration_of(3)
    assert all(labels is ids or torch.equal(labels, ids) for ids, labels in data.labelled())


def test_a_calibration_without_an_answer_is_refused(tmp_path):
    silent = [row for row in rows("asked", 12, 0) if not row["loss_mask"].any()]
    for split in ("for_prune", "eval_merge"):
        write_rows(tmp_path / split, silent)
    with pytest.raises(ShearingError, match="for_prune of .*: its loss mask marks no token; give more sequences"):
        read_calibration(tmp_path, "unused", VOCAB, SEQ, SequenceOptions())
    with pytest.raises(ShearingError, match="marks no token"):
        ids = torch.ones(1, 4, dtype=torch.int64)
        Calibration(ids, ids, "a", "b", select_mask=torch.tensor([[True, False, False, False]]))
