"""The data, teacher and cache that these tests share."""

from types import SimpleNamespace

import pytest
from helpers_cache import write_data, write_teacher

from llmshearing.training.cache.cli import cache_targets


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """`data`, `source` (the student), `teacher`, and `cache` of it in the run's batches of four."""
    root = tmp_path_factory.mktemp("cache")
    data, teacher = write_data(root / "data"), write_teacher(root / "teacher")
    source = write_teacher(root / "source", 1)
    cache_targets(str(teacher), data, root / "made", split="train", batch=4)
    return SimpleNamespace(root=root, data=data, teacher=teacher, source=source, cache=root / "made")
