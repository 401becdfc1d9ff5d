"""The report in headless Chromium: no errors, no requests, all visible, and the viewer shows the network's values.

Skipped without Chromium, unless REQUIRE_CHROMIUM=1.
"""

import importlib.util
import os
import re
import shutil

import numpy as np
import pytest

from tests.support.report_run import NAMES, STEPS, make_run, page_of, truth_of
from tests.support.tiers import rest_slow

PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1200, "height": 900}
LAYER = "stage1.block0.channel.spikes"  # shown large at first: what the last block hands on


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    lacks = "" if program else f"none of {', '.join(names)} is installed"
    if importlib.util.find_spec("playwright") is None:
        lacks = "playwright is not installed"
    if lacks:
        (pytest.fail if os.environ.get("REQUIRE_CHROMIUM") == "1" else pytest.skip)(f"no browser: {lacks}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers often run as root and with little shared memory.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=program, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    # Longer than a line of a phone.
    return make_run(tmp_path_factory.mktemp("a_folder_with_a_name_that_is_longer_than_a_line"))


@pytest.fixture(scope="module")
def truth(workdir):
    return truth_of(workdir)


@pytest.fixture(scope="module")
def file(workdir):
    path = workdir / "report.html"
    path.write_text(page_of(workdir), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, file):
    """A function that opens the page; after the test checks that no error occurred in it."""
    wrong, asked, contexts = [], [], []

    def look(viewport=DESKTOP, scheme="light", **options):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        # Only errors: reading canvases back, as these tests do, is warned of as slow.
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.clock.install()
        page.goto(file.as_uri())
        return page

    yield look
    assert wrong == []
    assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}
    for context in contexts:
        context.close()


def luminance(colour):
    """Of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = np.array([float(x) for x in re.findall(r"[\d.]+", colour)[:3]]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(page, selector):
    """Between the text of an element and the page."""
    style = "(node, name) => getComputedStyle(node)[name]"
    text = page.eval_on_selector(selector, style, "color")
    behind = page.eval_on_selector("body", style, "backgroundColor")
    bright, dark = sorted((luminance(text), luminance(behind)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", rest_slow(["light", "dark"]))
def test_everything_is_shown(opened, viewport, scheme):
    page = opened(viewport, scheme)
    widths = page.evaluate("[...document.images].map((image) => image.complete && image.naturalWidth)")
    assert len(widths) > 30
    assert all(widths)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    wide = "[...document.querySelectorAll('p, h1, h2, h3, li, figure, svg, canvas, button')]"
    outside = page.evaluate(
        f"{wide}.filter((x) => x.closest('.scroll, nav') === null)"
        ".map((x) => x.getBoundingClientRect().right).filter((right) => right > innerWidth)"
    )
    assert outside == []
    for selector in ("body", ".quiet", "a[href='#fields']", ".plot svg text", "figcaption"):
        assert contrast(page, selector) >= 4.5
    assert (luminance(page.eval_on_selector("body", "(x) => getComputedStyle(x).backgroundColor")) < 0.5) == (
        scheme == "dark"
    )
    assert page.locator(".plot svg").count() == 3
    assert page.evaluate("document.querySelectorAll('[id=viewer]:not([hidden])').length") == 1


def test_names_stay_text(opened):
    page = opened()
    assert page.evaluate("window.broken") is None
    assert page.title() == 'a <b> & "run": report'
    assert page.inner_text("h1") == 'a <b> & "run"'
    rows = page.locator("#scores tbody th").all_inner_texts()
    assert [row.removesuffix(" (true)") for row in rows] == NAMES
    for name in NAMES:
        assert name in page.inner_text("#confusion")
    assert page.locator("script").count() == 2


def shown(page):
    """Probability and mean logit of each class, as the viewer's table has them."""
    values = page.eval_on_selector_all("#scores data", "(all) => all.map((one) => Number(one.value))")
    return np.array(values).reshape(-1, 2).T


def percent_in(text):
    """The first number before a per cent sign."""
    return float(re.search(r"([\d.]+)\u00a0%", text).group(1))


def lit(page):
    """The large map's squares that are lit, row by row."""
    alphas = page.evaluate("""() => {
      const canvas = document.querySelector('#large canvas');
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      return [...data].filter((_, i) => i % 4 === 3);
    }""")
    return np.array(alphas)


def test_viewer_steps_and_shows_the_network_s_scores_and_spikes(opened, truth):
    page = opened()
    examples = page.locator("[data-example]")
    for choice in (0, examples.count() - 1):
        examples.nth(choice).click()
        index = int(re.search(r"Test image (\d+)", page.get_attribute("#shown", "alt")).group(1))
        assert page.get_attribute(f"[data-example='{choice}']", "aria-pressed") == "true"
        page.focus("#viewer")
        page.keyboard.press("Home")
        there = [("#forward", step) for step in range(2, STEPS + 1)]
        back = [("#back", step) for step in range(STEPS - 1, 0, -1)]
        for button, step in [("#shown", 1), *there, *back]:
            page.click(button)
            assert page.inner_text("#at") == f"{step} of {STEPS}"
            mean = truth.logits[:step, index].mean(0)
            probability, logits = shown(page)
            np.testing.assert_allclose(logits, mean, rtol=1e-4, atol=1e-4)
            powers = np.exp(mean - mean.max())
            np.testing.assert_allclose(probability, powers / powers.sum(), atol=1e-4)
            assert f"After step {step} of {STEPS}: {NAMES[mean.argmax()]}," in page.inner_text("#verdict")

            fired = truth.spikes[LAYER][index, step - 1]
            assert percent_in(page.inner_text("#large p")) == pytest.approx(100 * fired.mean(), abs=0.051)
            np.testing.assert_array_equal(lit(page) > 0, fired.any(-1).ravel())
            for channel in (0, fired.shape[-1] - 1):
                page.fill("#channel", str(channel))
                np.testing.assert_array_equal(lit(page) > 0, fired[..., channel].ravel())
            page.fill("#channel", "-1")


def test_viewer_plays_and_obeys_keys(opened, truth):
    page = opened(PHONE)
    page.click("#play")
    assert page.inner_text("#play") == "Pause"
    for step in range(2, STEPS + 1):
        page.clock.run_for(900)
        assert page.inner_text("#at") == f"{step} of {STEPS}"
    assert page.inner_text("#play") == "Play"
    assert page.is_disabled("#forward")
    page.click("#play")  # from the start
    assert page.inner_text("#at") == f"1 of {STEPS}"
    page.click("#play")
    page.clock.run_for(5000)
    assert page.inner_text("#at") == f"1 of {STEPS}"
    assert page.is_disabled("#back")

    page.focus("#viewer")
    for key, step in (("ArrowRight", 2), ("End", STEPS), ("ArrowRight", STEPS), ("ArrowLeft", STEPS - 1), ("Home", 1)):
        page.keyboard.press(key)
        assert page.inner_text("#at") == f"{step} of {STEPS}"
    page.keyboard.press("2")
    assert page.get_attribute("[data-example='1']", "aria-pressed") == "true"
    page.fill("#step", "2")
    assert page.inner_text("#at") == f"2 of {STEPS}"

    assert page.locator("#layers button:visible").count() == 6
    page.check("#every")
    assert page.locator("#layers button:visible").count() == len(truth.spikes)
    page.locator("#layers button:visible").first.click()
    assert page.inner_text("#large p").startswith("Stage 0, encode, all channels")
    rates = page.locator("#layers button .quiet").all_inner_texts()
    index = int(re.search(r"Test image (\d+)", page.get_attribute("#shown", "alt")).group(1))
    for rate, fired in zip(rates, truth.spikes.values(), strict=True):
        assert percent_in(rate) == pytest.approx(100 * fired[index, 1].mean(), abs=0.051)


def test_without_scripts_and_on_paper(opened):
    page = opened(PHONE, java_script_enabled=False)
    assert page.is_hidden("#viewer")
    assert page.get_by_text("The viewer needs JavaScript").is_visible()
    assert page.locator(".still img.token").count() == 2 * STEPS
    page.emulate_media(media="print")
    assert page.is_hidden("nav")
    assert page.locator("h2").last.is_visible()
