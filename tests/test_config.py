"""Reading a configuration: every problem at once, each naming key, value and what would be right."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from composer.core import Time
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.config import (
    Config,
    ConfigError,
    Shape,
    all_keys,
    head_mode,
    load_config,
    parse_time,
    schema,
    source_shape,
    target_problems,
    target_shape,
    to_yaml,
)
from llmshearing.errors import ShearingError

GOOD: dict[str, Any] = {
    "data_local": "data",
    "max_seq_len": 128,
    "max_duration": "100ba",
    "global_train_batch_size": 8,
    "model": {
        "path": "nowhere/source",
        "d_model": 64,
        "n_heads": 8,
        "n_layers": 4,
        "intermediate_size": 96,
        "vocab_size": 256,
        "l0_module": {
            "lagrangian_warmup_steps": "20ba",
            "target_model": {"d_model": 32, "n_heads": 4, "n_layers": 2, "intermediate_size": 48},
        },
    },
    "train_loader": {"dataset": {"split": "for_prune"}},
    "eval_loader": {"dataset": {"split": "eval_merge"}},
    "callbacks": {
        "data_loading": {
            "dynamic": True,
            "set_names": ["a", "b"],
            "proportion": [0.25, 0.75],
            "target_loss": [1.5, 2.5],
        }
    },
}
TARGET = "model.l0_module.target_model"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def the_problem(path: Path, *overrides: str) -> str:
    found = problems(path, *overrides)
    assert len(found) == 1, found
    return found[0]


# -- what is accepted ------------------------------------------------------------------------------------------


def test_defaults_follow_other_keys(good: Path) -> None:
    cfg = load_config(good, ["global_seed=5", "data_local=elsewhere"])
    assert cfg.seed == cfg.train_loader.dataset.shuffle_seed == 5
    assert cfg.train_loader.dataset.local == cfg.eval_loader.dataset.local == "elsewhere"
    assert cfg.model.max_seq_len == cfg.eval_loader.dataset.max_seq_len == 128
    assert cfg.model.attn_implementation == "sdpa"


def test_overrides_of_the_seeds_command_lines(good: Path) -> None:
    cfg = load_config(
        good,
        [
            "callbacks.data_loading.proportion=[0.67,0.33]",
            "callbacks.data_loading.set_names=[cc,c4-rp]",
            "model.l0_module.pruning_modules=[head,intermediate,hidden,head_layer,mlp]",
            "train_loader.prefetch_factor=null",
            "train_loader.persistent_workers=false",
            "optimizer.lr=1e-4",
            "loggers.wandb.init_kwargs.dir=out",
            "max_duration=3200",
            "fsdp_config.sharding_strategy=FULL_SHARD",
        ],
    )
    assert cfg.callbacks.data_loading.proportion == [0.67, 0.33]
    assert cfg.callbacks.data_loading.set_names == ["cc", "c4-rp"]
    assert cfg.train_loader.prefetch_factor is None and cfg.optimizer.lr == 1e-4
    assert cfg.loggers.wandb == {"init_kwargs": {"dir": "out"}}
    assert cfg.max_duration == "3200ba"
    assert load_config(good, ["model.l0_module=null"]).model.l0_module is None


def test_the_predecessors_yaml_loads(tmp_path: Path) -> None:
    """Every legacy key, blank values included."""
    path = tmp_path / "legacy.yaml"
    path.write_text("""
data_local: /data
data_remote: # blank
tokenizer_name: /llama
max_seq_len: 4096
global_seed: 17
run_name:
model:
  {name: mosaic_llama2_7b, path: state_dict.pt, init_device: cpu, tokenizer_name: "${tokenizer_name}", d_model: 4096,
   n_heads: 32, n_layers: 32, intermediate_size: 11008, max_seq_len: "${max_seq_len}", vocab_size: 32000,
   init_std: 0.02, attn_pdrop: 0.0, resid_pdrop: 0.0, emb_pdrop: 0.0, attn_impl: flash, rms_norm_eps: 1e-5,
   l0_module: {start_sparsity: 0.0, pruning_modules: [head, head_layer, mlp, intermediate, hidden],
     lagrangian_warmup_steps: 320ba, target_model: {d_model: 2560, n_layers: 32, n_heads: 20,
     intermediate_size: 6912, vocab_size: 32000}}}
tokenizer: {type: hftokenizer, args: {tokenizer_name: "${tokenizer_name}", max_seq_len: "${max_seq_len}"}}
train_loader:
  name: text
  dataset: {local: "${data_local}", remote: "${data_remote}", split: train_small, shuffle: true,
    tokenizer_name: "${tokenizer_name}", max_seq_len: "${max_seq_len}", shuffle_seed: "${global_seed}",
    is_uint16: true}
  drop_last: true
  num_workers: 8
eval_loader: {name: text, dataset: {local: "${data_local}", split: val_small, shuffle: false}, drop_last: false}
scheduler: {name: cosine_with_warmup, t_warmup: 100ba, alpha_f: 0.1}
optimizer: {name: decoupled_adamw, lr: 1e-4, betas: [0.9, 0.95], eps: 1.0e-08, weight_decay: 0.0, lag_lr: 1.0}
algorithms: {gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}}
max_duration: 800ba
eval_interval: 100ba
eval_subset_num_batches: 1000
global_train_batch_size: 32
seed: ${global_seed}
device_eval_batch_size: 8
device_train_microbatch_size: 8
precision: amp_bf16
fsdp_config: {sharding_strategy: FULL_SHARD, mixed_precision: DEFAULT, activation_checkpointing: true}
progress_bar: false
log_to_console: true
console_log_interval: 1ba
callbacks:
  speed_monitor: {window_size: 10}
  memory_monitor: {}
  data_loading: {dynamic: false, update_type: doremi, proportion: , set_names: , target_loss: }
loggers: {wandb: {project: pruning, name: "${run_name}", init_kwargs: {mode: offline}}}
save_interval: 800ba
save_folder: save_dir
""")
    cfg = load_config(path)
    assert cfg.model.attn_implementation == "flash_attention_2"
    assert cfg.seed == 17 and cfg.run_name is None and cfg.callbacks.memory_monitor == {}
    target = target_shape(cfg)
    assert target is not None and target.heads == target.groups == 20


def test_run_name_from_the_launchers_environment(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(good).run_name is None
    monkeypatch.setenv("COMPOSER_RUN_NAME", "night")
    assert load_config(good).run_name == "night"


def test_every_field_is_documented() -> None:
    """A docstring under each field: the schema is the manual."""
    for cls in vars(schema).values():
        if dataclasses.is_dataclass(cls):
            source = inspect.getsource(cls)
            for spec in dataclasses.fields(cls):
                after = source.split(f"    {spec.name}: ", 1)[1]
                next_field = after.find("\n    ", after.find('"""'))
                assert '"""' in after[: next_field if next_field > 0 else None], f"{cls.__name__}.{spec.name}"


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "optimizer.lr": st.floats(0, 1),
        "optimizer.lag_lr": st.integers(0, 5),
        "max_duration": st.integers(100, 10**12).map(lambda n: f"{n}ba") | st.just("7ep") | st.integers(100, 900),
        "run_name": st.text("ab ${}:'\"#\\-é[],", min_size=1).filter(lambda s: "${" not in s),
        "device_train_microbatch_size": st.sampled_from([None, 1, 4, "auto"]),
        "model.l0_module.round_to": st.integers(1, 64),
        "scheduler.t_warmup": st.sampled_from(["0ba", "0.05dur", "12800tok", 3]),
        "loggers.file_logger": st.dictionaries(st.sampled_from("ab"), st.integers() | st.booleans() | st.none()),
        "train_loader.num_workers": st.integers(0, 4),
    },
)


@given(VALUES)
def test_to_yaml_round_trips(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    given_yaml = json.loads(json.dumps(GOOD))
    for key, value in values.items():
        *sections, name = key.split(".")
        node = given_yaml
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    path = tmp_path_factory.mktemp("cfg") / "c.yaml"
    path.write_text(yaml.safe_dump(given_yaml))
    cfg = load_config(path)
    assert isinstance(cfg, Config)
    path.write_text(to_yaml(cfg))
    assert load_config(path) == cfg


# -- times -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**13), st.sampled_from(["ba", "ep", "sp", "tok", "sec", "iter"]))
def test_times_are_composers(value: int, unit: str) -> None:
    ours, theirs = parse_time(f"{value}{unit}"), Time.from_timestring(f"{value}{unit}")
    assert (ours.value, ours.unit) == (theirs.value, theirs.unit.value)


def test_times_other_forms() -> None:
    assert parse_time(640) == parse_time("640ba") == (640, "ba")
    assert parse_time("3e9tok") == (3e9, "tok") and parse_time("0.2dur") == (0.2, "dur")
    for wrong in ("640 batches", "ba", "-3ba", "1.5ba", "2dur", "1e", "", "1..2dur", "inf", "nanba"):
        with pytest.raises(ValueError):
            parse_time(wrong)


# -- what is refused, one problem each -------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], list[str]]] = {
    "proportions do not sum to 1": (
        ["callbacks.data_loading.proportion=[0.67,0.34]"],
        ["callbacks.data_loading.proportion", "[0.67, 0.34]", "1.01", "not 1"],
    ),
    "a negative proportion": (["callbacks.data_loading.proportion=[-0.5,1.5]"], ["proportion", "-0.5", "negative"]),
    "NaN": (["callbacks.data_loading.proportion=[.nan,1.0]"], ["proportion", "NaN"]),
    "too few proportions": (["callbacks.data_loading.proportion=[1.0]"], ["proportion", "1 values", "2 set_names"]),
    "too few target losses": (["callbacks.data_loading.target_loss=[1.0]"], ["target_loss", "[1.0]", "2 set_names"]),
    "no target loss": (["callbacks.data_loading.target_loss=null"], ["target_loss", "update_type=constant"]),
    "a domain twice": (["callbacks.data_loading.set_names=[a,a]"], ["set_names", "a comes more than once"]),
    "wrong choice": (["precision=bf16"], ["precision = bf16", "amp_bf16"]),
    "wrong update type": (["callbacks.data_loading.update_type=domini"], ["update_type = domini", "doremi, constant"]),
    "a rate of Muon without Muon": (["optimizer.muon_lr=0.01"], ["optimizer.muon_lr = 0.01", "only muon reads it"]),
    "a momentum of 1": (
        ["optimizer.name=muon", "optimizer.muon_momentum=1.0"],
        ["optimizer.muon_momentum = 1.0", "[0, 1)"],
    ),
    "relative steps without Muon": (
        ["optimizer.muon_relative=true"],
        ["optimizer.muon_relative = True", "only muon reads it"],
    ),
    "a negative rate of Muon": (["optimizer.name=muon", "optimizer.muon_lr=-1"], ["optimizer.muon_lr", "at least 0"]),
    "wrong type": (["optimizer.lr=fast"], ["optimizer.lr = fast", "a number"]),
    "wrong type in a list": (
        ["callbacks.data_loading.proportion=[a,b]"],
        ["proportion = [a, b]", "a list, each a num"],
    ),
    "a mapping for a number": (["max_seq_len.x=1"], ["max_seq_len = {x: 1}", "a whole number"]),
    "a number for a section": (["model.l0_module=3"], ["model.l0_module = 3", "a mapping of pruning_modules"]),
    "fractional count": (["global_train_batch_size=8.5"], ["global_train_batch_size = 8.5", "a whole number"]),
    "not a time": (["eval_interval=often"], ["eval_interval = often", "640ba"]),
    "a time of 0": (["save_interval=0ba"], ["save_interval = 0ba", "more than 0"]),
    "a fraction as duration": (["max_duration=0.5dur"], ["max_duration = 0.5dur", "a time in ba"]),
    "warm-up too long": (["scheduler.t_warmup=200ba"], ["scheduler.t_warmup = 200ba", "max_duration = 100ba"]),
    "warm-up too long in another unit": (["scheduler.t_warmup=801sp"], ["801sp", "max_duration = 100ba"]),
    "warm-up past t_max": (
        ["scheduler.t_max=0.1dur", "scheduler.t_warmup=11ba"],
        ["t_warmup = 11ba", "t_max = 0.1dur"],
    ),
    "masks' warm-up too long": (["model.l0_module.lagrangian_warmup_steps=102401tok"], ["102401tok", "max_duration"]),
    "microbatch": (["device_train_microbatch_size=3"], ["batch_size = 8", "device_train_microbatch_size = 3"]),
    "auto on the CPU": (["device_train_microbatch_size=auto", "device=cpu"], ["auto", "CPU"]),
    "microbatch word": (["device_train_microbatch_size=big"], ["device_train_microbatch_size = big", "or auto"]),
    "no eval split": (["eval_loader.dataset.split=null"], ["eval_loader.dataset.split", "eval_merge"]),
    "no train split": (
        ["train_loader.dataset.split=null", "callbacks.data_loading.dynamic=false"],
        ["train_loader.dataset.split", "dynamic"],
    ),
    "no time to download": (["train_loader.dataset.download_timeout=0"], ["download_timeout = 0", "more than 0"]),
    "sequence lengths": (["eval_loader.dataset.max_seq_len=64"], ["dataset.max_seq_len = 64", "max_seq_len = 128"]),
    "target's sequence length": ([f"{TARGET}.max_seq_len=64"], [f"{TARGET}.max_seq_len = 64", "128"]),
    "prefetch without workers": (["train_loader.prefetch_factor=2"], ["prefetch_factor = 2", "num_workers = 0"]),
    "resume without folder": (["autoresume=true", "run_name=x"], ["save_folder", "autoresume"]),
    "attention twice": (["model.attn_impl=flash", "model.attn_implementation=eager"], ["flash_attention_2", "eager"]),
    "dropout": (["model.resid_pdrop=0.1"], ["model.resid_pdrop = 0.1", "must be 0"]),
    "override without =": (["oops"], ["'oops'", "key=value"]),
    "override that is no YAML": (["optimizer.lr=[1"], ["'optimizer.lr=[1'", "cannot be read"]),
    "target larger than source": ([f"{TARGET}.d_model=65"], [f"{TARGET}.d_model = 65", "larger", "64"]),
    "target vocabulary": ([f"{TARGET}.vocab_size=100"], [f"{TARGET}.vocab_size = 100", "256"]),
    "target head_dim": ([f"{TARGET}.head_dim=4"], [f"{TARGET}.head_dim = 4", "8"]),
    "empty target": (
        [
            "model.l0_module.target_model={}",
            f"{TARGET}.d_model=null",
            f"{TARGET}.n_heads=null",
            f"{TARGET}.n_layers=null",
            f"{TARGET}.intermediate_size=null",
        ],
        [TARGET, "names no size"],
    ),
    "no goal": (["model.l0_module.target_model=null"], [TARGET, "target_sparsity"]),
    "two goals": (["model.l0_module.target_sparsity=0.5"], ["target_sparsity = 0.5", TARGET]),
    "sparsity of 1": (
        ["model.l0_module.target_model=null", "model.l0_module.target_sparsity=1.0"],
        ["= 1.0", "between"],
    ),
    "starts above its goal": (
        [
            "model.l0_module.target_model=null",
            "model.l0_module.target_sparsity=0.5",
            "model.l0_module.start_sparsity=0.6",
        ],
        ["start_sparsity = 0.6", "0.5"],
    ),
    "unknown mask": (["model.l0_module.pruning_modules=[heads]"], ["pruning_modules = [heads]", "head_layer"]),
    "layer masks of two sorts": (
        ["model.l0_module.pruning_modules=[hidden,head,intermediate,layer,mlp]"],
        ["layer", "mlp"],
    ),
    "heads without mask": (
        ["model.l0_module.pruning_modules=[hidden,intermediate,layer]"],
        [f"{TARGET}.n_heads = 4", "8", "mask head"],
    ),
    "hidden without mask": (
        ["model.l0_module.pruning_modules=[head,intermediate,layer]"],
        [f"{TARGET}.d_model = 32", "mask hidden"],
    ),
    "MLP without mask": (
        ["model.l0_module.pruning_modules=[head,hidden,layer]"],
        ["intermediate_size = 48", "mask intermediate"],
    ),
    "layers without mask": (
        ["model.l0_module.pruning_modules=[head,hidden,intermediate]"],
        ["n_layers = 2", "mask layer"],
    ),
    "layers with half a mask": (
        ["model.l0_module.pruning_modules=[head,hidden,intermediate,mlp]"],
        ["n_layers = 2", "head_layer and mlp"],
    ),
    "source's heads and groups": (["model.n_kv_heads=3"], ["model.n_heads = 8", "n_kv_heads = 3"]),
    "hidden and heads": (["model.n_heads=7"], ["model.d_model = 64", "n_heads = 7", "head_dim"]),
    "half a source": (["model.vocab_size=null"], ["model.vocab_size", "nowhere/source"]),
    "heads of no group": (
        ["model.n_kv_heads=2", f"{TARGET}.n_heads=6"],
        [f"{TARGET}.n_heads = 6", "4 query heads", "n_kv_heads = 2"],
    ),
    "groups and heads at once": (
        ["model.n_kv_heads=4", f"{TARGET}.n_kv_heads=2", f"{TARGET}.n_heads=2"],
        ["n_heads = 2", "n_kv_heads = 2", "whole groups (n_heads = 4"],
    ),
    "plain heads, other groups": ([f"{TARGET}.n_kv_heads=2"], [f"{TARGET}.n_heads = 4", "n_kv_heads = 2"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_key_value_and_remedy(name: str, good: Path) -> None:
    overrides, words = BAD[name]
    problem = the_problem(good, *overrides)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimizer.lrr", "optimizer.lr"),
        ("max_duratoin", "max_duration"),
        ("path", "model.path"),
        ("t_warmup", "scheduler.t_warmup"),
        ("model.target_model", "model.l0_module.target_model"),
        ("model.l0_module.pruning_module", "model.l0_module.pruning_modules"),
        ("callback", "callbacks"),
        ("train_loader.split", "train_loader.dataset.split"),
    ],
)
def test_unknown_key_did_you_mean(key: str, hint: str, good: Path) -> None:
    assert the_problem(good, f"{key}=x") == f"unknown key {key}; did you mean {hint}?"


def test_all_problems_come_at_once(good: Path) -> None:
    found = problems(
        good,
        "optimiser.lr=1",
        "optimizer.lag_lr=much",
        "callbacks.data_loading.proportion=[0.5,0.6]",
        f"{TARGET}.d_model=128",
        "global_train_batch_size=null",
        "eval_loader.dataset.split=null",
        "rubbish",
    )
    for word in ("optimiser", "lag_lr", "proportion", "d_model", "global_train_batch_size", "split", "rubbish"):
        assert sum(word in problem for problem in found) == 1, (word, found)
    assert len(found) == 7


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    found = "\n".join(problems(path))
    for key in ("data_local", "max_seq_len", "max_duration", "global_train_batch_size", "model.path"):
        assert f"missing key {key}" in found
    assert "train_loader.dataset.local" not in found  # follows data_local: said once


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "a: 1\na: 2\n", "word"])
def test_files_that_are_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert "bad.yaml" in str(pytest.raises(ShearingError, load_config, path).value)
    with pytest.raises(ShearingError, match="absent"):
        load_config(tmp_path / "absent.yaml")


def test_interpolations_that_lead_nowhere_or_to_the_wrong_type(good: Path) -> None:
    assert "nothere" in the_problem(good, "save_folder=${nothere}/x")
    assert "must be a number" in the_problem(good, "optimizer.lr=${data_local}")


def test_ranks_of_the_launch_divide_the_batch(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 ranks" in the_problem(good)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=3), st.data())
def test_any_value_of_any_key_loads_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, value: Any, data: st.DataObject
) -> None:
    """No value of any key ends in anything but a configuration or a ConfigError."""
    key = data.draw(st.sampled_from(all_keys()))
    given_yaml = json.loads(json.dumps(GOOD))
    *sections, name = key.split(".")
    node = given_yaml
    for section in sections:
        if not isinstance(node.get(section), dict):
            node[section] = {}
        node = node[section]
    node[name] = value
    path = tmp_path_factory.mktemp("cfg") / "c.yaml"
    path.write_text(yaml.safe_dump(given_yaml, allow_unicode=True))
    try:
        load_config(path)
    except ConfigError as error:
        assert error.problems


# -- shapes ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_grouped_queries_cut_groups_or_heads_inside_groups(
    tmp_path_factory: pytest.TempPathFactory, groups: int, per_group: int, data: st.DataObject
) -> None:
    """Exactly the shapes of one of the two ways are accepted, and each gives the way."""
    heads = data.draw(st.integers(1, groups * per_group))
    kv = data.draw(st.none() | st.integers(1, groups))
    source = GOOD["model"] | {"n_heads": groups * per_group, "n_kv_heads": groups, "head_dim": 8}
    source["l0_module"] = {"target_model": {"n_heads": heads} | ({"n_kv_heads": kv} if kv else {})}
    path = tmp_path_factory.mktemp("cfg") / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"model": source}))
    by_group = heads % per_group == 0 and kv in (None, heads // per_group)
    by_query = kv == groups and heads % groups == 0
    if not (by_group or by_query):
        assert f"n_heads = {heads}" in the_problem(path)
        return
    cfg = load_config(path)
    target = target_shape(cfg)
    assert target is not None and target.heads == heads and target.hidden == 64
    if head_mode(cfg) == "query":
        assert target.groups == groups and heads < groups * per_group
    else:
        assert heads == target.groups * per_group


def test_groups_alone_name_the_heads(good: Path) -> None:
    cfg = load_config(good, ["model.n_kv_heads=4", f"{TARGET}.n_heads=null", f"{TARGET}.n_kv_heads=3"])
    target = target_shape(cfg)
    assert target is not None and (target.heads, target.groups) == (6, 3)


HF = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "vocab_size": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
NO_KEYS = [f"model.{key}=null" for key in ("d_model", "n_heads", "n_layers", "intermediate_size", "vocab_size")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(HF))
    return tmp_path / "source"


def test_source_shape_from_config_json(good: Path, source: Path) -> None:
    expected = Shape(64, 8, 2, 16, 96, 4, 256)
    assert source_shape(load_config(good, [f"model.path={source}", *NO_KEYS])) == expected
    assert source_shape(load_config(good, [f"model.path={source}"])) == expected
    (source / "config.json").write_text(
        json.dumps(
            {k: v for k, v in HF.items() if k[:3] not in ("num", "hea")}
            | {"num_attention_heads": 8, "num_hidden_layers": 4}
        )
    )
    assert source_shape(load_config(good, [f"model.path={source}"])) == Shape(64, 8, 8, 8, 96, 4, 256)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.d_model=72", ["model.d_model = 72", "hidden_size = 64"]),
        ("model.n_kv_heads=8", ["model.n_kv_heads = 8", "num_key_value_heads = 2"]),
        ("model.rope_theta=5e5", ["model.rope_theta = 500000.0", "rope_theta = 10000.0"]),
        ("model.tie_word_embeddings=false", ["model.tie_word_embeddings = False", "True"]),
    ],
)
def test_keys_must_agree_with_config_json(override: str, words: list[str], good: Path, source: Path) -> None:
    problem = the_problem(good, f"model.path={source}", override)
    assert all(word in problem for word in words)


def test_damaged_config_json(good: Path, source: Path) -> None:
    (source / "config.json").write_text('{"hidden_size": ')
    assert "config.json" in the_problem(good, f"model.path={source}")
    (source / "config.json").write_text(json.dumps(HF | {"vocab_size": None}))
    assert "vocab_size" in the_problem(good, f"model.path={source}")


def test_without_a_shape_the_checkpoint_tells(good: Path) -> None:
    """A .pt without shape keys: checked later, by the same function. A name that is not here: an error."""
    cfg = load_config(good, ["model.path=x/state_dict.pt", *NO_KEYS])
    assert source_shape(cfg) is None and target_shape(cfg) is None
    small = Shape(16, 4, 4, 4, 96, 4, 256)
    assert [problem for problem in target_problems(cfg, small) if "d_model = 32" in problem]
    big = Shape(64, 8, 8, 8, 96, 4, 256)
    assert not list(target_problems(cfg, big))
    assert target_shape(cfg, big) == Shape(32, 4, 4, 8, 48, 2, 256)
    assert "model.d_model" in the_problem(good, *NO_KEYS)
