"""The part of `make chaos` that needs no processes of its own, short."""

from pathlib import Path

from chaos.mutations import mutate_everything


def test_mutated_messages_and_files_are_refused_by_name(tmp_path: Path) -> None:
    tried, faults = mutate_everything(tmp_path, seed=1, count=10)
    assert faults == []
    assert tried > 200
