"""Names that MLflow takes, for metrics and artifacts of tasks whose own names may be anything.

Every part between slashes is spelled with the characters that MLflow allows. A part that had to be changed ends in six
digits of the SHA-256 of what it was, so that two labels never become one (`map@1` and `map#1`), at every start alike.
"""

import hashlib
import re

LONGEST_PART = 100  # characters; a name of the most parts that we make stays below MLflow's limit of 250
LONGEST = 250


def metric_key(name: str) -> str:
    """A metric's name as MLflow takes it; itself where nothing is wrong with it."""
    key = "/".join(map(_part, name.split("/")))
    return key if len(key) <= LONGEST else f"{key[: LONGEST - 7]}-{_digits(name)}"


def file_name(name: str) -> str:
    """One part of a path or of an artifact's name, for a name that may have slashes."""
    return _part(name)


def _part(text: str) -> str:
    spelled = re.sub(r"[^\w\-. :]", "_", text)
    if spelled.strip(".") == "" or spelled != text or len(text) > LONGEST_PART:
        return f"{spelled.strip('.')[: LONGEST_PART - 7]}-{_digits(text)}"
    return spelled


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
