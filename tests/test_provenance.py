"""Provenance goes with the adapter, and never with one that it does not describe."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from peft import LoraConfig, PeftModel

from ltdi_peft.adapter import read_adapter, save_adapter_folder, spec_of
from ltdi_peft.cards import MARK, Nearest, Place, adapter_card, scores_of, store_card, write_card
from ltdi_peft.provenance import (
    GeneratedConfig,
    Provenance,
    note_provenance,
    provenance_of,
    read_provenance,
    weights_digest,
)
from ltdi_peft.publish import push, save_adapter
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.task import Task

ABOUT = Provenance("Say it.\nTwice.", 3, 1.5, "me/gen", "0" * 40, "v1", 7, "say/it", 0.5, "", None)


@pytest.fixture
def model(tiny_peft):
    made = tiny_peft(lora_alpha=8.0)
    return note_provenance(made, replace(ABOUT, weights=weights_digest(read_adapter(made))))


def page(model, **options):
    return adapter_card(spec_of(model), provenance_of(model), **options)


# ---- in memory


def test_the_configuration_is_pefts_own_but_for_the_provenance(tiny_peft, model):
    plain, noted = tiny_peft(lora_alpha=8.0).peft_config["default"], model.peft_config["default"]
    assert isinstance(noted, LoraConfig)
    assert noted.to_dict() == plain.to_dict()
    assert provenance_of(tiny_peft()) is None


def test_a_copied_model_keeps_it_and_a_mixture_does_not_claim_it(tiny_peft, model):
    assert provenance_of(copy.deepcopy(model)) == provenance_of(model)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixed", combination_type="linear")
    assert provenance_of(model, "mixed") is None
    assert provenance_of(model, "other") is None
    assert provenance_of(model).seed == 3


def test_peft_saves_it_and_loads_without_it(tiny_base, model, tmp_path):
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)  # else PEFT asks the Hub for the base
    assert read_provenance(tmp_path) == provenance_of(model)
    assert "provenance" not in json.loads((tmp_path / "adapter_config.json").read_text())
    again = PeftModel.from_pretrained(tiny_base(), str(tmp_path))
    assert not isinstance(again.peft_config["default"], GeneratedConfig)


def test_the_digest_is_of_all_weights(model):
    adapter = read_adapter(model)
    digest = weights_digest(adapter)
    assert weights_digest(dict(reversed(adapter.items()))) == digest
    for site, (a, b) in adapter.items():
        for pair in ((a + 1, b), (a, torch.nextafter(b, b + 1))):
            assert weights_digest({**adapter, site: pair}) != digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"provenance\.json: format_version is 2, this ltdi_peft reads 1"),
        ({"surprise": 1}, r"missing or unknown keys \['surprise'\]"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path, change, message):
    (tmp_path / "provenance.json").write_text(json.dumps({**asdict(ABOUT), **change}))
    with pytest.raises(ValueError, match=message):
        read_provenance(tmp_path)


def test_a_file_from_before_readings_is_read(tmp_path):
    table = asdict(ABOUT)
    for late in ("prompt_in_context", "examples", "reading"):
        del table[late]
    (tmp_path / "provenance.json").write_text(json.dumps(table))
    assert read_provenance(tmp_path) == ABOUT


# ---- pages


def test_a_page_says_what_is_known(model):
    text = page(model, place=Place("me/x", "v2", "mit"), nearest=Nearest("say/it", 0.25))
    assert "\nlicense: mit\n" in text
    assert "> Say it.\n> Twice.\n" in text
    assert "| generator | `me/gen` on the Hub, revision `" + "0" * 40 in text
    assert "| seed, guidance scale | 3, 1.5 |" in text
    assert "| nearest of 7 training tasks | `say/it`, cosine 0.50 of the task prompts |" in text
    assert "| nearest training adapter | a run of `say/it`, ‖ΔW − ΔW'‖ / ‖ΔW'‖ = 0.250 |" in text
    assert 'from_pretrained("tiny/llama", revision="v1")' in text
    assert 'PeftModel.from_pretrained(base, "me/x", revision="v2")' in text
    assert "tokenizer('Say it.\\nTwice.\\nInput: your input\\nOutput:'" in text
    assert "## Scores" not in text


def test_a_page_says_what_the_prompt_was_taken_for(tiny_peft):
    read = replace(ABOUT, reading={"form": "letter", "language": "German"})
    assert "| read as | form letter, language German |" in page(note_provenance(tiny_peft(), read))
    assert "read as" not in page(note_provenance(tiny_peft(), ABOUT))


def test_a_page_does_not_say_what_is_not_known(tiny_peft, model):
    text = page(model)
    assert "| nearest training adapter | not measured |" in text
    assert "In this folder:" in text
    assert "changed after" not in text
    assert "changed after" in page(model, changed=True)
    spec = spec_of(model)
    never_saved = replace(ABOUT, generator=None, generator_revision=None)
    assert "| generator | one that was never saved |" in adapter_card(spec, never_saved)
    folder = replace(ABOUT, generator_revision=None)
    assert "| generator | `me/gen`, a folder that is not on the Hub |" in adapter_card(spec, folder)
    assert "from this sentence alone:" in text
    assert "from this sentence and 4 examples:" in adapter_card(spec, replace(ABOUT, examples=4))
    trained = adapter_card(spec, None)
    assert "enerated" not in trained
    assert "rank 4, alpha 8, 4 sites (q_proj, v_proj)" in trained


def test_other_models_have_other_programs(tiny_peft):
    spec = spec_of(tiny_peft())
    pairs = adapter_card(replace(spec, config={**spec.config, "task_type": "SEQ_2_SEQ_LM"}), None)
    assert "AutoModelForSeq2SeqLM.from_pretrained" in pairs
    classes = adapter_card(replace(spec, config={**spec.config, "task_type": "SEQ_CLS"}), None)
    assert "print(model(input_ids=ids).logits)" in classes
    assert "pipeline_tag" not in pairs + classes


def test_scores_of_a_result():
    row = {"tasks": 2, "accuracy": 0.5, "G": None, "ci": None, "gain": 1}
    result = {"recipe": "r", "date": "today", "methods": {"ours": {"unseen_tasks": row, "seconds": 1}}}
    scores = scores_of(result)
    kept = {"tasks": 2, "accuracy": 0.5, "G": None, "ci": None}
    assert scores == {"recipe": "r", "methods": {"ours": {"unseen_tasks": kept}}}


def test_only_pages_of_ours_and_empty_ones_are_replaced(tmp_path):
    for old in (None, f"x\n{MARK}\n", "# Model Card for Model ID\n[More Information Needed]\n"):
        if old:
            (tmp_path / "README.md").write_text(old)
        write_card(tmp_path, "new")
        assert (tmp_path / "README.md").read_text() == "new"
    write_card(tmp_path, "newer")
    assert (tmp_path / "README.md").read_text() == "new"


def test_saving_says_whether_the_weights_are_the_generated_ones(model, tmp_path):
    save_adapter(model, tmp_path / "same")
    assert "changed after" not in (tmp_path / "same" / "README.md").read_text()
    with torch.no_grad():
        next(w for n, w in model.named_parameters() if "lora_B" in n).mul_(2)
    save_adapter(model, tmp_path / "moved")
    assert "were changed after" in (tmp_path / "moved" / "README.md").read_text()


@pytest.mark.parametrize(
    ("frozen", "starts", "gauge"),
    [("lora_A", 1, "shared_a"), (None, 1, "shared_start"), ("lora_A", 2, "canonical")],
)
def test_a_stores_page_says_which_gauge_fits(tiny_peft, tmp_path, frozen, starts, gauge):
    store = TrajectoryStore(tmp_path)
    for seed in range(2):
        made = tiny_peft(seed=seed if starts == 2 else 0)
        spec, start = spec_of(made), read_adapter(made)
        names = tuple(f"{site.name}.{frozen}" for site in spec.sites) if frozen else ()
        run = store.start_run(spec, Task("t", ["Do."]), seed=seed, start=start, planned_steps=1, frozen=names)
        run.write(1, start)
        run.finish(1)
    text = store_card(store.trajectories(), Place("me/runs", None, "mit"))
    assert f"| gauge to learn in | `{gauge}` |" in text
    assert "| runs, tasks, snapshots | 2, 1, 2 |" in text
    assert "Licence: mit." in text
    assert 'TrajectoryStore.from_hub("me/runs")' in text


# ---- refused before the Hub is asked


def test_what_cannot_be_pushed(model, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"cannot be pushed: it has no adapter_config\.json \(an adapter\)"
    ):
        push(tmp_path, "me/x")
    with pytest.raises(ValueError, match="holds no finished run"):
        push(TrajectoryStore(tmp_path / "store"), "me/x")
    with pytest.raises(ValueError, match="holds no finished run"):
        push(model, "me/x", store=tmp_path / "store")
    local = replace(spec_of(model), base_model=str(tmp_path))
    save_adapter_folder(tmp_path / "local", local, read_adapter(model))
    with pytest.raises(ValueError, match=r"a folder of this machine.*base_model='owner/name'"):
        push(tmp_path / "local", "me/x")


def test_offline_is_said(model):
    with pytest.raises(ConnectionError, match=r"me/x: https://.* does not answer, or HF_HUB_OFFLINE is set"):
        push(model, "me/x")
    with pytest.raises(FileNotFoundError, match=r"me/x is not in the Hub's cache, and https://.* cannot be"):
        TrajectoryStore.from_hub("me/x")
