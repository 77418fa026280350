"""`manifest.json` of prepared data: what `prepare` records, what `train` checks, and the table of it."""

import json
from pathlib import Path
from typing import Any

from llmshearing.data.prepare.packing import ANSWERS, COUNTS
from llmshearing.data.text.codec import FILES, Codec
from llmshearing.data.text.lines import LINE, PLURALS
from llmshearing.errors import ShearingError
from llmshearing.files import is_count, is_plain_name

MANIFEST = "manifest.json"
FORMAT = "llmshearing-mds-1"
# What tokenizers are told apart by: words, spaces, digits, code, accents, other scripts
SAMPLE = (
    "The 3 quick-brown foxes' 1234567 jumps:\n\tif (x_1 >= 0.5) { return naïve[2]; }  中文 Привет ☃ http://a.b/c?d=e"
)


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of the data in `root`, its shape checked.

    Raises ShearingError, naming the file and what is wrong, if it is absent or not what `prepare` writes.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ShearingError(f"{path} does not exist, so {root} is not the output of llmshearing.data.prepare") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ShearingError(f"{path} cannot be read: {error!r}; copy it again or prepare the data again") from error
    if problems := _problems(manifest):
        lines = [f"{path}: {problem}" for problem in problems]
        raise ShearingError("\n".join([*lines, "copy it again or prepare the data again"]))
    return manifest


def _problems(manifest: Any) -> list[str]:
    if not isinstance(manifest, dict):
        return [f"it is a {type(manifest).__name__}, not an object"]
    said = [
        f"{key} is {manifest.get(key)!r}; a whole number above 0 is needed"
        for key in ("max_seq_len", "vocab_size")
        if not is_count(manifest.get(key)) or manifest[key] < 1
    ]
    splits = manifest.get("splits")
    if not isinstance(splits, dict) or not all(isinstance(domains, dict) for domains in splits.values()):
        return [*said, "splits is no object of objects"]
    for split, domains in splits.items():
        said += [f"{name!r} is no name of a folder" for name in (split, *domains) if not is_plain_name(name)]
        for domain, counts in domains.items():
            if not isinstance(counts, dict) or not all(is_count(counts.get(name)) for name in COUNTS):
                said.append(f"splits.{split}.{domain} lacks a number of {', '.join(COUNTS)}")
            elif any(name in counts for name in ANSWERS) and not all(is_count(counts.get(name)) for name in ANSWERS):
                said.append(f"splits.{split}.{domain} lacks a number of {', '.join(ANSWERS)}")
    request = manifest.get("request")
    if not isinstance(request, dict) or not isinstance(request.get("options"), dict):
        said.append("request has no options")
    return said + _left_out_problems(manifest)


def _left_out_problems(manifest: dict[str, Any]) -> list[str]:
    """Of the parts that only some manifests have: what was skipped, and what was there twice."""
    skipped, duplicates = (manifest.get(key, {}) for key in ("skipped", "duplicates"))
    if not isinstance(skipped, dict) or not isinstance(duplicates, dict):
        return ["skipped or duplicates is no object"]
    said = [f"skipped.{name} does not tell what and where" for name, n in skipped.items() if not _tells(n)]
    return said + [f"duplicates.{name} is no number" for name, n in duplicates.items() if not is_count(n)]


def _tells(skipped: Any) -> bool:
    if not isinstance(skipped, dict) or not isinstance(skipped.get("first"), list) or not skipped["first"]:
        return False
    kinds = skipped.get("what") or {LINE: skipped.get("count")}
    return isinstance(kinds, dict) and all(is_count(number) for number in kinds.values())


def check_model(root: Path, max_seq_len: int, vocab_size: int) -> None:
    """Raise ShearingError where data with a manifest are not for this sequence length and vocabulary.

    Data without one are checked as they are read.
    """
    if not (root / MANIFEST).is_file():
        return
    manifest, path = read_manifest(root), root / MANIFEST
    problems = []
    if manifest["max_seq_len"] != max_seq_len:
        problems.append(f"{path}: sequences are {manifest['max_seq_len']} tokens long, max_seq_len is {max_seq_len}")
    if manifest["vocab_size"] > vocab_size:
        problems.append(
            f"{path}: the tokenizer has {manifest['vocab_size']} ids, the model's vocab_size is {vocab_size}; "
            "prepare the data with the model's tokenizer"
        )
    if problems:
        raise ShearingError("\n".join(problems))


def check_tokenizer(root: Path, tokenizer: Path) -> None:
    """Raise ShearingError where the data's tokenizer gives other ids than that of the directory `tokenizer`.

    They are compared by what they do, on SAMPLE: equal tokenizers are stored in different ways. Nothing is compared
    where data or directory do not tell.
    """
    if not (root / MANIFEST).is_file() or not any((tokenizer / name).is_file() for name in FILES):
        return
    recorded = read_manifest(root).get("tokenizer_sample")
    if recorded is not None and recorded != Codec(tokenizer).encode([SAMPLE])[0]:
        raise ShearingError(
            f"{root / MANIFEST}: the data were prepared with another tokenizer than that of {tokenizer}: the same text "
            "gets other ids; prepare the data with the model's tokenizer"
        )


def table(manifest: dict[str, Any]) -> str:
    """What is in each split and domain, as text."""
    lines = [f"{'split':<12}{'domain':<20}{'documents':>12}{'tokens':>15}{'sequences':>12}{'bytes/token':>13}"]
    for split, domains in manifest["splits"].items():
        for domain, n in domains.items():
            ratio = n["bytes"] / max(1, n["tokens"])
            row = f"{n['documents']:>12,}{n['tokens']:>15,}{n['sequences']:>12,}{ratio:>13.2f}"
            lines.append(f"{split:<12}{domain:<20}{row}")
    for split, domains in manifest["splits"].items():
        masked = {name: n for name, n in domains.items() if ANSWERS[0] in n}
        lines += [f"answers in {split} {name}: {_answers(n, manifest)}" for name, n in masked.items()]
    for domain, n in manifest.get("skipped", {}).items():
        lines.append(f"skipped in {domain}: {_left_out(n)}, such as {n['first'][0]}")
    for domain, number in manifest.get("duplicates", {}).items():
        lines.append(f"duplicates left out of {domain}: {number:,}")
    return "\n".join(lines)


def _answers(n: dict[str, int], manifest: dict[str, Any]) -> str:
    """What a loss mask leaves, and which documents the borders of sequences cut."""
    share = n["answer_tokens"] / max(1, n["sequences"] * manifest["max_seq_len"])
    return (
        f"{n['answer_tokens']:,} tokens ({share:.1%}); {n['split_documents']:,} documents lie in more than one "
        f"sequence, {n['longer_documents']:,} of them longer than one; {n['unanswered_sequences']:,} sequences "
        "without an answer"
    )


def _left_out(skipped: dict[str, Any]) -> str:
    """As in `2 lines, 1 whole file`; older manifests know only how many lines and files together."""
    kinds = skipped.get("what") or {LINE: skipped["count"]}
    return ", ".join(f"{number:,} {kind if number == 1 else PLURALS.get(kind, kind)}" for kind, number in kinds.items())
