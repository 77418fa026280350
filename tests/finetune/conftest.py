"""A small model with a tokenizer that chats, and files of each form."""

from pathlib import Path

import pytest
from helpers_finetune import chat, write_lines
from helpers_prune import model_of
from helpers_tokenizers import train_byte_level
from transformers import AutoTokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source/ (and its tokenizer), chats.jsonl, prompts.jsonl, texts.jsonl."""
    root = tmp_path_factory.mktemp("finetune")
    folder = root / "source"
    train_byte_level(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model_of("llama", vocab_size=424, max_position_embeddings=64, num_key_value_heads=2).save_pretrained(folder)
    write_lines(root / "chats.jsonl", [chat(number) for number in range(12)])
    write_lines(root / "prompts.jsonl", [{"prompt": f"walk {n}:", "completion": f" {n} talks"} for n in range(23)])
    write_lines(root / "texts.jsonl", [{"text": f"the walker talks {number} times"} for number in range(12)])
    return root
