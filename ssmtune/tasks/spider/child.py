"""Runs SQL that nobody has checked: the program of the child process that `execution` starts.

Each line of standard input is a request, `{"database": path, "sql": text, "seconds": number}`; each line of output
answers one, with `{"rows": [...]}` or `{"error": text}`. The database is opened read-only, an authorizer denies SQLite
everything but reading, and memory is limited. The parent kills the process when an answer takes too long; without a
parent, the limit on its processor time ends it. Nothing of ssmtune is imported: it starts in hundredths of a second.
"""

import json
import resource
import sqlite3
import sys
from pathlib import Path

READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
UNSAFE_FUNCTIONS = {"load_extension", "fts3_tokenizer"}


def authorize(action, first, second, database, trigger):
    if action in READING and not (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in UNSAFE_FUNCTIONS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def connect(path):
    connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    connection.execute("PRAGMA query_only = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA temp_store = MEMORY")
    # some of Spider's texts are in another encoding than UTF-8
    connection.text_factory = lambda raw: raw.decode(errors="ignore")
    connection.set_authorizer(authorize)
    return connection


def answer(connections, request, max_rows, max_characters):
    """The reply to one request, as JSON."""
    path = request["database"]
    try:
        if path not in connections:
            connections[path] = connect(path)
        cursor = connections[path].execute(request["sql"])
        if cursor.description is None:
            return json.dumps({"error": "it is no query"})
        rows = cursor.fetchmany(max_rows + 1)
        if len(rows) > max_rows:
            return json.dumps({"error": f"more than {max_rows} rows"})
        text = json.dumps({"rows": rows}, default=bytes.hex)
        return text if len(text) <= max_characters else json.dumps({"error": f"more than {max_characters} characters"})
    # a query longer than SQLite takes, of several statements, or with a lone surrogate: the text is a model's
    except (sqlite3.Error, sqlite3.Warning, MemoryError, OverflowError, ValueError) as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})


def limit_processor_time(seconds):
    """The system ends this process when it has worked for so many seconds from now on, or one or two more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 2, most))


def main():
    max_rows, max_characters, max_bytes = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # no file can grow: pipes are none
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    connections = {}
    for line in sys.stdin:
        request = json.loads(line)
        limit_processor_time(request["seconds"])
        print(answer(connections, request, max_rows, max_characters), flush=True)


if __name__ == "__main__":
    main()
