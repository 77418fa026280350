"""The wheel and the source archive: built, checked, and the wheel run from an environment that has no checkout."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import llmshearing

ROOT = Path(__file__).resolve().parent.parent
TOOLS = [name for name in ("build", "twine") if find_spec(name) is None]


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command without the checkout on the path of Python."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([str(word) for word in words], cwd=cwd, env=own | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, out of a copy of what git would give."""
    if TOOLS:
        pytest.skip(f"not installed: {', '.join(TOOLS)} (the extra dev)")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    found = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=copy)
    assert found.returncode == 0, found.stderr[-4000:]
    return out


@pytest.mark.slow
def test_both_are_whole(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert run(sys.executable, "-m", "twine", "check", "--strict", wheel, source, cwd=built).returncode == 0
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    kept = {str(path.relative_to(ROOT)) for path in (ROOT / "llmshearing").rglob("*.py")}
    assert kept <= names and "llmshearing/py.typed" in names and "llmshearing/evaluate/tasks/arc_easy.yaml" in names
    assert f"Version: {llmshearing.__version__}\n" in metadata
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;]*$", metadata, re.MULTILINE)
    assert "torch" in needed and not {"mosaicml", "mosaicml-streaming", "wandb"} & set(needed)
    assert 'Requires-Dist: mosaicml==0.32.1; extra == "train"' in metadata


@pytest.mark.slow
def test_the_wheel_prunes_where_nothing_else_of_us_is(built: Path, tmp_path: Path) -> None:
    """A new environment: the wheel installed, what it requires lent by this environment's folder of packages."""
    (wheel,) = built.glob("*.whl")
    assert run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path).returncode == 0
    python = tmp_path / "venv/bin/python"
    found = run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    # a line of a .pth file that names a folder puts it last on the path; .pth files there are not read, ours neither
    lent = [path for path in sys.path if path.endswith("site-packages")]
    Path(site, "lent.pth").write_text("".join(f"{path}\n" for path in lent))
    where = run(python, "-c", "import llmshearing; print(llmshearing.__file__)", cwd=tmp_path).stdout.strip()
    assert where.startswith(site)
    made = run(sys.executable, "-c", "import helpers_without; helpers_without.build('.')", cwd=tmp_path,
               PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # fmt: skip
    assert made.returncode == 0, made.stderr
    words = ["prune", "random", "--model", "source", "--output", "small", "--target", "hidden_size=8"]
    found = run(tmp_path / "venv/bin/llmshearing", *words, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "small/model.safetensors").is_file()


def test_citation_and_changelog_name_the_version() -> None:
    version = re.escape(llmshearing.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert re.fullmatch(rf"## {version} \(\d{{4}}-\d\d-\d\d\)", first)
