"""Build a small corpus of five real-text domains from what pip and Python have already put on this machine.

    DIR/<domain>/00000.jsonl      one {"text": ...} a line, pieces of at most 8 kB, no piece twice

| domain | text |
|---|---|
| `api`  | descriptions of web services: botocore's JSON files (they arrive with mosaicml-streaming), HTML taken out |
| `code` | Python's standard library |
| `cpp`  | the C and C++ headers in torch/include, generated ones left out |
| `docs` | docstrings of torch, transformers, numpy, ..., read with `ast`, nothing imported |
| `text` | prose beside the packages: long descriptions, changelogs, licences, the Python language reference |

Sources are visited in the order of the hash of their names, so that a limit takes a bit of everything and the result
depends on nothing but the installed versions. Nothing is downloaded, and the corpus is not redistributed.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import logging
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)

PIECE_BYTES = 8_000
"""Longest piece. Small enough that a split by document leaves many documents on each side."""
DEFAULT_LIMIT_MB = 5.0
MIN_MB = 1.0
"""A domain below this (or below the limit, if that is smaller) is an error, not a quiet surprise in training."""
DOCUMENTED = (
    "torch", "transformers", "numpy", "sympy", "networkx", "matplotlib", "torchmetrics", "composer", "streaming",
    "huggingface_hub", "tokenizers", "torchvision", "PIL", "pydantic", "botocore", "fsspec", "jinja2", "rich",
)  # fmt: skip
PROSE = re.compile(r"(licen[cs]e|notice|copying|authors|changelog|readme)[^/]*$|\.(rst|md)$", re.IGNORECASE)
SKIPPED_CODE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


def name_hash(path: Path, root: Path) -> bytes:
    """sha256 of the path below `root`: sorting by it mixes, and in the same way on every machine."""
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()


def by_hash(paths: Iterable[Path], root: Path) -> list[Path]:
    return sorted(paths, key=lambda path: name_hash(path, root))


def package_dir(name: str) -> Path | None:
    """Folder of an installed package without importing it; None where it is missing."""
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def read(path: Path) -> str:
    """Text of a file; an empty string for what is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return "" if "\0" in text else text


# --- one generator a domain, each yielding whole texts ---------------------------------------------------------------


def code() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not SKIPPED_CODE & set(p.relative_to(root).parts)]
    yield from map(read, by_hash(files, root))


def cpp() -> Iterator[str]:
    torch = package_dir("torch")
    root = torch / "include" if torch else Path("no-torch")
    files = [p for p in root.rglob("*.h") if "ops" not in p.relative_to(root).parts[:-1]]
    yield from (text for text in map(read, by_hash(files, root)) if "@generated" not in text)


def docs() -> Iterator[str]:
    roots = filter(None, map(package_dir, DOCUMENTED))
    files = [(p, root.parent) for root in roots for p in root.rglob("*.py") if not {"tests", "testing"} & set(p.parts)]
    for path, _ in sorted(files, key=lambda item: name_hash(*item)):
        yield "\n\n\n".join(docstrings(read(path)))


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of at least 200 characters, each under the `def` or `class` line's name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= 200:
                yield f"{node.name}\n\n{docstring}"


def api() -> Iterator[str]:
    root = (package_dir("botocore") or Path("no-botocore")) / "data"
    newest = {path.parent.parent: path for path in sorted(root.glob("*/*/service-2.json*"))}
    for path in by_hash(newest.values(), root):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        yield "\n\n".join(service_paragraphs(json.loads(raw)))


def service_paragraphs(service: dict[str, Any]) -> Iterator[str]:
    """A service's description, then its operations and the members of its shapes, one paragraph each."""
    yield f"{service['metadata'].get('serviceFullName', '')}\n\n{plain(service.get('documentation', ''))}"
    for name, operation in service.get("operations", {}).items():
        yield f"{name}: {plain(operation.get('documentation', ''))}"
    for name, shape in service.get("shapes", {}).items():
        for member, reference in shape.get("members", {}).items():
            described = plain(reference.get("documentation", ""))
            if len(described) >= 80:  # "The ARN of the job." a thousand times teaches nothing
                yield f"{name}.{member}: {described}"


def plain(markup: str) -> str:
    """HTML to text: items become lines starting with a dash, paragraphs lines, other tags vanish."""
    text = re.sub(r"<li>\s*", "\n- ", markup)
    text = re.sub(r"</p>|<br\s*/?>|</h\d>|</dt>|</dd>", "\n", text)
    lines = (" ".join(line.split()) for line in html.unescape(re.sub(r"<[^>]+>", "", text)).split("\n"))
    return "\n".join(line for line in lines if line and line != "-")


def text() -> Iterator[str]:
    yield from python_reference()
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: (d.name or "").lower()):
        body = distribution.metadata.get_payload() or distribution.metadata.get("Description", "")
        yield str(body)
        for file in sorted(map(str, distribution.files or [])):
            if PROSE.search(file) and not file.endswith((".py", ".pyc", ".json")):
                yield read(Path(str(distribution.locate_file(file))))


def python_reference() -> Iterator[str]:
    """The Python language reference: the dictionary of topics in `pydoc_data/topics.py`."""
    topics = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if topics.is_file():
        tree = ast.parse(read(topics))
        found = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        yield from (topic for topic in found if len(topic) > 200)


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {"api": api, "code": code, "cpp": cpp, "docs": docs, "text": text}


# --- pieces and files ------------------------------------------------------------------------------------------------


def pieces(document: str) -> Iterator[str]:
    """Cut at blank lines (else at line ends) into pieces of at most PIECE_BYTES; lines of 2 kB are data, not text."""
    piece: list[str] = []
    size = 0
    for block in re.split(r"(?<=\n)\n+(?=\S)", document.replace("\r\n", "\n")):
        parts = [block + "\n"] if len(block.encode()) < PIECE_BYTES // 2 else block.splitlines(keepends=True)
        for part in parts:
            if (length := len(part.encode())) >= PIECE_BYTES // 2 or max(map(len, part.split("\n"))) >= 2000:
                continue
            if size + length > PIECE_BYTES:
                yield "".join(piece).strip()
                piece, size = [], 0
            piece.append(part)
            size += length
    yield "".join(piece).strip()


def fresh_blocks(document: str, seen: set[bytes]) -> str:
    """The document without the long paragraphs that an earlier document had (licences, inherited docstrings)."""
    kept = []
    for block in document.split("\n\n"):
        digest = hashlib.sha256(" ".join(block.split()).encode("utf-8", "replace")).digest()
        if len(block) < 120 or digest not in seen:
            kept.append(block)
        seen.add(digest)
    return "\n\n".join(kept)


def build_domain(name: str, limit: int) -> list[str]:
    """Pieces of one domain, at most `limit` bytes of UTF-8; raises ShearingError where there is too little text."""
    seen: set[bytes] = set()
    found: dict[str, None] = {}
    size = 0
    with tqdm(total=limit, desc=name, unit="B", unit_scale=True, leave=False) as bar:
        for document in DOMAINS[name]():
            for piece in pieces(fresh_blocks(document, seen)):
                length = len(piece.encode("utf-8", "replace"))
                if length < 200 or piece in found:
                    continue
                if size + length > limit:
                    return list(found)
                found[piece] = None
                size += length
                bar.update(length)
    if size < min(limit * 0.5, MIN_MB * 1e6):
        raise ShearingError(
            f"domain {name}: only {size:,} bytes of text found on this machine, at least {MIN_MB} MB wanted; "
            "is the package installed with its requirements (pip install -e '.[examples]')?"
        )
    return list(found)


def build(output: Path, limit_mb: float = DEFAULT_LIMIT_MB, domains: Iterable[str] = tuple(DOMAINS)) -> dict[str, int]:
    """Write `output/<domain>/00000.jsonl` for every domain and return bytes of text a domain.

    All domains are collected before anything is written, into a temporary folder that is renamed at the end.
    Raises ShearingError when `output` exists, and when a domain has too little text (all such domains at once).
    """
    if output.exists():
        raise ShearingError(f"--output {output}: exists already; remove it or give another path")
    collected, problems = {}, []
    for name in tqdm(sorted(domains), desc="corpus", unit="domain", leave=False):
        try:
            collected[name] = build_domain(name, int(limit_mb * 1e6))
        except ShearingError as error:
            problems.append(str(error))
    if problems:
        raise ShearingError("\n".join(problems))
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, texts in collected.items():
        (temporary / name).mkdir(parents=True)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (temporary / name / "00000.jsonl").write_text("".join(lines), encoding="utf-8", errors="replace")
    temporary.rename(output)
    return {name: sum(len(text.encode("utf-8", "replace")) for text in texts) for name, texts in collected.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.corpus",
        description="Build a corpus of five real-text domains from the text already on this machine.",
        epilog="example: python -m examples.quickstart.corpus --output runs/quickstart/corpus",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to create: one folder a domain, JSONL inside"
    )
    parser.add_argument(
        "--limit", type=float, default=DEFAULT_LIMIT_MB, metavar="MB", help="text a domain (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        sizes = build(arguments.output, arguments.limit)
    except ShearingError as error:
        log.error("%s", error)
        return 1
    for name, size in sizes.items():
        log.info("%-5s %.2f MB", name, size / 1e6)
    log.info("wrote %d domains to %s", len(sizes), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
