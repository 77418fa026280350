"""A record of instruction data -> token ids, and which of them are answers: the one rule for training and pruning.

    {"text": "..."}                                             every token is learned
    {"prompt": "...", "completion": "..."}                      the completion and the EOS after it
    {"messages": [{"role": "user", "content": "..."}, ...]}     every turn of the assistant and its end-of-turn token
    {"conversations": [{"from": "human", "value": "..."}, ...]} the same, in ShareGPT's names

Messages go through the tokenizer's own chat template. Where that marks answers (`{% generation %}`), its marks count.
Where it does not, turn i is what the rendering of turns 0..i has more than that of 0..i-1 with the prompt to answer:

    render(turns[:i], prompt to answer) | turn i, end of turn | what follows
    <------------------ a prefix ------>
    <-------------------- a prefix of the whole ------------>

Both must be prefixes of the whole rendering, else the template is refused: some render a turn otherwise when more
follow. Text that merely spells a special token stays text in `text`; in the other forms it becomes that token, as in
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmshearing.data.text.lines import shown
from llmshearing.errors import ShearingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT, PROMPT, COMPLETION, MESSAGES, SHAREGPT = "text", "prompt", "completion", "messages", "conversations"
FORMS = (
    '{"text"}, {"prompt", "completion"}, {"messages": [{"role", "content"}, ...]}, '
    '{"conversations": [{"from", "value"}, ...]}'
)
ASSISTANT = "assistant"
ROLES = {"human": "user", "gpt": ASSISTANT, "bing": ASSISTANT, "chatgpt": ASSISTANT, "bard": ASSISTANT}
"""Of ShareGPT -> of chat templates; others are the same in both."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class BadRecord(ShearingError):
    """A record that cannot be learned from; the message begins with its file and line."""


class Encoded(NamedTuple):
    """ids [n] of a record; answers [n]: whether each is to be learned (predicted from those before it)."""

    ids: list[int]
    answers: list[bool]


def encode_record(record: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> Encoded:
    """The tokens of one record; none for an empty text.

    BOS stands first where the tokenizer puts one by itself; EOS ends a text and a completion. A chat template writes
    its own.

    Args:
        record: what JSON holds. tokenizer: a fast one. where: `file:line`, for messages.

    Raises:
        BadRecord: the record is of no known form, says nothing to learn, or the template cannot render it.
        ShearingError: the tokenizer is not fast, or lacks a chat template or EOS that the record needs.
    """
    if not tokenizer.is_fast:
        raise ShearingError(f"tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}) has no fast version")
    form = form_of(record, where)
    if form == TEXT:
        return _text(record[TEXT], tokenizer)
    if form == PROMPT:
        return _completion(record[PROMPT], record[COMPLETION], tokenizer, where)
    return _chat(messages_of(record, where), tokenizer, where, record.get("tools"))


def form_of(record: Any, where: str) -> str:
    """TEXT, PROMPT, MESSAGES or SHAREGPT; raises BadRecord for what is none, or more than one."""
    if not isinstance(record, dict):
        raise BadRecord(f"{where} is a {type(record).__name__}, not an object; known forms: {FORMS}")
    strings = {key for key in (TEXT, PROMPT, COMPLETION) if isinstance(record.get(key), str)}
    lists = {key for key in (MESSAGES, SHAREGPT) if isinstance(record.get(key), list)}
    found = [TEXT] * (TEXT in strings) + [PROMPT] * ({PROMPT, COMPLETION} <= strings) + sorted(lists)
    if len(found) == 1:
        return found[0]
    if found:
        raise BadRecord(f"{where} is of several forms at once ({', '.join(found)}); known forms: {FORMS}")
    raise BadRecord(f"{where} is of no known form: it has {shown(record)}; known forms: {FORMS}")


def messages_of(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns of a chat, in the names that templates know; raises BadRecord naming the turn that is none."""
    share = not isinstance(record.get(MESSAGES), list)
    role_key, content_key = ("from", "value") if share else ("role", "content")
    turns = []
    for number, turn in enumerate(record[SHAREGPT if share else MESSAGES], 1):
        role = turn.get(role_key) if isinstance(turn, Mapping) else None
        content = turn.get(content_key) if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or not (isinstance(content, str) or (content is None and turn.get("tool_calls"))):
            raise BadRecord(f"{where}: turn {number} has no string in {role_key!r} and {content_key!r}")
        more = {key: value for key, value in turn.items() if key not in (role_key, content_key)}
        turns.append({**more, "role": ROLES.get(role, role) if share else role, "content": content})
    if not any(turn["role"] == ASSISTANT for turn in turns):
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns)) or "none"
        raise BadRecord(f"{where} has no turn of the assistant to learn from (roles: {roles})")
    return turns


# Text, and prompt with completion ----------------------------------------------------------------------------------


def _text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    if not text:
        return Encoded([], [])
    ids = _bos(tokenizer) + _ids(text, tokenizer, split_special_tokens=True) + _eos(tokenizer)
    return Encoded(ids, [True] * len(ids))


def _completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, where: str) -> Encoded:
    """As generation goes: the prompt's own tokens stand first, whatever a longer text would merge across its end."""
    if not completion:
        raise BadRecord(f"{where} has an empty completion: nothing to learn")
    asked, whole = _ids(prompt, tokenizer), _ids(prompt + completion, tokenizer)
    said = whole[len(asked) :] if whole[: len(asked)] == asked else _ids(completion, tokenizer)
    said += _eos(tokenizer) if said[-1:] != [tokenizer.eos_token_id] else []
    bos = _bos(tokenizer) if asked[:1] != [tokenizer.bos_token_id] else []
    return Encoded(bos + asked + said, [False] * len(bos + asked) + [True] * len(said))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS, where the tokenizer puts it before a text by itself."""
    own, plain = list(tokenizer("a", verbose=False)["input_ids"]), _ids("a", tokenizer)
    return own[:1] if own[:1] == [tokenizer.bos_token_id] and own[1 : 1 + len(plain)] == plain else []


def _eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ShearingError(f"tokenizer {tokenizer.name_or_path} has no EOS: a model could not learn where to stop")
    return [tokenizer.eos_token_id]


# Chat --------------------------------------------------------------------------------------------------------------


def _chat(
    turns: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, tools: Any = None
) -> Encoded:
    template = chat_template(tokenizer)
    whole = _render(turns, tokenizer, where, tools)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    if _GENERATION.search(template):
        answers = _marked(turns, tokenizer, where, tools, ids)
    else:
        spans = [_span(turns, at, whole, tokenizer, where, tools) for at in _answers(turns)]
        answers = [any(begin <= first < end for begin, end in spans) for first, _ in offsets]
        answers = _until_end_of_turn(ids, answers, _special(tokenizer), tokenizer)
    if not any(answers):
        raise BadRecord(f"{where}: the chat template leaves no answer to learn")
    return Encoded(ids, answers)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template; raises ShearingError where there is none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ShearingError(
            f"tokenizer {tokenizer.name_or_path} has no chat template, which messages need: put a "
            "chat_template.jinja beside it, or give prompt and completion"
        ) from error


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens, also of those that have no role such as EOS."""
    added = tokenizer.added_tokens_decoder
    return {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def _answers(turns: Sequence[Mapping[str, Any]]) -> list[int]:
    return [at for at, turn in enumerate(turns) if turn["role"] == ASSISTANT]


def _render(
    turns: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, tools: Any, ask: bool = False
) -> str:
    try:
        return tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # templates raise what they like
        raise BadRecord(f"{where}: the chat template cannot render {len(turns)} turns: {error}") from error


def _span(
    turns: Sequence[Mapping[str, Any]],
    at: int,
    whole: str,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    tools: Any,
) -> tuple[int, int]:
    """Where in the whole rendering turn `at` begins and ends, in characters."""
    before = _render(turns[:at], tokenizer, where, tools, ask=True)
    after = _render(turns[: at + 1], tokenizer, where, tools)
    if not (after.startswith(before) and whole.startswith(after)):
        raise BadRecord(
            f"{where}: the chat template renders the turns up to {at + 1} otherwise when more follow, so its answer "
            "cannot be told from the rest; use a template with {% generation %}, or end the record there"
        )
    return len(before), len(after)


def _marked(
    turns: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, tools: Any, ids: list[int]
) -> list[bool]:
    """What the template itself marks, and the special token that follows each mark: it ends the turn."""
    try:
        found = tokenizer.apply_chat_template(
            list(turns), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:  # templates raise what they like
        raise BadRecord(f"{where}: the chat template cannot render {len(turns)} turns: {error}") from error
    if list(found["input_ids"]) != ids:
        raise BadRecord(f"{where}: the chat template renders the same turns in two ways")
    marks = [bool(mark) for mark in found["assistant_masks"]]
    special = _special(tokenizer)
    return [
        mark or (at > 0 and marks[at - 1] and ids[at] in special and ids[at - 1] not in special)
        for at, mark in enumerate(marks)
    ]


def _until_end_of_turn(
    ids: list[int], answers: list[bool], special: set[int], tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """Without the white space that a template writes after the token that ends a turn: nobody generates so far."""
    kept, end = list(answers), len(ids)
    while end > 0:
        begin = end
        while begin > 0 and answers[begin - 1]:
            begin -= 1
        last = next((at for at in range(end - 1, begin - 1, -1) if ids[at] in special), None)
        if last is not None and not tokenizer.decode(ids[last + 1 : end]).strip():
            kept[last + 1 : end] = [False] * (end - last - 1)
        end = begin if begin < end else end - 1
    return kept
