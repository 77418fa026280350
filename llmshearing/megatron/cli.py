"""The command `llmshearing convert`: from one form of a model to another, Megatron's shards among them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmshearing.checkpoints.arguments import parse_pairs
from llmshearing.checkpoints.checkpoint import CheckpointInfo, is_checkpoint, read_checkpoint, save_checkpoint
from llmshearing.checkpoints.cli import conversion_options, convert_plain
from llmshearing.checkpoints.hf_config import read_config
from llmshearing.checkpoints.hf_read import DTYPES, check_given, read_hf
from llmshearing.checkpoints.hf_write import export_hf, refuse_masks
from llmshearing.checkpoints.output import check_directory, check_file
from llmshearing.commands import parser, run
from llmshearing.errors import ShearingError
from llmshearing.families.megatron import SPECS, Parallel
from llmshearing.gguf.convert import SUFFIX, export_gguf
from llmshearing.gguf.write import DTYPES as GGUF_DTYPES
from llmshearing.megatron.convert import read_megatron, write_megatron
from llmshearing.megatron.shards import check_output, is_shards
from llmshearing.megatron.stacked import is_stacked
from llmshearing.progress import tqdm
from llmshearing.storage import LazyTensors
from llmshearing.storage.dtypes import cast_lazily

CONFIG, TOKENS = "config", "vocab_size"
EXAMPLES = """
llmshearing convert out/latest-rank0.pt out/hf-latest dtype=bfloat16 tokenizer=models/source
llmshearing convert models/source out/state_dict.pt
llmshearing convert models/source out/model.gguf --dtype q8_0
llmshearing convert models/source out/shards --tp 8
llmshearing convert out/shards out/shards-tp2-pp4 --tp 2 --pp 4
llmshearing convert out/shards out/hf
llmshearing convert foreign/torch_dist out/hf config=models/source
"""


def convert(argv: Sequence[str] | None = None) -> int:
    """Convert, in the direction that the source and the options say; the exit status."""
    said = parser(
        "llmshearing convert",
        "Convert a model. Source: Hugging Face directory or name, checkpoint, or checkpoint of Megatron (shards of "
        "ranks, or torch_dist). Destination: shards where --tp or --pp is given; else a .pt or .gguf file by its name, "
        "or a Hugging Face directory.",
        EXAMPLES,
    )
    conversion_options(said)
    shards = said.add_argument_group("Megatron's shards")
    shards.add_argument("--tp", type=int, metavar="N", help="tensor-parallel ranks to write")
    shards.add_argument("--pp", type=int, metavar="N", help="pipeline stages to write")
    shards.add_argument(
        "--spec", choices=SPECS, help="names of modules to write: megatron-core's own, or Transformer Engine's (local, "
        "or as the source has them)"
    )  # fmt: skip
    file = said.add_argument_group("GGUF files, for llama.cpp")
    file.add_argument("--dtype", choices=GGUF_DTYPES, help="of matrices (default: as most are stored)")
    file.add_argument("--pre", metavar="NAME", help="llama.cpp's name for how the tokenizer splits text, where unknown")
    options = said.parse_intermixed_args(argv)

    def work() -> int:
        given = parse_pairs(options.pairs)
        writes = options.tp is not None or options.pp is not None
        writes_gguf = options.destination.endswith(SUFFIX)
        if not writes_gguf and (options.dtype or options.pre):
            raise ShearingError(f"--dtype and --pre are of files in {SUFFIX}; say dtype=float32|float16|bfloat16")
        if writes_gguf and writes:
            raise ShearingError(f"{options.destination} is one file: leave out --tp and --pp")
        if writes_gguf:
            _to_gguf(options, given)
        elif writes or is_megatron(options.source):
            _convert(options, given, writes)
        else:
            convert_plain(options, given)
        return 0

    return run(work)


def is_megatron(path: Path | str) -> bool:
    """Whether a path is a checkpoint of Megatron."""
    return is_shards(path) or is_stacked(path)


def _to_gguf(options: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Into a file for llama.cpp."""
    output = Path(options.destination)
    check_file(output, options.overwrite)
    if "dtype" in given:
        raise ShearingError(f"dtype={given['dtype']}: of a file in {SUFFIX}, say --dtype {'|'.join(GGUF_DTYPES)}")
    weights, info, _ = read_source(options.source, given)
    facts = {key: value for key, value in given.items() if key != CONFIG}
    export_gguf(
        weights, info, output, facts, where=str(options.source), dtype=options.dtype, pre=options.pre,
        overwrite=options.overwrite, check=options.check,
    )  # fmt: skip


def _convert(options: argparse.Namespace, given: Mapping[str, Any], writes: bool) -> None:
    """With shards on at least one side."""
    output = Path(options.destination)
    if writes:
        check_output(output, options.overwrite)
    elif output.suffix == ".pt":
        check_file(output, options.overwrite)
    else:
        check_directory(output, options.overwrite)
    if output.exists() and output.resolve() == Path(options.source).resolve():
        raise ShearingError(f"output {output} is the source; give another one")
    weights, info, spec = read_source(options.source, given)
    facts = {key: value for key, value in given.items() if key != CONFIG}
    check_given(facts, info.config, str(options.source))
    if writes:
        ranks, stages = (1 if number is None else number for number in (options.tp, options.pp))
        parallel = Parallel(ranks, stages, options.spec or spec)
        write_megatron(_in_dtype(weights, given), info, output, parallel, overwrite=options.overwrite)
    elif output.suffix == ".pt":
        _save(output, _in_dtype(weights, given), info)
    else:
        size, overwrite = options.max_shard_size, options.overwrite
        export_hf(
            weights, info, output, facts, where=str(options.source), max_shard_size=size, overwrite=overwrite,
            check=options.check,
        )  # fmt: skip


def read_source(source: str, given: Mapping[str, Any]) -> tuple[LazyTensors, CheckpointInfo, str]:
    """Tensors, what is known of the model, and the spec of its names in Megatron, of a model in any form."""
    if is_megatron(source):
        config = read_config(str(given[CONFIG])) if CONFIG in given else None
        weights, info, parallel = read_megatron(source, config=config, vocabulary=given.get(TOKENS))
        return weights, info, parallel.spec
    if CONFIG in given:
        raise ShearingError(f"{CONFIG}={given[CONFIG]} completes what Megatron's arguments tell; {source} has a config")
    if is_checkpoint(source):
        checkpoint = read_checkpoint(source, verify=False)  # each tensor is verified as it is read
        refuse_masks(checkpoint)
        return checkpoint.weights, checkpoint.info, SPECS[0]
    return *read_hf(source, given), SPECS[0]


def _in_dtype(weights: LazyTensors, given: Mapping[str, Any]) -> LazyTensors:
    if "dtype" not in given:
        return weights
    dtype = DTYPES[given["dtype"]]
    cast = {entry: cast_lazily(name, entry, dtype) for name, entry in reversed(weights.entries.items())}
    return LazyTensors({name: cast[entry] for name, entry in weights.entries.items()})


def _save(output: Path, weights: LazyTensors, info: CheckpointInfo) -> None:
    with tqdm(total=len(weights), desc="converting", unit="tensor") as bar:
        save_checkpoint(output, weights, info, progress=bar.update)
