"""What a run of `prepare` has finished, in one SQLite file, so that a killed run goes on and ends bit-identical.

A domain's result and the documents seen in it are committed together: after a kill, a domain is either done or has
left no trace.
"""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any


class Progress:
    """`done[domain]` results so far, and which documents have been seen. Memory does not grow with either."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        self._database.execute("CREATE TABLE IF NOT EXISTS done (domain TEXT PRIMARY KEY, result TEXT)")
        self._database.execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.commit()

    def result(self, domain: str) -> Any:
        """What `finish` recorded, or None."""
        row = self._database.execute("SELECT result FROM done WHERE domain = ?", (domain,)).fetchone()
        return None if row is None else json.loads(row[0])

    def finish(self, domain: str, result: Any) -> None:
        """Record a domain's result, and for good the documents seen since the last one."""
        self._database.execute("INSERT INTO done VALUES (?, ?)", (domain, json.dumps(result)))
        self._database.commit()

    def first_time(self, text: str) -> bool:
        """Whether this document has not been seen, in any domain; now it has."""
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        """Forget what was not finished."""
        self._database.close()
