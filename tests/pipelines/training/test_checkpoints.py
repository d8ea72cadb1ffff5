"""A run whose list of checkpoints a kill cut short resumes from the newest one that is whole."""

import torch
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from pipelines.training.checkpoints import SNAPSHOT, repair


def checkpoint(out, name, data=None):
    folder = out / "checkpoints" / f"checkpoint_{name}"
    folder.mkdir(parents=True)
    torch.save({"step": torch.zeros(1000)}, folder / "state.pt")
    if data is not None:
        (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:data])


def test_the_newest_whole_checkpoint_is_named_where_the_list_is_torn(tmp_path):
    repair(str(tmp_path))  # a run that has not begun
    for name, data in (("1", None), ("2", None), ("3", 700)):
        checkpoint(tmp_path, name, data)
    for torn in ("", '{"ray_version":"2.6'):
        (tmp_path / SNAPSHOT).write_text(torn)
        repair(str(tmp_path))
        state = _CheckpointManagerState.parse_raw((tmp_path / SNAPSHOT).read_text())
        assert [result.checkpoint_dir_name for result in state.checkpoint_results] == ["checkpoint_2"]
    before = (tmp_path / SNAPSHOT).read_text()
    repair(str(tmp_path))
    assert (tmp_path / SNAPSHOT).read_text() == before, "a list that is whole is left alone"


def test_without_a_whole_checkpoint_the_run_begins_anew(tmp_path):
    checkpoint(tmp_path, "1", 300)
    (tmp_path / SNAPSHOT).write_text("")
    repair(str(tmp_path))
    assert not (tmp_path / SNAPSHOT).exists()
