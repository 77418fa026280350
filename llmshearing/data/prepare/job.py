"""One run of `prepare`: domain after domain, each read, tokenized, packed and written in parts.

After each part of a domain its state is committed: a run that is killed goes on there.
"""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmshearing.data.mds.manifest import SAMPLE
from llmshearing.data.mds.remote import Upload
from llmshearing.data.prepare.encoding import Encoders, Recipe, Wanted
from llmshearing.data.prepare.forms import Conversations, Forms, has_answers
from llmshearing.data.prepare.options import Options
from llmshearing.data.prepare.packing import EVAL, EVAL_MERGE, Packer
from llmshearing.data.prepare.progress import PrepareProgress
from llmshearing.data.prepare.writing import Layout, PartWriter, merge
from llmshearing.data.text.lines import LINE
from llmshearing.data.text.sources import BEGINNING, MAX_PROBLEMS, Chunk, Place, read_chunks
from llmshearing.data.text.tokenizer import TextTokenizer
from llmshearing.errors import ShearingError
from llmshearing.progress import tqdm

log = logging.getLogger(__name__)

PROGRESS = "progress.db"
PART = 1 << 30  # bytes of input; an interrupted part is done again
BYTES_PER_PROCESS = 1 << 22  # of input; for less, starting a process takes longer than its work


@dataclass
class Domain:
    """A domain in the making: a packer and a writer a split, where reading goes on, and what was skipped."""

    packers: dict[str, Packer]
    writers: dict[str, PartWriter]
    place: Place = BEGINNING
    skipped: Counter[str] = field(default_factory=Counter)
    """Lines, rows, files and rests of files."""
    first_skipped: list[str] = field(default_factory=list)
    done: bool = False

    @property
    def tokens(self) -> int:
        """Packed so far, in all splits."""
        return sum(packer.tokens for packer in self.packers.values())

    def wanted(self) -> Wanted:
        """The splits that are not full."""
        return frozenset(split for split, packer in self.packers.items() if not packer.full)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON."""
        splits = {s: {"packer": p.state(), "shards": self.writers[s].shards} for s, p in self.packers.items()}
        skipped = {"count": self.skipped.total(), "what": dict(self.skipped), "first": self.first_skipped}
        return {"splits": splits, "place": self.place, "skipped": skipped, "done": self.done}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        for split, saved in state["splits"].items():
            self.packers[split].restore(saved["packer"])
            self.writers[split].shards = saved["shards"]
        self.place, self.done = Place(*state["place"]), state["done"]
        skipped = state["skipped"]  # an interrupted run of an older version knows only how many
        self.skipped = Counter(skipped.get("what", [LINE] * skipped["count"]))
        self.first_skipped = skipped["first"]


@dataclass
class Job:
    """Writes every split under `root`, and below `remote` too; `keep_local`: leave what was uploaded here."""

    root: Path
    sources: dict[str, list[Path]]
    tokenizer: TextTokenizer
    options: Options
    dtype: str
    processes: int
    progress: bool
    remote: str | None = None
    keep_local: bool = True
    forms: dict[str, Forms] = field(default_factory=dict)
    """By domain, of its files; those of a domain that is not named are texts."""
    conversations: Conversations | None = None
    problems: list[str] = field(default_factory=list)
    """That end the run, with on_error=fail."""

    def run(self) -> dict[str, Any]:
        """Do what is left to do; returns the manifest without its request. Raises ShearingError for bad input."""
        start, total = time.perf_counter(), sum(self._size(domain) for domain in self.sources)
        self._upload = Upload(self.root, self.remote)
        domains: dict[str, Domain] = {}
        tokens = 0  # of this run
        with (
            closing(PrepareProgress(self.root / PROGRESS)) as store,
            tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=not self.progress) as bar,
            Encoders(self._recipe(), max(1, min(self.processes, total // BYTES_PER_PROCESS))) as encoders,
        ):
            for name in self.sources:
                bar.set_postfix_str(name)
                domain = domains[name] = self._open(name, store)
                tokens -= domain.tokens
                before = bar.n
                if not domain.done:
                    self._write(name, domain, store, encoders, bar)
                bar.update(before + self._size(name) - bar.n)  # also what was done before, or not needed
                tokens += domain.tokens
        if self.problems:
            raise ShearingError("\n".join(self.problems[:MAX_PROBLEMS]))
        if small := self._too_small(domains):
            raise ShearingError("\n".join(small))
        self._finish(domains)
        seconds = time.perf_counter() - start
        log.info("%d tokens in %.1f seconds: %d tokens/s", tokens, seconds, tokens / seconds)
        return self._manifest(domains)

    def _size(self, name: str) -> int:
        return sum(path.stat().st_size for path in self.sources[name])

    def _recipe(self) -> Recipe:
        o = self.options
        fractions = (o.eval_fraction, o.for_prune_fraction)
        forms = {file: form for each in self.forms.values() for file, form in each.items()}
        return Recipe(
            self.tokenizer, o.text_field, self.dtype, o.seed, *fractions, o.dedup, forms, self.conversations
        )

    def _masked(self, name: str) -> bool:
        return has_answers(self.forms.get(name, {}))

    def _open(self, name: str, store: PrepareProgress) -> Domain:
        """The domain as the last commit left it."""
        o, packers, writers = self.options, {}, {}
        layout = Layout(o.max_seq_len, self.dtype, o.shard_size, o.compression, self._masked(name))
        for split in o.fractions():
            writers[split] = PartWriter(self.root / split / name, name, layout, [])
            limit = o.limit(split, name, len(self.sources))
            packers[split] = Packer(writers[split].write, o.max_seq_len, self.dtype, limit, masked=self._masked(name))
        domain = Domain(packers, writers)
        if (state := store.state(name)) is not None:
            domain.restore(state)
        return domain

    def _write(self, name: str, domain: Domain, store: PrepareProgress, encoders: Encoders, bar: tqdm) -> None:
        """Write what is left of a domain; `problems` grows by what is wrong with it."""
        first_time = store.first_time if self.options.dedup else None
        part = 0
        chunks = self._chunks(read_chunks(self.sources[name], self.options.text_field, bar.update, domain.place))
        for chunk, encoded in encoders.in_order(chunks, lambda: frozenset() if self.problems else domain.wanted()):
            domain.skipped += encoded.left_out
            domain.first_skipped += encoded.problems[: MAX_PROBLEMS - len(domain.first_skipped)]
            if self.options.on_error == "fail":
                self.problems += encoded.problems
            if self.problems:  # the rest is read to name its problems too
                continue
            for split, documents in encoded.splits.items():
                domain.packers[split].add(documents, first_time)
            domain.place = chunk.following
            if not domain.wanted():
                break
            part += chunk.size
            if part >= PART:
                self._commit(name, domain, store)
                part = 0
        if not self.problems:
            domain.done = True
            self._commit(name, domain, store)

    def _chunks(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Until there are problems enough."""
        for chunk in chunks:
            if len(self.problems) >= MAX_PROBLEMS:
                return
            yield chunk

    def _commit(self, name: str, domain: Domain, store: PrepareProgress) -> None:
        for split, writer in domain.writers.items():
            files = writer.end_part()
            self._upload(files)
            if split != EVAL:  # which is merged from here
                self._drop(files)
        store.commit(name, domain.state())

    def _drop(self, files: list[Path]) -> None:
        """Remove shards that were uploaded, if they are not to be kept."""
        for path in files if not self.keep_local and self.remote is not None else []:
            path.unlink()

    def _finish(self, domains: dict[str, Domain]) -> None:
        """Write the index of each directory, and the merged evaluation split."""
        for domain in domains.values():
            self._upload([writer.finish() for writer in domain.writers.values()])
        if EVAL not in self.options.fractions():
            return
        shutil.rmtree(self.root / EVAL_MERGE, ignore_errors=True)
        files = merge([domain.writers[EVAL].folder for domain in domains.values()], self.root / EVAL_MERGE)
        self._upload(files)

    def _too_small(self, domains: dict[str, Domain]) -> list[str]:
        """What to say of domains without a whole sequence in some split."""
        advice = "add documents, raise the split's fraction or lower --max_seq_len"
        return [
            f"domain {name!r} has {packer.tokens} tokens ({packer.documents} documents) in split {split}, "
            f"less than one sequence of {self.options.max_seq_len}; {advice}"
            for split in self.options.fractions()
            for name, domain in domains.items()
            if (packer := domain.packers[split]).sequences == 0
        ]

    def _manifest(self, domains: dict[str, Domain]) -> dict[str, Any]:
        packers = {name: domain.packers for name, domain in domains.items()}
        duplicates = {name: sum(p.duplicates for p in mine.values()) for name, mine in packers.items()}
        return {
            "max_seq_len": self.options.max_seq_len,
            "dtype": self.dtype,
            "vocab_size": self.tokenizer.vocab_size,
            "bos_id": self.tokenizer.bos_id,
            "eos_id": self.tokenizer.eos_id,
            "max_token_id": max(packer.max_token_id for mine in packers.values() for packer in mine.values()),
            "seed": self.options.seed,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "tokenizer_sample": self.tokenizer.encode([SAMPLE])[0],
            "splits": {
                split: {name: mine[split].counts() for name, mine in packers.items()}
                for split in self.options.fractions()
            },
            "skipped": {name: d.state()["skipped"] for name, d in domains.items() if d.skipped},
            "duplicates": {name: number for name, number in duplicates.items() if number},
            **self._told_of_masks(),
        }

    def _told_of_masks(self) -> dict[str, Any]:
        """`loss_mask`: the forms of each domain that has one; nothing where all is text."""
        masked = {name: sorted(set(forms.values())) for name, forms in self.forms.items() if has_answers(forms)}
        return {"loss_mask": masked} if masked else {}
