"""Which form the records of each file have, and the records themselves: texts, prompts with completions, chats.

    text      {"text": "..."}, or the field that --text_field names
    prompt    {"prompt": "...", "completion": "..."}
    chat      {"messages": [...]}, or ShareGPT's {"conversations": [...]}

`llmshearing.data.text.conversations` says which of their tokens are answers. What stands beside a form's own fields is
not looked at. Needs neither Streaming nor torch; transformers for the last two alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmshearing.data.text.conversations import (
    COMPLETION,
    MESSAGES,
    PROMPT,
    SHAREGPT,
    BadRecord,
    Encoded,
    chat_template,
    encode_record,
)
from llmshearing.data.text.lines import NoText, Problem, record_of, shown
from llmshearing.data.text.sources import Lines, read_chunks
from llmshearing.errors import ShearingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

AUTO, TEXT, CHAT = "auto", "text", "chat"
FORMS = (TEXT, PROMPT, CHAT)
FIELDS = {PROMPT: "strings in the fields 'prompt' and 'completion'", CHAT: "list in the field 'messages'"}
Forms = dict[str, str]  # file -> its form


class Record(NamedTuple):
    """A prompt or a chat. where: `file:line`. key: what it says, in bytes, by which it is split and known again."""

    fields: dict[str, Any]
    where: str
    key: bytes

    @property
    def size(self) -> int:
        """UTF-8 bytes of its texts."""
        said = [self.fields.get(PROMPT), self.fields.get(COMPLETION)]
        for turn in self.fields.get(MESSAGES) or self.fields.get(SHAREGPT) or ():
            said += [turn.get("content"), turn.get("value")] if isinstance(turn, Mapping) else []
        return sum(len(text.encode()) for text in said if isinstance(text, str))


def find_forms(sources: Mapping[str, Sequence[Path]], asked: str, text_field: str) -> dict[str, Forms]:
    """Domain -> file -> form: what is asked for, or with AUTO what the first record of each file is.

    Raises:
        ShearingError: a first record is of both other forms, or a Parquet file is to be of one of them.
    """
    found, problems = {}, []
    for domain, files in sources.items():
        forms: Forms = {}
        for path in files:
            try:
                forms[str(path)] = _form(path, text_field) if asked == AUTO else asked
            except ShearingError as error:
                problems.append(str(error))
            if forms.get(str(path)) not in (None, TEXT) and path.suffix == ".parquet":
                problems.append(f"{path} is Parquet, of which text alone is read; write {asked} records as JSONL")
        found[domain] = forms
        numbers = {form: [*forms.values()].count(form) for form in FORMS}
        if has_answers(forms):
            said = ", ".join(f"{number} of the form {form}" for form, number in numbers.items() if number)
            log.info("domain %s: %d files, %s: with a loss mask", domain, len(files), said)
    if problems:
        raise ShearingError("\n".join(problems))
    return found


def has_answers(forms: Forms) -> bool:
    """Whether a domain of such files gets a loss mask."""
    return any(form != TEXT for form in forms.values())


def _form(path: Path, text_field: str) -> str:
    """The form of the first record that has one; TEXT where none has: reading then says what is wrong."""
    if path.suffix == ".parquet":
        return TEXT
    chunk = next(read_chunks([path], text_field, lambda size: None), None)
    for _, line in chunk.content.numbered() if chunk is not None and isinstance(chunk.content, Lines) else ():
        try:
            document = record_of(line)
        except NoText:
            continue
        if not isinstance(document, dict):
            continue
        others = [form for form in (PROMPT, CHAT) if _fields(document, form) is not None]
        if isinstance(document.get(text_field), str):
            if others:
                log.warning("%s has a text beside its %s: the text is read; --form chooses", path, " and ".join(others))
            return TEXT
        if len(others) > 1:
            raise ShearingError(f"{path}: its first record is of the forms {' and '.join(others)}; choose by --form")
        if others:
            return others[0]
    return TEXT


def _fields(document: Mapping[str, Any], form: str) -> dict[str, Any] | None:
    """A record's own fields of a form; None: it is not of that form."""
    if form == PROMPT:
        fields = {key: document.get(key) for key in (PROMPT, COMPLETION)}
        return fields if all(isinstance(value, str) for value in fields.values()) else None
    for key in (MESSAGES, SHAREGPT):
        if isinstance(document.get(key), list):
            tools = {"tools": document["tools"]} if document.get("tools") else {}
            return {key: document[key], **tools}
    return None


def records(content: Lines, form: str, problems: list[Problem]) -> Iterator[Record]:
    """The records of a piece of a file; `problems` grows by what is wrong, naming file:line."""
    for number, line in content.numbered():
        where = f"{content.path}:{number}"
        try:
            if (document := record_of(line)) is None:
                continue
            fields = _fields(document, form) if isinstance(document, dict) else None
            if fields is None:
                raise NoText(f"has no {FIELDS[form]} (form {form}); it has {shown(document)}")
            key = json.dumps(fields, sort_keys=True, ensure_ascii=False).encode("utf-8")
        except NoText as error:
            problems.append(Problem(f"{where} {error}"))
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, and the file can hold other bytes
            problems.append(Problem(f"{where} has a lone surrogate or a byte that is no UTF-8 in its texts"))
        else:
            yield Record(fields, where, key)


class Conversations:
    """Records to tokens and answers, by transformers' tokenizer; travels to other processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, record: Record, problems: list[Problem]) -> Encoded | None:
        """None: it cannot be learned from, which `problems` then says."""
        try:
            return encode_record(record.fields, self.tokenizer, record.where)
        except BadRecord as error:
            problems.append(Problem(str(error)))
            return None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the chat template; of nothing where there is none."""
        try:
            return hashlib.sha256(chat_template(self.tokenizer).encode()).hexdigest()
        except ShearingError:
            return hashlib.sha256(b"").hexdigest()


def load_conversations(path: Path | str, forms: Mapping[str, Forms], eos_token: str | None) -> Conversations | None:
    """What the files' forms need of the tokenizer; None where all are text.

    Raises:
        ShearingError: it is no Hugging Face directory, or lacks the chat template that a file needs.
    """
    by_form = {form: file for file, form in chain.from_iterable(each.items() for each in forms.values())}
    if set(by_form) <= {TEXT}:
        return None
    file = by_form.get(CHAT) or by_form[PROMPT]
    if not Path(path).is_dir():
        raise ShearingError(
            f"{file} is of the form {CHAT if CHAT in by_form else PROMPT}, which needs a Hugging Face directory as "
            f"tokenizer; {path} is none"
        )
    from transformers import AutoTokenizer  # slow to import, and not needed for text

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), use_fast=True, local_files_only=True, trust_remote_code=False)
        if eos_token is not None:
            loaded.eos_token = eos_token
    except Exception as error:  # transformers raises many kinds for broken or foreign directories
        raise ShearingError(f"tokenizer {path} cannot be loaded: {error}") from error
    if CHAT in by_form:
        try:
            chat_template(loaded)
        except ShearingError as error:
            raise ShearingError(f"{file} is of the form {CHAT}: {error}") from error
    return Conversations(loaded)
