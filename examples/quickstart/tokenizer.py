"""Train the quickstart's tokenizer: SentencePiece BPE of 4,096 pieces, byte fallback, digits apart, as LLaMA's."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizerFast

from llmshearing.errors import ShearingError

VOCAB = 4096


def train_tokenizer(texts: Iterable[str], output: Path, vocab: int = VOCAB) -> LlamaTokenizerFast:
    """Train on `texts` and write `tokenizer.model`, `tokenizer.json` and their configs to `output`.

    Deterministic: one thread, no sampling. Raises ShearingError when the texts are too few for `vocab` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation is most of what code has to say about structure
            max_sentence_length=100_000,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ShearingError(f"tokenizer: no {vocab} pieces could be trained on these texts ({error})") from error
    output.mkdir(parents=True, exist_ok=True)
    (output / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizerFast(vocab_file=str(output / "tokenizer.model"), legacy=True)
    tokenizer.save_pretrained(output)
    return tokenizer
