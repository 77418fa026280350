"""A teacher that was asked beforehand: what training follows where ``distill.cache`` is given."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from composer.utils import dist
from torch import Tensor

from llmshearing.config import Config
from llmshearing.config.schema import Distill
from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.errors import ShearingError
from llmshearing.training.cache.index import ONE_FOLDER
from llmshearing.training.cache.match import check_cache, check_teacher, streams_of
from llmshearing.training.cache.read import TeacherCache
from llmshearing.training.source import Source
from llmshearing.training.targets import Answer, Guide, View

log = logging.getLogger(__name__)


class CachedTeacher(Guide):
    """Reads each batch's targets by its samples' identity, ``set`` and ``sample``.

    Args:
        cache: of the data that are trained on. set_names: what the numbers in ``set`` mean; None: one folder holds all.
    """

    def __init__(
        self,
        cache: TeacherCache,
        set_names: list[str] | None,
        weight: float = 1.0,
        ce: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(weight, ce, temperature)
        self.cache, self.set_names = cache, set_names

    def ask(self, batch: Mapping[str, Tensor], view: View | None = None) -> Answer:
        """See :meth:`Guide.ask`.

        Raises:
            ShearingError: a view is asked for, or the cache has not what the batch's samples are (`TeacherCache`).
        """
        if view is not None:
            raise ShearingError("distill.cache: there are no hidden states in a teacher's cache; distill.hidden = 0")
        sets = batch["set"].tolist()
        domains = [ONE_FOLDER if self.set_names is None else self.set_names[number] for number in sets]
        return Answer(self.cache.targets(domains, batch["sample"].tolist(), batch["input_ids"]))


def build_cached(cfg: Config, source: Source, data: MixtureDataset) -> CachedTeacher:
    """The cache that ``distill.cache`` names, compared with the run.

    Raises:
        ShearingError: it is absent, unfinished or damaged, or of other data, another vocabulary or another teacher.
    """
    asked = cfg.distill or Distill()
    cache = TeacherCache(str(asked.cache))
    recorded = source.checkpoint.info.tokenizer if source.checkpoint is not None else cfg.model.path
    wanted: dict[str, Any] = {"temperature": asked.temperature, "top_k": asked.top_k}
    if asked.top_k is not None:
        wanted |= {"top_k": min(asked.top_k, cache.index.vocab_size), "tail": asked.tail}
    check_cache(cache, streams_of(data), source.config.vocab_size, cfg.tokenizer_name or recorded, wanted)
    if asked.teacher is not None:
        _on_first_rank(cache, asked.teacher)
    about = cache.index
    said = f"top_k {about.top_k}, tail {about.tail}, teacher {about.teacher['name']}"
    log.info("following the teacher's cache %s: %s", cache.path, said)
    names = None if data.plain else data.set_names
    return CachedTeacher(cache, names, asked.weight, asked.ce, asked.temperature)


def _on_first_rank(cache: TeacherCache, teacher: str) -> None:
    """:func:`check_teacher`, whose weights are read once; every rank raises what it found."""
    problem: list[str | None] = [None]
    if dist.get_global_rank() == 0:
        try:
            check_teacher(cache, teacher)
        except ShearingError as error:
            problem[0] = str(error)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ShearingError(problem[0])
