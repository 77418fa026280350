"""Give each domain's target loss: `python -m llmshearing.utils.target_loss {source,fit} ...`.

source  the losses of the source model: it is evaluated on the prepared data, or its evaluation is read from a file
fit     losses of models of several sizes, extrapolated to the target's (llmshearing/data/mixture/target_loss.py)

The last line of the output is a pair of overrides for the training command.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmshearing.commands import parser, run
from llmshearing.data.mds.manifest import read_manifest
from llmshearing.data.mixture.target_loss import fit, predict, read_models, source_losses
from llmshearing.data.prepare.packing import EVAL
from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)


def evaluated(model: Path, data: Path, split: str, set_names: Sequence[str] | None) -> tuple[list[str], list[float]]:
    """(set_names, losses) of a Hugging Face model on the merged evaluation split of prepared data.

    Raises ShearingError for data without a manifest, a model that cannot be loaded, or bad data.
    """
    import torch

    from llmshearing.checkpoints.hf_read import load_hf_model
    from llmshearing.training.evaluation import domain_losses, eval_batches

    manifest = read_manifest(data)
    names, length = list(set_names or manifest["splits"].get(EVAL, ())), manifest["max_seq_len"]
    loaded = load_hf_model(str(model), torch.float32)
    losses = domain_losses(loaded, eval_batches(str(data), split, names, length, loaded.config.vocab_size), names)
    return names, [losses[name] for name in names]


def _fitted(arguments: argparse.Namespace) -> tuple[list[str], list[float]]:
    sizes, names, losses = read_models(arguments.losses)
    curves = []
    for name, column in zip(names, losses.T, strict=True):
        try:
            curves.append(fit(sizes, column.tolist()))
        except ShearingError as error:
            raise ShearingError(f"domain {name}: {error}") from error
        rms = float(np.sqrt(np.mean([(predict(curves[-1], n) - x) ** 2 for n, x in zip(sizes, column, strict=True)])))
        log.info("%s: loss(N) = %.4g N^-%.4g + %.4g, off by %.2g (RMS)", name, *curves[-1], rms)
    if arguments.plot is not None:
        from llmshearing.data.plots import plot_fits

        plot_fits(arguments.plot, names, sizes, losses, curves, arguments.parameters)
        log.info("wrote the plot to %s", arguments.plot)
    return names, [predict(curve, arguments.parameters) for curve in curves]


def _source(arguments: argparse.Namespace) -> tuple[list[str], list[float]]:
    if (arguments.losses is None) == (arguments.model is None) or (arguments.model is None) != (arguments.data is None):
        raise ShearingError("give either --model with --data, or --losses with --set_names")
    if arguments.model is not None:
        return evaluated(arguments.model, arguments.data, arguments.split, arguments.set_names)
    if not arguments.set_names:
        raise ShearingError("--losses needs --set_names: the domains in the configuration's order")
    return arguments.set_names, source_losses(arguments.losses, arguments.set_names)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)

    def command() -> int:
        names, targets = _source(arguments) if arguments.kind == "source" else _fitted(arguments)
        listed = ",".join(f"{loss:.6g}" for loss in targets)
        key = "callbacks.data_loading"
        sys.stdout.write(f"{key}.set_names=[{','.join(names)}] {key}.target_loss=[{listed}]\n")
        return 0

    return run(command)


def _parser() -> argparse.ArgumentParser:
    command = "python -m llmshearing.utils.target_loss"
    said = "Give each domain's target loss, as overrides for the training command."
    options = parser(command, said, f"{command} fit --losses sizes.json --parameters 1.3e9 --plot fit.png")
    kinds = options.add_subparsers(dest="kind", required=True)
    source = kinds.add_parser("source", help="the source model's own losses")
    source.add_argument("--model", type=Path, help="Hugging Face directory to evaluate")
    source.add_argument("--data", type=Path, help="output of llmshearing.data.prepare to evaluate it on")
    source.add_argument("--split", default="eval_merge", help="merged evaluation split (default: %(default)s)")
    source.add_argument("--losses", type=Path, help="instead: JSON {domain: loss}, or a run's evaluations.jsonl")
    source.add_argument("--set_names", nargs="+", help="domains in the configuration's order (default: the data's)")
    fitted = kinds.add_parser("fit", help="from losses of models of several sizes")
    form = 'JSON list of {"parameters": N, "losses": {domain: loss}}'
    fitted.add_argument("--losses", type=Path, required=True, help=form)
    fitted.add_argument("--parameters", type=float, required=True, help="of the pruned model, e.g. 1.3e9")
    fitted.add_argument("--plot", type=Path, help="PNG to write (needs matplotlib)")
    return options


if __name__ == "__main__":
    sys.exit(main())
