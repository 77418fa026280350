"""The whole fault campaign: kills at random moments in both stages and in runs of both, on one and two ranks.

    python tests/faults/campaign.py [--kills 32] [--seed 0] [--report benchmarks/results/faults.json]

Each run is killed several times, started again each time, and in the end compared bit for bit with one that ran
through: weights, gates, multipliers, optimizer, schedule, mixture, evaluations, and the samples of every batch.
"""

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT.parent), os.environ.get("PYTHONPATH", "")])

from helpers_faults import INTERVAL, Job, differences, draw_kill, small_lab, write_jobs  # noqa: E402

PLACES = ["step", "save", "evaluation", "start-up", "anywhere", "step", "save", "anywhere"]
SETTINGS = [("pruning", 1), ("continued", 1), ("pruning", 2), ("continued", 2), ("folding", 1), ("folding", 2)]
AROUND = ["fold", "step", "fold", "start-up"]  # where runs that fold themselves are killed
KILLS_A_RUN = 4


def kill_and_resume(job: Job, generator: random.Random, places: list[str], stage: str) -> list[dict]:
    """Kill one run at each of these places, then let it end; a row for each kill."""
    rows = []
    for where in places:
        kill = draw_kill(generator, where, job.ranks)
        outcome = job.start(kill)
        if not set(outcome.codes) <= {0, 76, -9}:
            raise RuntimeError(f"{stage} on {job.ranks} ranks, {kill}: {outcome.codes}\n{outcome.output[-3000:]}")
        lost = job.batches_done() - job.batch_saved()
        row = {"stage": stage, "ranks": job.ranks, **asdict(kill), "codes": outcome.codes}
        row |= {"seconds": round(outcome.seconds, 1), "begun": job.batches_done(), "saved": job.batch_saved()}
        rows.append(row | {"lost": lost, "killed": -9 in outcome.codes})
    outcome = job.start()
    if outcome.codes != [0] * job.ranks:
        raise RuntimeError(f"{stage} on {job.ranks} ranks did not end: {outcome.codes}\n{outcome.output[-3000:]}")
    return rows


def fold(reference: Job, target: Path) -> None:
    """What the second stage trains."""
    from llmshearing.checkpoints import prune_and_save_model

    prune_and_save_model(reference.saved / "latest-rank0.pt", target)


def campaign(root: Path, kills: int, seed: int, say=print) -> dict:
    """Run it; rows of all kills, and for each run whether it ended as the uninterrupted one."""
    lab, generator = small_lab(root / "lab"), random.Random(seed)
    rows, runs, references = [], [], {}
    configs = write_jobs(lab, root)
    for stage, ranks in SETTINGS:
        (root / f"reference-{stage}-{ranks}").mkdir()
        job = Job(root / f"reference-{stage}-{ranks}", configs[stage], ranks)
        outcome = job.start()
        if outcome.codes != [0] * ranks:
            raise RuntimeError(f"{stage} on {ranks} ranks: {outcome.codes}\n{outcome.output[-3000:]}")
        references[stage, ranks] = job.result()
        if (stage, ranks) == ("pruning", 1):
            fold(job, root / "folded.pt")
    while sum(row["killed"] for row in rows) < kills:
        stage, ranks = SETTINGS[len(runs) % len(SETTINGS)]
        folder = root / f"run{len(runs)}"
        folder.mkdir()
        job = Job(folder, configs[stage], ranks)
        places = [PLACES[(len(runs) * 3 + i) % len(PLACES)] for i in range(KILLS_A_RUN)]
        places = AROUND if stage == "folding" else places
        mine = kill_and_resume(job, generator, places, stage)
        differ = differences(references[stage, ranks], job.result())
        for row in mine:
            row["survived"] = not differ and row["lost"] <= INTERVAL
            verdict = "ok" if row["survived"] else f"DIFFERS in {differ}"
            place = f"{row['where']:10s} {row['event']:18s} rank {row['rank']}"
            say(f"{stage:9s} {ranks} ranks  {place}: begun {row['begun']:2d} saved {row['saved']:2d}  {verdict}")
        rows += mine
        runs.append({"stage": stage, "ranks": ranks, "differs": differ})
        shutil.rmtree(folder)
    return {"kills": rows, "runs": runs}


def summary(result: dict) -> dict:
    """Counts for the report's head."""
    killed = [row for row in result["kills"] if row["killed"]]
    return {
        "kills": len(killed),
        "survived": sum(row["survived"] for row in killed),
        "by_place": {place: sum(row["where"] == place for row in killed) for place in sorted({*PLACES, *AROUND})},
        "by_setting": {
            f"{stage}, {ranks} ranks": sum(row["stage"] == stage and row["ranks"] == ranks for row in killed)
            for stage, ranks in SETTINGS
        },
        "most_batches_lost": max(row["lost"] for row in killed),
        "save_interval": INTERVAL,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as root:
        result = campaign(Path(root), arguments.kills, arguments.seed)
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    head = summary(result) | {"minutes": round((time.time() - began) / 60, 1), "seed": arguments.seed, **versions}
    print(json.dumps(head, indent=1))
    if arguments.report is not None:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(json.dumps({**head, **result}, indent=1) + "\n")
    return 0 if head["survived"] == head["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
