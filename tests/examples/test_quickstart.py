"""The quickstart's parts: its corpus is real and deterministic, its kept source has learned something."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart.corpus import build, build_domain
from examples.quickstart.run import AFTER, CONFIGS, MASKS, SHORT, SOURCE, last_checkpoint, shrinking, table
from examples.quickstart.train_source import SEQUENCE, is_held_out, pack
from llmshearing.checkpoints.hf_config import read_config
from llmshearing.config import Config, load_config, source_shape, target_shape
from llmshearing.errors import ShearingError
from llmshearing.prune.run import make_plan
from llmshearing.training.loss import token_losses
from llmshearing.training.source import read_source


def texts(directory: Path) -> dict[str, list[str]]:
    return {
        folder.name: [json.loads(line)["text"] for line in (folder / "00000.jsonl").read_text().splitlines()]
        for folder in sorted(directory.iterdir())
    }


def test_corpus_has_real_domains_and_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(tmp_path / name, limit_mb=0.1)
    corpus = texts(tmp_path / "a")
    assert corpus == texts(tmp_path / "b")
    assert len(corpus) >= 4
    everything = [text for domain in corpus.values() for text in domain]
    assert len(everything) == len(set(everything))
    for name, domain in corpus.items():
        assert 50_000 < sum(len(text.encode()) for text in domain) <= 100_000, name
        assert max(len(text.encode()) for text in domain) <= 12_000
    assert sum("def " in text for text in corpus["code"]) > len(corpus["code"]) / 2


def test_corpus_refuses_an_output_that_exists_and_a_domain_without_text(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ShearingError, match="exists already"):
        build(tmp_path, limit_mb=0.1)
    monkeypatch.setattr("examples.quickstart.corpus.DOMAINS", {"code": lambda: iter(["short"])})
    with pytest.raises(ShearingError, match="domain code: only"):
        build_domain("code", 100_000)


def test_kept_source_loads_strictly_and_beats_a_unigram_model(root: Path) -> None:
    folder = root / SOURCE
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10 * 2**20
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Text that nobody can have trained on: this repository's own.
    ours = [path.read_text() for path in sorted((root / "llmshearing").glob("*.py"))]
    ids = pack(ours, tokenizer)[:24]
    with torch.no_grad():
        loss = token_losses(model(input_ids=ids, use_cache=False).logits, ids).mean().item()
    counts = Counter(ids.flatten().tolist())
    entropy = -sum(n / ids.numel() * math.log(n / ids.numel()) for n in counts.values())  # fitted to this very text
    assert loss < entropy


def test_recorded_losses_beat_the_recorded_unigram_losses(root: Path) -> None:
    record = json.loads((root / SOURCE / "training.json").read_text())
    assert all(record["eval_loss"][name] < record["eval_loss_unigram"][name] - 2 for name in record["eval_loss"])


def test_pack_keeps_documents_whole_and_in_order(root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / SOURCE)
    documents = [f"document {i} " * 40 for i in range(20)]
    ids = pack(documents, tokenizer).flatten().tolist()
    assert ids[0] == tokenizer.bos_token_id and len(ids) % SEQUENCE == 0
    decoded = tokenizer.decode(ids[1 : ids.index(tokenizer.eos_token_id)])
    assert decoded.split() == documents[0].split()


def test_held_out_share_is_the_one_that_the_data_command_is_given() -> None:
    share = sum(is_held_out(f"text {i}") for i in range(5000)) / 5000
    assert 0.045 < share < 0.075


def test_all_ways_see_the_same_tokens_and_end_in_the_same_shape(root: Path) -> None:
    def config(name: str, *overrides: str) -> Config:
        return load_config(root / CONFIGS / f"{name}.yaml", overrides)

    recover, masks = config("recover"), config("prune", *MASKS)
    random, after = (config("continue", *overrides) for overrides in (SHORT, AFTER))
    assert target_shape(masks) == source_shape(after) == source_shape(recover)
    sequences = [
        int(c.max_duration.removesuffix("ba")) * c.global_train_batch_size for c in (recover, random, masks, after)
    ]
    assert sequences[0] == sequences[1] == sequences[2] + sequences[3]


def test_the_target_is_one_that_fisher_takes(root: Path) -> None:
    source, target = root / SOURCE, load_config(root / CONFIGS / "prune.yaml", [f"model.path={root / SOURCE}"])
    plan = make_plan("fisher", read_config(source), {"save_gpu_memory": False, **shrinking(target)}, {})
    assert plan.target.shape == read_source(target).target


def test_stages_know_the_names_of_what_they_make(root: Path) -> None:
    cfg = load_config(root / CONFIGS / "prune.yaml", [])
    assert last_checkpoint(Path("x"), cfg) == Path("x/ep0-ba100-rank0.pt")
    later = load_config(root / CONFIGS / "recover.yaml", [])
    assert last_checkpoint(Path("x"), later) == Path("x/ep0-ba200-rank0.pt")
    text = table({"source": {"parameters": 1234567, "mean": 1.5}, "small": {"parameters": 10, "mean": 2.0}})
    assert "1,234,567" in text and "2.0000" in text
