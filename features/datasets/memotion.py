"""Memotion (Sharma et al. 2020, SemEval task 8): memes, image and text, with five labels each.

    ROOT/images/image_1.jpg, LISTS/labels.csv      memotion_dataset_7k as the organisers give it out: 6,992 memes

Task A is `sentiment` (3 classes), B `humour`, `sarcasm`, `offence` and `motivation` (yes or no), C the same as levels
`humour_level`, `sarcasm_level` and `offence_level` (4 each). The organisers' test memes come without labels in this
layout, so a fifth of these is the test split; some are held out of train for validation.
"""

from collections.abc import Iterator

from features.datasets.layout import Layout, Row

LEVELS = {
    "humour": ("not_funny", "funny", "very_funny", "hilarious"),
    "sarcasm": ("not_sarcastic", "general", "twisted_meaning", "very_twisted"),
    "offensive": ("not_offensive", "slight", "very_offensive", "hateful_offensive"),
    "motivational": ("not_motivational", "motivational"),
}
NAMES = {"humour": "humour", "sarcasm": "sarcasm", "offensive": "offence", "motivational": "motivation"}
TEST_SHARE = 0.2


def read(layout: Layout) -> Iterator[Row]:
    """A row per meme: image, text (as corrected, else as recognised), labels of tasks A, B and C."""
    images = layout.media("jpg", "jpeg", "png", "bmp")
    test = Layout(layout.root, layout.lists, TEST_SHARE)
    for row in layout.table("labels.csv"):
        name = row["image_name"].rpartition(".")[0]
        levels = {NAMES[label]: _level(label, row[label]) for label in LEVELS}
        yield {
            "clip_id": name,
            "image": images.get(name),
            "text": row["text_corrected"].strip() or row["text_ocr"].strip() or None,
            "split": "test" if test.held_out(f"test {name}") == "val" else layout.held_out(name),
            "sentiment": row["overall_sentiment"].removeprefix("very_") or None,
            **{name: None if level is None else int(level > 0) for name, level in levels.items()},
            **{f"{name}_level": level for name, level in levels.items() if name != "motivation"},
        }


def _level(label: str, value: str) -> int | None:
    return LEVELS[label].index(value) if value in LEVELS[label] else None
