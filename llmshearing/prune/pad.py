"""A model whose layers differ in size -> a plain one: `python -m llmshearing.prune.pad --model DIR --output DIR`.

The result computes the same and loads without this package; all of its layers are as large as the largest was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llmshearing.checkpoints.hf_read import load_hf_weights
from llmshearing.checkpoints.hf_write import write_hf_directory
from llmshearing.checkpoints.output import check_directory
from llmshearing.commands import parser, run
from llmshearing.errors import ShearingError
from llmshearing.families.nonuniform.config import NonUniformConfig, config_of
from llmshearing.fold.padding import padded

EXAMPLE = "python -m llmshearing.prune.pad --model out/obs --output out/obs-plain"


def pad(model: Path | str, output: Path | str, *, overwrite: bool = False, check: bool = True) -> Path:
    """Write the uniform model. check: see :func:`llmshearing.checkpoints.hf_write.write_hf_directory`.

    Raises:
        ShearingError: the model cannot be loaded, its layers agree already, or the output is in use.
    """
    check_directory(Path(output), overwrite)
    weights, config = load_hf_weights(model)
    if not isinstance(config, NonUniformConfig):
        raise ShearingError(f"{model} has layers of one size already (model_type {config.model_type})")
    stored, values = padded(weights, config.to_dict())
    return write_hf_directory(
        stored, config_of(values), output, tokenizer=model, tokenizer_required=False, overwrite=overwrite, check=check
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    said = "Fill the smaller layers of a non-uniform model with zeros: the same function as a plain model."
    arguments = parser("python -m llmshearing.prune.pad", said, EXAMPLE)
    arguments.add_argument("--model", required=True, help="Hugging Face directory of a non-uniform model")
    arguments.add_argument("--output", required=True, help="directory to write")
    arguments.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    arguments.add_argument("--no-check", dest="check", action="store_false", help="do not compare what was written")
    options = vars(arguments.parse_args(argv))

    def command() -> int:
        pad(**options)
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
