"""One run of `prepare`: domain after domain, each read, tokenized, packed and recorded as done."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streaming import LocalDataset
from tqdm import tqdm

from llmshearing.data.encoding import encode_in_order
from llmshearing.data.options import Options
from llmshearing.data.packing import EVAL, EVAL_MERGE, Packer, open_writer, split_of
from llmshearing.data.progress import Progress
from llmshearing.data.sources import MAX_PROBLEMS, read_documents
from llmshearing.data.tokenizer import TextTokenizer
from llmshearing.errors import ShearingError

PROGRESS = "progress.db"
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 1 << 20  # encoded at once
BYTES_PER_PROCESS = 1 << 22  # of input; for less, starting a process takes longer than its work


@dataclass
class Batch:
    """Documents in their order, and what was wrong between them."""

    texts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    characters: int = 0

    @property
    def full(self) -> bool:
        return len(self.texts) >= BATCH_DOCUMENTS or self.characters >= BATCH_CHARACTERS


@dataclass
class Job:
    """Writes every split under `root`; `arguments` load the tokenizer in other processes."""

    root: Path
    sources: dict[str, list[Path]]
    encoder: TextTokenizer
    arguments: tuple[Any, ...]
    options: Options
    dtype: str
    processes: int
    progress: bool

    def run(self) -> dict[str, Any]:
        """Do what is left to do; returns the manifest without its request. Raises ShearingError for bad input."""
        store = Progress(self.root / PROGRESS)
        results: dict[str, Any] = {}
        problems: list[str] = []
        try:
            total = sum(path.stat().st_size for files in self.sources.values() for path in files)
            with tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=not self.progress) as bar:
                for domain in self.sources:
                    bar.set_postfix_str(domain)
                    results[domain] = store.result(domain) or self._domain(domain, store, bar, problems)
                    if self.options.on_error == "fail" and problems:
                        continue  # the other domains are read to name their problems too
                    if store.result(domain) is None:
                        store.finish(domain, results[domain])
        finally:
            store.close()
        if self.options.on_error == "fail" and problems:
            raise ShearingError("\n".join(problems[:MAX_PROBLEMS]))
        splits = {split: {d: r["splits"][split] for d, r in results.items()} for split in self.options.fractions()}
        if small := too_small(splits, self.options):
            raise ShearingError("\n".join(small))
        if EVAL in splits:
            self._merge(list(self.sources))
        return self._manifest(splits, results)

    def _domain(self, domain: str, store: Progress, bar: tqdm, problems: list[str]) -> dict[str, Any]:
        """Write the splits of one domain; `problems` grows by what is wrong with it."""
        packers = self._packers(domain)
        skipped: list[str] = []
        count = duplicates = 0
        batches = self._batches(self.sources[domain], bar, problems)
        size = sum(path.stat().st_size for path in self.sources[domain])
        processes = max(1, min(self.processes, size // BYTES_PER_PROCESS))
        for batch, ids in encode_in_order(batches, lambda b: b.texts, self.encoder, self.arguments, processes):
            count += len(batch.problems)
            skipped += batch.problems[: MAX_PROBLEMS - len(skipped)]
            if self.options.on_error == "fail" and (problems or batch.problems):
                problems += batch.problems
                continue
            duplicates += self._add(packers, batch, ids, store)
            if all(packer.full for packer in packers.values()):
                break
        for packer in packers.values():
            packer.writers[0].finish()
        return {
            "splits": {split: packer.counts() for split, packer in packers.items()},
            "max_token_id": max(packer.max_token_id for packer in packers.values()),
            "skipped": {"count": count, "first": skipped},
            "duplicates": duplicates,
        }

    def _packers(self, domain: str) -> dict[str, Packer]:
        packers, encoder, options = {}, self.encoder, self.options
        for split in options.fractions():
            folder = self.root / split / domain
            shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
            writer = open_writer(folder, options.max_seq_len, self.dtype, options.shard_size)
            limit = options.limit(split, domain, len(self.sources))
            packers[split] = Packer(
                domain, [writer], options.max_seq_len, self.dtype, encoder.bos_id, encoder.eos_id, limit
            )
        return packers

    def _batches(self, files: list[Path], bar: tqdm, failed: list[str]) -> Iterator[Batch]:
        """Batches bounded by number and length of documents; none is empty of both texts and problems.

        Stops early where there are problems enough to fail with; once a domain has failed no text is handed on.
        """
        batch, found = Batch(), 0
        for path in files:
            for text in read_documents(path, self.options.text_field, batch.problems, bar.update):
                if not failed:
                    batch.texts.append(text)
                    batch.characters += len(text)
                if batch.full or len(batch.problems) >= MAX_PROBLEMS:
                    found += len(batch.problems)
                    yield Batch(batch.texts, list(batch.problems))
                    batch.problems.clear()  # read_documents goes on filling this very list
                    batch = Batch(problems=batch.problems)
                    if self.options.on_error == "fail" and found >= MAX_PROBLEMS:
                        return
        if batch.texts or batch.problems:
            yield batch

    def _add(self, packers: dict[str, Packer], batch: Batch, ids: list[Any], store: Progress) -> int:
        """Hand a batch to its packers; returns the number of duplicates left out."""
        options, duplicates = self.options, 0
        mine: dict[str, list[int]] = {split: [] for split in packers}
        for i, text in enumerate(batch.texts):
            if options.dedup and not store.first_time(text):
                duplicates += 1
                continue
            split = split_of(text, options.seed, options.eval_fraction, options.for_prune_fraction)
            if split in packers and not packers[split].full:
                mine[split].append(i)
        for split, chosen in mine.items():
            packers[split].add([batch.texts[i] for i in chosen], [ids[i] for i in chosen])
        return duplicates

    def _merge(self, domains: list[str]) -> None:
        """One directory of all domains' evaluation sequences, in the domains' order."""
        folder = self.root / EVAL_MERGE
        shutil.rmtree(folder, ignore_errors=True)
        writer = open_writer(folder, self.options.max_seq_len, self.dtype, self.options.shard_size)
        for domain in domains:
            data = LocalDataset(str(self.root / EVAL / domain))
            for i in range(len(data)):
                writer.write(data[i])
        writer.finish()

    def _manifest(self, splits: dict[str, dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
        skipped = {domain: r["skipped"] for domain, r in results.items() if r["skipped"]["count"]}
        return {
            "max_seq_len": self.options.max_seq_len,
            "dtype": self.dtype,
            "vocab_size": self.encoder.vocab_size,
            "bos_id": self.encoder.bos_id,
            "eos_id": self.encoder.eos_id,
            "max_token_id": max(r["max_token_id"] for r in results.values()),
            "seed": self.options.seed,
            "tokenizer_fingerprint": self.encoder.fingerprint,
            "splits": splits,
            "skipped": skipped,
            "duplicates": {domain: r["duplicates"] for domain, r in results.items() if r["duplicates"]},
        }


def too_small(splits: dict[str, dict[str, Any]], options: Options) -> list[str]:
    """Domains without a whole sequence in some split."""
    advice = "add documents, raise the split's fraction or lower --max_seq_len"
    return [
        f"domain {domain!r} has {n['tokens']} tokens ({n['documents']} documents) in split {split}, "
        f"less than one sequence of {options.max_seq_len}; {advice}"
        for split, domains in splits.items()
        for domain, n in domains.items()
        if n["sequences"] == 0
    ]
