"""Small real runs: text that Python itself ships, a tokenizer, a tiny LLaMA, prepared data, a configuration.

Everything is made once a session (fixture `lab`) by the commands that users type, and takes seconds.
"""

import asyncio
import copy
import email
import json
import os
import pkgutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import yaml
from composer.loggers import InMemoryLogger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["asyncio", "docs", "email"]
SEQ, VOCAB = 32, 384
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TARGET = {"d_model": 20, "n_heads": 2, "intermediate_size": 28, "n_layers": 2}
# What the target's keys are called in a config.json, with the KV groups that go with the heads.
TARGET_HF = {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 28}
TARGET_HF |= {"num_hidden_layers": 2, "head_dim": 8, "vocab_size": VOCAB}


@dataclass(frozen=True)
class Lab:
    """`corpus`: JSONL by domain; `source`: Hugging Face directory of a random model; `data`: what prepare wrote."""

    root: Path
    corpus: Path
    source: Path
    data: Path


def documents() -> dict[str, list[str]]:
    """Three kinds of real text, in pieces of at most 1500 characters."""
    texts = {"docs": [topics[name] for name in sorted(topics)][:60]}
    for package in (asyncio, email):
        modules = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
        files = [Path(package.__path__[0], f"{name}.py") for name in modules]
        texts[package.__name__] = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return {name: [text[at : at + 1500] for text in texts[name] for at in range(0, len(text), 1500)] for name in NAMES}


def write_corpus(folder: Path) -> Path:
    for name, texts in documents().items():
        (folder / name).mkdir(parents=True)
        (folder / name / "part.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of VOCAB pieces, <s> = 0 and </s> = 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for texts in documents().values() for text in texts), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


def build_lab(root: Path) -> Lab:
    from llmshearing.data.prepare.run import prepare

    source = root / "source"
    make_model(initializer_range=0.1).save_pretrained(source)
    save_tokenizer(source)
    corpus = write_corpus(root / "corpus")
    shares = {"eval_fraction": 0.15, "for_prune_fraction": 0.4}
    prepare(corpus, source, root / "data", SEQ, progress=False, **shares)
    return Lab(root, corpus, source, root / "data")


def settings(lab: Lab, folder: Path | None, **changes) -> dict:
    """A pruning run of 8 batches as a nested dict; `changes` are keys with `__` for dots."""
    data = {"dynamic": True, "set_names": NAMES, "proportion": [0.25, 0.25, 0.5], "target_loss": [5.5, 6.0, 5.8]}
    masks = {"lagrangian_warmup_steps": "3ba", "eval_target_model": True, "target_model": dict(TARGET)}
    made = {
        "data_local": str(lab.data),
        "max_seq_len": SEQ,
        "run_name": "test",
        "model": {"path": str(lab.source), "l0_module": masks},
        "train_loader": {"dataset": {"split": "for_prune"}},
        "eval_loader": {"dataset": {"split": "eval_merge"}},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "1ba"},
        "optimizer": {"lr": 1e-3, "lag_lr": 0.5},
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "max_duration": "8ba",
        "eval_interval": "4ba",
        "eval_subset_num_batches": 3,
        "global_train_batch_size": 4,
        "device_eval_batch_size": 4,
        "precision": "fp32",
        "device": "cpu",
        "callbacks": {"data_loading": data},
        "progress_bar": False,
        "python_log_level": None,
        "save_folder": str(folder) if folder else None,
        "save_interval": "4ba",
    }
    made = copy.deepcopy(made)
    for key, value in changes.items():
        place = made
        *path, last = key.split("__")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return made


def write_yaml(path: Path, made: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return path


def configured(lab: Lab, tmp_path: Path, **changes):
    """The `Config` of :func:`settings`, as read from a file; it saves to `tmp_path/run`."""
    from llmshearing.config import load_config

    made = settings(lab, tmp_path / "run", **changes)
    return load_config(write_yaml(tmp_path / "run.yaml", made), [])


def trainer_of(cfg):
    """The trainer that `train` would build and, listening to it, a logger that keeps everything in memory."""
    from llmshearing.training.build import build_trainer
    from llmshearing.training.source import read_source

    trainer = build_trainer(cfg, read_source(cfg), "cpu")
    memory = InMemoryLogger()
    memory.init(trainer.state, trainer.logger)
    trainer.logger.destinations = (*trainer.logger.destinations, memory)
    return trainer, memory


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(*words: object, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the root of the checkout, as a user does; `python3` and `composer` are this environment's."""
    mine = {"python3": [sys.executable], "composer": [sys.executable, "-m", "composer.cli"]}
    first, *rest = [str(word) for word in words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            variables.pop(name, None)
    command = [*mine.get(first, [first]), *rest]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout)
