"""What lies in the repository beside code: the package's generator, and encoded trajectories of a suite."""

from pathlib import Path

import pytest
import torch

from ltdi_peft.adapter import load_adapter_folder
from ltdi_peft.collect import recipe_suite
from ltdi_peft.config import load_recipe
from ltdi_peft.encoded import load_encoded, recipe_encoded
from ltdi_peft.files import read_json
from ltdi_peft.generator import load_generator
from ltdi_peft.generator_config import default_folder
from ltdi_peft.provenance import weights_digest
from ltdi_peft.ship import CARD_FILE, require_proof, scores_text
from ltdi_peft.shrink import MAX_BYTES
from ltdi_peft.spec import site_norms

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
ENCODED = ROOT / "recipes" / "encoded" / "smollm2_builtin.safetensors"
ORIGIN = ROOT / "recipes" / "encoded" / "smollm2_builtin_origin"


@pytest.fixture(scope="module")
def shipped():
    return load_generator(default_folder())


@pytest.fixture(scope="module")
def proof(shipped):
    return read_json(RESULTS / f"{shipped.config.recipe['name']}.json")


def test_it_is_small_and_for_the_model_of_the_main_job(shipped):
    assert sum(path.stat().st_size for path in default_folder().glob("*.safetensors")) <= MAX_BYTES
    assert shipped.config.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_committed_result_proves_it(shipped, proof):
    require_proof(shipped, proof)
    assert (default_folder() / CARD_FILE).read_text().endswith(scores_text(proof))


def test_it_makes_another_adapter_for_another_task(shipped):
    """From conditions that it holds, for the prompt encoder's own model is not in the package."""
    with torch.no_grad():
        tokens = shipped.tokens(shipped.conditions[[0, 100]])
    one, other = (site_norms(shipped.spec, shipped.codec.decode(pair)) for pair in tokens)
    assert len(one) == len(shipped.spec.sites) == 30
    assert all(0 < norm < float("inf") for norm in one.values())
    assert not torch.allclose(*tokens, rtol=0.1, atol=0.01)
    assert one != other


def test_the_encoded_trajectories_are_those_of_the_recipe():
    assert sum(file.stat().st_size for file in (ENCODED, *ORIGIN.iterdir())) <= 30e6
    changed = [f"--train.encoded={ENCODED}", "--codec.width=85", "--codec.gate=0"]
    recipe = load_recipe(ROOT / "recipes" / "smollm2_builtin.yaml", changed)
    suite = recipe_suite(recipe)
    names = [task.name for task in suite.split("train")]
    encoded = recipe_encoded(recipe, names)
    assert sorted(encoded.runs.tasks) == sorted(names)
    assert set(encoded.held_out.tasks) == {task.name for task in suite.split("validation")}
    assert encoded.runs.tokens.shape == (488, recipe.diffusion.k, 30, 85)
    first, last = encoded.runs.tokens[:, 0].float(), encoded.runs.tokens[:, -1].float()
    assert first.square().mean() < last.square().mean()  # runs lead away from the shared start


def test_the_origin_beside_them_fits_them(shipped):
    recipe = load_recipe(ROOT / "recipes" / "two_purposes.yaml")
    assert (Path(recipe.train.encoded).name, Path(recipe.train.origin).name) == (ENCODED.name, ORIGIN.name)
    spec, origin = load_adapter_folder(ORIGIN, expected=load_encoded(ENCODED).codec.spec)
    assert spec.sites == shipped.spec.sites
    assert weights_digest(origin) == weights_digest(shipped.codec.origin)
