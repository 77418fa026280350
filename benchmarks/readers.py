"""Which programs read what is written: every method x family x reader that is asked for, on tiny models, as a table.

    python -m benchmarks.readers                                                    every family, every method
    python -m benchmarks.readers --methods random obs --families llama qwen2
    python -m benchmarks.readers --transformers5 other/bin/python --output docs/readers.md

Each model is pruned by the command's own function and written. Then each reader loads the directory (or a file that
was converted from it) and computes the log-probabilities of the same tokens. A cell says their largest difference from
transformers', in nats. A reader that is not installed, or was not asked for, is said to be that: no cell says "works"
that was not run.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmshearing.checkpoints.parity import largest_difference, scores_of, token_ids
from llmshearing.families import UNIFORM
from llmshearing.families.names import INTERMEDIATE, LAYERS
from llmshearing.prune.calibration import SequenceOptions
from llmshearing.prune.run import prune

TOLERANCE = 1e-2
Check = Callable[[Path, PreTrainedModel, Tensor], Tensor]
IN_FIVE = """
import json, sys, torch, llmshearing
from transformers import AutoModelForCausalLM, __version__
said = {"version": __version__}
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.load(folder + "/ids.pt")
        with torch.no_grad():
            torch.save(model(input_ids=ids, use_cache=False).logits.log_softmax(-1), folder + "/five.pt")
        said[folder] = None
    except Exception as error:
        said[folder] = f"{type(error).__name__}: {error}"
json.dump(said, open(sys.argv[1], "w"))
"""


def _plain(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    return scores_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)


def _generate(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The last position after a static cache has seen the others."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        last = model(
            input_ids=ids[:, -1:],
            past_key_values=cache,
            use_cache=True,
            cache_position=torch.tensor([ids.shape[1] - 1]),
        )
    whole = scores_of(model, ids)
    return torch.cat([whole[:, :-1], last.logits.float().log_softmax(-1)], dim=1)


def _compiled(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = torch.compile(model, backend="aot_eager")(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    return logits.float().log_softmax(-1)


def _accelerate(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    return scores_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto"), ids)


def _ctranslate2(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    import ctranslate2
    import numpy as np

    out = str(folder / "ctranslate2")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(out, force=True)
    generator = ctranslate2.Generator(out, device="cpu", compute_type="float32", inter_threads=1, intra_threads=1)
    found = generator.forward_batch([row.tolist() for row in ids], return_log_probs=True)
    return torch.from_numpy(np.array(found))[..., : model.config.vocab_size]


def _llama_cpp(folder: Path, model: PreTrainedModel, ids: Tensor) -> Tensor:
    from llmshearing.checkpoints.hf_read import read_hf
    from llmshearing.gguf.check import llama_cpp_scores
    from llmshearing.gguf.convert import export_gguf

    weights, info = read_hf(folder, {})
    info = replace(info, tokenizer=None)  # words with numbers, which are no pairs to merge
    file = export_gguf(weights, info, folder / "model.gguf", {}, where=str(folder), overwrite=True, check=False)
    return llama_cpp_scores(file, ids)


READERS: dict[str, tuple[str | None, Check]] = {
    "transformers": (None, _plain),
    "static cache": (None, _generate),
    "torch.compile": (None, _compiled),
    "accelerate": ("accelerate", _accelerate),
    "ctranslate2": ("ctranslate2", _ctranslate2),
    "llama.cpp": ("llama_cpp", _llama_cpp),
}
"""Name -> package that it needs beside torch and transformers, and how it computes log-probabilities."""
FIVE = "transformers 5"
NOT_RUN = ("PEFT", "lm-eval", "torch.export", "torchao", "vLLM", "TensorRT-LLM", "ExLlama", "MLX")


def make(family: str, method: str, folder: Path, tiny: Callable[..., Any]) -> Path:
    """A tiny model of a family, pruned by a method, in a directory."""
    config, keys = tiny(family), UNIFORM[family].keys
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for value in source.parameters():
            value.add_(0.1 * torch.randn_like(value))
    source.save_pretrained(folder / "source")
    _tokenizer(folder / "source", config.vocab_size)
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(3 * line + word) % 60}" for word in range(24)) for line in range(200)))
    key = keys[LAYERS] if method == "depth" else keys[INTERMEDIATE]
    target = {key: 2 if method == "depth" else 32}
    few = SequenceOptions(max_seq_len=16, samples=8, report_samples=4)
    return prune(method, folder / "source", folder / "pruned", target, calibration=text, sequences=few).path


def _tokenizer(folder: Path, tokens: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{at}": 3 + at for at in range(tokens - 3)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def cell(difference: float) -> str:
    return f"works, {difference:.0e}" if difference <= TOLERANCE else f"**differs**, {difference:.2g}"


def row_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Reader -> what it did with a directory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = token_ids(model.config)
    torch.save(ids, folder / "ids.pt")
    wanted, found = scores_of(model, ids), {}
    torch.save(wanted, folder / "wanted.pt")
    for name, (package, check) in READERS.items():
        if name not in names:
            found[name] = "not run"
        elif package is not None and find_spec(package) is None:
            found[name] = "not installed"
        else:
            try:
                found[name] = cell(largest_difference(check(folder, model, ids), wanted))
            except Exception as error:  # each reader raises its own kinds
                found[name] = f"refuses: {_short(str(error) or type(error).__name__)}"
    return found


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 110 else line[:107] + "..."


def in_five(python: str, folders: Sequence[Path], scratch: Path) -> dict[str, str]:
    """Directory -> what transformers 5 did with it, in an interpreter of its own."""
    told = scratch / "five.json"
    subprocess.run([python, "-c", IN_FIVE, str(told), *map(str, folders)], check=True, stderr=subprocess.DEVNULL)
    said = json.loads(told.read_text())
    found = {"version": said["version"]}
    for folder in folders:
        error = said[str(folder)]
        if error is not None:
            found[str(folder)] = f"refuses: {_short(error)}"
        else:
            scores, wanted = (torch.load(folder / name, weights_only=True) for name in ("five.pt", "wanted.pt"))
            found[str(folder)] = cell(largest_difference(scores, wanted))
    return found


def versions(names: Iterable[str]) -> str:
    said = []
    for name in names:
        try:
            said.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if find_spec("llama_cpp") is not None:
        import llama_cpp

        said.append(f"llama-cpp-python {llama_cpp.__version__}")
    return ", ".join(said)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(UNIFORM), choices=list(UNIFORM))
    parser.add_argument("--methods", nargs="+", default=["random", "activation", "fisher", "obs", "depth"])
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS))
    parser.add_argument("--transformers5", metavar="PYTHON", help="an interpreter that has transformers 5")
    parser.add_argument("--output", type=Path, help="a Markdown file; else standard output")
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    rows, folders = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for family in options.families:
            for method in options.methods:
                place = Path(scratch) / f"{family}-{method}"
                try:
                    folder = make(family, method, place, tiny_config)
                    rows.append([method, family, folder, row_of(folder, options.readers)])
                    folders.append(folder)
                except Exception as error:
                    rows.append([method, family, None, {"transformers": f"the method refuses: {_short(str(error))}"}])
                sys.stderr.write(f"{method} {family}: {rows[-1][3]}\n")
                if options.output:  # what is interrupted keeps its rows
                    options.output.write_text(table(rows, {}))
        five = in_five(options.transformers5, folders, Path(scratch)) if options.transformers5 else {}
    text = table(rows, five)
    if options.output:
        options.output.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


def table(rows: Sequence[Sequence[Any]], five: dict[str, str]) -> str:
    """The document."""
    used = versions(("transformers", "torch", "accelerate", "ctranslate2", "gguf"))
    columns = [*READERS, FIVE]
    lines = [
        "# Readers of what is written",
        "",
        "Printed by `python -m benchmarks.readers`: do not edit. Tiny models, float32, one CPU thread. A cell says the",
        "largest difference of a log-probability from transformers' own, in nats; `not run` and `not installed` mean",
        "that. What each reader asks of a shape is known to `llmshearing prune --dry-run` (`families/readers.py`).",
        "",
        f"Versions: {used}" + (f"; transformers 5: {five['version']}." if five else "."),
        f"Not run at all: {', '.join(NOT_RUN)}.",
        "",
        "| method | family | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for method, family, folder, found in rows:
        own = {**found, FIVE: five.get(str(folder), "not run")}
        lines.append(f"| {method} | `{family}` | " + " | ".join(own.get(name, "-") for name in columns) + " |")
    return "\n".join([*lines, ""])


SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
BASE = {**SIZES, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 64, "n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "gemma2": GEMMA, "gemma3_text": GEMMA,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True,
    },
}  # fmt: skip


def tiny_config(family: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**{**BASE, **IDS, "tie_word_embeddings": False, **OWN.get(family, {})})


if __name__ == "__main__":
    sys.exit(main())
