import os

import pytest

from peft_ila.files import lock_directory, read_json, whole_directory, whole_file


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.suffix == ".txt" and temporary.parent.parent == path.parent
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_block_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("killed_at", range(2))
def test_a_directory_whose_writer_was_killed_is_found_again(tmp_path, monkeypatch, killed_at):
    path = tmp_path / "directory"
    with whole_directory(path) as temporary:
        (temporary / "first").write_text("first")

    class Killed(BaseException):
        pass

    renames = []

    def rename(source, target):
        renames.append(source)
        if len(renames) > killed_at:
            raise Killed
        real(source, target)

    real = os.rename
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("os.rename", rename)
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        with whole_directory(path) as temporary:
            (temporary / "second").write_text("second")
    with lock_directory(tmp_path):
        assert (path / "first").read_text() == "first"
        assert [entry.name for entry in tmp_path.iterdir() if entry.name != "_peft_ila.lock"] == ["directory"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["directory"]


def test_files_of_others_are_kept(tmp_path):
    path = tmp_path / "directory"
    with whole_directory(path) as temporary:
        (temporary / "own").write_text("old")
        (temporary / "gone").write_text("old")
    (path / "mine").mkdir()
    (path / "mine" / "notes").write_text("mine")
    with whole_directory(path, own=("own", "gone")) as temporary:
        (temporary / "own").write_text("new")
    assert sorted(entry.name for entry in path.iterdir()) == ["mine", "own"]
    assert (path / "own").read_text() == "new" and (path / "mine" / "notes").read_text() == "mine"


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("[" + " " * 100 + "]")
    for name, message in (("pipe", "not a regular file"), ("large", "has 102 bytes; the maximum is 50")):
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / name, most=50)


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "directory"
    for name in ("first", "second"):
        with whole_directory(path) as temporary:
            (temporary / name).write_text(name)
    assert [entry.name for entry in path.iterdir()] == ["second"]
    with pytest.raises(RuntimeError), whole_directory(path) as temporary:
        (temporary / "third").write_text("half")
        raise RuntimeError
    assert [entry.name for entry in path.iterdir()] == ["second"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["directory"]
