"""What differs between the versions of transformers that the package runs on: 4.57 and 5.

No other module looks at a version. Reading the version imports nothing but the metadata of installed packages.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _major(package: str) -> int:
    try:
        return int(version(package).partition(".")[0])
    except PackageNotFoundError:  # data preparation runs without
        return 0


FIVE = _major("transformers") >= 5
"""transformers 5 or later."""

INSTALLED = "transformers5" if FIVE else "transformers4"
"""Which of `families.readers` the installed transformers is."""

LAYER_TUPLES = not FIVE
"""Decoder layers that return a tuple: those of some families in transformers 4, none in 5."""

SCALED_GEMMA2_EMBEDDING = FIVE
"""Gemma 2's embedding multiplies by the square root of hidden units itself, not its model."""

HEADS_DIVIDE_HIDDEN = FIVE
"""Configs refuse hidden units that are no multiple of heads, also where the width of heads is told apart."""

MODULES_AS_STORED = not FIVE
"""Whether modules carry the names that tensors have on disk. 5 renames some, and fuses experts (`families.stored`)."""

EAGER_EXPERTS = {"experts_implementation": "eager"} if FIVE else {}
"""Option of from_pretrained for mixtures of experts of any width. 5's own choice refuses rows of a weight that are no
multiple of 16 bytes ("strides should be multiple of 16 bytes")."""

TIES_WHAT_IS_ABSENT = FIVE
"""Whether loading ties a tensor only where it is not stored, in either direction. 4.57 ties by the config alone."""

FEWEST_HEADS = 1 if FIVE else 0
"""Query heads of a row without which attention fails."""

RECORD_WITH_CACHE = not FIVE
"""Whether to use a cache where arguments of layers are recorded, to run them alone. 4.57 then leaves the causal mask to
the attention kernel; 5 makes masks of sliding windows that are as wide as the cache."""


def of_config(error: BaseException) -> BaseException:
    """What a config's refusal says: 5 wraps it in an error that names only the step at which it was found."""
    from huggingface_hub.errors import StrictDataclassError

    return error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ is not None else error
