import os

import pytest

from peft_ila.files import lock_directory, read_json, whole_directory, whole_file


def names(directory) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.suffix == ".txt" and temporary.parent.parent == path.parent
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


def test_a_failed_block_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "new", last="last") as temporary:
        (temporary / "last").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("killed_at", range(4))
def test_the_last_file_says_that_all_are_there(tmp_path, monkeypatch, killed_at):
    """Killed at any of three moves, or not at all. Files of others stay."""

    class Killed(BaseException):
        pass

    def write(content):
        with whole_directory(tmp_path, last="b") as temporary:
            (temporary / "inside").mkdir()
            for name in ("a", "b", "inside/c"):
                (temporary / name).write_text(content)

    def replace(source, target):
        moved.append(target)
        if len(moved) > killed_at:
            raise Killed
        os.rename(source, target)

    moved = []
    (tmp_path / "mine").write_text("mine")
    write("old")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        try:
            write("new")
        except Killed:
            assert killed_at < 3 and not (tmp_path / "b").exists()
    write("new")
    assert {(tmp_path / name).read_text() for name in ("a", "b", "inside/c")} == {"new"}
    assert names(tmp_path) == ["a", "b", "inside", "mine"]


def test_a_lock_removes_what_a_killed_run_left(tmp_path):
    (tmp_path / "out" / ".file.txt-1.peft_ila-partial").mkdir(parents=True)
    with lock_directory(tmp_path / "out"):
        assert names(tmp_path / "out") == ["_peft_ila.lock"]
        with pytest.raises(BlockingIOError, match="is in use by another run"), lock_directory(tmp_path / "out"):
            pass
    assert names(tmp_path / "out") == []
    with lock_directory(tmp_path / "new"):
        pass
    assert names(tmp_path) == ["out"]


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "pipe")
