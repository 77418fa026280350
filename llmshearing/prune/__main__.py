"""The command: `python -m llmshearing.prune METHOD --model HF_DIR --output DIR --target ...`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from llmshearing.checkpoints.arguments import parse_pairs
from llmshearing.commands import parser, run
from llmshearing.errors import ShearingError
from llmshearing.families.family import EXAMPLE, KEYS
from llmshearing.families.names import GROUPS, HEADS, HIDDEN, INTERMEDIATE
from llmshearing.families.readers import READERS
from llmshearing.prune.calibration import SequenceOptions
from llmshearing.prune.methods import METHODS
from llmshearing.prune.readers import check_target, lines_of
from llmshearing.prune.run import plan_of, prune
from llmshearing.prune.shards import BALANCE, OF_SHARDS, UNBALANCE, prune_shards, replay_shards
from llmshearing.prune.targets import DROP, RATIO

REPLAY = "replay"
# Names of a target in earlier scripts for Megatron -> size.
REMAIN = {
    "hidden_size_remain": HIDDEN,
    "num_attention_heads_remain": HEADS,
    "num_query_groups_remain": GROUPS,
    "ffn_hidden_size_remain": INTERMEDIATE,
}
PRUNE_TYPE: dict[str, Any] = {
    "choices": [BALANCE, UNBALANCE],
    "default": BALANCE,
    "help": "balance: every rank keeps equally many units; else the result is of one rank (%(default)s)",
}
CONFIG_HELP = "Hugging Face directory whose config completes Megatron's arguments"
EXAMPLES = f"""
python -m llmshearing.prune random --model models/source --output out/random \\
    --target {' '.join(f'{key}={size}' for key, size in EXAMPLE.items())} --tp 2
python -m llmshearing.prune activation --model models/source --output out/narrow --ratio 0.25 --calibration data/mds
python -m llmshearing.prune random --megatron out/shards --output out/small-shards --hidden_size_remain 192 \\
    --num_attention_heads_remain 6 --ffn_hidden_size_remain 512 --drop_layers 3 4
python -m llmshearing.prune replay --megatron out/shards --output out/again --selection out/random/selection.safetensors
python -m llmshearing.prune depth --model out/narrow --output out/small --drop_layers 3 4
python -m llmshearing.prune depth --model models/other --output out/other --delete_layer_num 2 \\
    --model_decoder_layers model.decoder.layers --calibration text.txt
"""


def build_parser() -> argparse.ArgumentParser:
    """A subcommand for each method."""
    said = "Prune a Hugging Face model in one shot and write the result as one."
    whole = parser("python -m llmshearing.prune", said, EXAMPLES)
    commands = whole.add_subparsers(dest="method", required=True, metavar="METHOD")
    for method in METHODS.values():
        command = commands.add_parser(
            method.name,
            help=method.help,
            description=f"{method.help}. Can change: {', '.join(method.sizes)}.",
            epilog=whole.epilog,
            formatter_class=whole.formatter_class,
        )
        _common(command)
        own = command.add_argument_group(f"options of {method.name}")
        if method.any_decoder:
            own.add_argument("--delete_layer_num", type=int, metavar="K", help="layers to drop, in place of a target")
        if method.add_options is not None:
            method.add_options(own)  # type: ignore[arg-type]
        if method.name in OF_SHARDS:
            _of_shards(command)
    again = commands.add_parser(
        REPLAY,
        help="cut Megatron's shards by a selection that was saved before",
        epilog=whole.epilog,
        formatter_class=whole.formatter_class,
    )
    again.add_argument("--megatron", "--load", required=True, metavar="DIR", help="Megatron's checkpoint")
    again.add_argument("--output", "--save", required=True, help="directory to write")
    again.add_argument("--selection", required=True, metavar="FILE", help="selection.safetensors of any method")
    again.add_argument("--prune_type", **PRUNE_TYPE)
    again.add_argument("--config", metavar="DIR", help=CONFIG_HELP)
    again.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    return whole


def _of_shards(command: argparse.ArgumentParser) -> None:
    """Options for Megatron's shards, by the names of earlier scripts too."""
    own = command.add_argument_group("Megatron's shards in and out, in place of --model")
    own.add_argument("--megatron", "--load", metavar="DIR", help="Megatron's checkpoint; the output is one")
    own.add_argument("--prune_type", **PRUNE_TYPE)
    own.add_argument("--config", metavar="DIR", help=CONFIG_HELP)
    own.add_argument("--tokenizer", metavar="DIR", help="for calibration by text (default: what the shards tell)")
    for option, size in REMAIN.items():
        names = [f"--{option}", *(["--intermediate_size_remain"] if size == INTERMEDIATE else [])]
        own.add_argument(*names, type=int, metavar="N", dest=option, help=f"target: {size} that stay")


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="Hugging Face directory, or name on the hub")
    command.add_argument("--output", "--save", required=True, help="directory to write")
    command.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="shape in the config's keys, or a JSON or YAML file with such keys; absent keys stay",
    )
    command.add_argument("--ratio", type=float, help="in place of a target: part of what is cut to remove, as 0.25")
    command.add_argument("--drop_layers", type=int, nargs="+", metavar="N", help="layers to drop, by number from 0")
    command.add_argument("--calibration", metavar="PATH", help="MDS data of the data command, JSONL, or plain text")
    command.add_argument("--samples", type=int, default=64, help="sequences to choose by (%(default)s)")
    command.add_argument(
        "--report_samples", type=int, default=64, help="other sequences, to measure perplexity on (%(default)s)"
    )
    command.add_argument("--max_seq_len", type=int, help="tokens (default: what MDS data has, else 512)")
    command.add_argument("--batch_size", type=int, default=4, help="sequences at once (%(default)s)")
    command.add_argument("--select_split", default="for_prune", help="of MDS data, to choose by (%(default)s)")
    command.add_argument("--report_split", default="eval_merge", help="of MDS data, to report on (%(default)s)")
    command.add_argument("--text_field", default="text", help="of JSONL (%(default)s)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    command.add_argument("--save_gpu_memory", action="store_true", help="have one layer at a time on the device")
    command.add_argument("--pad", action="store_true", help="fill layers of unequal sizes with zeros to the largest")
    command.add_argument(
        "--zero", action="store_true", help="write zeros in the source's shape, to be finetuned before it is folded"
    )
    command.add_argument("--refit", action="store_true", help="fit what stays to what the source says, in closed form")
    command.add_argument(
        "--refit_ridge", type=float, default=0.1, help="how much a refit holds on to the cut tensors (%(default)s)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    command.add_argument(
        "--no-check", dest="check", action="store_false", help="do not load the result and compare it (parity.json)"
    )
    command.add_argument(
        "--readers", nargs="+", default=[], choices=tuple(READERS), metavar="NAME",
        help=f"refuse a target that one of these programs would not read: {', '.join(READERS)}",
    )  # fmt: skip
    command.add_argument("--dry-run", action="store_true", help="say the target and who would read it, then stop")


def read_target(options: dict[str, Any]) -> dict[str, Any]:
    """Take the target out of the command line's values.

    Raises:
        ShearingError: a file cannot be read or holds no keys; a key is given twice; or nothing is asked for.
    """
    texts = options.pop("target")
    files = [text for text in texts if "=" not in text]
    target = parse_pairs(text for text in texts if "=" in text)
    extra = {key: options.pop(key, None) for key in (RATIO, DROP, "delete_layer_num")}
    extra |= {KEYS[size]: options.pop(option, None) for option, size in REMAIN.items()}
    parts = [*(_read_file(Path(file)) for file in files), {k: v for k, v in extra.items() if v is not None}]
    for part in parts:
        if both := sorted(set(part) & set(target)):
            raise ShearingError(f"target key {', '.join(both)} is given twice")
        target |= part
    if not target and METHODS[options["method"]].sizes:
        raise ShearingError("nothing to prune: give --target key=value ..., --target FILE, --ratio or --drop_layers")
    return target


def _read_file(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ShearingError(f"target {path} is no key=value, and cannot be read as a file: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ShearingError(f"target {path} must hold keys and values, such as {json.dumps(EXAMPLE)}")
    return loaded


def _check_source(options: dict[str, Any]) -> None:
    """Refuse a command line without a source or with two, and options of the other source.

    Raises:
        ShearingError: naming the options.
    """
    if (options["model"] is None) == (options.get("megatron") is None):
        either = " or --megatron DIR" if options["method"] in OF_SHARDS else ""
        raise ShearingError(f"give one source: --model DIR{either}")
    ignored = ["pad", "zero", "save_gpu_memory"] if options["model"] is None else ["config", "tokenizer"]
    if given := [f"--{key}" for key in ignored if options.get(key)]:
        raise ShearingError(f"{', '.join(given)}: not for {'shards' if options['model'] is None else '--model'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    options = vars(build_parser().parse_args(argv))
    return run(lambda: _work(options))


def _work(options: dict[str, Any]) -> int:
    method = options["method"]
    if method == REPLAY:
        del options["method"]
        replay_shards(options.pop("megatron"), options.pop("output"), options.pop("selection"), **options)
        return 0
    _check_source(options)
    target = read_target(options)
    sequences = SequenceOptions(**{field.name: options.pop(field.name) for field in fields(SequenceOptions)})
    del options["method"]
    model, shards = options.pop("model"), options.pop("megatron", None)
    dry_run, readers = options.pop("dry_run"), options.pop("readers")
    if (dry_run or readers) and model is None:
        raise ShearingError("--dry-run and --readers: not for shards; say --model")
    others = ("pad", "zero", "save_gpu_memory", "check") if model is None else ("prune_type", "config", "tokenizer")
    options = {key: value for key, value in options.items() if key not in others}
    if model is None:
        if options.pop("refit", False):
            raise ShearingError("--refit with --megatron: shards are cut only; convert, refit and convert back")
        options.pop("refit_ridge", None)
        prune_shards(method, shards, target=target, sequences=sequences, **options)
    else:
        plan = plan_of(method, model, target, options)
        check_target(plan, readers)
        if dry_run:
            sys.stdout.write("\n".join(lines_of(plan, readers)) + "\n")
            return 0
        prune(method, model, target=target, sequences=sequences, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
