"""One result in any layout: one rank with microbatches, two replicas (DDP), two shards (FSDP 2), on real gloo ranks.

All runs of a stage train on the same samples with the same gates, so each is compared with one rank's: samples, loss
curve, gradients, evaluation, weights; also where a run goes on in another layout than the one it began in.
"""

import pytest
import torch
from helpers_layouts import Job, execute, on_ranks
from helpers_runs import TARGET, make_model, settings, write_yaml

from llmshearing.checkpoints import prune_and_save_model
from llmshearing.checkpoints.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

STEPS, SAVED, FEW = 50, 35, 5
KEPT = [0, FEW - 1]  # batches whose gradients are compared
MICROBATCHES = "device_train_microbatch_size=2"
SHARDS = "fsdp_config={mixed_precision: FULL}"  # DEFAULT gathers float64 weights in float32
FOLDERS = "fsdp_config={state_dict_type: sharded}"
FIRST_READS = "fsdp_config={load_monolith_rank0_only: true}"
RECOMPUTE = "model.activation_checkpointing=true"
CLIPS = {
    name: [f"algorithms.gradient_clipping={{clipping_type: {name}, clipping_threshold: {threshold}}}"]
    for name, threshold in {"norm": 0.01, "value": 1e-4}.items()
}


class Jobs:
    """Jobs of a pruning and of a continued run (with tied embeddings); each saves on its way to a folder of its own."""

    def __init__(self, lab, root):
        data = {"callbacks__data_loading__update_type": "constant", "eval_subset_num_batches": -1}
        times = {"max_duration": f"{STEPS}ba", "eval_interval": f"{SAVED}ba", "save_interval": f"{SAVED}ba"}
        masks = {"lagrangian_warmup_steps": "20ba", "eval_target_model": True, "target_model": dict(TARGET)}
        made = settings(lab, None, **data, **times, device_eval_batch_size=64, model__l0_module=masks)
        make_model(tie_word_embeddings=True, initializer_range=0.1).save_pretrained(root / "tied")
        plain = {**made, "model": {"path": str(root / "tied")}}
        self.root = root
        self.files = {
            stage: write_yaml(root / f"{stage}.yaml", settings)
            for stage, settings in {"prune": made, "continue": plain}.items()
        }

    def begin(self, stage, name, *more):
        return Job(str(self.files[stage]), [f"save_folder={self.root / stage / name}", *more])

    def go_on(self, stage, name, *more):
        """From the checkpoint that run ``name`` has made on the way, or will have made."""
        [first] = (self.root / stage / "alone").glob(f"ep*-ba{SAVED}-rank0.pt")
        name = f"{name}/{first.name.removesuffix('-rank0.pt') if FOLDERS in more else first.name}"
        return Job(str(self.files[stage]), [f"load_path={self.root / stage / name}", "trust_checkpoint=true", *more])

    def few(self, *more, clip="norm", **options):
        """A few pruning steps, whose gradients are kept."""
        short = [f"max_duration={FEW}ba", "model.l0_module.lagrangian_warmup_steps=2ba", "optimizer.lag_lr=3.0"]
        return Job(str(self.files["prune"]), [*short, *CLIPS[clip], *more], gradients=KEPT, **options)


@pytest.fixture(scope="module")
def jobs(lab, tmp_path_factory):
    return Jobs(lab, tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def alone(jobs):
    """One rank, two microbatches: what all others are compared with."""
    runs = {stage: jobs.begin(stage, "alone", MICROBATCHES) for stage in jobs.files}
    runs |= {clip: jobs.few(MICROBATCHES, clip=clip, double=True) for clip in CLIPS}
    runs["bf16"] = jobs.few(MICROBATCHES, autocast=True)
    return {name: execute(job) for name, job in runs.items()}


@pytest.fixture(scope="module")
def two(jobs, alone):
    """Two ranks, one launch; "A <- B" goes on as A from what B saved."""
    runs = {}
    for stage in jobs.files:
        runs[stage, "replicas"] = jobs.begin(stage, "replicas")
        runs[stage, "shards"] = jobs.begin(stage, "shards", SHARDS)
        runs[stage, "replicas <- shards"] = jobs.go_on(stage, "shards")
        runs[stage, "shards <- alone"] = jobs.go_on(stage, "alone", FIRST_READS)
    runs["prune", "replicas <- alone"] = jobs.go_on("prune", "alone")
    runs["prune", "shards <- replicas"] = jobs.go_on("prune", "replicas", SHARDS)
    runs["prune", "folders"] = jobs.begin("prune", "folders", FOLDERS)
    runs["prune", "folders <- folders"] = jobs.go_on("prune", "folders", FOLDERS)
    for clip in CLIPS:
        runs[clip, "shards"] = jobs.few(SHARDS, clip=clip, double=True)
    runs["norm", "replicas"] = jobs.few(double=True)
    runs["norm", "recomputing replicas"] = jobs.few(RECOMPUTE, double=True)
    runs["norm", "recomputing shards"] = jobs.few(SHARDS, RECOMPUTE, double=True)
    runs["norm", "shards read by all"] = jobs.few(SHARDS, "model.init_device=cpu", double=True)
    # without trust_checkpoint: the run's own folder, of which plain data alone is loaded
    saving = [FOLDERS, f"save_folder={jobs.root / 'own'}", "save_interval=3ba", "autoresume=true", "eval_interval=2ba"]
    runs["own folders", "begun"] = jobs.few(*saving, "max_duration=3ba")
    runs["own folders", "resumed"] = jobs.few(*saving)
    runs["bf16", "replicas"] = jobs.few(autocast=True)
    runs["bf16", "shards"] = jobs.few(SHARDS, autocast=True)
    return on_ranks(2, {" ".join(key): job for key, job in runs.items()}, jobs.root / "two")


def merged(ranks):
    """batch -> rows (set, sample, loss) of the whole batch, in its order."""
    return {batch: [row for rank in ranks for row in rank["batches"][batch]] for batch in ranks[0]["batches"]}


def assert_same_curve(ranks, one, tolerance, first=0):
    rows, wanted = merged(ranks), merged([one])
    assert list(rows) == list(wanted)[first:]
    for batch, row in rows.items():
        assert [(domain, sample) for domain, sample, _ in row] == [(d, s) for d, s, _ in wanted[batch]], batch
        mean, want = (sum(loss for *_, loss in each) / len(each) for each in (row, wanted[batch]))
        assert mean == pytest.approx(want, rel=tolerance), batch
    for rank in ranks:  # each has the whole penalty; their mean counts it once
        penalties = {batch: value for batch, value in one["penalties"].items() if batch >= first}
        assert rank["penalties"] == pytest.approx(penalties, rel=tolerance, abs=1e-6)
    evaluations = {batch: loss for batch, loss in one["evaluations"].items() if batch > first}
    assert ranks[0]["evaluations"] == pytest.approx(evaluations, rel=tolerance)


def assert_same_tensors(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        largest = value.abs().max().clamp(min=1e-12).item()
        difference = (found[name] - value).abs().max().item()
        assert difference <= tolerance * largest, (name, difference, largest)


# Curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["replicas", "shards"])
@pytest.mark.parametrize("stage", ["prune", "continue"])
def test_curves_and_samples_over_50_steps(two, alone, stage, layout):
    ranks = two[f"{stage} {layout}"]
    assert len(ranks[0]["batches"]) == STEPS
    assert_same_curve(ranks, alone[stage], 1e-4)
    assert [rank["sharded"] > 0 for rank in ranks] == [layout == "shards"] * 2


def test_sharded_folders_change_nothing(two, alone):
    assert_same_curve(two["prune folders"], alone["prune"], 1e-4)


# Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", ["replicas", "shards", "recomputing replicas", "recomputing shards", "shards read by all"]
)
def test_gradients_in_float64(two, alone, layout):
    """Weights, log alphas and multipliers, clipped by their common norm, as the optimizer gets them."""
    ranks, one = two[f"norm {layout}"], alone["norm"]
    names = one["gradients"][0].keys()
    assert any(".layers." in name for name in names) and "model.lm_head.weight" in names
    assert {f"masks.{part}.hidden" for part in ("log_alpha", "lambda_1", "lambda_2")} <= names
    assert one["gradients"][FEW - 1]["masks.log_alpha.hidden"].abs().max() > 0
    for rank in ranks:
        for batch in KEPT:
            norm = torch.stack([g.norm() for g in rank["gradients"][batch].values()]).norm().item()
            assert norm == pytest.approx(0.01, rel=1e-3)  # clipped, or close to it
            assert_same_tensors(rank["gradients"][batch], one["gradients"][batch], 1e-9)
        assert_same_tensors(rank["final"], one["final"], 1e-9)


def test_shards_clipped_by_value(two, alone):
    one = alone["value"]["gradients"]
    for rank in two["value shards"]:
        for batch in KEPT:
            assert_same_tensors(rank["gradients"][batch], one[batch], 1e-9)
    assert max(gradient.abs().max().item() for gradient in one[0].values()) == 1e-4


def test_checkpointed_layers_run_twice(two):
    calls = {name: two[f"norm {name}"][0]["layer_calls"] for name in ("shards", "recomputing shards")}
    assert calls["recomputing shards"] == 2 * calls["shards"] > 0


@pytest.mark.parametrize("layout", ["replicas", "shards"])
def test_bfloat16(two, alone, layout):
    """Products are rounded to 8 bits; masks, their gradients and the sums stay float32."""
    ranks = two[f"bf16 {layout}"]
    assert_same_curve(ranks, alone["bf16"], 1e-2)
    for rank in ranks:
        assert_same_tensors(rank["final"], alone["bf16"]["final"], 2e-2)
        assert {value.dtype for value in rank["final"].values()} == {torch.float32}


def test_ranks_hold_the_same_masks(two):
    for ranks in two.values():
        masks = [{key: value for key, value in rank["final"].items() if key.startswith("masks.")} for rank in ranks]
        assert all(torch.equal(value, masks[1][key]) for key, value in masks[0].items())


# Going on in another layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "prune replicas <- alone", "prune shards <- alone", "prune replicas <- shards", "prune shards <- replicas",
        "prune folders <- folders", "continue replicas <- shards", "continue shards <- alone",
    ],
)  # fmt: skip
def test_going_on(two, alone, change):
    assert_same_curve(two[change], alone[change.split()[0]], 1e-4, first=SAVED)


@pytest.mark.parametrize("stage", ["prune", "continue"])
@pytest.mark.parametrize("layout", ["replicas", "shards"])
def test_going_on_alone(two, alone, jobs, stage, layout):
    assert_same_curve([execute(jobs.go_on(stage, layout, MICROBATCHES))], alone[stage], 1e-4, first=SAVED)


def test_going_on_alone_from_a_sharded_folder(two, alone, jobs):
    result = execute(jobs.go_on("prune", "folders", FOLDERS, MICROBATCHES))
    assert_same_curve([result], alone["prune"], 1e-4, first=SAVED)
    assert result["sharded"] > 0


def test_autoresume_from_its_own_sharded_folder(two):
    begun, resumed = two["own folders begun"], two["own folders resumed"]
    for before, after in zip(begun, resumed, strict=True):
        assert list(before["batches"]) == [0, 1, 2] and list(after["batches"]) == [3, 4]


def test_sharded_folder_folds_as_one_file_does(two, jobs, tmp_path):
    folder, file = (jobs.root / "prune" / name / "latest-rank0.pt" for name in ("folders", "replicas"))
    assert folder.is_dir() and file.is_file()
    sharded, one = (read_checkpoint(prune_and_save_model(p, tmp_path / f"{p.is_dir()}.pt")) for p in (folder, file))
    assert_same_tensors(dict(sharded.weights), dict(one.weights), 1e-4)
    assert sharded.info.hf_config == one.info.hf_config
