"""`python -m benchmarks.readers`: a cell says "works" only where its reader ran."""

from benchmarks.readers import NOT_RUN, READERS, cell, main


def test_only_what_was_run_works(tmp_path):
    out = tmp_path / "readers.md"
    assert main(["--families", "llama", "--methods", "random", "--readers", "transformers", "--output", str(out)]) == 0
    text = out.read_text()
    heads, row = (line.split(" | ") for line in text.splitlines() if line.startswith(("| method", "| random")))
    said = dict(zip((name.strip("| ") for name in heads), (value.strip("| ") for value in row), strict=True))
    assert said["family"] == "`llama`" and said["transformers"].startswith("works, ")
    assert {said[name] for name in [*READERS, "transformers 5"] if name != "transformers"} == {"not run"}
    assert all(name in text for name in NOT_RUN)


def test_a_difference_is_no_success():
    assert cell(1e-6) == "works, 1e-06" and cell(0.5) == "**differs**, 0.5" and "differs" in cell(float("inf"))
