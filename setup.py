"""Package metadata. What the core and training need stands in requirements.txt; the rest are the extras below."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_requirements() -> tuple[list[str], list[str]]:
    """Those of the core, and those of training, which follow the line `# train`."""
    parts = (ROOT / "requirements.txt").read_text().split("\n# train:")
    lines = [[line.partition("#")[0].strip() for line in part.splitlines()[1:]] for part in parts]
    core, train = ([line for line in part if line] for part in lines)
    return core, train


def read_version() -> str:
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "llmshearing" / "__init__.py").read_text())
    if found is None:
        raise RuntimeError("llmshearing/__init__.py does not set __version__")
    return found.group(1)


CORE, TRAIN = read_requirements()
EVAL = ["lm_eval>=0.4.13,<0.5", "datasets>=4", "accelerate>=1.1", "matplotlib>=3.8"]
FINETUNE = ["peft>=0.17", "accelerate>=1.1"]
MEGATRON = "megatron-core==0.16.1"
TEST = [
    "pyarrow>=15",
    "matplotlib>=3.8",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "psutil>=5.9",
    "hypothesis>=6.100",
]
EXTRAS = {
    # Composer and Streaming as they pin, and what only training uses
    "train": TRAIN,
    # FlashAttention-2 needs a CUDA compiler to install: never a hard requirement
    "flash-attn": ["flash-attn>=2.5"],
    # what examples/ and `make shear`, `make smollm2` use beyond the package itself
    "examples": ["gguf>=0.17"],
    # files for llama.cpp: llmshearing convert ... out.gguf
    "gguf": ["gguf>=0.17"],
    # Parquet files as input of llmshearing.data.prepare
    "parquet": ["pyarrow>=15"],
    # plots of llmshearing.data.mixture.target_loss
    "plot": ["matplotlib>=3.8"],
    # tasks and the plot of llmshearing evaluate; fsspec is left to pip, Composer's extras would pin old versions
    "eval": EVAL,
    # llmshearing finetune
    "finetune": FINETUNE,
    # a short training of shards in GPTModel (llmshearing.megatron.core); converting and pruning need none of it
    "megatron": [MEGATRON],
    # what the tests of the core need, on any stack
    "test": TEST,
    "dev": [
        *TEST,
        *EVAL,
        *FINETUNE,
        MEGATRON,
        # an S3 service on loopback; not moto[server], whose antlr4 is too new for omegaconf
        "moto[s3]>=5",
        "flask>=2.2",
        "flask-cors>=4",
        # wheel and sdist
        "build>=1.2",
        "twine>=5",
        "setuptools>=70.1",
        "ruff>=0.8",
        "mypy>=1.11",
        "types-PyYAML",
        "types-tqdm",
    ],
}

setup(
    name="llmshearing",
    version=read_version(),
    description="Structured pruning of language models: learned masks, one fold, continued pretraining.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["llmshearing", "llmshearing.*"]),
    entry_points={"console_scripts": ["llmshearing=llmshearing.cli:main"]},
    package_data={"llmshearing": ["py.typed", "scripts/*.sh", "evaluate/tasks/*.yaml", "report/web/*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
