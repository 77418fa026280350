"""From folders of JSONL or Parquet to MDS: `python -m llmshearing.data.prepare --input DIR --tokenizer T --output DIR
...`

    input/<domain>/*.jsonl[.gz|.zst]  ->  output/{for_prune,for_ft,eval}/<domain>/   one MDS directory a
    domain
                                          output/eval_merge/                         all of eval in one
                                          output/manifest.json                       what was done with what

A document goes to the split that its text's hash says: no document, nor an exact copy of it, is in two
splits, and adding files moves none. Memory is bounded by the chunks in flight and one shard for each split.
A killed run leaves `.OUTPUT.partial`; the same command goes on after its last finished part of a domain.

Worker processes import this module again when it is the main one: it must need neither Streaming nor torch.
"""

import json
import logging
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmshearing import files as durable
from llmshearing.commands import run
from llmshearing.data.mds.manifest import FORMAT, MANIFEST, read_manifest, table
from llmshearing.data.prepare.encoding import WorkerDied
from llmshearing.data.prepare.forms import AUTO, find_forms, load_conversations
from llmshearing.data.prepare.inputs import describe_file, find_sources
from llmshearing.data.prepare.options import Options, parser, resolve_dtype
from llmshearing.data.prepare.packing import EVAL, EVAL_MERGE
from llmshearing.data.text.tokenizer import load_tokenizer
from llmshearing.errors import ShearingError
from llmshearing.progress import tqdm

log = logging.getLogger(__name__)

REQUEST = "request.json"


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
    processes: int = 1,
    remote: str | None = None,
    keep_local: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Prepare `output_dir` and return its manifest; `options` are the fields of `Options`.

    `processes` tokenize; the result does not depend on them. Everything is uploaded to `remote` too, part by part, the
    manifest last; without `keep_local` the training shards are then there alone. If `output_dir` already holds this
    very result, nothing is done. Raises ShearingError for bad input, an output that holds anything else, or a domain
    too small for one sequence in a split; nothing is left behind then. If it is killed, or the disk is full, finished
    parts stay in a hidden folder beside the output, and the same call goes on after them.
    """
    chosen = Options(max_seq_len=max_seq_len, **options)
    problems = chosen.problems()
    if processes < 1:
        problems.append(f"processes is {processes}; it must be at least 1")
    if not keep_local and remote is None:
        problems.append("without remote the shards have to be kept here; give one, or leave keep_local on")
    if problems:
        raise ShearingError("\n".join(problems))
    output = Path(output_dir)
    sources = find_sources(Path(input_dir), domains)
    if chosen.proportions is not None and set(chosen.proportions) != set(sources):
        raise ShearingError(f"proportions are of {sorted(chosen.proportions)}; the domains are {sorted(sources)}")
    encoder = load_tokenizer(tokenizer, bos_token, eos_token)
    dtype = resolve_dtype(chosen.dtype, encoder.vocab_size)
    forms = find_forms(sources, chosen.form, chosen.text_field)
    conversations = load_conversations(tokenizer, forms, eos_token)
    request = {
        "options": {key: value for key, value in asdict(chosen).items() if (key, value) != ("form", AUTO)},
        "tokenizer": encoder.fingerprint,
        "remote": remote,
        "sources": _describe(Path(input_dir), sources, progress),
    }
    if conversations is not None:
        request["chat_template"] = conversations.fingerprint
    if existing := _existing(output, request):
        log.info("nothing to do: %s already holds this data", output)
        return existing
    from llmshearing.data.mds.remote import Upload, UploadFailed
    from llmshearing.data.prepare.job import PROGRESS, Job

    partial = _partial(output, request)
    job = Job(partial, sources, encoder, chosen, dtype, processes, progress, remote, keep_local, forms, conversations)
    try:
        manifest = {"format": FORMAT, **job.run(), "request": request}
        durable.write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        Upload(partial, remote)([partial / MANIFEST])
        for name in (REQUEST, PROGRESS):
            (partial / name).unlink()
        durable.move(partial, output)  # an empty directory may be there
    except WorkerDied:
        raise
    except ShearingError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except (OSError, sqlite3.Error) as error:
        advice = "make room" if not isinstance(error, UploadFailed) else "see to the remote storage"
        raise ShearingError(
            f"writing {output} failed: {error}. Finished parts are kept in {partial}; "
            f"{advice} and run the same command again"
        ) from error
    log.info("%s", table(manifest))
    sequences = sum(n["sequences"] for domains in manifest["splits"].values() for n in domains.values())
    log.info("wrote %d sequences of %d tokens to %s", sequences, max_seq_len, remote or output)
    return manifest


def _partial(output: Path, request: dict[str, Any]) -> Path:
    """The folder to write in: that of an interrupted run of the same request, or a fresh one."""
    partial = output.parent / f".{output.name}.partial"
    try:
        same = json.loads((partial / REQUEST).read_text()) == request
    except (OSError, ValueError):
        same = False
    if same:
        log.info("going on where an interrupted run stopped")
        return partial
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    durable.write_text(partial / REQUEST, json.dumps(request))
    return partial


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
        manifest = read_manifest(output)
    except ShearingError as error:
        raise ShearingError(
            f"output {output} exists and is not prepared data; choose another --output\n{error}"
        ) from None
    defaults = asdict(Options(max_seq_len=0))  # of options that are younger than the data
    found = {"remote": None, **manifest["request"]}
    found["options"] = {**defaults, **found["options"]}
    request = {**request, "options": {**defaults, **request["options"]}}
    complete = all((output / split / d / "index.json").is_file() for split, d in _directories(manifest["splits"]))
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = vars(parser().parse_args(argv))
    if arguments["proportions"] is not None:
        arguments["proportions"] = dict(arguments["proportions"])
    required = [arguments.pop(name) for name in ("input", "tokenizer", "output", "max_seq_len")]

    def command() -> int:
        prepare(*required, progress=not arguments.pop("no_progress"), **arguments)
        return 0

    return run(command)

