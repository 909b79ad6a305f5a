"""The page in a real browser: phone and desktop, light and dark, by mouse, by keyboard, and what a screen reader hears."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
from PIL import Image

from attunement.compare import records, report
from attunement.compare.records import Trial

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="the report is tested in a browser and there is none here: apt-get install chromium chromium-driver",
)
PHONE, DESKTOP = (390, 844), (1280, 900)
Show = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synthetic.write(tmp_path_factory.mktemp("study"))
    return report.write(folder, pictures=False)


@pytest.fixture
def show(browser: Any, page: Path) -> Iterator[Show]:
    """Open the page at a size and in a scheme; afterwards the browser is as it was."""

    def opened(
        size: tuple[int, int] = DESKTOP,
        dark: bool = False,
        path: Path = page,
        task: str | None = "banking77",
        **media: str,
    ) -> Any:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE},
        )
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"} | media
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": k, "value": v} for k, v in features.items()]}
        )
        browser.get(path.as_uri())
        if task:
            choose(browser, task)
        return browser

    yield opened
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def choose(browser: Any, task: str) -> None:
    label = browser.find_element(By.XPATH, f"//fieldset//span[.='{task}']/..")
    label.find_element(By.TAG_NAME, "input").send_keys(Keys.SPACE)


def seen(browser: Any, css: str) -> list[Any]:
    return [one for one in browser.find_elements(By.CSS_SELECTOR, css) if one.is_displayed()]


def labels(browser: Any) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('#table [data-task]:not([hidden]) tbody tr')]"
        ".filter((line) => !line.hidden).map((line) => line.querySelector('.label').textContent)"
    )


def column(browser: Any, key: str) -> list[float | None]:
    values = browser.execute_script(
        "const table = document.querySelector('#table [data-task]:not([hidden]) table');"
        "const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.dataset.key === arguments[0]);"
        "return [...table.tBodies[0].rows].map((line) => line.cells[at]?.dataset.v ?? '')",
        key,
    )
    return [float(value) if value else None for value in values]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_fits_the_screen_and_every_text_can_be_read(show: Show, size: tuple[int, int], dark: bool) -> None:
    browser = show(size, dark)
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert inner == size[0]
    assert wide <= size[0]
    paper = browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    assert paper == ("rgb(16, 20, 24)" if dark else "rgb(255, 255, 255)")
    faint = browser.execute_script(CONTRAST)
    assert faint == []  # WCAG AA: 4.5 to 1, or 3 to 1 where the letters are large
    small = [
        (one.text, one.size)
        for one in seen(browser, "button, select, input[type=search]")
        if one.size["height"] < 20 and not one.find_elements(By.XPATH, "ancestor::*[self::th or self::figcaption]")
    ]
    assert small == []


def test_nothing_is_fetched(show: Show) -> None:
    browser = show()
    assert browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


def test_sixty_methods_are_drawn_and_no_name_covers_another(show: Show, page: Path) -> None:
    browser = show()
    study = records.read(page.parent)
    final = {t.label for t in study.trials if t.task == "banking77" and t.stage == "final" and t.quality is not None}
    assert len(final) == 62
    for figure in seen(browser, "#pareto figure"):
        drawn = {mark.get_attribute("data-label") for mark in figure.find_elements(By.CSS_SELECTOR, ".mark")}
        timed = final - {"zero-shot"} if figure.get_attribute("data-cost") == "step" else final
        assert drawn == timed
        boxes = [name.rect for name in figure.find_elements(By.CSS_SELECTOR, "text.name")]
        assert len(boxes) >= 4
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = a["x"] >= b["x"] + b["width"] - 2 or b["x"] >= a["x"] + a["width"] - 2
                assert apart or a["y"] >= b["y"] + b["height"] - 3 or b["y"] >= a["y"] + a["height"] - 3
    assert len(labels(browser)) == 63


def test_the_axis_is_logarithmic_where_the_values_need_it(show: Show) -> None:
    browser = show()

    def ticks(cost: str) -> list[str]:
        figure = browser.find_element(By.CSS_SELECTOR, f"figure[data-cost={cost}]")
        return [t.text for t in figure.find_elements(By.CSS_SELECTOR, "text[text-anchor=middle]")]

    assert {"10 k", "100 k", "1 M", "10 M"} <= set(ticks("trainable"))
    assert "0" in ticks("trainable")  # zero-shot trains nothing, and has a place
    assert {"0.4×", "0.6×", "0.8×"} <= set(ticks("step"))


def test_the_table_sorts_by_mouse(show: Show) -> None:
    browser = show()
    quality = [value for value in column(browser, "quality") if value is not None]
    assert quality == sorted(quality, reverse=True)
    head = seen(browser, "#table th[data-key=trainable]")[0]
    button = head.find_element(By.TAG_NAME, "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
    ActionChains(browser).move_to_element(button).click().perform()
    assert head.get_attribute("aria-sort") == "ascending"
    values = column(browser, "trainable")
    assert values == sorted(values, key=lambda v: (v is None, v))
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    values = column(browser, "trainable")
    assert values == sorted(values, key=lambda v: (v is None, -(v or 0)))  # those without a value stay last
    assert len(seen(browser, "#table th[aria-sort]")) == 1


def test_the_table_sorts_by_keyboard_and_says_so(show: Show) -> None:
    browser = show()
    button = seen(browser, "#table th[data-key=label] button")[0]
    browser.execute_script("arguments[0].focus()", button)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert labels(browser) == sorted(labels(browser), key=str.lower)
    assert browser.find_element(By.ID, "said").text or browser.execute_script(
        "return document.getElementById('said').textContent"
    ).startswith("sorted by Method, ascending")
    ActionChains(browser).send_keys(Keys.SPACE).perform()
    assert labels(browser) == sorted(labels(browser), key=str.lower, reverse=True)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_table_that_goes_on_shows_it_and_is_scrolled_by_keyboard(
    show: Show, size: tuple[int, int], dark: bool
) -> None:
    browser = show(size, dark)
    (table,) = seen(browser, "#table .wide")
    assert (table.aria_role, table.accessible_name) == ("region", "All measurements on banking77, scrolls")

    def edge() -> float:
        """How far the right edge is from the colour of the page, beside the caption, at most."""
        browser.execute_script("arguments[0].scrollIntoView(); arguments[0].scrollTop = 0", table)
        picture = Image.open(io.BytesIO(table.screenshot_as_png)).convert("L")
        inner = browser.execute_script("return arguments[0].clientWidth", table)
        paper = picture.getpixel((inner - 120, 3))
        shaded = range(inner - 24, inner - 8)  # over the last ones a phone draws its bar
        return max(abs(picture.getpixel((x, 3)) - paper) for x in shaded)

    assert edge() > 25
    browser.execute_script("arguments[0].focus()", table)
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    WebDriverWait(browser, 5).until(lambda _: browser.execute_script("return arguments[0].scrollLeft", table) > 0)
    browser.execute_script("arguments[0].scrollLeft = 1e6", table)
    assert edge() <= 2


def test_the_filter_leaves_what_fits(show: Show) -> None:
    browser = show()
    field = browser.find_element(By.ID, "filter")
    field.send_keys("orthogonal")
    assert set(labels(browser)) == {"boft", "clover", "hra", "oft", "osf", "road", "tarot"}
    assert browser.find_element(By.ID, "count").text == "7 of 63"
    field.clear()
    field.send_keys("LoRA ag")
    assert labels(browser) == ["LoRA again"]


def test_the_task_changes_everything_that_is_said_and_drawn(show: Show) -> None:
    browser = show()
    first = seen(browser, "#findings .findings")
    assert len(first) == 1
    before = (first[0].text, labels(browser), seen(browser, "#pareto figure")[0].get_attribute("innerHTML"))
    choose(browser, "mrpc")
    after = (
        seen(browser, "#findings .findings")[0].text,
        labels(browser),
        seen(browser, "#pareto figure")[0].get_attribute("innerHTML"),
    )
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert "F1" in seen(browser, "#table thead")[0].text
    assert len(seen(browser, "#learning svg")) == 2
    choose(browser, "All tasks")
    assert "Choose one task" in browser.find_element(By.ID, "learning").text


def test_a_mark_shows_its_values_when_pointed_at(show: Show) -> None:
    browser = show()
    mark = browser.find_element(By.CSS_SELECTOR, "figure[data-cost=trainable] .mark[data-label='full fine-tuning']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    ActionChains(browser).move_to_element(mark).perform()
    tip = browser.find_element(By.ID, "tip")
    assert tip.is_displayed()
    assert "full fine-tuning" in tip.text
    assert "81.8 %" in tip.text
    assert "trained 22.4 M" in tip.text
    box, screen = tip.rect, browser.execute_script("return [innerWidth, scrollY, innerHeight]")
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= screen[0]
    assert screen[1] <= box["y"] <= screen[1] + screen[2]
    ActionChains(browser).move_to_element(browser.find_element(By.ID, "table-title")).perform()
    assert not tip.is_displayed()


def test_a_chart_is_one_stop_of_tab_and_arrows_walk_its_marks(show: Show) -> None:
    browser = show()
    stops = 'return document.querySelectorAll(\'figure[data-cost="step"] .mark[tabindex="0"]\').length'
    assert browser.execute_script(stops) == 1
    last = browser.find_elements(By.CSS_SELECTOR, "#families button")[-1]
    browser.execute_script("arguments[0].focus()", last)
    ActionChains(browser).send_keys(Keys.TAB).perform()
    first = browser.switch_to.active_element
    assert first.find_element(By.XPATH, "ancestor::figure").get_attribute("data-cost") == "backward_bytes"
    costs, names = [], []
    for _ in range(6):
        here = browser.switch_to.active_element
        names.append(here.get_attribute("data-label"))
        costs.append(browser.execute_script("return arguments[0].transform.baseVal[0].matrix.e", here))
        tip = browser.find_element(By.ID, "tip")
        assert tip.is_displayed()
        assert names[-1] in tip.text
        assert here.get_attribute("aria-label").startswith(f"{names[-1]}: accuracy ")
        ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert costs == sorted(costs)
    assert len(set(names)) == 6
    ActionChains(browser).send_keys(Keys.END).send_keys(Keys.ARROW_UP).perform()
    ActionChains(browser).send_keys(Keys.TAB).perform()
    here = browser.switch_to.active_element.find_element(By.XPATH, "ancestor::figure")
    assert here.get_attribute("data-cost") == "peak_memory"


def test_focus_can_be_seen(show: Show) -> None:
    browser = show()
    body = ActionChains(browser)
    for _ in range(16):
        body.send_keys(Keys.TAB).perform()
        here = browser.switch_to.active_element
        if here.get_attribute("name") == "task":  # drawn on the text beside the radio button
            here = here.find_element(By.XPATH, "following-sibling::span")
        drawn = "outline-style", "outline-width"
        if "mark" in (here.get_attribute("class") or "").split():  # drawn as a ring around the mark
            here, drawn = here.find_element(By.CLASS_NAME, "ring"), ("stroke", "stroke-width")
        style, width = map(here.value_of_css_property, drawn)
        assert style != "none", here.get_attribute("outerHTML")[:100]
        assert float(width.removesuffix("px")) >= 2


def test_enter_opens_the_method_with_its_recipe_and_escape_goes_back(show: Show) -> None:
    browser = show()
    mark = browser.find_element(By.CSS_SELECTOR, "figure[data-cost=trainable] .mark[data-label='dora']")
    browser.execute_script("arguments[0].focus()", mark)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    card = browser.find_element(By.ID, "card")
    assert card.is_displayed()
    assert card.find_element(By.TAG_NAME, "h2").text == "dora"
    recipe = card.find_element(By.TAG_NAME, "pre").text
    assert "method: low_rank/dora" in recipe
    assert "learning_rate: 0." in recipe
    assert card.find_elements(By.CSS_SELECTOR, "svg[role=img]")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not card.is_displayed()
    assert browser.switch_to.active_element.get_attribute("data-label") == "dora"


@pytest.mark.parametrize("allowed", [True, False], ids=["clipboard", "older way"])
def test_a_recipe_is_copied_and_the_button_says_so(show: Show, allowed: bool) -> None:
    browser = show()
    browser.execute_script(
        "window.copied = null;"
        "navigator.clipboard.writeText = async (text) => { if (!arguments[0]) throw new Error('no'); window.copied = text; };"
        "document.execCommand = () => { window.copied = document.activeElement.value; return true; };",
        allowed,
    )
    line = next(
        line for line in seen(browser, "#table tbody tr") if line.find_element(By.CLASS_NAME, "label").text == "tarot"
    )
    button = line.find_element(By.CSS_SELECTOR, "button.copy")
    assert button.get_attribute("aria-label") == "Copy the recipe of tarot"
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', inline: 'center'}); arguments[0].focus()", button
    )
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert "method: orthogonal/tarot" in browser.execute_script("return window.copied")
    assert button.text == "Copied"
    assert browser.execute_script("return document.getElementById('said').textContent") == "Recipe copied"
    assert browser.switch_to.active_element == button


def test_a_highlighted_method_is_lit_everywhere(show: Show) -> None:
    browser = show()
    browser.execute_script(
        "const pick = document.getElementById('highlight'); pick.value = 'oft'; pick.dispatchEvent(new Event('change'))"
    )
    assert {one.get_attribute("data-label") for one in browser.find_elements(By.CSS_SELECTOR, "svg .lit")} == {"oft"}
    assert len(browser.find_elements(By.CSS_SELECTOR, "#pareto .mark.lit")) == 4
    assert len(browser.find_elements(By.CSS_SELECTOR, "#learning .curve.lit")) == 2
    assert [line.find_element(By.CLASS_NAME, "label").text for line in seen(browser, "#table tr.lit")] == ["oft"]
    family = browser.find_element(By.XPATH, "//div[@id='families']/button[contains(., 'prompts')]")
    family.click()
    assert family.get_attribute("aria-pressed") == "true"
    clear = browser.find_elements(By.CSS_SELECTOR, "figure[data-cost=step] .mark:not(.faded)")
    assert {one.get_attribute("data-label") for one in clear} == {
        "dept",
        "llama adapter",
        "p tuning",
        "prefix",
        "prompt",
        "vpt",
        "oft",
    }


def test_the_rates_of_every_method_can_be_shown(show: Show) -> None:
    browser = show(PHONE)
    assert len(seen(browser, "#sensitivity figure")) == 8
    more = browser.find_element(By.ID, "more")
    assert more.get_attribute("aria-expanded") == "false"
    browser.execute_script("arguments[0].click()", more)
    assert len(seen(browser, "#sensitivity figure")) == 62
    assert more.get_attribute("aria-expanded") == "true"
    hira = browser.find_element(By.CSS_SELECTOR, "#sensitivity figure[data-label=hira] svg")
    assert "diverged" in hira.get_attribute("aria-label")
    assert len(hira.find_elements(By.CSS_SELECTOR, ".lost")) == 2


def test_a_screen_reader_finds_its_way(show: Show) -> None:
    browser = show()
    outline = browser.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3')].filter((one) => one.checkVisibility()).map((one) => one.tagName)"
    )
    assert outline[0] == "H1"
    assert outline.count("H1") == 1
    for tag in ("main", "header", "footer", "nav[aria-label]"):
        assert len(browser.find_elements(By.CSS_SELECTOR, tag)) == 1
    assert browser.execute_script("return document.documentElement.lang") == "en"
    browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    browser.execute_cdp_cmd("Accessibility.disable", {})
    roles = {
        "button",
        "link",
        "combobox",
        "radio",
        "searchbox",
        "textbox",
        "img",
        "image",
        "table",
        "region",
        "group",
        "figure",
    }
    named = [
        (n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored") and "role" in n
    ]
    assert [(role, name) for role, name in named if role in roles - {"figure", "group"} and not name.strip()] == []
    assert sum(role == "table" for role, _ in named) >= 1
    assert sum(role == "columnheader" for role, _ in named) >= 15
    assert sum(role == "rowheader" for role, _ in named) >= 63
    charts = [name for role, name in named if role == "group" and "Arrow keys walk" in name]
    assert len(charts) >= 4
    assert any("On the front: " in name for name in charts)


def test_motion_is_left_out_where_a_person_asks_for_it(show: Show) -> None:
    browser = show()
    script = "return getComputedStyle(document.querySelector('.mark')).transitionDuration"
    assert browser.execute_script(script) == "0s"
    browser = show(**{"prefers-reduced-motion": "no-preference"})
    assert browser.execute_script(script) != "0s"


def test_without_javascript_the_page_is_a_static_table(show: Show, browser: Any) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    show(task=None)
    tables = seen(browser, "#table table")
    assert len(tables) == 3
    assert "LoRA again" in tables[1].text
    assert len(seen(browser, "#findings .findings")) == 3
    assert seen(browser, ".live") == []
    assert "must match the size of tensor b" in browser.find_element(By.ID, "cut").text


def test_labels_with_markup_are_only_text(show: Show, tmp_path: Path) -> None:
    odd = "</script><img src=x onerror='window.hacked=1'>"
    trials = [
        Trial(
            id=f"{label}{seed}",
            task=odd,
            method=f"own/{i}",
            label=label,
            seed=seed,
            quality=0.5 + 0.1 * i + 0.01 * seed,
            trainable=10 + i,
            recipe='{"method": "lora"}',
        )
        for i, label in enumerate((odd, "plain"))
        for seed in range(3)
    ]
    records.write(tmp_path, {"name": odd}, trials)
    browser = show(path=report.write(tmp_path, pictures=False), task=None)
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_element(By.TAG_NAME, "h1").text == odd
    assert labels(browser) == ["plain", odd]
    assert browser.find_elements(By.TAG_NAME, "img") == []
    mark = browser.find_elements(By.CSS_SELECTOR, ".mark")[0]
    browser.execute_script("arguments[0].focus()", mark)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert browser.find_element(By.ID, "card").is_displayed()


CONTRAST = """
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const under = (node) => {
  for (; node; node = node.parentElement) {
    const found = parse(getComputedStyle(node).backgroundColor);
    if (found.length < 4 || found[3] > 0.99) return found;
  }
  return parse(getComputedStyle(document.documentElement).backgroundColor);
};
const faint = [];
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  const apart = node.closest('script, style, :disabled, .away, select');
  if (!own || apart || !node.checkVisibility() || !node.getClientRects().length) continue;
  const style = getComputedStyle(node), size = parseFloat(style.fontSize);
  const ink = parse(node instanceof SVGElement ? style.fill : style.color), paper = under(node);
  const [a, b] = [light(ink), light(paper)], ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  if (ratio < (large ? 3 : 4.5)) faint.push(`${node.tagName} ${node.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
}
return faint;
"""
