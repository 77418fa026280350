"""What all tests share: where the reference vectors are, few threads, a deterministic hypothesis."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout that was not installed is tested too
# Processes that a test starts find the same checkout and take as few threads.
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
# Under `-n` every process has a core to itself: a second thread would only wait for it.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile(
    "default",
    deadline=None,
    max_examples=30,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


# Start several ranks, and measure time-outs: never two of these at once.
ALONE = ("distributed/", "faults/", "training/test_distributed.py", "test_pipeline.py", "data/test_two_ranks.py",
         "megatron/test_core.py", "megatron/test_scripts.py")  # fmt: skip


# Then the files of few tests that take minutes: what is long and starts last keeps one process waiting for the other.
LONG = ("test_readme.py", "checkpoints/test_sharded.py", "storage/test_sharded.py", "storage/test_memory.py",
        "test_cli.py", "training/test_onerun.py", "families/test_conformance.py")  # fmt: skip


def scope(nodeid: str) -> str:
    """What runs in one process, in turn: a file, or all that start ranks."""
    name = nodeid.partition("::")[0].removeprefix("tests/")
    return "ranks" if name.startswith(ALONE) else name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `pytest -n 2`: the longest first, then by numbers of tests."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    counts = Counter(scope(item.nodeid) for item in items)
    places = {name: place for place, name in enumerate(("ranks", *LONG))}

    def place(item: pytest.Item) -> tuple[int, int, str]:
        name = scope(item.nodeid)
        return places.get(name, len(places)), -counts[name], name

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Under `pytest -n 2` (make test): the tests of a file, and all that are not to meet others of their kind, in turn.

    xdist's own groups of tests (--dist loadgroup) do nothing under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False  # the order is that of the collection
    return ByFile(config, log)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def reference_vectors() -> Path:
    """Directory of the reference vectors; the test is skipped, saying so, where it is absent."""
    path = Path(os.environ.get("REFERENCE_VECTORS", ROOT.parent / "shared" / "reference-vectors"))
    if not path.is_dir():
        pytest.skip(f"no reference vectors at {path} (set REFERENCE_VECTORS)")
    return path


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory):
    """Corpus, tokenizer, tiny source model and prepared data for real runs; see `helpers_runs`."""
    from helpers_runs import build_lab  # brings torch and Composer

    return build_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Two threads for torch, without importing it for tests that do not."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > 2:
        torch.set_num_threads(2)
