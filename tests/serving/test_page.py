"""The page to try the models: what it is made of, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from asgi import Client
from browser import Page, browse, chromium
from fakes import FakeModel, FakeModels, every_task
from live import live

from effllm.serving.app import create_app
from effllm.serving.settings import ServeSettings

needs_browser = pytest.mark.skipif(chromium() is None, reason="there is no Chromium here")


def test_the_page_is_whole_and_its_policy_lets_only_its_own_code_run() -> None:
    answer = Client(create_app(every_task(), ServeSettings())).get("/")
    page, policy = answer.text, answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?://|@import|url\(|<link(?! rel=\"icon\" href=\"data:)|innerHTML|\seval\(", page)
    for kind in ("script", "style"):
        (block,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert " style=" not in page  # the policy would not allow it


def test_every_field_of_the_page_has_a_label() -> None:
    page = Client(create_app(every_task(), ServeSettings())).get("/").text
    fields = set(re.findall(r'<(?:select|input|textarea) id="([\w-]+)"', page))
    assert fields == {"key", "model", "other"}
    assert fields <= set(re.findall(r'<label for="([\w-]+)"', page))


@pytest.fixture(scope="module")
def models() -> FakeModels:
    models = every_task()
    twins = [("films-int8", "text-classification"), ("names-int8", "token-classification")]
    twins += [("squad-int8", "question-answering"), ("masks-int8", "fill-mask")]
    models.models = {**models.models, **{name: FakeModel(name, task) for name, task in twins}}
    return models


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browse(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def url(models: FakeModels) -> Iterator[str]:
    with live(models, ServeSettings(port=0)) as url:
        yield url


@pytest.fixture
def page(browser: Page, url: str) -> Page:
    browser.log.clear()
    browser.open(f"{url}/")
    browser.wait("!document.getElementById('form').hidden")
    return browser


def choose(page: Page, model: str, other: str = "") -> None:
    page.run(
        f"(() => {{ for (const [id, name] of [['model', '{model}'], ['other', '{other}']]) {{"
        "$(id).value = name; $(id).dispatchEvent(new Event('change')); } })()"
    )


def fill(page: Page, **fields: str) -> None:
    for name, text in fields.items():
        page.run(f"document.getElementById('field-{name}').select()")
        page.type(text)


def answered(page: Page, count: int = 1) -> str:
    """Run, wait for the answers, and return their text."""
    page.run("$('form').requestSubmit()")
    page.wait(f"!$('run').disabled && $('results').children.length === {count}")
    return page.run("$('results').innerText")


@needs_browser
@pytest.mark.slow
def test_each_task_is_answered_and_compared(page: Page) -> None:
    choose(page, "films", "films-int8")
    text = answered(page, 2)
    assert all(label in text for label in ("films-int8", "negative", "positive", "neutral"))
    assert "queue 1.00 ms, tokenise 2.00 ms, model 3.00 ms · 6 tokens" in text
    assert "same best answer; largest |\u2060Δscore| 0.000000" in page.run("$('difference').innerText")
    choose(page, "masks", "masks-int8")
    fill(page, text="a [MASK] and a [MASK]")
    assert answered(page, 2).count("Mask 2") == 2
    choose(page, "names", "names-int8")
    fill(page, text="😀 Ada saw London")
    answered(page, 2)
    assert (
        page.run("[...document.querySelectorAll('mark')].map((m) => m.firstChild.data).join()")
        == "Ada,London,Ada,London"
    )
    assert "2 of 2 entities" in page.run("$('difference').innerText")
    choose(page, "squad", "squad-int8")
    fill(page, question="who?", context="😀Ada did")
    assert "😀Ada" in answered(page, 2)
    assert "same answer; |\u2060Δscore| 0.000000" in page.run("$('difference').innerText")
    choose(page, "minilm", "other")
    fill(page, first="a cat", second="a cat")
    assert "1.0000" in answered(page, 2)
    assert "cosine between the models' vectors 1.000000 and 1.000000" in page.run("$('difference').innerText")
    assert [line for line in page.log if not line.startswith("REQUEST ")] == []


@needs_browser
@pytest.mark.slow
def test_only_the_server_itself_is_asked(page: Page, url: str) -> None:
    choose(page, "films")
    answered(page)
    requests = [line for line in page.log if line.startswith("REQUEST ")]
    assert len(requests) == 3
    assert all(line.startswith(f"REQUEST {url}/") for line in requests)


@needs_browser
@pytest.mark.slow
def test_markup_in_a_text_stays_text(page: Page) -> None:
    nasty = "<img src=x onerror=\"document.title='broken'\"> Ada </script><b>London"
    choose(page, "names")
    fill(page, text=nasty)
    answered(page)
    assert page.run("document.querySelector('.passage').innerText.replace(/ ?(PER|LOC)/g, '')").startswith("<img src=x")
    assert page.run("document.querySelectorAll('#results img, #results script').length") == 0
    assert page.run("document.title") == "effllm serve"
    choose(page, "masks")
    fill(page, text=nasty)
    page.run("$('form').requestSubmit()")
    page.wait("!$('error').hidden")
    assert page.run("$('error').innerText") == "422: inputs.0: there is no [MASK] in the text"


@needs_browser
@pytest.mark.slow
def test_it_is_used_with_the_keyboard_alone(page: Page) -> None:
    seen = []
    for _ in range(7):
        page.press("Tab")
        seen.append(page.run("document.activeElement.id || document.activeElement.textContent"))
    assert seen == ["API", "Metrics", "model", "other", "field-first", "field-second", "run"]
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    page.wait("$('results').children.length === 1")
    choose(page, "films")
    page.run("document.getElementById('field-text').focus()")
    page.press("Enter", ctrl=True)
    page.wait("$('results').children.length === 1 && $('results').innerText.includes('positive')")


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_narrow_screen_and_is_legible(page: Page, url: str, tmp_path: Path, dark: bool) -> None:
    page.open(f"{url}/", 400, dark=dark)
    page.wait("!document.getElementById('form').hidden")
    choose(page, "names", "names-int8")
    fill(page, text="Ada " + "W" * 300)
    answered(page, 2)
    assert page.run("document.documentElement.scrollWidth") <= 400
    contrast = """(() => {
      const light = (color) => {
        const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const back = (node) => {
        const color = getComputedStyle(node).backgroundColor;
        return color === 'rgba(0, 0, 0, 0)' && node.parentElement ? back(node.parentElement) : color;
      };
      const nodes = [...document.querySelectorAll('h1, h2, p, label, button, mark, td, th, a, textarea, select')];
      return Math.min(...nodes.filter((n) => n.innerText || n.value).map((n) => {
        const [x, y] = [light(getComputedStyle(n).color), light(back(n))].sort();
        const [low, high] = [Math.min(x, y), Math.max(x, y)];
        return (high + 0.05) / (low + 0.05);
      }));
    })()"""
    assert page.run(contrast) >= 4.5  # WCAG 2, level AA
    page.screenshot(tmp_path / "page.png")


@needs_browser
@pytest.mark.slow
def test_a_server_with_a_key_is_asked_for_it(browser: Page, models: FakeModels, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret", encoding="utf-8")
    with live(models, ServeSettings(port=0, api_key_file=str(tmp_path / "key"))) as url:
        browser.open(f"{url}/")
        browser.wait("!document.getElementById('key-form').hidden")
        assert browser.run("document.activeElement.id") == "key"
        browser.type("wrong")
        browser.press("Enter")
        browser.wait("$('state').textContent.startsWith('401')")
        browser.run("$('key').select()")
        browser.type("secret")
        browser.press("Enter")
        browser.wait("!document.getElementById('form').hidden")
        assert browser.run("$('key-form').hidden")
        assert browser.run("getComputedStyle($('more')).display") == "none"
        choose(browser, "films")
        assert "positive" in answered(browser)
