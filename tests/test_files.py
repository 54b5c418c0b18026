"""Files and folders that are whole or not there."""

import pytest
import torch
from safetensors.torch import save_file

from ltdi_peft.files import replace_file, replacing, replacing_folder


def test_a_file_that_a_library_writes_may_be_read_by_whoever_reads_ours(tmp_path):
    replace_file(tmp_path / "ours", b"1")
    with replacing(tmp_path / "theirs") as partial:
        save_file({"x": torch.zeros(2)}, partial)
    assert (tmp_path / "theirs").stat().st_mode == (tmp_path / "ours").stat().st_mode


def test_what_fails_leaves_the_older_file_and_folder(tmp_path):
    replace_file(tmp_path / "file", b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    for way, name in ((replacing, "file"), (replacing_folder, "folder")):
        with pytest.raises(OSError, match="full"), way(tmp_path / name):
            raise OSError("the disk is full")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "folder" / "old").exists()


def test_a_folder_takes_the_place_of_an_older_one_and_of_what_a_killed_writer_left(tmp_path):
    for name in ("made", "made.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with replacing_folder(tmp_path / "made") as partial:
        partial.mkdir()
        (partial / "new").touch()
        assert (tmp_path / "made" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]
