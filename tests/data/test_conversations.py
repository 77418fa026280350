"""Records of instruction data -> ids and answers: against text written by hand, for each form and kind of template."""

import pytest
from helpers_tokenizers import train_byte_level
from transformers import AutoTokenizer

from llmshearing.data.text.conversations import BadRecord, encode_record
from llmshearing.errors import ShearingError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}%s{{ m['content'] + '<|im_end|>' }}%s{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN_TEMPLATE = CHATML.replace("%s", "")
TAGS = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
TAGGED = CHATML.replace("%s{{ m['content'] + '<|im_end|>' }}%s", TAGS + "{{ m['content'] + '<|im_end|>' }}{% endif %}")
SHORT_TAGS = TAGGED.replace("{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
                            "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")  # fmt: skip
# As templates of reasoning models do: an answer looks otherwise once another question follows.
FORGETFUL = PLAIN_TEMPLATE.replace(
    "{{ m['content'] +", "{{ ('<think></think>' if m['role'] == 'assistant' and loop.last else '') + m['content'] +"
)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the walk"},
    {"role": "assistant", "content": "talks and jumps"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "naïve café 中文"},
]
ANSWERED = ["talks and jumps<|im_end|>", "naïve café 中文<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level(folder)
    return AutoTokenizer.from_pretrained(folder)


def answered(tokenizer, encoded):
    """The texts of the runs of answers."""
    runs, last = [], False
    for number, mark in zip(*encoded, strict=True):
        if mark:
            runs = [*runs, [number]] if not last else [*runs[:-1], [*runs[-1], number]]
        last = mark
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, TAGGED, SHORT_TAGS])
def test_every_turn_of_the_assistant_with_its_end_is_an_answer(tokenizer, template):
    tokenizer.chat_template = template
    encoded = encode_record({"messages": TURNS}, tokenizer, "x:1")
    assert answered(tokenizer, encoded) == ANSWERED
    rendered = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(encoded.ids) == rendered
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert encoded.ids.count(start) == encoded.ids.count(end) == len(TURNS)  # each one token, not its characters


def test_sharegpt_is_the_same_chat(tokenizer):
    tokenizer.chat_template = PLAIN_TEMPLATE
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]
    assert encode_record({"conversations": turns}, tokenizer, "x:1") == encode_record(
        {"messages": TURNS}, tokenizer, "x:1"
    )


def test_a_template_that_renders_a_turn_otherwise_later_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(BadRecord, match=r"^x:7: the chat template renders the turns up to 3 otherwise"):
        encode_record({"messages": TURNS}, tokenizer, "x:7")
    assert answered(tokenizer, encode_record({"messages": TURNS[:3]}, tokenizer, "x:7")) == [
        "<think></think>talks and jumps<|im_end|>"
    ]


def test_prompt_and_completion(tokenizer):
    record = {"prompt": "walk", "completion": "ing"}  # one token in a text, two where the prompt was asked alone
    encoded = encode_record(record, tokenizer, "x:1")
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("walk", "ing")]
    assert encoded.ids == [*ids[0], *ids[1], tokenizer.eos_token_id]
    assert encoded.answers == [False] * len(ids[0]) + [True] * (len(ids[1]) + 1)
    ended = encode_record({"prompt": "walk", "completion": "ing<|endoftext|>"}, tokenizer, "x:1")
    assert ended == encoded  # one EOS, not two


def test_of_a_text_every_token_is_learned_and_what_spells_a_special_token_stays_text(tokenizer):
    encoded = encode_record({"text": "walks <|im_end|>"}, tokenizer, "x:1")
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    assert all(encoded.answers) and end not in encoded.ids
    assert encoded.ids.count(eos) == 1 and encoded.ids[-1] == eos
    assert tokenizer.decode(encoded.ids) == "walks <|im_end|><|endoftext|>"
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [end]  # the tokenizer is as it was
    assert encode_record({"text": ""}, tokenizer, "x:1") == ([], [])


def test_a_tokenizer_that_begins_texts_with_bos(tokenizer, tmp_path):
    from tokenizers import processors

    tokenizer.save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path, bos_token="<|im_start|>")
    bos = own.convert_tokens_to_ids("<|im_start|>")
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    assert encode_record({"text": "walks"}, own, "x:1").ids[0] == bos
    encoded = encode_record({"prompt": "walk", "completion": "s"}, own, "x:1")
    assert encoded.ids[0] == bos and not encoded.answers[0]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "?", "answer": "!"}, r"^f.jsonl:3 is of no known form: it has \['answer', 'question'\]"),
        ({"prompt": "?"}, "of no known form"),
        ({"text": 5}, "of no known form"),
        ([1], "is a list, not an object"),
        ({"text": "a", "messages": TURNS}, "of several forms at once"),
        ({"prompt": "?", "completion": ""}, "empty completion"),
        ({"messages": TURNS[:2]}, r"no turn of the assistant .*roles: system, user"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": [{"role": "assistant"}]}, "turn 1 has no string in 'role' and 'content'"),
    ],
)
def test_bad_records_are_named(tokenizer, record, said):
    tokenizer.chat_template = PLAIN_TEMPLATE
    with pytest.raises(BadRecord, match=said):
        encode_record(record, tokenizer, "f.jsonl:3")


def test_a_template_that_raises_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(BadRecord, match="^x:2: the chat template cannot render 5 turns: no system here"):
        encode_record({"messages": TURNS}, tokenizer, "x:2")


def test_a_tokenizer_without_a_template_is_named(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ShearingError, match="has no chat template"):
        encode_record({"messages": TURNS}, tokenizer, "x:2")
