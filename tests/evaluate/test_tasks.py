"""Tasks through lm-eval and our task files, against direct scoring of the same items."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from helpers_prune import model_of
from helpers_tokenizers import save_word_tokenizer
from transformers import AutoTokenizer

from llmshearing.errors import ShearingError
from llmshearing.evaluate.items import check_items
from llmshearing.evaluate.lm_eval_tasks import read_tasks, run_tasks, shipped

lm_eval = pytest.importorskip("lm_eval", reason="the extra [eval] brings it")


def words(seed: int, number: int) -> str:
    """Words without an order, so that no two texts of different seeds are alike."""
    return " ".join(f"w{Random(seed * 31 + i).randrange(20)}" for i in range(number))


N = 12
QUERIES = [words(i, 3 + i % 4) for i in range(N)]
CHOICES = [[f"w{(i + 5 * j) % 20} {words(5 * i + j, (i + j) % 3)}".strip() for j in range(2 + i % 3)] for i in range(N)]
ITEMS = {
    "choices": [
        {"query": q, "choices": c, "gold": i % len(c)} for i, (q, c) in enumerate(zip(QUERIES, CHOICES, strict=True))
    ],
    "contexts": [
        {"context_options": [words(i, 4), words(i + 9, 4)], "continuation": words(i + 2, 3), "gold": i % 2}
        for i in range(N)
    ],
    "continuation": [{"context": words(i, 6), "continuation": words(i + 4, 2)} for i in range(N)],
}
PROMPT = {"arc_easy": "{}\nAnswer:", "arc_challenge": "{}\nAnswer:", "piqa": "{}\nAnswer:", "boolq": "{}\nAnswer:"}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_word_tokenizer(folder)
    return model_of("llama", torch.float64, max_position_embeddings=64), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    for form, items in ITEMS.items():
        (folder / f"{form}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def score(judged, context: str, continuation: str, bos: bool) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether it is the greedy one; one forward pass a token."""
    model, tokenizer = judged
    before = [1] * bos + tokenizer(context, add_special_tokens=False)["input_ids"]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    total, greedy = 0.0, True
    for token in after:
        with torch.no_grad():
            logits = model(torch.tensor([before])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        greedy &= int(logits.argmax()) == token
        before = [*before, token]
    return total, greedy


@pytest.mark.parametrize("bos", ["never", "always"])
def test_tasks_are_direct_scoring(judged, files: Path, bos: str) -> None:
    form = dict.fromkeys(shipped(), "choices") | {"winogrande": "contexts", "lambada": "continuation"}
    specs = read_tasks([f"{name}={files / form[name]}.jsonl" for name in shipped()])
    found = run_tasks(*judged, specs, batch_size=4, bos=bos)
    assert set(found) == set(shipped()) and all(each["items"] == N for each in found.values())
    for name in shipped():
        right, right_norm, lls = [], [], []
        for item in ITEMS[form[name]]:
            if form[name] == "continuation":
                ll, greedy = score(judged, item["context"], f" {item['continuation']}", bos == "always")
                lls.append(ll)
                right.append(greedy)
                continue
            if form[name] == "contexts":
                pairs = [(context, item["continuation"], item["continuation"]) for context in item["context_options"]]
            else:
                prompt = PROMPT.get(name, "{}").format(item["query"])
                pairs = [(prompt, choice, choice) for choice in item["choices"]]
            scores = torch.tensor(
                [score(judged, a, f" {b}", bos == "always")[0] for a, b, _ in pairs], dtype=torch.float64
            )
            lengths = torch.tensor([float(len(c)) for *_, c in pairs], dtype=torch.float64)
            right.append(int(scores.argmax()) == item["gold"])
            right_norm.append(int((scores / lengths).argmax()) == item["gold"])
        accuracy = sum(right) / N
        assert found[name]["acc"]["value"] == pytest.approx(accuracy), name
        assert found[name]["acc"]["stderr"] == pytest.approx((accuracy * (1 - accuracy) / (N - 1)) ** 0.5, rel=1e-6)
        if "acc_norm" in found[name]:
            assert found[name]["acc_norm"]["value"] == pytest.approx(sum(right_norm) / N), name
        if lls:
            assert found[name]["perplexity"]["value"] == pytest.approx(
                torch.tensor(lls).mean().neg().exp().item(), rel=1e-4
            )
            assert found[name]["perplexity"]["stderr"] > 0


def test_limit_and_a_task_file_of_ones_own(judged, files: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "llmshearing/evaluate/tasks/multiple_choice.yaml").read_text()
    own.write_text(text.replace("task: multiple_choice", "task: mine"))
    words = [f"multiple_choice={files}/choices.jsonl", f"{own}={files}/choices.jsonl"]
    found = run_tasks(*judged, read_tasks(words), limit=5)
    assert found["mine"] == found["multiple_choice"] and found["mine"]["items"] == 5


def test_an_unknown_name_and_data_out_of_reach(judged, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShearingError, match="lm-eval has no task arc_eazy; of local items .* arc_easy"):
        run_tasks(*judged, read_tasks(["arc_eazy"]))


def test_every_line_that_is_wrong_is_named(tmp_path: Path) -> None:
    lines = [
        {"query": "a", "choices": ["b", "c"], "gold": 1},
        {"query": "a", "choices": ["b", "c"]},
        {"query": "a", "choices": ["b", "c"], "gold": 2},
        {"query": "", "choices": ["b"], "gold": "1"},
        "text",
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    with pytest.raises(ShearingError) as caught:
        check_items(path, "choices")
    said = str(caught.value)
    assert f"{path}:2 has no field 'gold'" in said and f"{path}:3 has gold = 2, and 2 choices from 0 to 1" in said
    assert f"{path}:4 has query = ''" in said and f"{path}:5 is a str" in said and f"{path}:6 is no JSON" in said
    assert f"{path}:1 " not in said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{dir}/none.yaml", "none.yaml cannot be read"),
        ("{dir}/broken.yaml", "line 2"),
        ("{dir}/short.yaml", "has no key 'doc_to_text', no key 'metric_list', none of test_split, validation_split"),
        ("arc_easy={dir}/none.jsonl", "none.jsonl cannot be read"),
        ("arc_easy={dir}/empty.jsonl", "the file is empty"),
        ("sciq={dir}/empty.jsonl", "task 'sciq' has no task file for local items; there are arc_challenge"),
    ],
)
def test_task_files_that_are_wrong(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "broken.yaml").write_text("task: a\n  b: c\n")
    (tmp_path / "short.yaml").write_text("task: a\noutput_type: multiple_choice\ndoc_to_target: gold\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ShearingError, match=wanted):
        read_tasks([text.format(dir=tmp_path)])


def test_a_name_is_given_once(files: Path) -> None:
    with pytest.raises(ShearingError, match="task arc_easy is given twice"):
        read_tasks([f"arc_easy={files}/choices.jsonl"] * 2)
