"""README's commands and Python, and that of docs/pruners.md, run in their words; only sizes and places are small."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers_prune import model_of
from helpers_runs import ROOT, free_port, make_model, run, save_tokenizer
from helpers_tokenizers import save_word_tokenizer
from transformers import AutoModelForCausalLM

from llmshearing.prune import prune
from llmshearing.prune.methods import METHODS

# The sizes of a toy, which README's commands get from the YAML files that they name.
TOY = ["max_seq_len=32", "precision=fp32", "device=cpu", "fsdp_config=null", "eval_subset_num_batches=4"]
TOY += ["max_duration=4ba", "eval_interval=2ba", "save_interval=4ba", "global_train_batch_size=4"]
TOY += ["device_train_microbatch_size=2", "scheduler.t_warmup=1ba", "loggers.tensorboard=null", "model.vocab_size=384"]
TOY += ["callbacks.memory_monitor=null"]
DOMAINS = ["callbacks.data_loading.set_names=[code,web]", "callbacks.data_loading.proportion=[0.5,0.5]"]
DOMAINS += ["callbacks.data_loading.target_loss=[2.0,2.0]"]
CUT = {"d_model": 20, "n_heads": 2, "n_layers": 2, "intermediate_size": 28}
SOURCE = ["model.d_model=32", "model.n_heads=4", "model.n_layers=3", "model.intermediate_size=48"]
PRUNING = [f"model.l0_module.target_model.{key}={value}" for key, value in CUT.items()]
PRUNING += ["model.l0_module.lagrangian_warmup_steps=2ba"]
CONTINUED = [*(f"model.{key}={value}" for key, value in CUT.items()), "model.head_dim=8", *DOMAINS]


def section(title: str) -> list[list[str]]:
    """Commands of the bash blocks under a heading of README, split into words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def placed(word: str, tmp_path: Path) -> str:
    """A word of README with its places moved below `tmp_path`."""
    word = word.replace("$HF_MODEL_NAME", "models/Llama-2-7b-hf")
    return re.sub(r"(?<![\w/.])(models/|data/|out/|corpus$|state_dict\.pt$)", f"{tmp_path}/\\1", word)


def toy(words: list[str]) -> list[str]:
    """What makes a command small: fewer ranks, and the toy's sizes."""
    if words[0] == "composer":
        words[words.index("8")] = "1"
        words[3:3] = ["--master_port", str(free_port())]
    if "--max_seq_len" in words:
        return [*words[:-1], "32", "--eval_fraction", "0.15", "--for_prune_fraction", "0.4"]
    if "configs/llama2/7b.yaml" in words:
        given = [] if any("set_names" in word for word in words) else DOMAINS
        return [*words, *TOY, *given, *SOURCE, *PRUNING]
    return [*words, *TOY, *CONTINUED] if "configs/llama2/1.3b.yaml" in words else words


@pytest.mark.slow
def test_readme_commands_run(lab, tmp_path: Path) -> None:
    source = tmp_path / "models" / "Llama-2-7b-hf"
    make_model(num_key_value_heads=4, rms_norm_eps=1e-5).save_pretrained(source)
    save_tokenizer(source)
    for domain, kind in (("web", "docs"), ("code", "asyncio")):
        shutil.copytree(lab.corpus / kind, tmp_path / "corpus" / domain)
    commands = section("Prune your own model")
    assert len(commands) >= 8
    for words in commands:
        words = toy([placed(word, tmp_path) for word in words])
        words[0] = "python3" if words[0] == "python" else words[0]
        result = run(*words)
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", output_loading_info=True)
    assert not any(report.values())
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (20, 2)


def python_blocks(document: str) -> list[str]:
    """Blocks of Python of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def words_of_a_toy(folder: Path) -> Path:
    """A small model with its tokenizer in ``folder``, and text for it."""
    model_of("llama").save_pretrained(folder)
    save_word_tokenizer(folder)
    text = folder.parent / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(3 * i + j * j) % 20}" for j in range(11)) for i in range(400)))
    return text


def test_readme_python_runs(tmp_path: Path) -> None:
    """Only places and sizes are small."""
    text = words_of_a_toy(tmp_path / "source")
    (code,) = python_blocks("README.md")
    code = code.replace("models/source", f"{tmp_path}/source").replace("out/", f"{tmp_path}/out/")
    code = code.replace("data/mds", str(text))
    for large, small in (("128", "6"), ("344", "5"), ('_layers": 6', '_layers": 2')):
        assert large in code
        code = code.replace(large, small)
    found: dict = {}
    exec(code, found)
    assert found["model"].config.hidden_size == 6 and found["model"].config.num_hidden_layers == 2


def test_the_pruner_of_the_document_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/pruners.md, "Add a pruner": the method runs, and keeps what its score says."""
    words_of_a_toy(tmp_path / "source")
    found: dict = {}
    exec(python_blocks("docs/pruners.md")[0], found)
    monkeypatch.setitem(METHODS, "magnitude", found["METHOD"])
    target = {"hidden_size": 8, "intermediate_size": 5, "num_attention_heads": 2}
    out = prune("magnitude", tmp_path / "source", tmp_path / "out", target)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
    for layer, units in enumerate(out.choice.selection.units["intermediate"]):
        score = weights[f"model.layers.{layer}.mlp.down_proj.weight"].square().sum(0)
        assert units.index.tolist() == score.topk(5).indices.sort().values.tolist()


def test_first_screen_names_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"shear", "test", "smollm2"} <= set(named)
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in named)
