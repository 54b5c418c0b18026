"""The protocol: its numbers by hand, its controls on generators that cheat, its cache and its file."""

import importlib
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_bench import SPLITS, collected, tiny_recipe, tiny_suite, tiny_task, untrained_generator

from ltdi_peft import protocol
from ltdi_peft.baselines import adapter_digest, final_adapter
from ltdi_peft.batched import stack_adapters
from ltdi_peft.config import LOSSES, FewShotConfig, T2LConfig, T2LTraining
from ltdi_peft.encode import round_trip
from ltdi_peft.evaluate import chosen_methods, costs, evaluate, held_out_oracles
from ltdi_peft.generator import load_generator
from ltdi_peft.kept import whole_lines
from ltdi_peft.memorisation import between_stored, nearest_distances
from ltdi_peft.prepare import training_trajectories
from ltdi_peft.protocol import METHODS, digest, wrong_tasks
from ltdi_peft.report import markdown, table
from ltdi_peft.score import make_sheet, pick_shots, score
from ltdi_peft.statistics import Estimate
from ltdi_peft.store import TrajectoryStore
from ltdi_peft.summary import TaskScores, interval, number, summarise
from ltdi_peft.task import TaskSuite

# `ltdi_peft.evaluate` as an attribute is the function.
evaluation = importlib.import_module("ltdi_peft.evaluate")
ALL = ("base", "in_context", "start", "format_only", "multi_task_lora", "multi_task_lora_4x")
ALL += ("mean", "mean_noise", "nearest", "ridge", "t2l_recon", "t2l_sft")
ALL += ("vanilla", "vanilla+reptile", "naive", "naive+reptile")
ALL += ("local_consistency", "local_consistency+reptile")
ALL += ("ours", "ours_wrong_prompt", "oracle_codec", "oracle")


def scores_of(name, *, split="unseen_tasks", domain="d", nearest=0.5, **accuracy):
    """A task's scores, the same in both contexts unless `accuracy` gives pairs."""
    pairs = {m: v if isinstance(v, tuple) else (v, v) for m, v in accuracy.items()}
    table_ = {
        "prompt": {m: [float(v[0])] for m, v in pairs.items()},
        "no_prompt": {m: [float(v[1])] for m, v in pairs.items()},
    }
    distances = {"ours": [nearest], "oracle": [1.0]}
    return TaskScores(name, split, domain, 10, 0.0, table_, distances, {"ours": 0.3}, ["x"], True)


def many(count=24, **accuracy):
    rng = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.rand(count, generator=rng)).tolist()
    common = {"base": 0.0, "mean": 0.1, "multi_task_lora": 0.5, "oracle": 1.0}
    return [
        scores_of(f"t{i}", **common, **{m: v + noise[i] for m, v in accuracy.items()}) for i in range(count)
    ]


# ---- numbers from scores alone


def test_summary_by_hand():
    found = summarise(
        [
            scores_of("x", base=(0.0, 0.0), ours=(0.5, 0.2), mean=0.0, oracle=(1.0, 0.8)),
            scores_of("y", base=(0.2, 0.0), ours=(0.8, 0.6), mean=0.2, oracle=(0.8, 0.8)),
        ],
        draws=50,
        seed=0,
    )
    row = found["methods"]["ours"]["unseen_tasks"]
    assert (row["accuracy"], row["accuracy_no_prompt"]) == (0.65, 0.4)
    assert row["G"] == pytest.approx((0.5 + 0.6) / (1.0 + 0.6), abs=1e-6)
    assert row["G_no_prompt"] == pytest.approx(0.8 / 1.6)
    assert row["gain"] == pytest.approx(0.55)
    assert (row["tasks"], row["examples"]) == (2, 10)
    paired = found["paired"]["ours - mean"]["unseen_tasks"]
    assert paired["accuracy"] == pytest.approx(0.55)
    assert paired["no_prompt"]["accuracy"] == pytest.approx(0.3)
    assert list(found["paired"]) == ["ours - base", "ours - mean", "ours - oracle"]
    assert "unseen_domains" not in found["methods"]["ours"]
    assert set(found["per_task"]) == {"x", "y"}


def test_seeds_are_averaged_within_the_task():
    one = scores_of("x", base=0.0, ours=0.0, oracle=1.0)
    one.accuracy["prompt"]["ours"] = [0.2, 0.4, 0.9]
    row = summarise([one], draws=10, seed=0)["methods"]["ours"]["unseen_tasks"]
    assert row["accuracy"] == 0.5
    assert row["ci"] is None  # one task has no interval


def test_few_unseen_domains_are_listed():
    domains = [
        scores_of(f"{d}{i}", split="unseen_domains", domain=d, base=0, ours=v, oracle=1)
        for d, v in (("p", 0.25), ("q", 0.75))
        for i in range(3)
    ]
    row = summarise(domains, draws=200, seed=0)["methods"]["ours"]["unseen_domains"]
    assert row["domains"]["p"]["G"] == 0.25
    assert row["domains"]["q"]["accuracy_no_prompt"] == 0.75
    assert row["ci"] == [0.25, 0.75]  # two domains are resampled, not six tasks
    many_domains = [replace(domains[0], task=f"t{i}", domain=f"d{i}") for i in range(8)]
    assert "domains" not in summarise(many_domains, draws=20, seed=0)["methods"]["ours"]["unseen_domains"]


def test_chance_is_taken_off_where_there_are_choices():
    one = replace(scores_of("x", base=0.25, ours=0.7, oracle=1.0), chance=0.25)
    row = summarise([one], draws=10, seed=0)["methods"]["ours"]["unseen_tasks"]
    assert row["accuracy_over_chance"] == pytest.approx(0.6)


def test_chance_has_its_column_only_where_there_are_choices():
    free = scores_of("x", base=0.25, ours=0.7, ours_wrong_prompt=0.5, mean=0.5, oracle=1.0)
    choice = table(summarise([replace(free, chance=0.25)], draws=10, seed=0)).splitlines()
    assert choice[0].split(" | ")[1:4] == ["unseen tasks (1): accuracy", "over chance", "G [95 %]"]
    assert next(line for line in choice if "`ours`" in line).startswith("| `ours` | 0.70 | 0.60 | 0.60 |")
    plain = table(summarise([free], draws=10, seed=0))
    assert "over chance" not in plain
    assert len(choice[0].split("|")) == len(plain.splitlines()[0].split("|")) + 2  # one in each context


def test_reading_the_prompt_is_seen():
    control = summarise(many(ours=0.6, ours_wrong_prompt=0.2), draws=300, seed=0)["controls"]["prompt"]
    row = control["unseen_tasks"]
    assert row["reads_its_prompt"]
    assert (row["right"] - row["wrong"]) == pytest.approx(0.4, abs=1e-5)
    assert row["ci"][0] > 0
    assert row["ci_mean"][0] > 0
    assert row["no_prompt"]["ci"][0] > 0


def test_a_generator_that_ignores_its_prompt_is_detected():
    rng = torch.Generator().manual_seed(3)
    noise = (0.1 * torch.randn(24, generator=rng)).tolist()
    deaf = many(ours=0.6, ours_wrong_prompt=0.6)
    for one, off in zip(deaf, noise, strict=True):  # other prompts, other noise, no other information
        for context in one.accuracy.values():
            context["ours_wrong_prompt"] = [context["ours"][0] + off]
    row = summarise(deaf, draws=300, seed=0)["controls"]["prompt"]["unseen_tasks"]
    assert row["ci"][0] <= 0 <= row["ci"][1]
    assert row["ci_mean"][0] > 0  # far above the mean adapter, and yet deaf
    assert not row["reads_its_prompt"]


def test_a_memorising_generator_is_detected():
    row = summarise(
        [scores_of(f"t{i}", nearest=0.0, base=0, ours=0.5, oracle=1) for i in range(3)], draws=10, seed=0
    )["controls"]["memorisation"]["unseen_tasks"]
    assert (row["generated_to_nearest_stored"], row["ratio"]) == (0.0, 0.0)
    assert row["oracle_to_nearest_stored"] == 1.0
    assert row["relative_error"] == {"ours": 0.3}


def test_power_is_given_against_the_multi_task_lora():
    power = summarise(many(ours=0.6), draws=300, seed=0)["power"]["unseen_tasks"]
    assert (power["against"], power["tasks"]) == ("multi_task_lora", 24)
    # differences are uniform in [0.1, 0.2]: standard error 0.1/√12/√24, times 2.8
    assert power["G"] == pytest.approx(2.8 * 0.1 / 12**0.5 / 24**0.5, rel=0.3)


def test_nothing_to_summarise_is_said():
    with pytest.raises(ValueError, match="no scores of unseen tasks"):
        summarise([], draws=10, seed=0)


def test_what_is_not_finite_is_null():
    assert number(float("nan")) is None
    assert interval(Estimate(0.5, float("nan"), float("nan"), float("nan"))) is None


# ---- wrong prompts


def test_wrong_prompts_have_the_same_format_and_another_question():
    suite = tiny_suite()
    others, same = wrong_tasks(suite, suite["a/second/twice"], 5, seed=0)
    assert same
    assert {task.name for task in others} == {"a/first/twice", "b/second/twice", "c/second/twice"}
    assert "b/first/twice" not in {task.name for task in others}  # validation tasks are never used
    few, _ = wrong_tasks(suite, suite["a/second/twice"], 2, seed=0)
    assert few == wrong_tasks(suite, suite["a/second/twice"], 2, seed=0)[0]
    picks = {
        tuple(t.name for t in wrong_tasks(suite, suite["a/second/twice"], 2, seed=s)[0]) for s in range(9)
    }
    assert len(picks) > 1


def test_without_a_format_any_other_task_serves():
    lone = replace_name(tiny_task("a/first/plain"), "sorted")
    tasks = {"sorted": lone, "b/first/plain": tiny_task("b/first/plain")}
    suite = TaskSuite("s", tasks, {"unseen_tasks": ("sorted",), "train": ("b/first/plain",)})
    others, same = wrong_tasks(suite, lone, 5, seed=0)
    assert ([task.name for task in others], same) == (["b/first/plain"], False)
    alone = TaskSuite("s", {"sorted": lone}, {"unseen_tasks": ("sorted",)})
    with pytest.raises(ValueError, match="no wrong prompt"):
        wrong_tasks(alone, lone, 5, seed=0)


def replace_name(task, name):
    return type(task)(**{**vars(task), "name": name, "family": ""})


# ---- the whole protocol on a tiny model


class Run:
    """A finished evaluation, and how many tasks each further call scored."""

    def __init__(self, folder):
        bench = collected(folder / "run")
        short = T2LTraining(steps=2, tasks=2, validate_every=2)
        evaluate_ = replace(
            bench.recipe.evaluate,
            methods=ALL,
            t2l=T2LConfig(hidden=8, layers=1, examples=2, reconstruction=short, sft=short),
            few_shot=FewShotConfig(
                tasks=2, validation=1, counts=(2, 3), steps=1, in_context=True, curve_steps=1
            ),
            sampling_steps=(3, 6),
            training_tasks=(3, 5),
        )
        self.recipe = replace(bench.recipe, evaluate=evaluate_)
        self.bench = replace(bench, recipe=self.recipe)
        self.results = folder / "results"
        self.deaf = untrained_generator(self.bench, centre="mean")
        self.ours = untrained_generator(self.bench)
        self.scored = []

    def __call__(self, generator=None, recipe=None):
        original = protocol.score_task

        def counted(one, task, split):
            self.scored.append(task.name)
            return original(one, task, split)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(protocol, "score_task", counted)
            patch.setattr(evaluation, "train_variant", lambda *args, **kwargs: self.deaf)
            self.scored = []
            about = {"bench": self.bench, "results": self.results, "progress": False}
            return evaluate(recipe or self.recipe, generator=generator or self.ours, **about)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def result(run):
    found = run()
    assert len(run.scored) == 5
    return found


def test_result_file_has_the_format_of_the_protocol(run, result):
    on_disk = json.loads((run.results / "tiny.json").read_text())
    assert on_disk == json.loads(json.dumps(result))
    wanted = ["recipe", "commit", "date", "machine", "versions", "seeds", "base_model", "suite", "trials"]
    wanted += ["methods", "paired", "controls", "power", "per_task", "cost", "few_shot", "curve"]
    wanted += ["sampling_steps", "training_tasks"]
    assert list(on_disk) == wanted
    assert tuple(on_disk["methods"]) == ALL
    assert on_disk["seeds"] == [0, 1]
    assert on_disk["suite"] == {"train": 5, "validation": 1, "unseen_tasks": 3, "unseen_domains": 2}
    for method in ALL:
        for split, count in (("unseen_tasks", 3), ("unseen_domains", 2)):
            row = on_disk["methods"][method][split]
            assert {"accuracy", "accuracy_no_prompt", "G", "ci", "G_no_prompt", "tasks", "examples"} <= set(
                row
            )
            assert (row["tasks"], row["examples"]) == (count, 6)
            assert 0 <= row["accuracy"] <= 1
    assert set(on_disk["controls"]["prompt"]["unseen_tasks"]) >= {"right", "wrong", "mean", "ci", "no_prompt"}
    assert set(on_disk["paired"]) == {f"ours - {name}" for name in ALL if name != "ours"}


def test_seeds_and_wrong_prompts_are_what_the_recipe_says(result):
    one = result["per_task"]["a/second/twice"]
    counts = {method: len(values) for method, values in one["accuracy"]["prompt"].items()}
    assert counts["ours"] == counts["ridge"] == counts["nearest"] == counts["vanilla"] == 2
    assert counts["ours_wrong_prompt"] == len(one["wrong_tasks"]) == 2
    assert counts["base"] == counts["mean"] == counts["oracle"] == counts["oracle_codec"] == 1
    assert counts["mean_noise"] == counts["naive+reptile"] == 2
    assert counts["in_context"] == counts["format_only"] == counts["multi_task_lora_4x"] == 1
    assert one["same_format"]
    assert one["chance"] == pytest.approx(1 / 3)


def test_costs_are_measured(result):
    cost = result["cost"]
    assert cost["generate"]["batch_1"] > 0
    assert cost["generate"]["batch_32"] > 0
    gaining = [
        name
        for name, row in result["per_task"].items()
        if row["accuracy"]["prompt"]["oracle"][0] > row["accuracy"]["prompt"]["base"][0]
    ]
    runs = cost["fine_tune"]["runs"]
    assert {one["task"] for one in runs} <= set(gaining)
    assert bool(runs) == bool(gaining)
    if runs:
        fastest = cost["fine_tune"]["seconds"]
        wanted = {batch: fastest / cost["generate"][batch] for batch in ("batch_1", "batch_32")}
        assert cost["speed_up"] == pytest.approx(wanted, rel=1e-3)
    assert result["methods"]["ours"]["seconds_per_adapter"] == cost["generate"]["batch_1"]


def test_markdown_is_made_from_the_file(run, result):
    text = (run.results / "tiny.md").read_text()
    drawn = {file: title for title, file in re.findall(r"^!\[(.+)\]\(tiny/(.+)\)$", text, re.MULTILINE)}
    assert text == markdown(json.loads((run.results / "tiny.json").read_text()), drawn)
    assert {path.name for path in (run.results / "tiny").iterdir()} == set(drawn)
    names = {"methods", "tasks", "sampling_steps", "gradient_steps", "training_tasks", "chains"}
    assert set(drawn) == {f"{name}.png" for name in names}
    assert "## Figures" not in markdown(result)
    assert text.startswith("# tiny\n")
    assert table(result) in text
    assert all(f"| `{method}` |" in text for method in ALL)
    for word in ("Paired differences", "A few examples", "Memorisation", "Cost", "Power, unseen tasks"):
        assert word in text
    for rival in ("`multi_task_lora` saw 256", "`multi_task_lora_4x` saw 256", "`format_only` saw 16"):
        assert f"{rival} examples" in text


def test_the_ladder_and_the_curve_are_in_the_file(run, result):
    tasks = set(SPLITS["unseen_tasks"][:2])
    assert set(result["few_shot"]) == {"2", "3"}
    for rows in result["few_shot"].values():
        assert set(rows) == {"generated", "best_of", "refined", "lora", "lora_from_start", "start_in_context"}
        assert rows["lora"]["over_lora"] == 0
        assert all(row["ci"] is None or len(row["ci"]) == 2 for row in rows.values())
        assert all(set(row["per_task"]) == tasks for row in rows.values())
    assert result["curve"]["points"] == [0, 1]
    zero_shot = result["few_shot"]["2"]["generated"]["accuracy"]
    assert result["curve"]["generated"]["accuracy"][0] == pytest.approx(zero_shot)


def test_the_sweeps_are_in_the_file(run, result):
    rows = result["sampling_steps"]["rows"]
    diffusions = {"ours", *(name for name in ALL if name.partition("+")[0] in LOSSES)}
    assert {row["method"] for row in rows} == diffusions
    assert {row["steps"] for row in rows} == {3, 6}
    assert [row["training_tasks"] for row in result["training_tasks"]["rows"]] == [3, 5, 5]
    assert result["training_tasks"]["start_and_codec_saw"] == 5


def test_a_second_call_scores_nothing(run, result, monkeypatch):
    def never(*args, **kwargs):
        raise RuntimeError("measured again")

    for name in ("with_best_guidance", "between_stored", "seconds_to_generate", "fine_tunes"):
        monkeypatch.setattr(evaluation, name, never)
    again = run()
    assert run.scored == []
    assert again["per_task"] == result["per_task"]
    assert again["cost"] == result["cost"]


def test_a_killed_evaluation_goes_on(run, result):
    (file,) = (run.recipe.folder / "evaluation").glob(f"{16 * '?'}.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][: len(lines[2]) // 2])  # killed while writing the third
    again = run()
    assert run.scored == [*SPLITS["unseen_tasks"], *SPLITS["unseen_domains"]][2:]
    assert again["per_task"] == result["per_task"]
    assert len(whole_lines(file)) == 5


def test_another_generator_is_scored_anew_and_a_deaf_one_is_detected(run, result):
    deaf = run(generator=run.deaf)
    assert len(run.scored) == 5
    row = deaf["controls"]["prompt"]["unseen_tasks"]
    assert row["ci"] is None or row["ci"][0] <= 0 <= row["ci"][1]
    assert not row["reads_its_prompt"]
    assert "does not demonstrably read its prompt" in table(deaf)
    for one in deaf["per_task"].values():  # the same adapter whatever the prompt
        assert set(one["accuracy"]["prompt"]["ours"]) == set(one["accuracy"]["prompt"]["ours_wrong_prompt"])


def test_stored_adapters_have_distance_0_and_a_memoriser_shows(run, result, monkeypatch):
    runs = training_trajectories(run.recipe, SPLITS["train"])
    assert nearest_distances(run.bench.spec, [final_adapter(runs[2])], runs) == pytest.approx([0.0], abs=1e-5)
    own = result["controls"]["memorisation"]["unseen_tasks"]
    assert own["generated_to_nearest_stored"] > 0
    assert own["oracle_to_nearest_stored"] > 0
    monkeypatch.setitem(METHODS, "ours", lambda p, task, context: [final_adapter(runs[0])])
    monkeypatch.setattr(protocol, "VERSION", "memoriser")
    found = run()["controls"]["memorisation"]
    assert found["unseen_tasks"]["ratio"] == pytest.approx(0.0, abs=1e-5)
    assert found["stored_to_nearest_other_task"] >= found["stored_to_nearest_stored"] > 0


def test_between_stored_by_brute_force(run):
    runs = training_trajectories(run.recipe, SPLITS["train"])
    spec = run.bench.spec
    others = [
        nearest_distances(spec, [final_adapter(a)], [b for b in runs if b.run_id != a.run_id])[0]
        for a in runs
    ]
    found = between_stored(spec, runs)
    assert found["stored_to_nearest_stored"] == pytest.approx(
        sorted(others)[4] / 2 + sorted(others)[5] / 2, abs=2e-6
    )


# ---- methods that are asked in another way


@pytest.fixture(scope="module")
def opened(run, result):
    oracles = held_out_oracles(run.recipe, run.bench.suite)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "train_variant", lambda *args, **kwargs: run.deaf)
        return evaluation.open_protocol(run.recipe, run.bench, run.ours, ALL, oracles, progress=False)


def test_oracle_and_codec_come_from_the_held_out_store(run, result, opened):
    held_out = {r.task.name: r for r in TrajectoryStore(run.recipe.held_out_folder).trajectories()}
    assert set(result["per_task"]) == {*SPLITS["unseen_tasks"], *SPLITS["unseen_domains"]}
    for name, row in result["per_task"].items():
        own, task = final_adapter(held_out[name]), run.bench.suite[name]
        sheet = make_sheet(run.bench.adapted, task.evaluation[:6], task.held_out_prompts)
        both = stack_adapters([own, round_trip(opened.codec, own)])
        want = score(run.bench.adapted, sheet, both).accuracy.tolist()
        got = [row["accuracy"]["prompt"][method][0] for method in ("oracle", "oracle_codec")]
        assert got == pytest.approx(want, abs=1e-6)


def sheets_of(opened, task, prompts, monkeypatch):
    """Every sheet that `accuracies` makes, by the number of shots."""
    made, original = {}, protocol.make_sheet

    def kept(*args, shots):
        made[len(shots)] = original(*args, shots=shots)
        return made[len(shots)]

    monkeypatch.setattr(protocol, "make_sheet", kept)
    adapters = {
        name: METHODS[name](opened, task, "prompt") for name in ("base", "in_context", "multi_task_lora_4x")
    }
    return made, adapters, protocol.accuracies(opened, task, adapters, prompts)


@pytest.mark.parametrize("context", ["prompt", "no_prompt"])
def test_in_context_shows_training_examples_and_nothing_else(opened, context, monkeypatch):
    task = opened.bench.suite["a/second/twice"]
    prompts = task.held_out_prompts if context == "prompt" else None
    made, adapters, _ = sheets_of(opened, task, prompts, monkeypatch)
    assert sorted(made) == [0, 5]  # the other methods see no example
    for shown, plain in zip(made[5].rows, made[0].rows, strict=True):
        words = opened.bench.base.tokenizer.decode(shown.ids[: shown.answer])
        inputs = [text.split(" Output")[0] for text in words.split("Input : ")[1:]]
        asked = opened.bench.base.tokenizer.decode(plain.ids).split("Input : ")[1].split(" Output")[0]
        assert inputs == [e.input for e in pick_shots(task, 5)] + [asked]
        assert set(inputs[:-1]) <= {e.input for e in task.train}
        assert not set(inputs[:-1]) & {e.input for e in task.evaluation}
        assert words.startswith("please" if prompts else "Input")
        assert shown.ids[shown.answer :] == plain.ids[plain.answer :]
    assert adapters["in_context"] == [opened.bench.fresh]  # B = 0: the base model


def test_each_is_scored_on_its_own_context_and_spec(opened, monkeypatch):
    task, wide = opened.bench.suite["b/second/plain"], opened.apart["multi_task_lora_4x"]
    examples, prompts = task.evaluation[:6], task.held_out_prompts
    _, adapters, found = sheets_of(opened, task, prompts, monkeypatch)
    for name, bench, count in (("in_context", opened.bench, 5), ("multi_task_lora_4x", wide, 0)):
        sheet = make_sheet(bench.adapted, examples, prompts, shots=pick_shots(task, count))
        wanted = score(bench.adapted, sheet, stack_adapters(adapters[name])).accuracy.item()
        assert found[name] == [pytest.approx(wanted, abs=1e-6)]
    assert list(found) == list(adapters)


def test_errors_leave_out_what_has_no_adapter_or_another_spec(result):
    for one in result["per_task"].values():
        assert set(one["error"]) == set(ALL) - {"oracle", "in_context", "multi_task_lora_4x"}
    errors = result["controls"]["memorisation"]["unseen_tasks"]["relative_error"]
    assert errors["mean_noise"] > errors["mean"] > 0


def test_noise_is_the_same_whenever_it_is_made(opened):
    tasks = [opened.bench.suite[name] for name in ("a/second/twice", "b/second/plain")]
    digests = [[adapter_digest(a) for a in opened.noisy(task, "prompt")] for task in (*tasks, tasks[0])]
    assert digests[0] == digests[2]
    assert len({*digests[0], *digests[1]}) == 4  # another for every task and seed


def test_what_a_score_depends_on_is_in_its_digest(opened, monkeypatch):
    known = digest(opened)
    fixed = {**opened.fixed, "multi_task_lora_4x": opened.apart["multi_task_lora_4x"].fresh}
    others = [digest(replace(opened, fixed=fixed)), digest(replace(opened, apart={}))]
    monkeypatch.setitem(protocol.SHOTS, "in_context", 4)
    assert len({known, *others, digest(opened)}) == 4


def test_gradient_steps_are_told(result):
    trials = result["trials"]
    # one plain step of the recipe; three inner steps are the least that REPTILE can take
    assert trials["naive"]["gradient_steps"] == 1
    assert trials["naive+reptile"]["gradient_steps"] == trials["naive+reptile"]["inner_steps"] == 3
    assert trials["multi_task_lora_4x"]["rank"] == 8


# ---- what bad input gets


def test_too_few_examples_for_the_context_are_refused_first(run, monkeypatch):
    monkeypatch.setitem(protocol.SHOTS, "in_context", 13)
    with pytest.raises(ValueError, match=r"has 12 training examples; 13 are to stand in context"):
        evaluate(run.recipe, bench=run.bench, results=run.results, progress=False)


def test_missing_oracles_say_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"no finished run of 5 of 5 unseen tasks.*ltdi collect"):
        held_out_oracles(tiny_recipe(tmp_path), tiny_suite())
    assert not (tmp_path / "held_out").exists()


def test_a_suite_without_unseen_tasks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no unseen tasks"):
        held_out_oracles(tiny_recipe(tmp_path), tiny_suite().parts(unseen_tasks=0, unseen_domains=0))


def test_unknown_methods_are_refused(tmp_path):
    recipe = tiny_recipe(tmp_path)
    wrong = replace(recipe, evaluate=replace(recipe.evaluate, methods=("ours", "magic")))
    with pytest.raises(ValueError, match=r"names \['magic'\].*known methods"):
        chosen_methods(wrong)
    few = replace(recipe, evaluate=replace(recipe.evaluate, methods=("ours",)))
    assert chosen_methods(few) == ("base", "start", "ours", "oracle")


def test_a_missing_generator_is_refused(run, result):
    with pytest.raises(FileNotFoundError, match="ltdi train"):
        evaluate(run.recipe, bench=run.bench, results=run.results, progress=False)


def test_an_evaluated_generator_keeps_its_scores(run, result, monkeypatch):
    monkeypatch.setattr(evaluation, "train_variant", lambda *args, **kwargs: run.deaf)
    folder = run.recipe.generator_folder
    run.ours.save_pretrained(folder)
    found = evaluate(run.recipe, bench=run.bench, results=run.results, progress=False)
    scores = load_generator(folder).scores
    shutil.rmtree(folder)
    assert scores["recipe"] == run.recipe.name
    row = found["methods"]["ours"]["unseen_tasks"]
    kept = {key: row[key] for key in ("tasks", "accuracy", "G", "ci")}
    assert scores["methods"]["ours"]["unseen_tasks"] == kept
    assert set(scores["methods"]) == set(found["methods"])


def test_speed_up_and_break_even_by_hand():
    runs = [{"seconds": s, "steps": 8, "reached": True} for s in (2.0, 4.0, 100.0)]
    measured = {"batch_1": 0.5, "batch_32": 0.1, "flops": {"generate": 7.0}}
    found = costs({**measured, "runs": runs}, {"collect": 60.0, "train": 10.0})
    assert found["fine_tune"]["seconds"] == 4.0
    assert found["speed_up"] == {"batch_1": 8.0, "batch_32": 40.0}
    assert found["break_even_tasks"] == 20.0
    assert found["flops"] == {"generate": 7.0}
    assert costs({**measured, "runs": []}, {})["speed_up"] == {}
