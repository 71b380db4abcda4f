"""The page, the Markdown and the terminal's text of a comparison: the same figures, whatever texts are in it."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from compare_findings import ARABIC, CHINESE, LONG, SCRIPT, example_findings, with_little, with_more_arms
from trl_perce.compare.page import write_html
from trl_perce.compare.text import print_findings, write_markdown
from trl_perce.scoring.heatmap.pieces import printable


# Means of untrained, CE and PerCE, the change, its interval and what it means
FIGURES = {
    "Personal tokens": ["−3.21", "−3.02", "−2.88", "+0.14", "[+0.05, +0.20]", "better"],
    "Other tokens": ["−2.55", "−2.31", "−2.35", "−0.04", "[−0.06, −0.02]", "worse"],
    "… of users trained on": ["−5.30", "−5.10", "−5.04", "+0.06"],
    "Words of the persona": ["2.96", "1.44", "1.83", "+0.39", "[−0.04, +0.83]", "unclear"],
    "Answers with persona words": ["5.2", "3.1", "9.4", "+6.3", "[+2.1, +10.5]", "worse"],
    "The right one is likeliest": ["29.2", "34.6", "37.5", "+2.9", "[−1.0, +6.9]", "unclear"],
    "ROUGE-L": ["0.12", "0.15", "0.16", "+0.00", "[−0.01, +0.02]", "unclear"],
    "Length": ["128.0", "23.4", "26.1", "+2.8", "[+0.4, +5.1]", "higher"],
}
COST = {
    "CE": ["1 min 01 s", "1.00 ×", "2.0 GiB (process)", "1.00 ×"],
    "PerCE": ["1 min 42 s", "1.68 ×", "3.0 GiB (process)", "1.50 ×"],
}
INTERVALS = ["[−3.54, −2.89]", "[−3.32, −2.72]", "[−3.17, −2.59]", "[+0.12, +0.27]", "240 (42)"]
VARIANTS = {"all": lambda findings: findings, "little": with_little, "more": with_more_arms}


class Page(HTMLParser):
    """Tags with their attributes, and what a reader gets to read."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.rows, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "style"):
            self.inside = tag
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.inside != "style":
            self.texts.append(data)
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.inside = None if tag == self.inside else self.inside


def page_of(findings, tmp_path):
    write_html(findings, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def markdown_of(findings, tmp_path):
    write_markdown(findings, tmp_path / "report.md")
    return (tmp_path / "report.md").read_text(encoding="utf-8")


def printed(findings):
    console = Console(file=io.StringIO(), width=80)
    print_findings(findings, console)
    return console.file.getvalue()


def assert_shown(figures, text):
    """The first four in their order, the others somewhere."""
    end = 0
    for index, figure in enumerate(figures):
        end = find(figure, text, end if index < 4 else 0)


def find(figure, text, start=0):
    found = re.compile(rf"(?<![\d.−+]){re.escape(figure)}(?![\d.])").search(text, start)
    assert found, (figure, text)
    return found.end()


def test_the_figures_are_the_same_in_all_reports(tmp_path):
    findings = example_findings()
    rows = [[" ".join(cell.split()) for cell in row] for row in Page(page_of(findings, tmp_path)).rows]
    lines = markdown_of(findings, tmp_path).replace("\\", "").splitlines()
    # A title that takes two lines has its figures in the last
    terminal = re.sub(r"\n {4,}(?=\S)", " ", printed(findings))
    for title, figures in FIGURES.items():
        (row, whole) = (row for row in rows if row[0].startswith(title))
        assert_shown(figures, " ".join(row[1:]))
        (line, whole_line) = (line for line in lines if line.startswith(f"| {title}"))
        assert_shown(figures, line)
        (line,) = (line for line in terminal.splitlines() if line.startswith(f"  {title}"))
        assert_shown(figures, line)
        if title == "Personal tokens":
            assert_shown(INTERVALS, " ".join(whole))
            assert_shown(INTERVALS, whole_line)
    for label, figures in COST.items():
        assert [label, *figures] in rows and f"| {label} | {' | '.join(figures)} |" in lines
        (line,) = (line for line in terminal.splitlines() if line.startswith(f"{label} "))
        assert_shown(figures, line)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_verdict_comes_first(tmp_path, variant):
    findings = VARIANTS[variant](example_findings())
    text = printed(findings)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    first, *others = findings["verdict"]["sentences"]
    assert " ".join(text.split()).startswith(" ".join([first, *others]))
    assert markdown_of(findings, tmp_path).replace("\\", "").startswith(f"# {first}\n")
    page = Page(page_of(findings, tmp_path))
    shown = " ".join("".join(page.texts).replace("\u00a0", " ").split())
    answer = findings["verdict"]["answer"].capitalize()
    assert f"Is PerCE more personal than CE? {answer} {' '.join([first, *others])}" in shown
    for said in (*findings["verdict"]["remarks"], *findings["verdict"]["rules"]):
        assert said.replace("`", "") in shown
    for arm in ("uniform", "dft") if variant == "more" else ():
        assert shown.count(f"{findings['labels'][arm]} against CE") > 3
        assert_shown(FIGURES["Other tokens"], text[text.index(findings["labels"][arm].split()[-1]) :])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_page_is_one_file_and_every_text_a_text(tmp_path, variant):
    findings = VARIANTS[variant](example_findings())
    text = page_of(findings, tmp_path)
    page = Page(text)
    allowed = {"a", "script", "img", "iframe", "object", "form", "input", "base", "embed"} & {
        tag for tag, _ in page.tags
    }
    assert not allowed
    for _, attributes in page.tags:
        assert not {"src", "srcset", "style", "action"} & {*attributes}
        assert attributes.get("href", "data:,") == "data:,"
        assert not any(name.startswith("on") for name in attributes)
    (style,) = re.findall("<style>(.*?)</style>", text, re.S)
    assert "url(" not in style and "@import" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = (attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; ")
    shown = "".join(page.texts)
    for piece in (SCRIPT, ARABIC, CHINESE, LONG) if findings["answers"] else ("None were generated.",):
        assert shown.count(printable(piece)) > 1 or not findings["answers"]
        assert printable(piece) in shown
    # Tables have a caption and heads, the plot a text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") == tags.count("thead") > 2
    assert all(
        attributes.get("aria-label") or attributes.get("aria-hidden") for tag, attributes in page.tags if tag == "svg"
    )


def test_answers_are_coloured_and_their_personal_words_marked(tmp_path):
    findings = example_findings()
    text = page_of(findings, tmp_path)
    assert '<span class="t p14 personal" title="+3.1 nats">am</span> ' in text  # 20 · (3.1 / 5)^0.7 = 14.3
    assert '<span class="t n20" title="−6.0 nats">at</span>' in text
    assert '<span class="t " title="+0.0 nats">spend</span>' in text
    markdown = markdown_of(findings, tmp_path)
    assert (
        "\n- PerCE: I <b>will</b> buy <b>linen</b> at <b>the</b> market and sew two dresses <b>for</b> my" in markdown
    )
    assert not re.search(r"(?<!\\)<(?!/?b>)", markdown) and "\x1b" not in markdown and "\n- CE: (empty)\n" in markdown
    assert "left out.\n" in markdown and "for `max_length`" in markdown


def test_the_plot_shows_changes_where_they_are(tmp_path):
    findings = example_findings()
    page = Page(page_of(findings, tmp_path))
    (zero,) = {attributes["x1"] for _, attributes in page.tags if attributes.get("class") == "zero"}
    ticks = dict(re.findall(r'<text x="([\d.]+)%" y="1.1rem">(.*?)</text>', page_of(findings, tmp_path)))
    zero, unit = float(zero[:-1]), max(map(float, ticks))
    top = float(ticks[f"{unit}"])
    nats = [(float(x[:-1]) - zero) / (unit - zero) * top for x in circles(page)]
    measures = [measure["changes"]["perce"] for measure in findings["measures"] if measure["unit"] == "nats"]
    assert nats == pytest.approx([change["difference"] for change in measures], abs=1e-4)
    ends = [
        (float(attributes[name][:-1]) - zero) / (unit - zero) * top
        for _, attributes in page.tags
        if attributes.get("class", "").startswith("mark") and "x1" in attributes
        for name in ("x1", "x2")
    ]
    expected = [end for change in measures for end in change["interval"] or ()]
    assert ends == pytest.approx(expected, abs=1e-4)


def circles(page):
    return [attributes["cx"] for tag, attributes in page.tags if tag == "circle"]


# The lowest contrast of all texts that are seen, each against what lies behind it
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => rgba(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
  };
  let least = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(element.closest("svg") ? style.fill : style.color), luminance(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < least[0]) least = [contrast, element.className + ": " + element.textContent.slice(0, 40)];
  }
  return least;
}"""
WIDE = """() => [document.documentElement.scrollWidth, ...[...document.querySelectorAll("body *")]
  .filter((element) => !element.closest("thead") && element.getBoundingClientRect().right > innerWidth + 1).map((element) => element.outerHTML.slice(0, 80))]"""


def test_the_page_in_a_browser(browser, tmp_path):
    requests, faults = [], []
    for variant, change in VARIANTS.items():
        write_html(change(example_findings()), tmp_path / f"{variant}.html")
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme=scheme)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: faults.append(message.text))
        for variant in VARIANTS:
            page.goto((tmp_path / f"{variant}.html").as_uri())
            assert page.evaluate(WIDE) == [360], variant
            for details in page.locator("details").all():
                details.evaluate("(details) => { details.open = true; }")
            assert page.evaluate(WIDE) == [360], variant
            least, where = page.evaluate(CONTRAST)
            assert least >= 4.5, (scheme, variant, where)
        if scheme == "dark":
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 23)"
            # On paper it is light, and what is folded is there
            page.reload()
            rules = page.locator("details li").first
            assert not rules.is_visible()
            page.emulate_media(media="print")
            assert rules.is_visible()
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert all(url.startswith(("file:", "data:")) for url in requests) and not faults
