"""Reads the `index.json` of an MDS directory, as something that others wrote: nothing in it is believed unchecked."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from llmshearing.data.mds.compression import NAMES
from llmshearing.data.mds.format import HASHES, Shard
from llmshearing.data.mds.masks import COLUMN
from llmshearing.errors import ShearingError
from llmshearing.files import is_count

INDEX = "index.json"
COLUMNS = ("tokens", "set")
MOST = 2**32  # bytes, and so samples, of a shard: MDS counts them in 32 bits
KEYS = ("column_names", "column_encodings", "column_sizes")


def broken_json(path: Path) -> str | None:
    """What keeps a file from being read as JSON, or None."""
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {error!r}"
    return None


def read_index(folder: Path) -> list[Shard]:
    """The shards of an MDS directory, whose files lie in it by their names and hold the columns `tokens` and `set`.

    Raises ShearingError, naming what is wrong.
    """
    path = folder / INDEX
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ShearingError(f"{path} does not exist, so {folder} is no MDS directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ShearingError(f"{path} cannot be read: {error!r}; copy it again or prepare the data again") from error
    shards = found.get("shards") if isinstance(found, dict) else None
    if not isinstance(shards, list) or found.get("version") != 2:
        raise ShearingError(f"{path} is no index of MDS shards, version 2; copy it again or prepare the data again")
    problems = [f"{path}: shard {i}: {problem}" for i, shard in enumerate(shards) for problem in _problems(shard)]
    if problems:
        raise ShearingError("\n".join([*dict.fromkeys(problems)][:20]))
    if not shards:
        raise ShearingError(f"{folder} has no sample; prepare it again")
    return [Shard.of(shard) for shard in shards]


def _problems(shard: Any) -> list[str]:
    if not isinstance(shard, dict) or shard.get("format") != "mds" or shard.get("version") != 2:
        return ["it is not described as MDS, version 2"]
    said = []
    if not is_count(shard.get("samples"), MOST) or shard["samples"] == 0:
        said.append(f"samples is {shard.get('samples')!r}; a whole number above 0 is needed")
    compression = shard.get("compression")
    if compression is not None and not (isinstance(compression, str) and compression in NAMES):
        said.append(f"compression is {compression!r}, which Streaming does not know")
    if (compression is None) != (shard.get("zip_data") is None):
        said.append("compression and zip_data must be given together")
    for key in ("raw_data", "zip_data"):
        if key == "raw_data" or shard.get(key) is not None:
            said += [f"{key}: {problem}" for problem in _file_problems(shard.get(key))]
    return said + _column_problems(*(shard.get(key) for key in KEYS))


def _file_problems(data: Any) -> list[str]:
    if not isinstance(data, dict) or set(data) != {"basename", "bytes", "hashes"}:
        return ["basename, bytes and hashes are needed"]
    said = []
    name = data["basename"]
    if not isinstance(name, str) or not _stays_inside(name):
        said.append(f"basename {name!r} is not the name of a file inside the directory")
    if not is_count(data["bytes"], MOST):
        said.append(f"bytes is {data['bytes']!r}, no whole number below 2^32")
    hashes = data["hashes"]
    if not isinstance(hashes, dict) or not all(k in HASHES and isinstance(v, str) for k, v in hashes.items()):
        said.append(f"hashes {hashes!r} are none that Streaming knows")
    return said


def _stays_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name and "\\" not in name


def _column_problems(names: Any, encodings: Any, sizes: Any) -> list[str]:
    if not all(isinstance(values, list) for values in (names, encodings, sizes)):
        return [f"{', '.join(KEYS)} must be lists"]
    if not len(names) == len(encodings) == len(sizes) or not all(isinstance(x, str) for x in names + encodings):
        return [f"{', '.join(KEYS)} must be of one length, the first two of strings"]
    if not all(size is None or is_count(size, MOST) for size in sizes):
        return [f"column_sizes {sizes} must be whole numbers, or null"]
    if missing := [name for name in COLUMNS if name not in names]:
        return [f"it has the columns {names}; {missing} is missing"]
    kinds = dict(zip(names, encodings, strict=True))
    said = [f"column {n} is {k!r}, which would run code" for n, k in kinds.items() if k == "pkl"]
    if kinds["tokens"] != "bytes" and not kinds["tokens"].startswith("ndarray"):
        said.append(f"column tokens is {kinds['tokens']!r}; known are 'ndarray:...' and 'bytes' (of ids)")
    if kinds["set"] != "str":
        said.append(f"column set is {kinds['set']!r}, not 'str'")
    if (mask := kinds.get(COLUMN, "bytes")) != "bytes" and not mask.startswith("ndarray"):
        said.append(f"column {COLUMN} is {mask!r}; known are 'ndarray:...' and 'bytes'")
    return said
