"""One task's values over a whole corpus: what its kind asks of them, its classes, and what looks unintended."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.corpus.events import BACKGROUND, find_fault
from features.corpus.manifest import Corpus
from features.corpus.tasks import NUMBERS, SENTIMENT, Declared, Task, shortened
from features.errors import CorpusError

NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"
FRACTION = r"^[-+]?\d*\.\d*([eE][-+]?\d+)?$"
FEW = 50  # different whole numbers mixed with text may be classes; more are taken for a measure
MOSTLY = 0.8  # share of a column's values that are numbers, from which on the others look like mistakes
MAX_CLASSES = 10_000  # beyond this a column is an identifier or a text


class LabelCheck:
    """Looks at one task's values: what its kind asks of them, its classes, and what looks unintended.

    named: the run says of which kind the task is.
    """

    def __init__(self, corpus: Corpus, task: Declared, named: bool) -> None:
        self.corpus, self.declared, self.named = corpus, task, named
        self.rows, self.missing, self.numbers = 0, 0, 0
        self.whole, self.fractions = True, False
        self.counts: Counter = Counter()
        self.spoiling: tuple[int, str] | None = None  # the first value among numbers that is none, and its row
        self.fault: tuple[int, str] | None = None

    def find_fault(self, batch: pa.RecordBatch) -> tuple[int, str] | None:
        """The first value that cannot be, as its row in the batch and a few words."""
        column = batch.column(self.declared.name)
        if self.declared.kind == "events":
            return find_fault(column, _seconds(batch))
        if self.declared.kind not in NUMBERS:
            return None
        if (row := first_true(pc.fill_null(pc.is_inf(column), False))) is not None:
            return row, f"{column[row].as_py():g} cannot be learned; leave the field empty where there is no number"
        if self.declared.kind == "sentiment":
            row = first_true(pc.fill_null(pc.greater(pc.abs(column), SENTIMENT), False))
            if row is not None:
                value = f"{column[row].as_py():g}"
                return row, f"{value} lies beyond the scale of -3 to 3; rescale it or call it a regression"
        return None

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the next rows. Raises CorpusError for a value that cannot be, or for too many classes."""
        name, column = self.declared.name, batch.column(self.declared.name)
        if self.fault is not None:
            row, what = self.fault
            raise CorpusError(f"corpus {self.corpus.uri}: row {self.rows + row + 1}, column {name!r}: {what}")
        self.missing += column.null_count
        if self.declared.kind in NUMBERS:
            self.counts.update(column.drop_null()[:1].to_pylist())  # one is enough to know that there are any
            if pa.types.is_floating(column.type):
                self.whole = self.whole and pc.all(pc.equal(column, pc.round(column))).as_py() is not False
        else:
            if column.type == pa.string() and not self.named:
                self._look_for_numbers(column)
            if self.declared.kind == "events":
                column = pc.struct_field(pc.list_flatten(column), "label")
            for pair in column.drop_null().value_counts().to_pylist():
                self.counts[pair["values"]] += pair["counts"]
        self.rows += batch.num_rows
        if len(self.counts) > MAX_CLASSES:
            self._check_spoilt()
            raise CorpusError(
                f"task {name!r} has more than {MAX_CLASSES} classes; if it is no label, name the tasks to learn"
            )

    def _look_for_numbers(self, column: pa.Array) -> None:
        numbers = pc.fill_null(pc.match_substring_regex(column, NUMBER), True)
        self.numbers += (pc.sum(numbers).as_py() or 0) - column.null_count
        self.fractions = self.fractions or bool(pc.any(pc.match_substring_regex(column, FRACTION)).as_py())
        row = first_true(pc.invert(numbers))
        if row is not None and self.spoiling is None:
            self.spoiling = self.rows + row + 1, column[row].as_py()

    def _check_spoilt(self) -> None:
        """Raise CorpusError for a column of numbers in which some values are none; classes are rarely such numbers."""
        if self.spoiling is None:
            return
        (row, value), name = self.spoiling, self.declared.name
        commas = re.fullmatch(r"[-+]?\d+,\d+", value) is not None
        measured = self.fractions or len(self.counts) > FEW  # and no codes of classes
        if not commas and not (measured and self.numbers >= MOSTLY * (self.rows - self.missing)):
            return
        what = "has a decimal comma; write a point" if commas else "is no number; fix it, or leave it empty"
        raise CorpusError(
            f"corpus {self.corpus.uri}: row {row}, column {name!r}: {value!r} {what} (as classes: --tasks "
            f"{name}:classification)"
        )

    def task(self) -> Task:
        """The task with its classes. Raises CorpusError where it has no value, or numbers that are spoilt."""
        task = self.declared
        assert task.kind is not None  # from the run, or by now from the column's type
        if not self.counts:
            what = "event" if task.kind == "events" else "value"
            raise CorpusError(
                f"task {task.name!r} has no {what} in any row of {self.corpus.uri}; fill the column or leave the task "
                "out"
            )
        self._check_spoilt()
        if task.kind == "events":
            classes = (BACKGROUND, *sorted(self.counts.keys() - {BACKGROUND}))
        else:
            classes = () if task.kind in NUMBERS else tuple(str(value) for value in sorted(self.counts))
        return Task(task.name, task.kind, classes, task.rate)

    def notes(self) -> Iterator[str]:
        """What looks unintended."""
        name = self.declared.name
        if self.missing:
            yield f"task {name!r}: {self.missing} of {self.rows} clips have no value"
        if self.declared.kind == "classification":
            single = [str(value) for value, count in self.counts.items() if count == 1]
            if single:
                names = shortened(single, 5)
                yield f"task {name!r}: {len(single)} of {len(self.counts)} classes have one clip each ({names})"
            alike: dict[str, str] = {}
            for value in map(str, self.counts):
                if (other := alike.setdefault(unicodedata.normalize("NFKC", value).casefold(), value)) != value:
                    yield f"task {name!r}: {other!r} and {value!r} are two classes; write them alike where they are one"
                    break
        is_float = self.corpus.schema.field(name).type == pa.float64()
        if self.declared.kind == "regression" and not self.named and is_float and self.whole:
            yield f"task {name!r} is a regression of whole numbers; as classes: --tasks {name}:classification"


def _seconds(batch: pa.RecordBatch) -> np.ndarray:
    """Length of each clip, NaN where the manifest leaves it to the file."""
    if "end" not in batch.schema.names:
        return np.full(batch.num_rows, np.nan)
    start = pc.fill_null(batch.column("start"), 0.0) if "start" in batch.schema.names else 0.0
    return pc.subtract(batch.column("end"), start).to_numpy(zero_copy_only=False)


def first_true(wrong: pa.Array) -> int | None:
    """The row of the first true value of a column, None where there is none."""
    row = pc.index(wrong, True).as_py()
    return row if row >= 0 else None
