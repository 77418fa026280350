"""The README of an exported model. It tells the source, the shape, the data, and how the model was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from llmshearing.checkpoints.checkpoint import CheckpointInfo
from llmshearing.families import table_for
from llmshearing.families.nonuniform.table import SIZES

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- llmshearing
- pruning
---
# {name}

```python
{register}from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (of.from_pretrained("{name}") for of in (AutoModelForCausalLM, AutoTokenizer))
```

The licences of the source model and of the data hold for this model too.
"""


def model_card(info: CheckpointInfo, name: str) -> str:
    """The card in Markdown: shape, history, data and configuration. A part that is not known is left out."""
    run = run_config(info)
    register = "import llmshearing  # layers differ in size: makes them known to transformers\n"
    parts = [
        HEADER.format(name=name, register=register if SIZES in info.hf_config else ""),
        _shape(info),
        _history(info),
        _data(run),
    ]
    if info.run_config:
        parts.append(f"## Configuration of the last run\n\n```yaml\n{info.run_config.strip()}\n```\n")
    return "\n".join(part for part in parts if part)


def run_config(info: CheckpointInfo) -> Mapping[str, Any]:
    """The run's configuration as a mapping; empty where there is none."""
    try:
        loaded = yaml.safe_load(info.run_config or "")
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def tokenizer_of(info: CheckpointInfo) -> str | None:
    """Path or name of the tokenizer. The checkpoint tells it, or else the configuration of its run."""
    run = run_config(info)
    model = run.get("model")
    return (
        info.tokenizer
        or (model.get("tokenizer_name") if isinstance(model, dict) else None)
        or run.get("tokenizer_name")
    )


def _shape(info: CheckpointInfo) -> str:
    table = table_for(info.config)
    head_dim = {table.head_dim_key: table.head_dim} if table.head_dim_key else {}
    shape = {**table.shape(), **head_dim, "parameters": table.count()}
    shown = {key: f"{value:,}" for key, value in shape.items()}
    shown |= {key: ", ".join(map(str, sizes)) for key, sizes in info.hf_config.get(SIZES, {}).items()}
    rows = "\n".join(f"| {key} | {value} |" for key, value in shown.items())
    return f"## Shape\n\n| | |\n|---|---:|\n{rows}\n"


def _history(info: CheckpointInfo) -> str:
    lines = "\n".join(f"{number}. {line}" for number, line in enumerate(info.history, 1))
    return f"## How it was made\n\n{lines}\n" if lines else ""


def _data(run: Mapping[str, Any]) -> str:
    callbacks = run.get("callbacks")
    loading = callbacks.get("data_loading") if isinstance(callbacks, dict) else None
    if not isinstance(loading, dict) or not loading.get("set_names"):
        return ""
    names, shares = loading["set_names"], loading.get("proportion") or []
    losses = loading.get("target_loss") or []
    rows = [
        f"| {name} | {shares[at] if at < len(shares) else ''} | {losses[at] if at < len(losses) else ''} |"
        for at, name in enumerate(names)
    ]
    update = loading.get("update_type", "constant")
    return (
        f"## Data\n\nDomains of the last run, with the proportions that it started from (update: {update}).\n\n"
        "| domain | proportion | target loss |\n|---|---:|---:|\n" + "\n".join(rows) + "\n"
    )
