"""The old name of `llmshearing.data.mds.shards`, for scripts that import it."""

from llmshearing.data.mds.shards import MdsDirectory

__all__ = ["MdsDirectory"]
