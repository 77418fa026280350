"""Package metadata. Runtime requirements stand in requirements.txt; optional ones are the extras below."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_requirements() -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def read_version() -> str:
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "llmshearing" / "__init__.py").read_text())
    if found is None:
        raise RuntimeError("llmshearing/__init__.py does not set __version__")
    return found.group(1)


EVAL = ["lm_eval>=0.4.13,<0.5", "datasets>=4", "accelerate>=1.1", "matplotlib>=3.8"]
MEGATRON = "megatron-core==0.16.1"
EXTRAS = {
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
    # a short training of shards in GPTModel (llmshearing.megatron.core); converting and pruning need none of it
    "megatron": [MEGATRON],
    "dev": [
        *EVAL,
        MEGATRON,
        "pyarrow>=15",
        # an S3 service on loopback; not moto[server], whose antlr4 is too new for omegaconf
        "moto[s3]>=5",
        "flask>=2.2",
        "flask-cors>=4",
        "pytest>=8.2",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "psutil>=5.9",
        "hypothesis>=6.100",
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
    license="MIT",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["llmshearing", "llmshearing.*"]),
    entry_points={"console_scripts": ["llmshearing=llmshearing.cli:main"]},
    package_data={"llmshearing": ["scripts/*.sh", "evaluate/tasks/*.yaml"]},
    install_requires=read_requirements(),
    extras_require=EXTRAS,
)
