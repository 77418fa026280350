"""Small tokenizers of every kind, trained on the same sentences, for the tests of the vocabulary."""

import json

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"


def corpus():
    """Words with common beginnings and endings, many rare ones among them."""
    stems = [a + b for a in ("walk", "talk", "jump", "cook", "paint", "print") for b in ("", "s", "ed", "ing", "er")]
    return [f"the {x} and {y}, {i} times: naïve café 中文 {x}{y}\n" for i, x in enumerate(stems) for y in stems[::3]]


def train_sentencepiece(folder, kind):
    text = folder / "text.txt"
    text.write_text("".join(corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type=kind, vocab_size=420, byte_fallback=True,
        split_digits=True, user_defined_symbols=["<tool>"], control_symbols=["<pad>"], minloglevel=2,
        hard_vocab_limit=False, self_test_sample_size=3,
    )  # fmt: skip
    text.unlink()


def add_beside_sentencepiece(folder, token):
    """Add a special token as transformers 4 does, in files beside the model; its id."""
    number = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {"0": "<unk>", "1": "<s>", "2": "</s>", str(number): token}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": [token]}
    config = {
        "added_tokens_decoder": {i: {"content": text, **plain, "special": True} for i, text in added.items()},
        "add_bos_token": True, "add_eos_token": False, "legacy": True, "tokenizer_class": "LlamaTokenizer", **special,
    }  # fmt: skip
    for name, values in (
        ("added_tokens", {token: number}), ("tokenizer_config", config), ("special_tokens_map", special)
    ):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(values))
    return number


def train_byte_level(folder):
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    model.add_special_tokens(SPECIAL)
    model.add_tokens([AddedToken("walking stick")])
    last = SPECIAL[-1], model.token_to_id(SPECIAL[-1])
    model.post_processor = processors.TemplateProcessing(single=f"$A {last[0]}", special_tokens=[last])
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=last[0], bos_token=last[0])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def save_word_tokenizer(folder, words=20):
    """A tokenizer of whole words w0, w1, ... with ids from 3 on."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": 3 + i for i in range(words)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
