import pytest

from peft_ila.files import whole_directory, whole_file


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
