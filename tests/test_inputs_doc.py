"""docs/inputs.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_test_that_the_document_names_exists() -> None:
    named, file = [], ""
    for part, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", (ROOT / "docs" / "inputs.md").read_text()):
        file = part or file
        if part or name:
            named.append((file, name))
    assert len(named) > 40
    missing = [
        f"{file}::{name}" for file, name in named
        if not (ROOT / file).is_file() or (name and f"def {name}(" not in (ROOT / file).read_text())
    ]  # fmt: skip
    assert missing == []
