"""From folders of JSONL to MDS: `python -m llmshearing.data.prepare --input DIR --tokenizer T --output DIR
...`

    input/<domain>/*.jsonl[.gz|.zst]  ->  output/{for_prune,for_ft,eval}/<domain>/   one MDS directory a
    domain
                                          output/eval_merge/                         all of eval in one
                                          output/manifest.json                       what was done with what

A document goes to the split that its text's hash says: no document, nor an exact copy of it, is in two
splits, and adding files moves none. Memory is bounded by one batch of documents and one shard for each split.
"""

import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streaming import MDSWriter
from tqdm import tqdm

from llmshearing.data.options import Options, parser, resolve_dtype
from llmshearing.data.packing import EVAL, EVAL_MERGE, Packer, open_writer, split_of
from llmshearing.data.sources import describe_file, find_sources, read_documents
from llmshearing.data.tokenizer import TextTokenizer, load_tokenizer
from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = "llmshearing-mds-1"
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 1 << 22  # encoded at once


def prepare(
    input_dir: Path | str,
    tokenizer: Path | str,
    output_dir: Path | str,
    max_seq_len: int,
    *,
    domains: Sequence[str] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Prepare `output_dir` and return its manifest; `options` are the fields of `Options`.

    If `output_dir` already holds this very result, nothing is done. Raises ShearingError for bad input, an
    output that holds anything else, or a domain too small for one sequence in a split; nothing is left behind
    then.
    """
    chosen = Options(max_seq_len=max_seq_len, **options)
    if problems := chosen.problems():
        raise ShearingError("\n".join(problems))
    output = Path(output_dir)
    sources = find_sources(Path(input_dir), domains)
    encoder = load_tokenizer(tokenizer, bos_token, eos_token)
    dtype = resolve_dtype(chosen.dtype, encoder.vocab_size)
    request = {
        "options": asdict(chosen),
        "tokenizer": encoder.fingerprint,
        "sources": _describe(Path(input_dir), sources, progress),
    }
    if existing := _existing(output, request):
        log.info("nothing to do: %s already holds this data", output)
        return existing
    partial = output.parent / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        manifest = _write(partial, sources, encoder, chosen, dtype, progress)
        manifest = {"format": FORMAT, **manifest, "request": request}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        partial.rename(output)  # an empty directory may be there
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    log.info("%s", table(manifest))
    sequences = sum(n["sequences"] for domains in manifest["splits"].values() for n in domains.values())
    log.info("wrote %d sequences of %d tokens to %s", sequences, max_seq_len, output)
    return manifest


def _describe(root: Path, sources: dict[str, list[Path]], progress: bool) -> dict[str, dict[str, Any]]:
    with _bar("hashing input", sources, progress) as bar:
        return {
            domain: {str(path.relative_to(root / domain)): describe_file(path, bar.update) for path in files}
            for domain, files in sources.items()
        }


def _bar(title: str, sources: dict[str, list[Path]], progress: bool) -> tqdm:
    total = sum(path.stat().st_size for files in sources.values() for path in files)
    return tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=not progress, mininterval=0.5)


def _existing(output: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if `output` holds the result of `request`; None if there is nothing; else
    ShearingError."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        manifest = json.loads((output / MANIFEST).read_text())
        found = dict(manifest["request"])
        complete = all((output / split / d / "index.json").is_file() for split, d in _directories(manifest["splits"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ShearingError(f"output {output} exists and is not prepared data; choose another --output") from None
    if found == request and complete:
        return manifest
    changed = [key for key in request if found.get(key) != request[key]]
    changed += [k for k, v in request["options"].items() if found.get("options", {}).get(k) != v]
    what = f"was prepared with other {', '.join(changed)}" if changed else "is incomplete"
    raise ShearingError(f"output {output} exists and {what}; remove it or choose another --output")


def _directories(splits: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """(split, domain) of every MDS directory; the merged one has no domain."""
    found = [(split, domain) for split, domains in splits.items() for domain in domains]
    return found + [(EVAL_MERGE, "")] if EVAL in splits else found


def _write(
    root: Path,
    sources: dict[str, list[Path]],
    encoder: TextTokenizer,
    options: Options,
    dtype: str,
    progress: bool,
) -> dict[str, Any]:
    """Write every split under `root`; returns the manifest without its request."""
    shape = (options.max_seq_len, dtype, options.shard_size)
    merged = open_writer(root / EVAL_MERGE, *shape) if options.eval_fraction > 1e-9 else None
    splits: dict[str, dict[str, Any]] = {split: {} for split in options.fractions()}
    problems: list[str] = []
    largest = 0
    with _bar("preparing", sources, progress) as bar:
        for domain, files in sources.items():
            packers = _packers(root, domain, encoder, options, shape, merged)
            bar.set_postfix_str(domain)
            for texts in _batches(files, options.text_field, problems, bar):
                if not problems:
                    _add(packers, texts, encoder, options)
                if all(packer.full for packer in packers.values()):
                    break
            for split, packer in packers.items():
                packer.writers[0].finish()
                splits[split][domain] = packer.counts()
                largest = max(largest, packer.max_token_id)
    if merged is not None:
        merged.finish()
    problems = problems or _too_small(splits, options)
    if problems:
        raise ShearingError("\n".join(problems))
    return {
        "max_seq_len": options.max_seq_len,
        "dtype": dtype,
        "vocab_size": encoder.vocab_size,
        "bos_id": encoder.bos_id,
        "eos_id": encoder.eos_id,
        "max_token_id": largest,
        "seed": options.seed,
        "tokenizer_fingerprint": encoder.fingerprint,
        "splits": splits,
    }


def _packers(
    root: Path,
    domain: str,
    encoder: TextTokenizer,
    options: Options,
    shape: tuple[int, str, str],
    merged: MDSWriter | None,
) -> dict[str, Packer]:
    packers = {}
    for split in options.fractions():
        writers = [open_writer(root / split / domain, *shape)]
        if split == EVAL and merged is not None:
            writers.append(merged)
        limit = options.limits()[split]
        packers[split] = Packer(domain, writers, *shape[:2], encoder.bos_id, encoder.eos_id, limit)
    return packers


def _batches(files: list[Path], field: str, problems: list[str], bar: tqdm) -> Iterator[list[str]]:
    """Texts of all files in turn, in batches bounded by number and length."""
    texts, characters = [], 0
    for path in files:
        for text in read_documents(path, field, problems, bar.update):
            texts.append(text)
            characters += len(text)
            if len(texts) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield texts
                texts, characters = [], 0
    if texts:
        yield texts


def _add(packers: dict[str, Packer], texts: list[str], encoder: TextTokenizer, options: Options) -> None:
    by_split: dict[str, list[str]] = {}
    for text in texts:
        split = split_of(text, options.seed, options.eval_fraction, options.for_prune_fraction)
        by_split.setdefault(split, []).append(text)
    for split, mine in by_split.items():
        if split in packers and not packers[split].full:
            packers[split].add(mine, encoder.encode(mine))


def _too_small(splits: dict[str, dict[str, Any]], options: Options) -> list[str]:
    advice = "add documents, raise the split's fraction or lower --max_seq_len"
    return [
        f"domain {domain!r} has {n['tokens']} tokens ({n['documents']} documents) in split {split}, "
        f"less than one sequence of {options.max_seq_len}; {advice}"
        for split, domains in splits.items()
        for domain, n in domains.items()
        if n["sequences"] == 0
    ]


def table(manifest: dict[str, Any]) -> str:
    """What is in each split and domain, as text."""
    lines = [f"{'split':<12}{'domain':<20}{'documents':>12}{'tokens':>15}{'sequences':>12}{'bytes/token':>13}"]
    for split, domains in manifest["splits"].items():
        for domain, n in domains.items():
            ratio = n["bytes"] / max(1, n["tokens"])
            row = f"{n['documents']:>12,}{n['tokens']:>15,}{n['sequences']:>12,}{ratio:>13.2f}"
            lines.append(f"{split:<12}{domain:<20}{row}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = vars(parser().parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    required = [arguments.pop(name) for name in ("input", "tokenizer", "output", "max_seq_len")]
    try:
        prepare(*required, progress=not arguments.pop("no_progress"), **arguments)
    except (ShearingError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
