"""The Trainer of transformers on our examples: loss over answers, checkpoints that a killed run goes on from, progress.

    loss = - sum over answers of log p(token | those before) / number of answers in the step, on all processes

Checkpoints are whole once they hold the trainer's state, which is written last.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from llmshearing import files
from llmshearing.errors import ShearingError
from llmshearing.finetune.options import BF16, FLOAT32, Options
from llmshearing.finetune.records import IGNORED, Data, Examples, Padding
from llmshearing.progress import tqdm

log = logging.getLogger(__name__)

STATE, ABOUT = "trainer_state.json", "run.json"
KEPT = 2
"""Checkpoints: a kill while the newest is written leaves the one before."""
HELD_OUT = "eval_loss_of_answers"


# Loss --------------------------------------------------------------------------------------------------------------


def answer_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """- log p of each label that is learned, else 0: logits [B, T, V], labels [B, T] -> [B, T-1], float32 or wider."""
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(len(labels), -1)


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Their sum, divided by the number of answers in the whole step (None: in these logits)."""
    number = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return answer_losses(logits, labels).sum() / number


def sums_of(logits: Any, labels: Tensor) -> Tensor:
    """Sum and number of each sequence's losses: [B, 2]. What evaluation keeps in place of the logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.stack([answer_losses(logits, labels).sum(1), (labels[:, 1:] != IGNORED).sum(1)], 1)


def mean_loss(found: Any) -> dict[str, float]:
    """The mean over all answers, from :func:`sums_of` of all sequences."""
    total, number = found.predictions.astype("float64").sum(0)
    return {HELD_OUT: total / number}


# Runs --------------------------------------------------------------------------------------------------------------


def training_arguments(options: Options, folder: Path, steps: int, processes: int = 1) -> TrainingArguments:
    """Ours in transformers' names."""
    cpu = options.device == "cpu" or not torch.cuda.is_available()
    bf16 = options.precision == BF16 or (
        options.precision != FLOAT32 and not cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        bf16=bf16,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        learning_rate=options.rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=int(options.warmup * steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        max_steps=steps,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=KEPT,
        logging_strategy="steps",
        logging_steps=max(1, min(10, options.save_every)),
        seed=options.seed,
        data_seed=options.seed,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        include_for_metrics=[],
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )


def steps_of(options: Options, examples: int, processes: int) -> int:
    """Optimizer steps: as asked, or of so many epochs, each of which ends with a smaller step."""
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(examples / (options.batch_size * processes))
    return max(1, math.ceil(options.epochs * math.ceil(batches / options.accumulate)))


def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    options: Options,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A Trainer, not started."""
    longest = getattr(model.config, "max_position_embeddings", None)
    pad = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    if data.held_out:
        arguments.eval_strategy, arguments.eval_steps = "steps", options.save_every
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Examples(data.train),
        eval_dataset=Examples(data.held_out) if data.held_out else None,
        data_collator=Padding(pad, options.pad_multiple, longest),
        compute_loss_func=answer_loss,
        compute_metrics=mean_loss,
        preprocess_logits_for_metrics=sums_of,
        callbacks=[*callbacks, Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Progress(TrainerCallback):
    """One line for all steps, with the last loss; losses on what is held out in the log."""

    bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="finetuning", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **more: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        if state.is_world_process_zero and logs and HELD_OUT in logs:
            log.info("step %d of %d: held-out loss %.4f", state.global_step, state.max_steps, logs[HELD_OUT])

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.bar is not None:
            self.bar.close()


# Unfinished runs ---------------------------------------------------------------------------------------------------


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            json.loads((path / STATE).read_text())
        except (OSError, ValueError):
            continue
        return path
    return None


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def check_same_run(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was told otherwise.

    Raises:
        ShearingError: naming what differs, with both values.
    """
    try:
        earlier = json.loads((folder / ABOUT).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ShearingError(f"{folder / ABOUT} cannot be read: {error}; --restart begins anew") from error
    now = json.loads(json.dumps(about))
    differ = [
        f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) != now.get(key)
    ]
    if differ:
        raise ShearingError(
            f"{folder} holds an unfinished run that was told otherwise: {'; '.join(differ)}. Give it the same, or "
            "--restart to begin anew"
        )


def begin(folder: Path, about: Mapping[str, Any], restart: bool, first: bool = True) -> None:
    """The folder of a run's checkpoints, with what it was told; see :func:`check_same_run`.

    Args:
        first: whether this is the process that writes; the others compare.
    """
    if restart and first:
        shutil.rmtree(folder, ignore_errors=True)
    check_same_run(folder, about)
    if first:
        files.write_text(folder / ABOUT, json.dumps(dict(about), indent=1) + "\n")
