"""The benchmark of GPUs, tried on a CPU: every line of it runs before somebody rents a GPU for it."""

import csv

import pytest
import torch

from tests.benchmarks import gpu

FIGURES = {
    "steps": {"ms", "bound", "samples/s", "memory MB"},
    "training": {"ms", "samples/s", "memory MB", "first loss", "last loss"},
    "loading": {"samples/s", "waiting"},
    "workers": {"samples/s"},
    "extraction": {"clips/s"},
}


def run(tmp_path, monkeypatch, *parts):
    monkeypatch.setattr(gpu, "MODELS", ("clcr", "concat"))
    out = tmp_path / "gpu.csv"
    assert gpu.main(gpu.Options(out, "cpu", parts)) == 0
    rows = list(csv.DictReader(out.open()))
    assert all(float(row["value"]) >= 0 for row in rows)
    for part in parts:
        assert {row["figure"] for row in rows if row["part"] == part} == FIGURES[part]
    return {(row["part"], row["what"]) for row in rows}


def test_models_and_loading_are_measured(tmp_path, monkeypatch):
    found = run(tmp_path, monkeypatch, "steps", "training", "loading")
    assert {("steps", "clcr"), ("training", "concat"), ("training", "audio"), ("loading", "by windows")} <= found


@pytest.mark.slow
def test_workers_on_one_device_and_extraction_are_measured(tmp_path, monkeypatch, shared_ray):
    found = run(tmp_path, monkeypatch, "workers", "extraction")
    assert found == {("workers", "1"), ("workers", "2"), ("extraction", "first, starts Ray"), ("extraction", "cpu")}


def test_without_a_gpu_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(gpu.Options(tmp_path / "gpu.csv")) == 1
    assert "no GPU here" in capsys.readouterr().out and not (tmp_path / "gpu.csv").exists()


def test_a_part_that_breaks_off_costs_no_other(tmp_path, monkeypatch):
    def broken(device, size):
        yield "steps", "clcr", "ms", 1.0
        raise ValueError("out of memory")

    monkeypatch.setitem(gpu.PARTS, "steps", broken)
    monkeypatch.setitem(gpu.PARTS, "loading", lambda device, size: iter([("loading", "all", "samples/s", 2.0)]))
    assert gpu.main(gpu.Options(tmp_path / "gpu.csv", "cpu", ("steps", "loading"))) == 1
    assert (tmp_path / "gpu.csv").read_text().splitlines()[1:] == ["steps,clcr,ms,1.0", "loading,all,samples/s,2.0"]
