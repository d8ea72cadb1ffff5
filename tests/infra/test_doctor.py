"""The doctor names what is missing and what to do about it, before a job starts anything."""

import os
import socket
import sys

import pytest

import infra.doctor as doctor
from infra.doctor import Check, Unhealthy


def test_this_machine_is_ready(tmp_path):
    checks = [doctor.decoders(), doctor.torch_pairing(), doctor.ray_access(), doctor.storage(str(tmp_path))]
    assert all(check.ok for check in checks), checks
    assert "PyAV" in checks[0].found and "torchaudio" in checks[1].found
    doctor.require(*checks)


def test_a_job_stops_at_the_first_failed_check_with_what_to_do():
    bad = Check("ray", False, "not there", "install it")
    with pytest.raises(Unhealthy, match=r"^ray: not there; install it$"):
        doctor.require(Check("torch", True, "fine"), bad, Check("disk", False, "full", "buy one"))


def test_a_folder_that_does_not_exist_yet_is_storage_where_its_parent_is(tmp_path):
    assert doctor.storage(str(tmp_path / "not" / "yet")).ok
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_found_out(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", "/proc/store"):
        check = doctor.storage(str(place))
        assert not check.ok and "give a folder that this user may write" in str(check) and "\n" not in str(check)
    assert not doctor.storage("nope://bucket/store").ok


def test_a_cluster_with_tokens_needs_one_here(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert "ray get-auth-token" in doctor.ray_access().fix
    (tmp_path / "token").write_text("secret")
    assert doctor.ray_access().ok


def test_an_mlflow_server_that_is_down_is_found_out_and_a_file_needs_none(monkeypatch):
    assert doctor.mlflow_server("sqlite:///mlflow.db").ok
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        check = doctor.mlflow_server(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert not check.ok and "mlflow server" in check.fix and "\n" not in str(check)


def test_the_command_prints_every_check_and_counts_the_failed_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["doctor", "--storage", str(tmp_path), str(tmp_path / "file")])
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and [line[:4] for line in lines].count("FAIL") == 1
    assert lines[5].startswith(f"FAIL storage {tmp_path / 'file'}") and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_is_too_long_for_rays_sockets_is_named(monkeypatch, name):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, "/tmp/" + "t" * 30)
    assert doctor.ray_folder().ok
    monkeypatch.setenv(name, "/tmp/" + "t" * 60)
    check = doctor.ray_folder()
    assert not check.ok and name in str(check) and "shorter" in str(check)
