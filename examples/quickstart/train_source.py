"""Train the quickstart's source model: a LLaMA of 4.3 M parameters that can already do something.

    python -m examples.quickstart.train_source --corpus DIR --output examples/quickstart/source

The shape is chosen to be sheared: halves of hidden (192), heads (6 of 32) and intermediate (512) and three quarters of
the 8 layers are whole numbers. Plain torch and transformers: AdamW, cosine schedule, CPU bf16 autocast.

Documents of the `eval` split of `llmshearing.data.prepare` are never trained on, by the model or by the tokenizer, so
the pipeline's evaluation of the source is on text that it has not seen.

Shapes: T tokens a sequence (256), B sequences a step (32), N sequences of a domain; ids are int64 [N, T].
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from examples.quickstart.tokenizer import train_tokenizer
from llmshearing.data.prepare.options import Options
from llmshearing.data.prepare.packing import split_of
from llmshearing.errors import ShearingError
from llmshearing.training.model import CAUSAL_SDPA

log = logging.getLogger(__name__)

SEQUENCE, BATCH = 256, 32
LEARNING_RATE, FINAL_FRACTION, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 3e-3, 0.03, 60, 0.1, 1.0
DEFAULT_TOKENS = 5_000_000
EVAL_FRACTION = 0.06
"""Share of the documents held out, in the quickstart's data as here."""
EVAL_SEQUENCES = 160
"""Held-out sequences of each domain that the losses in training.json are means of."""


def is_held_out(text: str) -> bool:
    """Whether the data command, with EVAL_FRACTION, puts this document into the evaluation split."""
    options = Options(SEQUENCE, eval_fraction=EVAL_FRACTION)
    return split_of(text, options.seed, options.eval_fraction, options.for_prune_fraction) == "eval"


def source_config(vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def read_corpus(corpus: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Domain -> (training texts, held-out texts), split as the data command splits them."""
    domains = sorted(path for path in corpus.glob("*") if path.is_dir()) if corpus.is_dir() else []
    if not domains:
        raise ShearingError(f"--corpus {corpus}: no folders of JSONL; build it with examples.quickstart.corpus")
    split: dict[str, tuple[list[str], list[str]]] = {}
    for domain in domains:
        train, held_out = split[domain.name] = ([], [])
        for path in sorted(domain.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                text = json.loads(line)["text"]
                (held_out if is_held_out(text) else train).append(text)
    return split


def pack(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """BOS text EOS, one after the other, cut to rows: int64 [N, T]; the incomplete last row is dropped."""
    ids: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
    rows = len(ids) // SEQUENCE
    return torch.tensor(ids[: rows * SEQUENCE]).view(rows, SEQUENCE)


def token_losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Next-token cross-entropy in nats: [B, T] ids -> [B, T-1], computed in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].reshape(-1)
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
    return losses.view(len(ids), -1)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out: dict[str, Tensor], limit: int = EVAL_SEQUENCES) -> dict[str, float]:
    """Mean loss of each domain's first `limit` held-out sequences."""
    model.eval()
    means = {
        name: torch.cat([token_losses(model, part).mean(1) for part in ids[:limit].split(BATCH)]).mean().item()
        for name, ids in held_out.items()
    }
    model.train()
    return {name: round(mean, 4) for name, mean in means.items()}


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from LEARNING_RATE down to FINAL_FRACTION of it."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
    return LEARNING_RATE * warm * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)


def batches(ids: Tensor, steps: int, seed: int):
    """`steps` batches [B, T]: epoch after epoch over all sequences, each epoch in its own seeded order."""
    queue = torch.empty(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        if len(queue) < BATCH:
            queue = torch.cat([queue, torch.randperm(len(ids), generator=generator)])
        chosen, queue = queue[:BATCH], queue[BATCH:]
        yield ids[chosen]


def train(model: LlamaForCausalLM, ids: Tensor, held_out: dict[str, Tensor], tokens: int, seed: int) -> int:
    """Train on at least `tokens` tokens; returns how many. Logs ten evaluations on the way."""
    steps = math.ceil(tokens / (BATCH * SEQUENCE))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    start = time.monotonic()
    for step, batch in enumerate(tqdm(batches(ids, steps, seed), total=steps, desc="source", mininterval=5)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = token_losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 40) == 0:
            rate = (step + 1) * BATCH * SEQUENCE / (time.monotonic() - start)
            log.info(
                "step %d/%d loss %.4f lr %.2e %.0f tokens/s",
                step + 1,
                steps,
                loss.item(),
                learning_rate(step, steps),
                rate,
            )
        if (step + 1) % max(1, steps // 10) == 0:
            log.info("step %d eval %s", step + 1, evaluate(model, held_out, 32))
    return steps * BATCH * SEQUENCE


def unigram_loss(train_ids: Tensor, held_out: Tensor, vocab: int) -> float:
    """Loss of the best model without context: add-one smoothed token frequencies of the training text."""
    frequency = np.bincount(train_ids.flatten().numpy(), minlength=vocab) + 1.0
    return float(-np.log(frequency / frequency.sum())[held_out[:EVAL_SEQUENCES, 1:].numpy()].mean())


def run(corpus: Path, output: Path, tokens: int, seed: int) -> dict:
    """Train tokenizer and model and write the HF directory `output`; returns what training.json holds."""
    began = time.monotonic()
    texts = read_corpus(corpus)
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = train_tokenizer((text for train_texts, _ in texts.values() for text in train_texts), temporary)
    train_ids = {name: pack(train_texts, tokenizer) for name, (train_texts, _) in texts.items()}
    held_out = {name: pack(held_texts, tokenizer) for name, (_, held_texts) in texts.items()}
    log.info("sequences of %d: train %s", SEQUENCE, {name: len(ids) for name, ids in train_ids.items()})
    log.info("held out %s", {name: len(ids) for name, ids in held_out.items()})

    torch.manual_seed(seed)
    model = LlamaForCausalLM(source_config(len(tokenizer)))
    model.set_attn_implementation(CAUSAL_SDPA)
    log.info("%d parameters", model.num_parameters())
    everything = torch.cat(list(train_ids.values()))
    seen = train(model, everything, held_out, tokens, seed)
    model.to(torch.bfloat16).generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(temporary)
    model.float()  # what the losses below are of: the kept bf16 weights
    record = {
        "command": f"python -m examples.quickstart.train_source --corpus {corpus.name} --tokens {tokens} --seed {seed}",
        "seed": seed,
        "tokens": seen,
        "epochs": round(seen / everything.numel(), 2),
        "parameters": model.num_parameters(),
        "optimizer": f"AdamW 0.9/0.95, decay {WEIGHT_DECAY}, clip {CLIP}, lr {LEARNING_RATE} cosine to "
        f"{FINAL_FRACTION:.0%}, warm-up {WARMUP_STEPS} steps, {BATCH} x {SEQUENCE} tokens, CPU bf16 autocast",
        "eval_loss": evaluate(model, held_out),
        "eval_loss_unigram": {
            n: round(unigram_loss(everything, ids, len(tokenizer)), 4) for n, ids in held_out.items()
        },
        "eval_sequences": {name: min(len(ids), EVAL_SEQUENCES) for name, ids in held_out.items()},
        "minutes": round((time.monotonic() - began) / 60, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (temporary / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.copy(corpus.parent / "training.log", temporary) if (corpus.parent / "training.log").exists() else None
    temporary.rename(output)
    return record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.train_source",
        description="Train the quickstart's tokenizer and its source model on a corpus of JSONL folders.",
        epilog="example: python -m examples.quickstart.train_source --corpus runs/corpus --output runs/source",
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder of domain folders with JSONL")
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="training tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        if arguments.output.exists():
            raise ShearingError(f"--output {arguments.output}: exists already; remove it or give another path")
        record = run(arguments.corpus, arguments.output, arguments.tokens, arguments.seed)
    except ShearingError as error:
        log.error("%s", error)
        return 1
    log.info("eval loss %s; wrote the source to %s", record["eval_loss"], arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
