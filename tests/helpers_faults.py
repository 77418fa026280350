"""Runs that are really killed: each rank a process of its own, which executes `train.main` as the command does.

The processes are forked from a server that has imported the package, so that each starts in a second or two. A signal
comes at a moment of the clock, or the process sends it to itself some milliseconds after a chosen event of Composer's:
so are kills within a step, an evaluation or a save aimed.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from helpers_runs import SEQ, TARGET, free_port, settings, write_yaml

EVENTS = {
    "step": ["batch_start", "after_forward", "after_backward", "after_train_batch", "batch_end"],
    "evaluation": ["eval_start", "eval_batch_end", "eval_end"],
    "save": ["batch_checkpoint"],
    "fold": ["batch_end", "batch_checkpoint"],
}
INTERVAL = 3  # batches between checkpoints
BATCHES = 18
FOLD = 8  # batch at which a run of the stage "folding" folds itself


@dataclass
class Kill:
    """`where`: start-up or anywhere (after `delay` seconds), or one of EVENTS (`delay` after its `count`-th time);
    `rank`: the one that is killed, None: all at once. `number`: another signal than SIGKILL."""

    where: str
    event: str = ""
    count: int = 1
    delay: float = 0.0
    rank: int | None = None
    number: int = int(signal.SIGKILL)


@dataclass
class Outcome:
    codes: list[int]
    seconds: float
    output: str


@dataclass
class Job:
    """A run that may be started several times. `environment` goes to its processes."""

    folder: Path
    config: Path
    ranks: int = 1
    overrides: list[str] = field(default_factory=list)

    @property
    def saved(self) -> Path:
        return self.folder / "run"

    def start(self, kill: Kill | None = None, limit: float = 120) -> Outcome:
        """Run to its end, or to the kill's."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["helpers_faults", "llmshearing.train"])
        port, began = free_port(), time.monotonic()
        logs = [self.folder / f"rank{rank}.log" for rank in range(self.ranks)]
        words = [str(self.config), f"save_folder={self.saved}", *self.overrides]
        processes = [
            context.Process(target=_rank, args=(words, rank, self.ranks, port, str(log), kill))
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            process.start()
        try:
            if kill is not None and not kill.event:
                time.sleep(kill.delay)
                for process in processes if kill.rank is None else [processes[kill.rank]]:
                    if process.is_alive():  # else it was too late: the run has ended
                        os.kill(process.pid, kill.number)
            lingering = kill is not None and (kill.rank is None or kill.number == signal.SIGSTOP)
            _wait(processes, began + limit, together=lingering)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
        output = "\n".join(log.read_text() for log in logs if log.is_file())
        return Outcome([process.exitcode for process in processes], time.monotonic() - began, output)

    def batches_done(self) -> int:
        """Batches begun, by the record of samples; those of a killed process too."""
        record = self.saved / "samples-rank0.jsonl"
        return len(record.read_text().splitlines()) if record.is_file() else 0

    def batch_saved(self) -> int:
        """Batch of the newest checkpoint that has its name."""
        names = [path.stem for path in self.saved.glob("ep*.pt")]
        return max((int(name.split("-")[1].removeprefix("ba")) for name in names), default=0)

    def result(self) -> dict:
        """What a run ends in, to compare: tensors, optimizer, records."""
        state = load_plain(self.saved / "latest-rank0.pt")["state"]
        return {
            "model": dict(state["model"]),
            "optimizer": state["optimizers"],
            "schedule": state["schedulers"],
            "mixture": state["dataset_state"]["train"],
            "evaluations": (self.saved / "evaluations.jsonl").read_text(),
            "samples": [(self.saved / f"samples-rank{rank}.jsonl").read_text() for rank in range(self.ranks)],
            "batch": state["timestamp"]["Timestamp"]["batch"],
        }


def _wait(processes, until: float, together: bool) -> None:
    """Until all have ended; where they are killed together, until one has."""
    while time.monotonic() < until:
        alive = [process.is_alive() for process in processes]
        if not any(alive) or (together and not all(alive)):
            return
        time.sleep(0.02)
    raise TimeoutError("a rank neither ended nor was killed")


def _rank(words: list[str], rank: int, ranks: int, port: int, output: str, kill: Kill | None) -> None:
    """One rank, in its own process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    places = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "NODE_RANK": 0}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    from llmshearing import train
    from llmshearing.training import build

    if kill is not None and kill.event and kill.rank in (None, rank):
        original = build.build_callbacks
        build.build_callbacks = lambda *arguments: [_killer(kill), *original(*arguments)]
    sys.exit(train.main(words))


def _killer(kill: Kill):
    from composer import Callback

    class Killer(Callback):
        left = kill.count

        def run_event(self, event, state, logger):
            if event.value == kill.event and state.timestamp.batch.value and self._counts(state):
                Killer.left -= 1
                if Killer.left == 0:
                    threading.Thread(target=self._die, daemon=True).start()

        def _counts(self, state):
            if kill.where == "fold":
                return state.timestamp.batch.value == FOLD
            return kill.where != "save" or state.timestamp.batch.value % INTERVAL == 0

        def _die(self):
            time.sleep(kill.delay)
            os.kill(os.getpid(), kill.number)

    return Killer()


def draw_kill(generator: random.Random, where: str, ranks: int) -> Kill:
    """A moment of that sort."""
    rank = generator.choice([None, *range(ranks)]) if ranks > 1 else None
    if where == "start-up":
        return Kill(where, delay=generator.uniform(0.05, 1.2), rank=rank)
    if where == "anywhere":
        return Kill(where, delay=generator.uniform(0.8, 3.5), rank=rank)
    event = generator.choice(EVENTS[where])
    longest = {"step": 0.01, "evaluation": 0.01, "save": 0.02, "fold": 0.5}[where]
    return Kill(where, event, 1 if where == "fold" else generator.randint(1, 3), generator.uniform(0, longest), rank)


def small_lab(root: Path):
    """As the fixture `lab`, with so little text that an epoch has a dozen batches."""
    from helpers_runs import Lab, documents, make_model, save_tokenizer

    from llmshearing.data.prepare.run import prepare

    source = root / "source"
    make_model(initializer_range=0.1).save_pretrained(source)
    save_tokenizer(source)
    for name, texts in documents().items():
        (root / "corpus" / name).mkdir(parents=True)
        lines = "".join(json.dumps({"text": text[:180]}) + "\n" for text in texts[:20])
        (root / "corpus" / name / "part.jsonl").write_text(lines)
    shares = {"eval_fraction": 0.25, "for_prune_fraction": 0.4}
    prepare(root / "corpus", source, root / "data", SEQ, progress=False, **shares)
    return Lab(root, root / "corpus", source, root / "data")


def write_jobs(lab, root: Path) -> dict[str, Path]:
    """Configurations of both stages (the second trains what the first folds to), and of one run of both."""
    base = {
        "max_duration": f"{BATCHES}ba",
        "eval_interval": "4ba",
        "eval_first": True,
        "eval_subset_num_batches": 2,
        "save_interval": f"{INTERVAL}ba",
        "save_num_checkpoints_to_keep": 3,
        "autoresume": True,
        "run_name": None,
        "record_samples": True,
        "dist_timeout": 20.0,
    }
    prune = settings(lab, root / "x", **base, model__l0_module__target_model=dict(TARGET))
    write_yaml(root / "prune.yaml", prune)
    ft = settings(lab, root / "x", **base, model__l0_module=None, model__path=str(root / "folded.pt"))
    ft["train_loader"]["dataset"]["split"] = "for_ft"
    write_yaml(root / "continue.yaml", ft)
    one = settings(lab, root / "x", **base, model__l0_module__target_model=dict(TARGET))
    one["model"] |= {"turn": {"samples": 8}}
    one["model"]["l0_module"] |= {"start": "fisher", "start_samples": 4, "constraint": "exact", "fold_at": f"{FOLD}ba"}
    write_yaml(root / "one.yaml", one)
    return {"pruning": root / "prune.yaml", "continued": root / "continue.yaml", "folding": root / "one.yaml"}


def load_plain(path: Path) -> dict:
    """Everything in a checkpoint file."""
    from llmshearing.training.resilience.resume import plain_data_only

    with plain_data_only():
        return torch.load(path, weights_only=True, map_location="cpu")


def equal(one, other) -> bool:
    """Bitwise, through all levels."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def differences(one: dict, other: dict) -> list[str]:
    """Parts of two results that are not the same bit for bit."""
    return [key for key in one if not equal(one[key], other[key])]
