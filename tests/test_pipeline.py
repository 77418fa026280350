"""From end to end, with real text: shear, fold, continue, convert, load in transformers; on one rank and on two."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers_runs import NAMES, SEQ, VOCAB, configured, free_port, make_model, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmshearing.checkpoints import build_model, checkpoint_to_hf, prune_and_save_model
from llmshearing.checkpoints.checkpoint import CheckpointInfo, read_checkpoint, save_checkpoint
from llmshearing.config import load_config
from llmshearing.data.mixture.loader import build_eval_dataloader, build_train_dataloader
from llmshearing.families import table_for
from llmshearing.fold.fold import fold, folded_shape
from llmshearing.fold.selection import load_selection
from llmshearing.masks.l0 import selection_from_gates
from llmshearing.train import train

pytestmark = pytest.mark.slow

SOURCE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SOURCE |= {"intermediate_size": 128, "num_hidden_layers": 4}
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SMALL |= {"intermediate_size": 64, "num_hidden_layers": 3}
KEPT = {"hidden": 32, "head": 1, "intermediate": 64, "layer": 3}
TARGET = {"d_model": 32, "n_heads": 2, "intermediate_size": 64, "n_layers": 3}
PRUNE, CONTINUE, BATCH = 160, 60, 16
DATA = {"set_names": NAMES, "max_seq_len": SEQ, "vocab_size": VOCAB}


def mean_loss(model, lab, device_batch=64):
    """Mean next-token loss over the whole evaluation split, by transformers alone."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in build_eval_dataloader(
            local=lab.data, split="eval_merge", batch_size=device_batch, **DATA
        ).dataloader:
            ids = batch["input_ids"]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            total += F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(-1).sum().item()
            count += len(ids)
    return total / count


def pretrain(model, lab, steps=500):
    spec = build_train_dataloader(
        local=lab.data, split="for_ft", proportion=[1 / 3] * 3, batch_size=BATCH, seed=0, **DATA
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    stream = iter(spec.dataloader)
    for _ in range(steps):
        ids = next(stream)["input_ids"]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def save_source(model, lab, folder: Path) -> Path:
    model.save_pretrained(folder)
    for path in lab.source.iterdir():
        if "token" in path.name:
            shutil.copy(path, folder)
    return folder


def random_gates(seed):
    """Gates of 0 and 1 of the target's sizes, all selections equally likely."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (64,), "head": (4, 2), "intermediate": (4, 128), "layer": (4,)}
    ranks = {kind: torch.rand(shape, generator=generator).argsort(-1).argsort(-1) for kind, shape in shapes.items()}
    return {kind: (rank < KEPT[kind]).float() for kind, rank in ranks.items()}


def log_probabilities(model):
    ids = torch.randint(VOCAB, (4, SEQ), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.log_softmax(-1)


@pytest.fixture(scope="module")
def trained(lab, tmp_path_factory):
    """A source that has learned something of the text: well below the loss of guessing, ln 384 = 5.95."""
    model = make_model(**SOURCE)
    pretrain(model, lab)
    assert mean_loss(model, lab) < 4.6
    return save_source(model, lab, tmp_path_factory.mktemp("trained") / "source")


@pytest.fixture(scope="module")
def sheared(lab, trained, tmp_path_factory):
    """(folder of the pruning run, trainer, folded checkpoint)."""
    folder = tmp_path_factory.mktemp("sheared")
    cfg = configured(
        lab,
        folder,
        model__path=str(trained),
        model__l0_module__target_model=TARGET,
        model__l0_module__lagrangian_warmup_steps="0.4dur",
        optimizer={"lr": 2e-3, "lag_lr": 0.5, "schedule_masks": False},
        loggers__file_logger={"filename": str(folder / "log.txt"), "buffer_size": 1, "flush_interval": 1000},
        scheduler__t_warmup="10ba",
        callbacks__data_loading__update_type="constant",
        callbacks__data_loading__proportion=[0.3, 0.4, 0.3],
        global_train_batch_size=BATCH,
        max_duration=f"{PRUNE}ba",
        eval_interval=f"{PRUNE}ba",
        save_interval=f"{PRUNE}ba",
    )
    trainer = train(cfg)
    return folder / "run", trainer, read_checkpoint(prune_and_save_model(folder / "run" / "latest-rank0.pt"))


def continued(lab, tmp_path, checkpoint: Path):
    """The model after `CONTINUE` more batches from a checkpoint, and the checkpoint of that run."""
    cfg = configured(
        lab,
        tmp_path,
        model={"path": str(checkpoint), "l0_module": None},
        train_loader__dataset__split="for_ft",
        optimizer={"lr": 2e-3},
        callbacks__data_loading__update_type="constant",
        global_train_batch_size=BATCH,
        max_duration=f"{CONTINUE}ba",
        eval_interval=f"{CONTINUE}ba",
        save_interval=f"{CONTINUE}ba",
    )
    train(cfg)
    checkpoint = tmp_path / "run" / "latest-rank0.pt"
    stored = read_checkpoint(checkpoint)
    return build_model(stored.weights, stored.info.config), checkpoint


@pytest.fixture(scope="module")
def finished(sheared, lab, tmp_path_factory):
    """(folder, model, checkpoint) of the sheared model after continued pretraining."""
    folder = tmp_path_factory.mktemp("continued")
    return folder, *continued(lab, folder, sheared[0] / "pruned-latest-rank0.pt")


def test_target_is_reached_on_every_axis(sheared):
    folder, trainer, folded = sheared
    assert {key: getattr(folded.info.config, key) for key in SMALL} == SMALL
    shapes = {name: tuple(value.shape) for name, value in folded.weights.items()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (VOCAB, 32)
    layers = {int(name.split(".")[2]) for name in shapes if ".layers." in name}
    assert layers == {0, 1, 2}
    for layer in layers:
        at = f"model.layers.{layer}."
        assert shapes[at + "self_attn.q_proj.weight"] == (32, 32)  # 2 heads of 16, hidden 32
        assert shapes[at + "self_attn.k_proj.weight"] == shapes[at + "self_attn.v_proj.weight"] == (16, 32)
        assert shapes[at + "self_attn.o_proj.weight"] == (32, 32)
        assert shapes[at + "mlp.gate_proj.weight"] == (64, 32) and shapes[at + "mlp.down_proj.weight"] == (32, 64)
    # The masks themselves have come there, not only the cut: descent and ascent circle around the target, so it is the
    # mean of the last third of the run that has to meet it.
    log = (folder.parent / "log.txt").read_text()
    for kind in trainer.state.model.masks.kinds:
        found = re.findall(rf"pruning/expected_sparsity/{kind}: ([\d.]+)", log)
        late = [float(value) for value in found[-PRUNE // 3 :]]
        size = trainer.state.model.masks.row_size(kind)
        assert len(found) == PRUNE
        assert sum(late) / len(late) == pytest.approx(1 - KEPT[kind] / size, abs=0.06), kind
    selection, _ = load_selection(folder / "pruned-latest-rank0.selection.safetensors")
    assert folded_shape(trainer.state.model.masks.table, selection)["hidden_size"] == 32


def test_sheared_is_better_than_random_selections(sheared, finished, lab, trained, tmp_path):
    """Right after the fold, random cuts of the source and of the pruning run's own weights; then one, continued."""
    folder, _, folded = sheared
    table = table_for(AutoModelForCausalLM.from_pretrained(trained).config)
    sources = [AutoModelForCausalLM.from_pretrained(trained).state_dict()]
    sources.append(read_checkpoint(folder / "latest-rank0.pt").weights)
    ours = mean_loss(build_model(folded.weights, folded.info.config), lab)
    random_losses = []
    for weights in sources:
        for seed in range(3):
            cut = fold(dict(weights), table, selection_from_gates(table, random_gates(seed)))
            random_losses.append(mean_loss(build_model(cut, folded.info.config), lab))
    assert ours < min(random_losses) - 0.1, (ours, random_losses)

    cut = fold(dict(sources[0]), table, selection_from_gates(table, random_gates(0)))
    info = CheckpointInfo(folded.info.config.to_dict(), history=["random selection"])
    save_checkpoint(tmp_path / "random.pt", cut, info)
    random_after, _ = continued(lab, tmp_path / "random", tmp_path / "random.pt")
    losses = mean_loss(finished[1], lab), mean_loss(random_after, lab)
    assert losses[0] < losses[1] and losses[0] < ours + 0.02, (ours, losses)


def test_continued_model_loads_in_transformers(finished, tmp_path):
    folder, model, checkpoint = finished
    assert len(read_checkpoint(checkpoint).info.history) == 3  # pruned, folded, continued
    checkpoint_to_hf(checkpoint, tmp_path / "hf", {})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(log_probabilities(loaded), log_probabilities(model), rtol=0, atol=1e-6)
    last = json.loads((folder / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["batch"] == CONTINUE
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("The import statement", return_tensors="pt")["input_ids"]
    assert loaded.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "pruned from" in card and "continued pretraining from" in card


# The commands that users type ------------------------------------------------------------------------------------

# The published recipe, at the size of a toy. A large eps keeps Adam from blowing up rounding, so that runs compare.
TOY = ["max_seq_len=32", "precision=fp32", "device=cpu", "eval_subset_num_batches=-1", "optimizer.eps=1.0"]
TOY += ["optimizer.lr=0.1", "scheduler.t_warmup=1ba", "device_eval_batch_size=64", "fsdp_config=null"]
TOY += ["callbacks.data_loading.set_names=[asyncio,docs,email]", "callbacks.memory_monitor=null"]
TOY += ["callbacks.data_loading.proportion=[0.3,0.3,0.4]", "callbacks.data_loading.target_loss=[5.5,5.5,5.5]"]
TOY += ["device_train_microbatch_size=1", "loggers.tensorboard=null", "model.vocab_size=384", "max_duration=4ba"]
TOY += ["global_train_batch_size=4", "eval_interval=2ba", "save_interval=4ba", "console_log_interval=4ba"]
BIG_SHAPE = ["model.d_model=32", "model.n_heads=4", "model.n_layers=3", "model.intermediate_size=48"]
CUT = {"d_model": 20, "n_heads": 2, "n_layers": 2, "intermediate_size": 28}
SMALL_SHAPE = [*(f"model.{key}={value}" for key, value in CUT.items()), "model.head_dim=8"]
PRUNING = [f"model.l0_module.target_model.{key}={value}" for key, value in CUT.items()]
PRUNING += ["model.l0_module.lagrangian_warmup_steps=2ba"]


def succeed(*words, **more):
    result = run(*words, **more)
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


def composer(processes, *words):
    return ["composer", "-n", processes, "--master_port", free_port(), "llmshearing/train.py", *words]


def close(one, other, tolerance):
    one, other = read_checkpoint(one), read_checkpoint(other)
    for here, there in ((one.weights, other.weights), (one.masks, other.masks)):
        assert here.keys() == there.keys()
        for name, value in here.items():
            torch.testing.assert_close(there[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: name + m)


def test_the_seeds_commands_on_two_ranks(lab, tmp_path):
    """HF -> Composer, prune, fold, continue, Composer -> HF: the predecessor's command lines, with its YAML files."""
    model_dir, hf = tmp_path / "pruned", tmp_path / "hf"
    source = save_source(make_model(num_key_value_heads=4, rms_norm_eps=1e-5), lab, tmp_path / "source")
    start = tmp_path / "composer" / "state_dict.pt"
    succeed("python3", "-m", "llmshearing.utils.composer_to_hf", source, start)
    assert "PASS" in succeed("python3", "-m", "llmshearing.utils.test_composer_hf_eq", source, start).stderr

    where = [f"data_local={lab.data}", f"tokenizer_name={source}", *TOY]
    pruning = [*where, f"model.path={start}", *BIG_SHAPE, *PRUNING]
    succeed(*composer(2, "configs/llama2/7b.yaml", *pruning, f"save_folder={model_dir}", "run_name=two"))
    # one process with the same global batch does the same: gates, data, evaluation
    train(load_config("configs/llama2/7b.yaml", [*pruning, f"save_folder={tmp_path / 'alone'}", "run_name=one"]))
    close(tmp_path / "alone" / "latest-rank0.pt", model_dir / "latest-rank0.pt", 1e-4)
    alone, two = (
        [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "alone", model_dir)
    )
    assert [line["batch"] for line in two] == [2, 4]
    for here, there in zip(alone, two, strict=True):
        assert here["tokens"] == there["tokens"]
        assert there["domains"] == pytest.approx(here["domains"], abs=1e-4)  # each sample once, on however many ranks
        assert there["loss"] == pytest.approx(here["loss"], abs=1e-4)
    assert sorted(path.name for path in (model_dir / "gates").iterdir()) == [
        "gates-ba2.safetensors",
        "gates-ba4.safetensors",
    ]

    command = ["python3", "-m", "llmshearing.utils.post_pruning_processing", "prune_and_save_model"]
    succeed(*command, model_dir / "latest-rank0.pt")
    pruned = model_dir / "pruned-latest-rank0.pt"
    going_on = [*where, f"model.path={pruned}", *SMALL_SHAPE, f"save_folder={tmp_path / 'ft'}", "run_name=ft"]
    succeed(*composer(2, "configs/llama2/1.3b.yaml", *going_on))
    facts = ["model_class=LlamaForCausalLM", "hidden_size=20", "num_attention_heads=2", "num_hidden_layers=2"]
    facts += ["intermediate_size=28", "num_key_value_heads=2", "_name_or_path=Sheared-Toy"]
    latest = tmp_path / "ft" / "latest-rank0.pt"
    succeed("python3", "-m", "llmshearing.utils.composer_to_hf", latest, hf, *facts)
    loaded, report = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert not any(report.values())
    stored = read_checkpoint(latest)
    torch.testing.assert_close(
        log_probabilities(loaded), log_probabilities(build_model(stored.weights, stored.info.config)), rtol=0, atol=1e-6
    )
    assert AutoTokenizer.from_pretrained(hf).vocab_size == VOCAB


def test_launchers_agree_and_errors_reach_the_exit_code(lab, tmp_path):
    """`python -m llmshearing.train` and `composer -n 1`: the same run; a bad key fails without a traceback of ours."""
    shared = [f"data_local={lab.data}", f"tokenizer_name={lab.source}", *TOY, f"model.path={lab.source}"]
    shared += ["model.rms_norm_eps=1e-6", *BIG_SHAPE, "model.n_kv_heads=2", *PRUNING]
    yaml = "configs/llama2/7b.yaml"
    here = [f"save_folder={tmp_path / 'plain'}", "run_name=a"]
    succeed("python3", "-m", "llmshearing.train", yaml, *shared, *here)
    succeed(*composer(1, yaml, *shared, f"save_folder={tmp_path / 'composer'}", "run_name=b"))
    close(tmp_path / "plain" / "latest-rank0.pt", tmp_path / "composer" / "latest-rank0.pt", 0.0)
    bad = run(*composer(1, yaml, *shared, "optimizer.lag_rl=1"))
    assert bad.returncode != 0
    assert re.search(r"optimizer\.lag_rl.*lag_lr", bad.stdout + bad.stderr)
    assert "Traceback" not in bad.stdout
