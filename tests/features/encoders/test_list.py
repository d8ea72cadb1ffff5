"""`python -m features.encoders list`: what is known, needed and installed."""

from features.encoders import registry
from features.encoders.__main__ import main
from features.encoders.registry import KINDS


def test_the_list_says_what_each_kind_needs(capsys, monkeypatch):
    assert main(["list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + 3 + len(KINDS) and all(any(kind.form in line for line in said) for kind in KINDS.values())
    assert "missing" not in "\n".join(said)
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    main(["list"])
    assert "transformers (missing: install [text])" in capsys.readouterr().out
