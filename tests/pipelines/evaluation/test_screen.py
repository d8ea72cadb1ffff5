"""What the screen shows of a model's evaluation."""

from pipelines.evaluate import said
from pipelines.evaluation.conditions import WHOLE, Condition, subsets


def about(modalities, drawn=50, **tasks):
    """What metrics.json says of a model that is right in all of its clips, and in half of them with less."""
    conditions = [Condition(WHOLE), *subsets(("video", "audio"))]
    found = {task: {"n": drawn, "accuracy": 0.5} for task in tasks}
    return {"modalities": modalities, "tasks": tasks, "subsets": {c.name: found for c in conditions}}, conditions


def test_a_model_is_shown_with_each_part_of_what_it_reads_and_what_a_constant_would_have():
    lines = said("m", *about(["video", "audio"], label={"n": 50, "accuracy": 1.0, "majority": 0.25}))
    assert lines == [
        "m: label accuracy 1.000",
        "  always answering the most frequent class: accuracy label 0.250",
        "  video alone: label accuracy 0.500",
        "  audio alone: label accuracy 0.500",
    ]


def test_a_model_of_one_modality_has_no_parts():
    assert said("m", *about(["audio"], label={"n": 50, "accuracy": 1.0})) == ["m: label accuracy 1.000"]


def test_parts_of_drawn_clips_stand_under_the_same_clips_whole():
    lines = said("m", *about(["video", "audio"], drawn=20, label={"n": 50, "accuracy": 1.0}))
    assert lines[1:3] == ["  of 20 clips drawn at random:", "  all modalities: label accuracy 0.500"]


def test_a_task_without_labels_says_so_and_numbers_have_their_figures():
    lines = said("m", *about(["audio"], label={"n": 0}, mood={"n": 3, "mae": 0.5, "pearson": float("nan")}))
    assert lines == ["m: label has no labels here; mood mae 0.500, pearson nan"]
