"""The command: `llmshearing finetune MODEL [DATA ...] --output DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llmshearing.commands import parser, run
from llmshearing.finetune.options import AUTO, BF16, FLOAT32, SCHEDULES, LoraOptions, Options

EXAMPLES = """
python -m llmshearing.finetune out/small chats.jsonl --output out/chat --lora --eval_fraction 0.05
python -m llmshearing.finetune out/small corpus/ --output out/recovered --learning_rate 5e-5 --max_steps 1000
python -m llmshearing.finetune out/zeroed texts.jsonl --output out/small-trained
python -m llmshearing.finetune out/small --adapter out/adapter --output out/merged
"""
PLAIN = Options()


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    given = build_parser().parse_args(argv)

    def work() -> int:
        from llmshearing.finetune.run import Where, finetune  # brings torch and transformers, which help does without

        lora = LoraOptions(given.rank, given.alpha, given.lora_dropout, tuple(given.target_modules))
        shared = {name: getattr(given, name) for name in vars(PLAIN) if name != "lora"}
        where = Where(
            output=Path(given.output),
            tokenizer=given.tokenizer,
            adapter=Path(given.adapter) if given.adapter else None,
            save_adapter=Path(given.save_adapter) if given.save_adapter else None,
            held_out=tuple(given.eval),
            keep_shape=given.keep_shape,
            restart=given.restart,
            overwrite=given.overwrite,
        )
        finetune(given.model, given.data, Options(lora=lora if given.lora else None, **shared), where)
        return 0

    return run(work)


def build_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    said = (
        "Finetune a Hugging Face directory on text, prompts with completions, or chats, with the loss on the answers. "
        "A run that was killed goes on where the same command is given again."
    )
    command = parser("python -m llmshearing.finetune", said, EXAMPLES)
    command.add_argument("model", metavar="MODEL", help="Hugging Face directory or name")
    command.add_argument(
        "data", nargs="*", metavar="DATA",
        help="files ending in .jsonl, .json or .txt, or folders; none: merge --adapter, or fold a zeroed model",
    )  # fmt: skip
    command.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    command.add_argument("--tokenizer", metavar="DIR", help="in place of the model's own")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    command.add_argument("--restart", action="store_true", help="do not go on with an unfinished run")
    command.add_argument(
        "--keep_shape", action="store_true", help="write a zeroed model (prune --zero) as it is, do not fold it"
    )
    _lora(command.add_argument_group("LoRA"))
    _training(command.add_argument_group("training"))
    held = command.add_argument_group("what loss is measured on, before, during and after")
    held.add_argument("--eval", nargs="+", default=[], metavar="DATA", help="files as DATA")
    held.add_argument("--eval_fraction", type=float, default=0.0, help="or a part of the records, as 0.05")
    return command


def _lora(own: argparse._ArgumentGroup) -> None:
    default = LoraOptions()
    own.add_argument("--lora", action="store_true", help="train a low-rank difference, and merge it (needs peft)")
    own.add_argument("--rank", type=int, default=default.rank, help="of it (%(default)s)")
    own.add_argument("--alpha", type=float, default=default.alpha, help="it counts alpha / rank (%(default)s)")
    own.add_argument("--lora_dropout", type=float, default=default.dropout, help="of its inputs (%(default)s)")
    own.add_argument(
        "--target_modules", nargs="+", default=[], metavar="NAME",
        help="modules by name or end of name (default: every linear one inside the layers)",
    )  # fmt: skip
    own.add_argument("--adapter", metavar="DIR", help="an adapter of PEFT's for MODEL, to go on with or to merge")
    own.add_argument("--save_adapter", metavar="DIR", help="keep the adapter too")


def _training(own: argparse._ArgumentGroup) -> None:
    own.add_argument("--learning_rate", type=float, help="at its highest (default: 2e-4 with --lora, else 2e-5)")
    own.add_argument("--epochs", type=float, default=PLAIN.epochs, help="passes over the data (%(default)s)")
    own.add_argument("--max_steps", type=int, help="steps, in place of epochs")
    own.add_argument("--batch_size", type=int, default=PLAIN.batch_size, help="sequences on a process (%(default)s)")
    own.add_argument("--accumulate", type=int, default=PLAIN.accumulate, help="batches of a step (%(default)s)")
    own.add_argument("--max_length", type=int, help="tokens of the longest sequence (default: 1024, or the model's)")
    own.add_argument("--pad_multiple", type=int, default=PLAIN.pad_multiple, help="batches are as wide (%(default)s)")
    own.add_argument("--warmup", type=float, default=PLAIN.warmup, help="part of all steps (%(default)s)")
    own.add_argument("--schedule", choices=SCHEDULES, default=PLAIN.schedule, help="of the rate (%(default)s)")
    own.add_argument("--weight_decay", type=float, default=PLAIN.weight_decay, help="of AdamW (%(default)s)")
    own.add_argument("--clip", type=float, default=PLAIN.clip, help="largest norm of a gradient, 0: any (%(default)s)")
    own.add_argument(
        "--precision", choices=(AUTO, BF16, FLOAT32), default=PLAIN.precision,
        help="of the passes; auto: bf16 on GPUs that have it (%(default)s)",
    )  # fmt: skip
    own.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    own.add_argument("--save_every", type=int, default=PLAIN.save_every, help="steps to a checkpoint (%(default)s)")
    own.add_argument("--seed", type=int, default=PLAIN.seed, help="of order and adapters (%(default)s)")
    own.add_argument("--device", choices=(AUTO, "cpu"), default=AUTO, help="auto: GPUs where there are some")


if __name__ == "__main__":
    sys.exit(main())
