"""Composer's own Trainer over our loaders: epochs, time, a resume in the middle of an epoch, evaluation."""

from collections import Counter

import torch
from composer import Callback, Trainer
from composer.models import ComposerModel
from torchmetrics import SumMetric

from llmshearing.data.mixture.loader import build_eval_dataloader, build_train_dataloader

SEQ, VOCAB = 16, 300


class Tiny(ComposerModel):
    """One parameter; remembers which samples it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.evaluated = [], []

    def forward(self, batch):
        self.trained += zip(batch["set"].tolist(), batch["sample"].tolist(), strict=True)
        return self.weight

    def loss(self, outputs, batch):
        return (outputs - 1) ** 2

    def eval_forward(self, batch, outputs=None):
        self.evaluated += batch["sample"].tolist()
        return (batch["set"] >= 0).sum()

    def get_metrics(self, is_train):
        return {} if is_train else {"samples": SumMetric()}

    def update_metric(self, batch, outputs, metric):
        metric.update(outputs)


class Change(Callback):
    """Stands for the dynamic loading callback: other proportions after batch 6."""

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 6:
            state.train_dataloader.dataset.set_proportion([0.6, 0.3, 0.1])


def trainer(domains, model, folder, **more):
    root, names = domains
    where = {"local": root, "set_names": names, "max_seq_len": SEQ, "vocab_size": VOCAB, "batch_size": 4}
    return Trainer(
        model=model,
        train_dataloader=build_train_dataloader(**where, split="train", proportion=[0.2, 0.5, 0.3], seed=1),
        eval_dataloader=build_eval_dataloader(**where, split="eval"),
        eval_interval="1ep",
        device_train_microbatch_size=2,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[Change()],
        device="cpu",
        progress_bar=False,
        auto_log_hparams=False,
        save_folder=str(folder) if folder else None,
        save_interval="1ba",
        **more,
    )


def test_epochs_resume_and_evaluation(domains, tmp_path):
    whole = Tiny()
    run = trainer(domains, whole, tmp_path / "saved", max_duration="2ep")
    run.fit()
    assert int(run.state.timestamp.batch) == 34 and int(run.state.timestamp.sample) == 136
    assert int(run.state.timestamp.token) == 136 * SEQ
    assert Counter(whole.evaluated) == dict.fromkeys(range(101), 2)
    assert int(run.state.eval_metric_values["samples"]) == 101
    run.close()
    for epoch, batch in ((0, 4), (0, 8), (0, 17), (1, 25)):
        rest = Tiny()
        path = tmp_path / "saved" / f"ep{epoch}-ba{batch}-rank0.pt"
        again = trainer(domains, rest, None, max_duration="2ep", load_path=str(path))
        again.fit()
        assert int(again.state.timestamp.batch) == 34
        assert rest.trained == whole.trained[4 * batch :]
        again.close()
    state = torch.load(path, weights_only=False)["state"]["dataset_state"]["train"]
    assert state["position"] == 100 and state["sample_in_epoch"] == 32
