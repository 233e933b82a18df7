"""Rewards remembered on disk, by function, prompt, completion and the columns it reads."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from ..errors import UserError


class Cache:
    """Keys -> JSON values in an sqlite file; several processes may share it."""

    def __init__(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self.database.execute(
                "create table if not exists cache (key text primary key, value text)"
            )
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(f"{path}: wanted a cache of rewards or no file; {error}") from None

    def get(self, key: str) -> list:
        """[value], or [] if there is none."""
        row = self.database.execute("select value from cache where key = ?", (key,)).fetchone()
        return [json.loads(row[0])] if row else []

    def put(self, values: dict[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self.database:
            self.database.executemany("insert or replace into cache values (?, ?)", rows)


def key_of(*parts: Any) -> str:
    """A hash of what a value depends on."""
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
