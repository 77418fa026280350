"""A model of shards in megatron-core's own GPTModel: loaded strictly, run, trained a few steps.

megatron-core (the extra `megatron`) is imported here alone, and when something is built. It is written for GPUs. On a
CPU its calls for the current device are answered with the CPU, and its own modules are used in place of Transformer
Engine's. Every process is one tensor-parallel rank; there is one pipeline stage.

Shape legend: B sequences, T tokens, V rows of the vocabulary with padding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.megatron import SPECS, layout_of
from llmshearing.families.megatron.arguments import SIZES, core_config, core_layer, core_model
from llmshearing.families.names import EXPERTS
from llmshearing.megatron.convert import read_megatron
from llmshearing.megatron.shards import Shards, open_shards

SEED = 1
PATIENCE = timedelta(minutes=10)


@dataclass
class CoreModel:
    """This rank's part of a model. model: GPTModel. arguments: Megatron's. tokens: of the vocabulary, unpadded."""

    model: nn.Module
    arguments: Mapping[str, Any]
    tokens: int
    partial: list[nn.Parameter]
    """Parameters that all ranks hold, and each has its own heads' gradients of."""
    device: torch.device

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V], of all ranks."""
        return self._run(ids)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, over the unpadded vocabulary. ids: [B, T]."""
        logits = self._run(ids)[:, :-1, : self.tokens]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def _run(self, ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        places = torch.arange(tokens, device=self.device).expand_as(ids)
        hidden = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=self.device).triu(1)  # True: not seen
        with _device(self.device):
            return self.model(ids, places, hidden)


def load(path: Path | str) -> CoreModel:
    """This rank's part, its weights loaded strictly. Processes are started by torchrun, or there is one.

    Raises:
        ShearingError: megatron-core is not installed; the shards are of another number of ranks than there are
            processes, of several stages, or named as Transformer Engine's.
    """
    shards = open_shards(path)
    weights, info, parallel = read_megatron(path)  # checked as everything that is read
    _start(parallel.tp, parallel.pp)
    if parallel.spec != SPECS[0]:
        raise ShearingError(
            f"{path} is named as Transformer Engine's modules are; convert it: llmshearing convert --spec {SPECS[0]}"
        )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with _device(device):
        model = _build(shards.arguments)
    model.load_state_dict(_own_part(shards), strict=True)
    table = table_for(info.config)
    named = dict(model.named_parameters())
    shared = [tensor.name(SPECS[0]) for tensor in layout_of(table).tensors if tensor.partial]
    partial = [named[name.format(layer=layer)] for name in shared for layer in range(table.layers)]
    tokens = table.axes["vocab"].length
    return CoreModel(model.to(device), shards.arguments, tokens, partial, device)


def _start(tp: int, pp: int) -> None:
    """Groups of processes, once."""
    try:
        from megatron.core import parallel_state, tensor_parallel
    except ImportError as error:
        raise ShearingError("megatron-core is not installed: pip install 'llmshearing[megatron]'") from error
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if (tp, pp) != (processes, 1):
        raise ShearingError(
            f"the shards are of {tp} x {pp} ranks, and there are {processes} processes: start {tp} (torchrun "
            f"--nproc_per_node {tp}), or convert to --tp {processes} --pp 1"
        )
    if dist.is_initialized():
        return
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    if gpu:
        tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    else:  # the tracker of random states that needs no GPU
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 looks for it, and defines it only with Transformer Engine
        moe_utils.te_general_gemm = None
    dtype = arguments["params_dtype"]
    torch.manual_seed(SEED)
    config = TransformerConfig(
        **core_config(arguments),
        activation_func=F.silu,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=True,
    )
    layer = get_gpt_layer_local_spec(**core_layer(arguments))
    model = GPTModel(config, layer, parallel_output=False, **core_model(arguments))
    return model.to(dtype)


def _own_part(shards: Shards) -> dict[str, Tensor]:
    return {name: part.make() for name, part in shards.stages[0][dist.get_rank()].items()}


@contextmanager
def _device(device: torch.device) -> Iterator[None]:
    """megatron-core asks CUDA for the current device; where there is none, the answer is the CPU."""
    if device.type != "cpu":
        yield
        return
    tensors = patch.object(Tensor, "cuda", lambda tensor: tensor)
    with patch("torch.cuda.current_device", lambda: device), tensors, _OnCpu():
        yield


class _OnCpu(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def train(core: CoreModel, batches: Sequence[Tensor], rate: float = 1e-4) -> list[float]:
    """A step of AdamW on each batch [B, T]; the losses before each step. In float32, whatever the weights were.

    Every rank holds the same batch. Gradients of what all ranks hold agree, except for norms inside heads.

    Raises:
        ShearingError: experts on several ranks, which megatron-core trains with sequence parallelism only.
    """
    if core.arguments.get(SIZES[EXPERTS]) and dist.get_world_size() > 1:
        raise ShearingError(
            "megatron-core trains experts on several tensor-parallel ranks only with sequence parallelism, which this "
            "short check has not: convert to --tp 1"
        )
    core.model.float()
    core.model.train()
    optimizer = torch.optim.AdamW(core.model.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    for ids in batches:
        loss = core.loss(ids.to(core.device))
        optimizer.zero_grad()
        with _device(core.device):
            loss.backward()
        for parameter in core.partial:
            dist.all_reduce(parameter.grad)
        optimizer.step()
        losses.append(loss.item())
    return losses
