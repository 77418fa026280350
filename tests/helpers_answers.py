"""Data of which only some tokens count: a domain with a loss mask, a third of whose sequences have no answer, beside a
plain one."""

from pathlib import Path

import helpers_cache
import numpy as np
from helpers_runs import SEQ, VOCAB
from streaming import MDSWriter

from llmshearing.data.mds.masks import COLUMN, encoding, packed

NAMES = ["asked", "plain"]


def rows(name: str, number: int, seed: int) -> list[dict]:
    generator = np.random.default_rng(seed)
    made = []
    for i in range(number):
        row = {"set": name, "tokens": generator.integers(2, VOCAB, SEQ).astype(np.uint16)}
        if name == "asked":  # of very different numbers of answers, the first token among them
            row[COLUMN] = packed((generator.random(SEQ) < 0.2 * (i % 5 + 1)) & (i % 3 > 0))
        made.append(row)
    return made


def write_rows(folder: Path, made: list[dict]) -> None:
    columns = {"set": "str", "tokens": "ndarray:uint16"}
    columns |= {COLUMN: encoding(SEQ)} if COLUMN in made[0] else {}
    with MDSWriter(out=str(folder), columns=columns, hashes=["xxh64"]) as out:
        for row in made:
            out.write(row)


def write_answers(root: Path) -> Path:
    """`train/DOMAIN` of both, `eval/` of both merged (shards with and without the column)."""
    from llmshearing.data.prepare.writing import merge

    for seed, name in enumerate(NAMES):
        write_rows(root / "train" / name, rows(name, 30, seed))
        write_rows(root / "apart" / name, rows(name, 7, 10 + seed))
    merge([root / "apart" / name for name in NAMES], root / "eval")
    return root


def run_settings(data: Path, source: Path, folder: Path | None, masks: dict | None = None) -> dict:
    """Six batches of both domains; with ``masks`` the source is pruned."""
    settings = helpers_cache.run_settings(data, source, folder)
    del settings["distill"]
    settings["model"] |= {} if masks is None else {"l0_module": masks}
    settings["callbacks"]["data_loading"] |= {"set_names": NAMES, "proportion": [0.75, 0.25]}
    return {**settings, "run_name": "answers", "eval_interval": "3ba"}
