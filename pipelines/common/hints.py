"""What the command line says of a mistake: one line, and what may have been meant."""

from collections.abc import Iterable

from features.errors import close_names


def hint(option: str, known: Iterable[str]) -> str:
    """What may have been meant, with the dashes that the option was given with."""
    dashes = "--" if option.startswith("--") else ""
    close = close_names(option.lstrip("-").replace("_", "-"), [name.replace("_", "-") for name in known])
    return f"; did you mean {' or '.join(dashes + name for name in close)}?" if close else ""


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
