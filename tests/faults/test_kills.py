"""Killed and started again, a run ends as if nothing had happened. `make faults` does the same at length."""

import random
import shutil
import signal

import pytest
from helpers_faults import FOLD, INTERVAL, Job, Kill, differences, draw_kill, small_lab, write_jobs

SETTINGS = [("pruning", 1), ("continued", 1), ("pruning", 2)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Makes jobs of a stage on some ranks; `reference`: the result of one that ran through."""
    root = tmp_path_factory.mktemp("kills")
    lab = small_lab(root / "lab")
    configs = write_jobs(lab, root)
    references = {}

    def make(name, stage="pruning", ranks=1, *overrides):
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return Job(folder, configs[stage], ranks, list(overrides))

    def reference(stage, ranks):
        if (stage, ranks) not in references:
            job = make(f"reference-{stage}-{ranks}", stage, ranks)
            outcome = job.start()
            assert outcome.codes == [0] * ranks, outcome.output
            references[stage, ranks] = job
        return references[stage, ranks].result()

    def folded():
        from llmshearing.checkpoints import prune_and_save_model

        reference("pruning", 1)
        prune_and_save_model(references["pruning", 1].saved / "latest-rank0.pt", root / "folded.pt")

    make.reference, make.folded = reference, folded
    return make


def ends_alike(jobs, job, stage):
    outcome = job.start()
    assert outcome.codes == [0] * job.ranks, outcome.output
    assert differences(jobs.reference(stage, job.ranks), job.result()) == []
    return outcome


@pytest.mark.parametrize(("stage", "ranks"), SETTINGS)
def test_killed_at_random(jobs, stage, ranks):
    """In a step, a save and an evaluation: at most an interval is computed again, with the same result bit for bit."""
    generator = random.Random(f"{stage} {ranks}")
    if stage == "continued":
        jobs.folded()
    job = jobs(f"killed-{stage}-{ranks}", stage, ranks)
    for where in ("save", "step", "evaluation")[:3 if ranks == 1 else 2]:
        kill = draw_kill(generator, where, ranks)
        outcome = job.start(kill)
        assert -9 in outcome.codes, outcome.output
        assert job.batches_done() - job.batch_saved() <= INTERVAL
    saved = job.batch_saved()
    outcome = ends_alike(jobs, job, stage)
    assert f"going on from batch {saved} of" in outcome.output
    assert not list(job.saved.glob("*.tmp")) and not (job.saved / ".writing").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_around_the_fold(jobs, ranks):
    """Before its checkpoint, in its hand-over, and at the compact size: the run ends as if it had run through."""
    job = jobs(f"folding-{ranks}", "folding", ranks)
    for event, delay in (("batch_end", 0.0), ("batch_checkpoint", 0.1 * ranks))[: 3 - ranks]:
        outcome = job.start(Kill("fold", event, 1, delay))
        assert -9 in outcome.codes, outcome.output
        assert job.batch_saved() in (FOLD - FOLD % INTERVAL, FOLD)
    job.start(Kill("step", "batch_start", FOLD + 2))
    ends_alike(jobs, job, "folding")


def test_a_run_that_has_ended_is_left_alone(jobs):
    jobs.reference("pruning", 1)
    job = Job(jobs("x").folder.parent / "reference-pruning-1", jobs("y").config)
    before = {path: path.stat().st_mtime_ns for path in job.saved.glob("ep*.pt")}
    outcome = job.start()
    assert outcome.codes == [0] and "has ended already" in outcome.output
    assert before == {path: path.stat().st_mtime_ns for path in job.saved.glob("ep*.pt")}


@pytest.mark.parametrize(
    ("number", "event", "ranks"),
    [(signal.SIGTERM, "after_forward", 2), (signal.SIGUSR1, "eval_batch_end", 1)],
    ids=["SIGTERM in a step of one rank of two", "SIGUSR1 in an evaluation"],
)
def test_signals_save_and_stop(jobs, number, event, ranks):
    """One rank's signal stops all after the same batch, with the documented code; nothing is lost."""
    job = jobs(f"signal-{event}", "pruning", ranks)
    place = "evaluation" if event.startswith("eval") else "step"
    outcome = job.start(Kill(place, event, 2, 0.0, ranks - 1, int(number)))
    assert outcome.codes == [75] * ranks, outcome.output
    assert f"stopped by {number.name} after batch" in outcome.output and "saved" in outcome.output
    assert job.batch_saved() == job.batches_done()
    ends_alike(jobs, job, "pruning")


def test_a_signal_before_training_ends_at_once(jobs):
    outcome = jobs("early").start(Kill("start-up", delay=0.3, number=int(signal.SIGTERM)))
    # 143: while Composer's own handler was in place; -15: Python had only just begun
    assert outcome.codes in ([75], [143], [-15]), outcome.output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stalled"])
def test_a_lost_rank_ends_the_others(jobs, number):
    """Within the timeout, naming it and where it was; the run goes on as if nothing had happened."""
    job = jobs("lost", "pruning", 2, "dist_timeout=8")
    outcome = job.start(Kill("step", "after_backward", 4, 0.0, 1, int(number)))
    assert outcome.codes == [76, -9] and outcome.seconds < 60, outcome.output
    assert "rank 1 is gone" in outcome.output and "rank 0 is at batch 4" in outcome.output, outcome.output
    ends_alike(jobs, job, "pruning")


def test_rank_0_is_missed_too(jobs):
    outcome = jobs("first", "pruning", 2, "dist_timeout=8").start(Kill("step", "after_backward", 2, 0.0, 0))
    assert outcome.codes == [-9, 76] and "rank 0 is gone" in outcome.output, outcome.output
