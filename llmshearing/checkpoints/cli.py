"""The commands of the converters; `llmshearing.utils` has a shell for each, under the name that users know."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from llmshearing.checkpoints.arguments import parse_pairs
from llmshearing.checkpoints.checkpoint import is_checkpoint
from llmshearing.checkpoints.equality import compare
from llmshearing.checkpoints.folding import prune_and_save_model
from llmshearing.checkpoints.hf_read import hf_to_checkpoint
from llmshearing.checkpoints.hf_write import checkpoint_to_hf
from llmshearing.commands import parser, run

log = logging.getLogger(__name__)

FOLD = "prune_and_save_model"  # the one sub-command of post_pruning_processing
ABOUT_FOLD = "Fold the checkpoint of a pruning run into the compact model, pruned-<checkpoint> beside it."


def composer_to_hf(argv: Sequence[str] | None = None) -> int:
    """Convert, in the direction that the source says; the exit status."""
    said = _parser(
        "composer_to_hf",
        "Composer checkpoint -> Hugging Face directory, or Hugging Face directory or name -> Composer checkpoint.",
        "out/latest-rank0.pt out/hf-latest dtype=bfloat16 tokenizer=models/source\n"
        "models/source out/state_dict.pt",
    )
    conversion_options(said)
    options = said.parse_intermixed_args(argv)

    def convert() -> int:
        convert_plain(options, parse_pairs(options.pairs))
        return 0

    return run(convert)


def conversion_options(said: argparse.ArgumentParser) -> None:
    """What every conversion takes."""
    said.add_argument("source", help="checkpoint file (or its directory), or Hugging Face directory or name")
    said.add_argument("destination", help="directory to write, or .pt file")
    said.add_argument(
        "pairs",
        nargs="*",
        metavar="key=value",
        help="dtype=float32|float16|bfloat16 (default: as stored), tokenizer=DIR, model_class=, _name_or_path=; any "
        "other key (vocab_size=, ...) is checked against the model's config and may be left out",
    )
    said.add_argument("--max_shard_size", default="5GB", help="largest safetensors file (%(default)s)")
    said.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    said.add_argument(
        "--no-check", dest="check", action="store_false", help="do not load the result and compare it (parity.json)"
    )


def convert_plain(options: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Between Composer's checkpoints and Hugging Face directories; the source says the direction."""
    if is_checkpoint(options.source):
        checkpoint_to_hf(
            options.source, options.destination, given, max_shard_size=options.max_shard_size,
            overwrite=options.overwrite, check=options.check,
        )  # fmt: skip
    else:
        hf_to_checkpoint(options.source, options.destination, given, overwrite=options.overwrite)


def post_pruning_processing(argv: Sequence[str] | None = None) -> int:
    """Fold a pruning run's checkpoint; the exit status."""
    said = _parser(
        "post_pruning_processing",
        ABOUT_FOLD,
        f"{FOLD} out/latest-rank0.pt\n{FOLD} out/latest-rank0.pt vocab_size=32000 --output out/compact.pt",
    )
    said.add_argument("command", choices=[FOLD])
    return _fold(said, argv)


def fold(argv: Sequence[str]) -> int:
    """:func:`post_pruning_processing`, where the sub-command may be left out; the exit status."""
    prog = "llmshearing fold"
    examples = f"{prog} out/latest-rank0.pt\n{prog} out/latest-rank0.pt vocab_size=32000 --output out/compact.pt"
    return _fold(parser(prog, ABOUT_FOLD, examples), argv[1:] if argv[:1] == [FOLD] else argv)


def _fold(said: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    said.add_argument("model_path", help="checkpoint file, or its directory")
    said.add_argument(
        "pairs", nargs="*", metavar="key=value", help="facts of the compact model's config, to be checked"
    )
    said.add_argument("--output", help="file to write (default: pruned-<name> in the same directory)")
    said.add_argument(
        "--uniform", action="store_true", help="without a target shape: give every layer the layers' mean size"
    )
    said.add_argument(
        "--zero_closed_blocks",
        action="store_true",
        help="write a closed attention or MLP of a kept layer as zeros instead of refusing it",
    )
    said.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    options = said.parse_intermixed_args(argv)

    def process() -> int:
        prune_and_save_model(
            options.model_path,
            options.output,
            parse_pairs(options.pairs),
            uniform=options.uniform,
            zero_closed_blocks=options.zero_closed_blocks,
            overwrite=options.overwrite,
        )
        return 0

    return run(process)


def test_composer_hf_eq(argv: Sequence[str] | None = None) -> int:
    """Compare a Hugging Face model with a checkpoint; the exit status is 0 where they agree."""
    said = _parser(
        "test_composer_hf_eq",
        "Compare the log-probabilities and the tensors of a Hugging Face model and a Composer checkpoint.",
        "models/source out/state_dict.pt",
    )
    said.add_argument("hf", help="Hugging Face directory or name")
    said.add_argument("checkpoint", help="checkpoint file, or its directory")
    said.add_argument("--sequences", type=int, default=8, help="random sequences (%(default)s)")
    said.add_argument("--length", type=int, default=128, help="tokens in each (%(default)s)")
    said.add_argument("--tolerance", type=float, default=1e-4, help="nats, in float32 (%(default)s)")
    said.add_argument("--seed", type=int, default=0, help="of the token ids (%(default)s)")
    options = vars(said.parse_args(argv))

    def test() -> int:
        result = compare(options.pop("hf"), options.pop("checkpoint"), **options)
        log.info("tensors: %d of %d are equal bit by bit", result.tensors - len(result.unequal), result.tensors)
        for name in result.unequal[:8]:
            log.info("  differs: %s", name)
        verdict = "PASS" if result.passed else "FAIL"
        log.info(
            "%s: largest difference of a log-probability %.3g nats (tolerance %g), %d sequences of %d tokens",
            *(verdict, result.max_difference, result.tolerance, options["sequences"], options["length"]),
        )
        return 0 if result.passed else 1

    return run(test)


def _parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    command = f"python3 -m llmshearing.utils.{name}"
    return parser(command, description, "\n".join(f"{command} {example}" for example in examples.splitlines()))
