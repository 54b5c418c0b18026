"""`ltdi serve`: its callbacks, and the page in headless Chromium."""

import ast
import asyncio
import re
import sys
import zipfile

import pytest
import torch
from browser import CHROMIUM, browser, generate, served, talk
from peft import PeftModel
from tiny_world import ROOT
from transformers import AutoModelForCausalLM

from ltdi_peft.adapter import load_adapter_folder
from ltdi_peft.cli import main
from ltdi_peft.studio import open_studio
from ltdi_peft.task import Example

NEEDS_CHROMIUM = "needs Chromium: apt-get install chromium"
PROMPT = "please a second twice"
SETTINGS = (0, None, 1, 0)  # seed, guidance scale, candidates, refinement steps
OPTIONS = (True, False, "Input: … Output: …", 3)  # prompt in context, earlier messages, format, longest
GOOD = "w0 w1 w2 => w1 w1"


@pytest.fixture(scope="module")
def page():
    """The room, which needs Gradio."""
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'ltdi_peft[serve]'")
    from ltdi_peft import page

    return page


@pytest.fixture
def calls(page, world):
    studio = open_studio(world.recipe.generator_folder, device="cpu")
    yield page.Callbacks(studio)
    studio.close()


# ---- callbacks


def test_generate_fills_the_page_and_replaces_the_adapter(page, calls):
    memory, card, notice, download, base, adapted, message, send = calls.generate(
        f" {PROMPT}\n", GOOD, *SETTINGS, page.Talk()
    )
    made = memory.made
    assert made.order.prompt == PROMPT
    assert made.measured.count == 1
    assert f"Confidence <b>{made.provenance.nearest_similarity:.2f}</b>" in card
    assert (notice, base, adapted) == ("", [], [])
    assert download.value["path"].endswith(".zip")
    assert message.interactive
    assert send.interactive
    (again, *_) = calls.generate("please b first", "", None, *SETTINGS[1:], memory)  # an empty seed is 0
    assert again.made.order.seed == 0
    assert list(calls.studio.model.peft_config) == [again.made.name]
    calls.forget(again)
    calls.forget(page.Talk())
    assert not isinstance(calls.studio.model, PeftModel)


def test_what_is_malformed_is_a_sentence_and_changes_nothing(page, calls):
    begun = page.Talk()
    memory, card, notice, *rest = calls.generate(PROMPT, f"{GOOD}\nw0 w1", *SETTINGS, begun)
    assert memory is begun
    assert "line 2 of the examples is &#x27;w0 w1&#x27;; expected: input =&gt; answer" in notice
    skipped = page.gr.skip()
    assert [card, *rest] == [skipped] * 6
    assert "task_prompt is empty" in calls.generate(" ", "", *SETTINGS, begun)[2]


@pytest.mark.parametrize("kind", [ValueError, OSError, ImportError])
def test_every_refusal_is_a_sentence(kind, page, calls, monkeypatch):
    def refuse(*args):
        raise kind("two\nlines <b>")

    monkeypatch.setattr(calls.studio, "make", refuse)
    notice = calls.generate(PROMPT, "", *SETTINGS, page.Talk())[2]
    assert ">two lines &lt;b&gt;</div>" in notice
    monkeypatch.setattr(calls.studio, "make", {}.__getitem__)
    monkeypatch.setattr(page, "REFUSALS", (ValueError,))
    with pytest.raises(KeyError):  # what is no refusal is not hidden
        calls.generate(PROMPT, "", *SETTINGS, page.Talk())


def test_a_talk_shows_each_answer_as_it_comes(page, calls):
    (*_, last) = calls.ask("w0", *OPTIONS, page.Talk())
    assert "there is no adapter yet; type a task and generate one." in last[-1]
    assert last[3] == "w0"  # what was typed stays
    memory = calls.generate(PROMPT, "", *SETTINGS, page.Talk())[0]
    first, second, (memory, base, adapted, message, notice) = calls.ask("w0 w1", *OPTIONS, memory)
    asked = {"role": "user", "content": "w0 w1"}
    assert first[1] == first[2] == [asked, {"role": "assistant", "content": "…"}]
    assert second[1] == base
    assert second[2] == first[2]
    (exchange,) = memory.exchanges
    assert [base[1]["content"], adapted[1]["content"]] == [exchange.base or "(no text)", exchange.adapted]
    assert (message, notice) == ("", "")
    (*_, refused) = calls.ask(" ", *OPTIONS, memory)
    assert refused[1:3] == (base, adapted)
    assert "the message is empty" in refused[-1]
    assert calls.clear(memory) == (page.Talk(memory.made), [], [], "")


def test_earlier_messages_stand_in_the_context_when_asked(page, calls, monkeypatch):
    seen = []
    monkeypatch.setattr(calls.studio, "ask_base", lambda question: seen.append(question) or "b")
    monkeypatch.setattr(calls.studio, "ask_adapted", lambda made, question: seen.append(question) or "")
    memory = calls.generate(PROMPT, "", *SETTINGS, page.Talk())[0]
    for keep in (False, True):
        (*_, (memory, _, shown, *_)) = calls.ask("w0", False, keep, "Input: … Output: …", 3, memory)
    assert shown[-1]["content"] == "(no text)"
    (*_, (memory, *_)) = calls.ask("w5", True, True, "the model's chat template", 3, memory)
    assert [question.prompt for question in seen] == [None] * 4 + [PROMPT] * 2
    assert [question.chat_template for question in seen] == [False] * 4 + [True] * 2
    assert [len(question.earlier) for question in seen] == [0, 0, 1, 0, 2, 0]  # "" is no answer
    assert seen[2].earlier == (Example("w0", "b"),)


def test_a_chat_template_can_be_chosen_where_there_is_one(page, calls):
    async def choices():  # outside of a loop Gradio 6.31 makes some that it does not close (safe_get_lock)
        blocks = page.build(calls.studio).blocks.values()
        return [[value for value, _ in one.choices] for one in blocks if one.get_block_name() == "radio"]

    assert asyncio.run(choices()) == [[page.PLAIN]]
    calls.studio.base.tokenizer.chat_template = "{{ messages }}"
    assert asyncio.run(choices()) == [[page.PLAIN, page.TEMPLATE]]


# ---- the subcommand


def test_a_port_in_use_is_refused_before_anything_is_loaded(page, capsys):
    with page.bound(0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port), "--generator", "nowhere"]) == 2
    assert f"port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err
    assert main(["serve", "--port", "70000", "--generator", "nowhere"]) == 2
    assert "port 70000 of 127.0.0.1 cannot be had" in capsys.readouterr().err
    assert main(["serve", "--port", "0", "--generator", "nowhere"]) == 2
    assert "no generator 'nowhere'" in capsys.readouterr().err


def test_without_gradio_serve_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ltdi_peft.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve", "--generator", "nowhere"]) == 2
    assert "the page needs Gradio: pip install 'ltdi_peft[serve]' (" in capsys.readouterr().err


def test_the_core_imports_no_gradio():
    def imports(path):
        nodes = ast.walk(ast.parse(path.read_text()))
        return " ".join(ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))

    found = {path.stem: imports(path) for path in (ROOT / "ltdi_peft").glob("*.py")}
    assert {room for room, text in found.items() if re.search(r"\b(gradio|fastapi|uvicorn)\b", text)} == {
        "page"
    }
    assert {room for room, text in found.items() if "ltdi_peft.page " in text} == {"serve_command"}


# ---- the page


@pytest.fixture(scope="module")
def address(page, world):
    """A running page, in an environment with a proxy that answers nobody."""
    options = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    with served(world.recipe.generator_folder, **options) as (found, process):
        assert found.startswith("http://127.0.0.1:"), found
        yield found
    assert process.returncode == 0  # Ctrl-C is the normal end
    assert "Traceback" not in process.said[1]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=NEEDS_CHROMIUM)
def test_the_whole_way_in_a_browser(address, world, tmp_path):
    with browser(address) as (page, asked):
        assert "No adapter yet" in page.locator("#card").inner_text()
        assert page.locator("#send").is_disabled()
        generate(page, PROMPT, "w0 w1 w2 -> w1 w1")
        page.locator("#notice .problem").wait_for()
        said = page.locator("#notice").inner_text()
        assert said.startswith("line 1 of the examples is 'w0 w1 w2 -> w1 w1'; expected: input => answer")
        assert "No adapter yet" in page.locator("#card").inner_text()
        generate(page, PROMPT, GOOD)
        page.locator("#card .said").wait_for()
        card = page.locator("#card").inner_text()
        assert re.search(r"Confidence 0\.\d\d|Confidence 1\.00", card)
        assert "of 1 right" in card
        assert page.locator("#card .near tr").count() == 5
        assert not page.locator("#notice .problem").is_visible()
        answers = [talk(page, words, count) for count, words in ((1, "w0 w1 w2"), (2, "w3 w1 w4"))]
        assert all(len(both) == 2 and all(both) for both in answers)
        with page.expect_download() as download:
            page.locator("#download").click()
        download.value.save_as(tmp_path / "adapter.zip")
        name = download.value.suggested_filename
    assert name == "please-a-second-twice.zip"
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert len(asked) > 5
    with zipfile.ZipFile(tmp_path / "adapter.zip") as packed:
        packed.extractall(tmp_path)
    folder = tmp_path / "please-a-second-twice"
    spec, adapter = load_adapter_folder(folder)
    plain = AutoModelForCausalLM.from_pretrained(world.base)
    ids = torch.tensor([[10, 13, 17, 20, 21, 5, 6]])
    before = plain(ids).logits
    alone = PeftModel.from_pretrained(plain, folder)  # peft alone
    assert not torch.equal(alone(ids).logits, before)
    assert len(adapter) == len(spec.sites) > 0
