"""
Heatmaps: the page, the picture, the terminal.

The page is tested in real Chromium. Playwright drives it, since `chromium --dump-dom` can neither hover nor press keys nor
say what went over the network.
"""

import io
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text
from rich.console import Console

from trl_perce.scoring.heatmap.page import write_html
from trl_perce.scoring.heatmap.palette import PALETTE, colour
from trl_perce.scoring.heatmap.pieces import NOTHING_TO_DRAW, most_personal, units_of
from trl_perce.scoring.heatmap.png import draw, write_png
from trl_perce.scoring.heatmap.terminal import print_heatmap
from trl_perce.scoring.scores import TokenScores


SETTINGS = {
    **{"model": "some/model", "adapter": None, "dataset": "some_rows", "counterfactual": "drop"},
    **{"weight_clip_min": 0.8, "weight_clip_max": 5.0},
}
NASTY = (
    "<script>alert(1)</script> </script> <!-- &amp; __DATA__ {{data}} \u2028 'x' \"y\" [bold]b[/bold] $x^2$ \x1b[31m"
)
RTL = "أحب الشعر \u202eabc"


def make_scores(row, tokens, pir, persona="I sew.", query="What now?", skipped=None, offsets=None):
    """Scores of tokens laid end to end. Their log-probabilities are −2, −3, … with the persona."""
    response = "".join(tokens)
    if offsets is None:
        ends = np.cumsum([len(token) for token in tokens]).tolist()
        offsets = list(zip([0, *ends], ends, strict=False))
    pir = np.array(pir, dtype=np.float32)
    log_probs = -2 - np.arange(len(pir), dtype=np.float32)
    return TokenScores(
        row=row,
        persona=persona,
        query=query,
        response=response,
        tokens=[response[start:end] for start, end in offsets],
        offsets=offsets,
        is_special=np.array([response[start:end].startswith("<|") for start, end in offsets], dtype=bool),
        log_probs=log_probs,
        counterfactual_log_probs=log_probs - pir,
        pir=pir,
        weights=np.where(np.isnan(pir), 1, np.clip(pir, 0.8, 5)).astype(np.float32),
        is_personal=pir > 1,
        threshold=1.0,
        num_tokens=100,
        num_counterfactual_tokens=0 if np.isnan(pir).all() else 40,
        num_persona_tokens=60,
        skipped=skipped,
    )


def emoji_scores(row=0, persona="I sew."):
    response = "a 🧵 b"  # the emoji is three tokens
    offsets = [(0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (3, 5)]
    return make_scores(row, [response], [0.1, 0.2, 0.5, 0.6, 0.7, -2.0], persona, offsets=offsets)


@pytest.fixture(scope="module")
def rows():
    nan = float("nan")
    return [
        make_scores(
            0, ["Buy", " nee", "dles", " and", " linen", ".", "<|im_end|>"], [0.2, 2.5, 1.5, -0.1, 4.0, 0.0, 1.1]
        ),
        make_scores(1, [NASTY, " ok", "\n\n", "fine"], [3.0, 0.5, 0.2, -4.0], persona=NASTY, query=NASTY),
        make_scores(2, ["plain", " words"], [nan, nan], persona="", query="No one asks"),
        make_scores(3, [], [], persona="Someone", skipped="longer than max_length"),
        emoji_scores(4, "I sew, too."),
        make_scores(5, ["كتاب", " جديد"], [-1.5, -0.5], persona=RTL),
        make_scores(6, ["x", " yarn"], [6.0, 9.0], persona="I knit. " * 100 + "The End"),
    ]


def expected_share(rows, threshold):
    pir = np.concatenate([row.pir for row in rows])
    pir = pir[~np.isnan(pir)]
    return int((pir > np.float32(threshold)).sum()), len(pir)


# Colours and pieces


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(-3, 3, width=32)), max_size=20),
    st.integers(1, 4),
)
@settings(max_examples=50, deadline=None)
def test_a_picture_shows_the_most_personal_row_of_each_persona(personas_and_means, num_rows):
    rows = [
        make_scores(index, ["a", "b"], [mean - 1, mean + 1], persona=persona)
        for index, (persona, mean) in enumerate(personas_and_means)
    ]
    rows.insert(len(rows) // 2, make_scores(99, ["a"], [float("nan")], persona="a"))
    found = most_personal(rows, num_rows)
    best = {}
    for persona, mean in personas_and_means:
        best[persona] = max(mean, best.get(persona, -9))
    expected = sorted(best.values(), reverse=True)[:num_rows]
    assert [row.pir.mean() for row in found] == pytest.approx(expected, abs=1e-6)
    assert len({row.persona for row in found}) == len(found)


def luminance(hex_colour):
    channels = np.array([int(hex_colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear, float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_on_every_colour(theme):
    text = luminance(PALETTE[theme]["text"])[1]
    for pir in np.linspace(-7, 7, 281):
        background = luminance(colour(float(pir), theme))[1]
        contrast = (max(text, background) + 0.05) / (min(text, background) + 0.05)
        assert contrast >= 4.5, (pir, contrast)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_ends_differ_for_colour_blind_readers(theme):
    # Machado et al. 2009, full protanopia, deuteranopia and tritanopia, in linear RGB
    for matrix in (
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ):
        ends = [np.clip(np.array(matrix) @ luminance(colour(pir, theme))[0], 0, 1) for pir in (-5.0, 5.0)]
        assert np.abs(ends[0] ** (1 / 2.2) - ends[1] ** (1 / 2.2)).max() > 0.2


def test_colour_is_neutral_at_zero_and_full_from_the_scale_on():
    assert colour(0.0) == colour(float("nan")) == PALETTE["light"]["neutral"]
    assert colour(5.0) == colour(80.0) == colour(float("inf")) == PALETTE["light"]["positive"]
    assert colour(-5.0, "dark") == PALETTE["dark"]["negative"]
    assert len({colour(pir) for pir in (-4.0, -1.0, 0.0, 1.0, 4.0)}) == 5


def test_tokens_of_one_character_are_one_piece():
    units = units_of(emoji_scores())
    assert [(unit.start, unit.end) for unit in units] == [(0, 1), (1, 2), (2, 3), (3, 5)]
    assert units[2].pir == pytest.approx(1.8)


def test_a_token_without_text_goes_to_its_neighbour():
    offsets = [(0, 0), (0, 2), (2, 2), (2, 4)]
    units = units_of(make_scores(0, ["abcd"], [1.0, 2.0, 4.0, 8.0], offsets=offsets))
    assert [(unit.start, unit.end, unit.pir) for unit in units] == [(0, 2, 7.0), (2, 4, 8.0)]


def test_light_imports():
    code = "import sys, trl_perce.scoring.heatmap.page, trl_perce.scoring.heatmap.terminal, trl_perce.scoring.report; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("write", [write_html, write_png])
def test_a_file_is_whole_or_not_there(write, rows, tmp_path):
    path = tmp_path / "out" / "file"

    def broken():
        yield rows[0]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write(broken(), path, SETTINGS)
    assert not list(tmp_path.rglob("*.*"))
    write(rows, path, SETTINGS)
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_numbers_of_rows_must_be_positive(rows, tmp_path):
    for call in (
        lambda: write_html(rows, tmp_path / "a", SETTINGS, max_rows=0),
        lambda: write_png(rows, tmp_path / "a", SETTINGS, num_rows=0),
        lambda: print_heatmap(rows, Console(file=io.StringIO()), num_rows=-1),
    ):
        with pytest.raises(ValueError, match="must be 1 or more"):
            call()


# The page


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of some scores from the disk. At the end nothing may have been loaded, logged or asked."""
    contexts, faults = [], []

    def open_(scores, color_scheme="light", max_rows=1000, **context):
        write_html(iter(scores), tmp_path / "heatmap.html", SETTINGS, max_rows=max_rows)
        contexts.append(browser.new_context(color_scheme=color_scheme, **context))
        page = contexts[-1].new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: re.match("(file|data):", request.url) or faults.append(request.url))
        page.goto((tmp_path / "heatmap.html").as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not faults


def shown_rows(page):
    return [int(row) for row in page.eval_on_selector_all("article", "cards => cards.map(card => card.dataset.row)")]


def move_slider(page, value):
    page.eval_on_selector(
        "#threshold",
        "(slider, value) => { slider.value = value; for (const type of ['input', 'change'])"
        " slider.dispatchEvent(new Event(type)); }",
        value,
    )


def card(page, row):
    return page.locator(f"article[data-row='{row}']")


def background(locator):
    """Colour of a token as `#rrggbb`: its own over the card's."""
    over, under = (
        [float(number) for number in re.findall(r"[\d.]+", locator.evaluate(script))]
        for script in (
            "element => getComputedStyle(element).backgroundColor.replace('srgb', '')",
            "element => getComputedStyle(element.closest('article')).backgroundColor",
        )
    )
    alpha = over[3] if len(over) == 4 else 1.0
    return [255 * alpha * top + (1 - alpha) * bottom for top, bottom in zip(over, under, strict=False)]


def test_every_text_is_shown_as_text(open_page, rows):
    page = open_page(rows)
    assert card(page, 1).locator(".text").all_text_contents()[:2] == [NASTY, NASTY]
    assert card(page, 1).locator(".response").text_content() == rows[1].response
    assert card(page, 5).locator(".text").first.text_content() == RTL
    assert (
        page.evaluate("getComputedStyle(document.querySelector('article[data-row=\"5\"] .response')).direction")
        == "rtl"
    )
    assert page.locator("article script").count() == 0 and page.locator("script").count() == 2
    for row in rows:
        if row.skipped is None:
            assert card(page, row.row).locator(".response").text_content() == row.response


def test_half_a_surrogate_pair_and_no_character_at_all(open_page):
    page = open_page([make_scores(0, ["x\x00\ud83d", " y"], [2.0, 0.0], persona="\udc00p")])
    assert card(page, 0).locator(".text").first.text_content().endswith("p")
    assert card(page, 0).locator(".personal").count() == 1


def test_the_policy_stops_scripts_styles_and_requests_that_are_not_ours(browser, rows, tmp_path):
    write_html(rows, tmp_path / "heatmap.html", SETTINGS)
    context = browser.new_context()
    page, requests = context.new_page(), []
    page.goto((tmp_path / "heatmap.html").as_uri())
    page.on("requestfinished", lambda request: requests.append(request.url))
    stopped = page.evaluate("""async () => {
        const stopped = [];
        document.addEventListener("securitypolicyviolation", (event) => stopped.push(event.effectiveDirective));
        for (const [tag, text] of [["script", "window.ran = true"], ["style", "article { display: none }"]]) {
            const element = document.createElement(tag);
            element.textContent = text;
            document.body.append(element);
        }
        const image = document.createElement("img");
        image.src = "https://example.com/a.png";
        document.body.append(image);
        await fetch("https://example.com").catch(() => {});
        await new Promise((done) => setTimeout(done, 50));
        return [window.ran === undefined, getComputedStyle(document.querySelector("article")).display, ...stopped.sort()];
    }""")
    context.close()
    assert stopped == [True, "block", "connect-src", "img-src", "script-src-elem", "style-src-elem"]
    assert not requests


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0, 1.5, 2.37, 5.0])
def test_the_slider_marks_tokens_and_counts_them_as_numpy_does(open_page, rows, threshold):
    page = open_page(rows)
    assert page.locator("#threshold-value").text_content() == "1.00 nats"
    move_slider(page, threshold)
    personal, number = expected_share(rows, threshold)
    share = personal / number
    status = page.locator("#status").text_content()
    assert f": {personal} of {number} tokens" in status and status.startswith("7 of 7 rows")
    assert float(re.search(r"([\d.]+) %", status)[1]) == pytest.approx(100 * share, abs=0.51)
    for row in (rows[0], rows[6]):
        personal, number = expected_share([row], threshold)
        assert f": {personal} of {number} tokens" in card(page, row.row).locator(".share").text_content()
        assert card(page, row.row).locator(".t.personal").count() == personal
    # Not by colour alone
    marked = card(page, 6).locator(".t.personal").first
    assert "underline" in marked.evaluate("element => getComputedStyle(element).textDecorationLine")


def test_a_threshold_of_another_scoring_is_where_the_slider_starts(open_page, rows):
    scores = make_scores(0, ["a", "b", "c"], [0.3, 0.34, 0.4])
    scores.threshold = 1 / 3
    page = open_page([scores])
    assert ": 2 of 3 tokens" in page.locator("#status").text_content()


def test_search(open_page, rows):
    page = open_page(rows)
    for text, found in (
        ("LINEN", [0]),
        ("the end", [6]),
        ("no one", [2]),
        ("</script>", [1]),
        ("i sew", [0, 4]),
        ("zebra", []),
        ("", [0, 1, 2, 3, 4, 5, 6]),
    ):
        page.locator("#search").fill(text)
        assert shown_rows(page) == found
        assert page.locator("#status").text_content().startswith(f"{len(found)} of 7 rows")
    page.locator("#search").fill("linen")
    assert ": 4 of 7 tokens" in page.locator("#status").text_content()


def test_sort(open_page, rows):
    page = open_page(rows)
    with_pir = [row for row in rows if len(row.pir) and not np.isnan(row.pir).all()]
    share = {row.row: (row.pir > 1).mean() for row in with_pir}
    mean = {row.row: row.pir.mean(dtype=float) for row in with_pir}
    for name, keys, sign in (("share", share, -1), ("-share", share, 1), ("mean", mean, -1), ("-mean", mean, 1)):
        page.locator("#sort").select_option(name)
        order = sorted(keys, key=lambda row, keys=keys, sign=sign: (sign * keys[row], row))
        assert shown_rows(page) == [*order, 2, 3], name  # those without a PIR at the end
    page.locator("#sort").select_option("share")
    move_slider(page, 3.9)  # the order follows the threshold
    share = {row.row: (row.pir > 3.9).mean() for row in with_pir}
    assert shown_rows(page)[:5] == sorted(share, key=lambda row: (-share[row], row))
    page.locator("#sort").select_option("row")
    assert shown_rows(page) == [0, 1, 2, 3, 4, 5, 6]


def test_words(open_page, rows):
    page = open_page(rows)
    page.locator("[data-view=words]").click()
    words = card(page, 0).locator(".t:not(.special)")
    assert words.all_text_contents() == ["Buy", "needles", "and", "linen"]
    assert card(page, 0).locator(".t.personal:not(.special)").all_text_contents() == ["needles", "linen"]
    assert card(page, 0).locator(".response").text_content() == rows[0].response
    assert card(page, 0).locator(".share").text_content() == "50 % personal: 2 of 4 words"
    words.nth(1).hover()
    tip = page.locator("#tip").inner_text()
    assert "PIR +4.00 nats, personal" in tip and "+2.50" in tip and "+1.50" in tip
    move_slider(page, 4)
    assert card(page, 0).locator(".t.personal").count() == 0
    page.locator("[data-view=tokens]").click()
    assert card(page, 0).locator(".t").count() == 7


def test_numbers_of_a_token_on_hover_keys_and_tap(open_page, rows):
    page = open_page(rows, viewport={"width": 390, "height": 844}, has_touch=True)
    tokens, tip = card(page, 0).locator(".t"), page.locator("#tip")
    assert tip.is_hidden()
    tokens.nth(1).hover()
    # PIR 2.5; log P −3 with the persona, −5.5 without; weight 2.5
    assert all(part in tip.inner_text() for part in ("nee", "+2.50", "−3.00", "5.0 %", "−5.50", "0.4 %", "2.50"))
    assert "personal" in tip.inner_text()
    page.mouse.move(0, 0)
    assert tip.is_hidden()

    page.locator("#threshold").focus()
    page.keyboard.press("Tab")  # each response is one stop
    assert "−2.00" in tip.inner_text() and "+0.20" in tip.inner_text() and "0.80" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "dles" in tip.inner_text() and "+1.50" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('article').dataset.row") == "1"

    tokens.nth(4).tap()
    assert "linen" in tip.inner_text() and tip.is_visible()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_tokens_of_one_emoji_are_coloured_as_one(open_page):
    page = open_page([emoji_scores()])
    pieces = card(page, 0).locator(".t")
    assert pieces.all_text_contents() == ["a", " ", "🧵", "b"]
    assert card(page, 0).locator(".response").text_content() == "a 🧵 b"
    pieces.nth(2).hover()
    tip = page.locator("#tip").inner_text()
    assert "🧵 PIR +1.80 nats" in tip and all(part in tip for part in ("+0.50", "+0.60", "+0.70"))
    assert ": 0 of 6 tokens" in page.locator("#status").text_content()


def test_special_tokens_rows_without_persona_and_skipped_rows(open_page, rows):
    page = open_page(rows)
    special = card(page, 0).locator(".special")
    assert special.all_text_contents() == ["<|im_end|>"]
    assert background(special)[:3] == [255, 255, 255]
    assert "no persona" in card(page, 2).locator(".share").text_content()
    assert card(page, 2).locator(".positive, .negative, .personal").count() == 0
    assert card(page, 3).locator(".share").text_content() == "skipped: longer than max_length"
    assert card(page, 3).locator(".response").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_pythons_in_both_themes(open_page, rows, theme):
    page = open_page(rows, color_scheme="dark" if theme == "light" else "light")
    page.locator("#theme").click()  # against the system's
    for index, pir in enumerate(rows[0].pir[:6].tolist()):
        expected = [int(colour(pir, theme)[i : i + 2], 16) for i in (1, 3, 5)]
        assert background(card(page, 0).locator(".t").nth(index)) == pytest.approx(expected, abs=1)
    text = page.evaluate("getComputedStyle(document.querySelector('.t')).color")
    expected = [int(PALETTE[theme]["text"][i : i + 2], 16) for i in (1, 3, 5)]
    assert [int(number) for number in re.findall(r"\d+", text)] == expected
    page.locator("#theme").click()
    assert background(card(page, 0).locator(".t").nth(4)) != pytest.approx(expected, abs=1)


def test_a_long_persona_opens_and_closes(open_page, rows):
    page = open_page(rows)
    full = card(page, 6).get_by_text("The End")
    assert full.is_hidden()
    card(page, 6).locator("summary").click()
    assert full.is_visible()
    card(page, 6).locator("summary").get_by_text("less").wait_for()  # the browser says a little later that it is open


def test_rows_that_are_left_out_are_counted(open_page, rows):
    page = open_page(rows, max_rows=3)
    assert "first 3 of 7 rows are shown, 4 are left out" in page.locator("#left-out").inner_text()
    assert shown_rows(page) == [0, 1, 2]


def test_no_rows(open_page):
    page = open_page([])
    assert page.locator("#status").text_content() == "0 of 0 rows"
    assert page.locator("#left-out").is_hidden()


def test_pages_and_a_thousand_rows(open_page, tmp_path):
    rng = np.random.default_rng(0)
    tokens = [" token", "ized", " text", " of", " a", " person", ",", " and", " more", "."] * 25
    pir = rng.normal(0.3, 1.2, (1000, 250)).astype(np.float32)
    page = open_page([make_scores(row, tokens, pir[row], persona=f"Person {row}. " * 40) for row in range(1000)])
    assert (tmp_path / "heatmap.html").stat().st_size < 12e6
    first = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert len(shown_rows(page)) == 25
    # Bounds with room for a busy machine; on an idle one they take a tenth
    measure = """([id, value]) => {
        const start = performance.now(), element = document.getElementById(id);
        element.value = value;
        element.dispatchEvent(new Event("input"));
        document.body.getBoundingClientRect();
        return performance.now() - start;
    }"""
    slider, search = (page.evaluate(measure, [id, value]) for id, value in (("threshold", 2), ("search", "PERSON 77")))
    print(f"first cards {first:.0f} ms, slider {slider:.0f} ms, search {search:.0f} ms")
    assert first < 10_000 and slider < 1000 and search < 2000
    assert shown_rows(page) == [77, *range(770, 780)]
    page.locator("#search").fill("")
    assert f": {int((pir > 2).sum()):,} of 250,000 tokens" in page.locator("#status").text_content()
    page.locator("#next").click()
    assert shown_rows(page) == list(range(25, 50)) and "rows 26–50 of 1,000" in page.locator("#where").inner_text()
    page.locator("#sort").select_option("mean")
    assert shown_rows(page) == np.argsort(-pir.mean(1, dtype=np.float64), kind="stable")[:25].tolist()


# The picture


def test_picture_has_no_clipped_and_no_overlapping_text(rows, tmp_path):
    scores = [
        *(row for row in rows if row.row in (0, 1, 4, 5, 6)),
        make_scores(7, ["see ", "x" * 500, *[" word"] * 300], np.linspace(-6, 6, 302), persona="语" * 900),
    ]
    long_names = {**SETTINGS, "model": "organisation/" + "model-" * 30, "adapter": "outputs/" + "a" * 200}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(scores, long_names)
        figure.savefig(tmp_path / "a.png")
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for axes in figure.axes for text in axes.findobj(Text) if text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_visible()]
    assert len(boxes) > 320
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    edges = np.array([box.extents for _, box in boxes])
    for index, (left, bottom, right, top) in enumerate(edges[:-1]):
        others = edges[index + 1 :]
        across = np.minimum(others[:, 2], right) - np.maximum(others[:, 0], left)
        along = np.minimum(others[:, 3], top) - np.maximum(others[:, 1], bottom)
        over = (across > 2.5) & (along > 2.5)  # pixels at 200 an inch
        assert not over.any(), (boxes[index][0], boxes[index + 1 + int(over.argmax())][0])
    words = " ".join(text for text, _ in boxes)
    assert "(cut: 300 of 900 characters)" in words and "□" in words and "a character that no font" in words
    assert words.count("word") < 301 + 5


def test_picture_colours_tokens_and_says_when_there_is_nothing(rows, tmp_path):
    write_png(rows[:2], tmp_path / "a.png", SETTINGS, num_rows=2)
    pixels = (imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    assert imread(tmp_path / "a.png").shape[1] == 1400
    for pir in (2.5, 4.0, -4.0):
        expected = [int(colour(pir)[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - expected).max(1) <= 1).sum() > 300
    write_png(rows[2:4], tmp_path / "b.png", SETTINGS)
    assert (tmp_path / "b.png").stat().st_size > 1000


# The terminal


def printed(rows, **options):
    console = Console(file=io.StringIO(), width=100, **{"force_terminal": False, **options})
    print_heatmap(rows, console, num_rows=10)
    return console.file.getvalue()


def test_piped_text_shows_personal_tokens(rows):
    text = printed(rows)
    assert "Buy [nee +2.5][dles +1.5] and [linen +4.0].[<|im_end|> +1.1]" in text
    assert "\x1b" not in text and "[bold]b[/bold]" in text and "␛[31m" in text
    assert "Row 0: 57 % personal (4 of 7 tokens), mean PIR +1.31 nats" in text
    assert "Row 2" not in text and "Row 3" not in text  # they have no PIR
    assert "[🧵 +1.8]" in text
    assert "… (cut: 300 of 807 characters)" in text


def test_a_console_that_has_no_colours_gets_the_piped_text(rows):
    assert "[linen +4.0]" in printed(rows, force_terminal=True, no_color=True)


def test_terminal_colours_are_those_of_the_picture(rows):
    text = printed(rows, force_terminal=True, color_system="truecolor")
    red, green, blue = (int(colour(4.0)[i : i + 2], 16) for i in (1, 3, 5))
    assert re.search(rf"\x1b\[4;[\d;]*48;2;{red};{green};{blue}mlinen\x1b\[0m", text)  # 4: underlined
    assert "\x1b[31m" not in text  # the escape sequence in the data
    assert "[bold]b[/bold]" in text.replace("\x1b[0m", "")


def test_white_space_at_the_end_leaves_no_empty_line():
    text = printed([make_scores(0, ["Buy", " linen", ".", "<|im_end|>", "\n"], [0.2, 4.0, 0.0, 0.1, 0.3])])
    assert "Buy [linen +4.0].<|im_end|>\n\n[…]" in text


def test_terminal_without_rows_to_show(rows):
    assert NOTHING_TO_DRAW in printed(rows[2:4])
