"""pip as the way to files: found in a folder of wheels, and what it says where it fails."""

import zipfile

import pytest

from ltdi_peft.download import pip_download


@pytest.fixture
def only_here(tmp_path, monkeypatch):
    """pip may use nothing but a folder with one small wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    about = "Metadata-Version: 2.1\nName: tiny-parcel\nVersion: 1.0\nRequires-Dist: not-there\n"
    files = {
        "tiny_parcel-1.0.dist-info/METADATA": about,
        "tiny_parcel-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_parcel-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / "tiny_parcel-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_the_file_comes_without_its_dependencies(only_here, tmp_path):
    path = pip_download("tiny-parcel==1.0", tmp_path / "out", "*.whl")
    assert path.name == "tiny_parcel-1.0-py3-none-any.whl"
    assert list((tmp_path / "out").iterdir()) == [path]


def test_what_cannot_be_had_is_named_with_pips_own_words(only_here, tmp_path):
    with pytest.raises(
        OSError, match=r"(?s)download .*no-such-parcel==2.0 failed .*No matching distribution"
    ):
        pip_download("no-such-parcel==2.0", tmp_path, "*.whl")
    with pytest.raises(OSError, match="failed with exit status 0"):
        pip_download("tiny-parcel==1.0", tmp_path, "*.tar.gz")
