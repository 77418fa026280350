"""The command: `llmshearing evaluate MODEL [MODEL ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llmshearing.commands import parser, run
from llmshearing.evaluate.lm_eval_tasks import shipped
from llmshearing.evaluate.perplexity import BOS, WIDEST, LossOptions
from llmshearing.evaluate.results import table
from llmshearing.evaluate.run import Options, evaluate
from llmshearing.evaluate.speed import SpeedOptions

EXAMPLES = """
python -m llmshearing.evaluate out/small --source models/source --data data/mds --output out/evaluation
python -m llmshearing.evaluate models/source out/a out/b --data books.jsonl web/ --tasks arc_easy=arc_easy.jsonl
python -m llmshearing.evaluate out/prune/latest-rank0.pt --data corpus --bos always --window 512 --stride 256
python -m llmshearing.evaluate out/small --tasks hellaswag piqa my_task.yaml=items.jsonl --limit 200 --no_speed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    said = "Judge models side by side: loss by domain, tasks, size, FLOPs, speed. Checkpoints are models too."
    command = parser("python -m llmshearing.evaluate", said, EXAMPLES)
    command.add_argument("models", nargs="+", metavar="MODEL", help="Hugging Face directory or name, or checkpoint")
    command.add_argument("--source", help="model that the others were made from; it is evaluated too")
    command.add_argument("--output", help="directory for evaluation.json, .csv and .png")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation")
    command.add_argument("--tokenizer", help="directory or name, in place of each model's own")
    command.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    command.add_argument("--batch_size", type=int, default=8, help="windows or items at once (%(default)s)")
    loss = command.add_argument_group("loss")
    loss.add_argument("--data", nargs="+", default=[], metavar="PATH", help="MDS data, or text: files, or folders")
    loss.add_argument("--split", help="of prepared data (default: eval_merge)")
    loss.add_argument("--text_field", default="text", help="of JSONL and Parquet (%(default)s)")
    loss.add_argument("--window", type=int, help=f"tokens seen at once (MDS: its own, else {WIDEST} or the longest)")
    loss.add_argument("--stride", type=int, help="tokens from one window's end to the next (half a window)")
    loss.add_argument("--bos", choices=BOS, default="auto", help="BOS before each document: auto asks the tokenizer")
    loss.add_argument("--documents", type=int, help="at most so many of each domain")
    tasks = command.add_argument_group("tasks (lm-eval)")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help=f"NAME=FILE.jsonl of local items ({', '.join(shipped())}), FILE.yaml[=FILE.jsonl], or a name of lm-eval's",
    )
    tasks.add_argument("--limit", type=int, help="items of each task, from the first")
    tasks.add_argument("--num_fewshot", type=int, help="examples before each item (default: what the task says)")
    speed = command.add_argument_group("speed")
    speed.add_argument("--no_speed", action="store_true", help="do not measure it")
    speed.add_argument("--prompt", type=int, default=256, help="tokens read (%(default)s)")
    speed.add_argument("--generate", type=int, default=32, help="tokens written (%(default)s)")
    speed.add_argument("--speed_batch", type=int, default=1, help="sequences at once (%(default)s)")
    speed.add_argument("--rounds", type=int, default=5, help="repetitions, in turn over the models (%(default)s)")
    command.add_argument("--flops_length", type=int, help="tokens of the sequence that FLOPs are told for")
    given = command.parse_args(argv)

    def work() -> int:
        options = Options(
            source=given.source,
            data=given.data,
            text_field=given.text_field,
            split=given.split,
            loss=LossOptions(given.window, given.stride, given.bos, given.batch_size, given.documents),
            tasks=given.tasks,
            limit=given.limit,
            num_fewshot=given.num_fewshot,
            speed=None
            if given.no_speed
            else SpeedOptions(given.prompt, given.generate, given.speed_batch, given.rounds),
            tokenizer=given.tokenizer,
            dtype=given.dtype,
            device=given.device,
            length=given.flops_length,
        )
        result = evaluate(given.models, options, given.output, overwrite=given.overwrite)
        sys.stdout.write(f"{table(result)}\n")
        return 0

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
