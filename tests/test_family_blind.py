"""No family is known outside `llmshearing/families`: no model type, no tensor's name, no key of a family's config."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from transformers import AutoConfig

from llmshearing.config import schema
from llmshearing.families import UNIFORM
from llmshearing.families.names import HEAD_DIM, YAML_KEYS

PACKAGE = Path(__file__).resolve().parent.parent / "llmshearing"
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in ("families", "utils")
]
# Parts of tensors' names that are plain words of the field.
GENERIC = {
    "weight", "bias", "model", "layer", "layers", "norm", "dense", "attention", "mlp", "experts", "gate", "attn",
    "decoder", "transformer", "embed",
}  # fmt: skip
# A key that every config of transformers answers to, whatever its family calls it.
EVERYWHERE = {"vocab_size"}
# What a run's YAML calls things, as the seeds fixed it: there, these are not a family's names.
YAML = set(YAML_KEYS.values()) | {"rms_norm_eps", "rope_theta", "tie_word_embeddings"}


def families_words() -> set[str]:
    """Model types, config keys, and the parts of tensors' names."""
    words: set[str] = set()
    for name, family in UNIFORM.items():
        words |= {name, *family.keys.values(), *family.layer_lists}
        table = family.table(AutoConfig.for_model(name), "group")
        words |= {part for spec in table.tensors for part in spec.name.split(".") if part.isidentifier()}
    return {word for word in words if len(word) > 2} - GENERIC - EVERYWHERE - {HEAD_DIM}  # a name of sizes


WORDS = families_words()


def words_in(path: Path) -> set[str]:
    """Identifiers and parts of strings of a file, docstrings and comments too."""
    found: set[str] = set()
    text = path.read_text()
    for name in ("Sheared LLaMA", "llama.cpp", "llama-cpp-python"):  # a paper and a program
        text = text.replace(name, "")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.STRING, tokenize.COMMENT):
            found |= set(re.findall(r"[A-Za-z_][A-Za-z_0-9]*", token.string.lower()))
    return found


def test_the_list_of_words_is_what_it_should_be() -> None:
    assert {"llama", "gpt_neox", "n_embd", "num_attention_heads", "q_proj", "c_attn", "embed_tokens"} <= WORDS
    assert not {"layers", "weight"} & WORDS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_family_is_named(path: Path) -> None:
    allowed = YAML if path.is_relative_to(PACKAGE / "config") else set()
    used = words_in(path) & (WORDS - allowed)
    assert not used, f"{path.relative_to(PACKAGE)} names {sorted(used)}: that belongs to llmshearing/families"


def test_yaml_words_are_keys_of_the_schema() -> None:
    fields = {field for cls in (schema.Model, schema.TargetModel) for field in cls.__dataclass_fields__}
    assert fields >= YAML
    assert ast.parse((PACKAGE / "config" / "schema.py").read_text())
