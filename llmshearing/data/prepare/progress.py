"""How far a run of `prepare` has come, in one SQLite file, so that a killed run goes on and ends bit-identical.

A part of a domain's state and the documents seen in it are committed together: after a kill, a part is either done or
has left no trace.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any


class PrepareProgress:
    """Each domain's state so far, and which documents have been seen. Memory does not grow with either."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        self._database.execute("CREATE TABLE IF NOT EXISTS states (domain TEXT PRIMARY KEY, state TEXT)")
        self._database.execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.commit()

    def state(self, domain: str) -> Any:
        """What `commit` recorded last, or None."""
        row = self._database.execute("SELECT state FROM states WHERE domain = ?", (domain,)).fetchone()
        return None if row is None else json.loads(row[0])

    def commit(self, domain: str, state: Any) -> None:
        """Record a domain's state, and for good the documents seen since the last commit."""
        self._database.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (domain, json.dumps(state)))
        self._database.commit()

    def first_time(self, digest: bytes) -> bool:
        """Whether this document has not been seen, in any domain; now it has."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        """Forget what was not committed."""
        self._database.close()
