"""What the command line says of a mistake: one line, and what may have been meant."""

import difflib
from collections.abc import Iterable


def hint(option: str, known: Iterable[str]) -> str:
    """What may have been meant: options with the same last part first (--width: --model.width), then close names."""
    dashes = "--" if option.startswith("--") else ""
    option, names = option.lstrip("-").replace("_", "-"), [name.replace("_", "-") for name in known]
    last = option.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last and name != option]
    if not same:
        lasts = {name.rpartition(".")[2]: name for name in reversed(names)}
        close = difflib.get_close_matches(option, names, n=1) or difflib.get_close_matches(last, lasts, n=1)
        same = [lasts.get(name, name) for name in close]
    return f"; did you mean {' or '.join(dashes + name for name in same[:3])}?" if same else ""


def one_line(box: str, known: Iterable[str]) -> str:
    """tyro's framed error as one line: the first statement, and what may have been meant of the options known."""
    lines = [line.strip(" │╭╮╰╯─|+") for line in box.splitlines()]  # | + - where the terminal has no better
    lines = ["" if set(line) <= {"-"} else line for line in lines]
    statement, _, _ = "\n".join(lines[1:]).partition("\n\n")
    text = " ".join(statement.split())
    if text.startswith("Unrecognized") and (word := next((w for w in text.split() if w.startswith("--")), "")):
        text += hint("--" + word.partition("=")[0].removeprefix("--").removeprefix("no-"), known)
    elif "Missing from" in text:
        text = "missing option " + " ".join(w for w in text.split() if w.startswith("--"))
    return f"{text} (--help lists every option)"
