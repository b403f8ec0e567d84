"""The report for people, in a real browser: Debian's chromium."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fxfuse
from fxfuse import cli, zoo
from fxfuse.drawing import Drawing, Node, Row, drawing
from fxfuse.page import Subject, page
from fxfuse.records import Fold, Refusal, Report
from fxfuse.summary import Summary, summarised
from tests.support import randomise

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
X = torch.randn(2, 3, 8, 8)
NOTHING = Summary(0, 0.0, None, None)
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "</style></title></svg><b id=injected>x</b>",
    "'\"`{{ 7 * 7 }}&lt;b&gt;",
]
# The contrast of every text that is shown to what it stands on, as WCAG 2 defines it.
CONTRASTS = """
() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = numbers(color).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const isOpaque = (color) => color !== "none" && (numbers(color)[3] ?? 1) === 1;
  const ground = (element) => {
    const row = element.closest(".row");
    const band = row && [...document.querySelectorAll(".band")].find(
      (each) => each.getAttribute("y") === row.querySelector(".frame").getAttribute("y"));
    if (band && isOpaque(getComputedStyle(band).fill)) return getComputedStyle(band).fill;
    for (let each = element; each; each = each.parentElement) {
      if (isOpaque(getComputedStyle(each).backgroundColor)) return getComputedStyle(each).backgroundColor;
    }
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest("script, title, option")) continue;
    const style = getComputedStyle(element);
    const [one, other] = [element.closest("svg") ? style.fill : style.color, ground(element)].map(light);
    found.push([(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), texts.currentNode.data]);
  }
  return found;
}
"""


def network():
    """Three norms: one is folded, one is left behind a ReLU, and one after the other."""
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid(),
            nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
        )
    ).float()  # fmt: skip


class Branches(nn.Module):
    """Of these convolutions two become one, and one stays."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.far, self.norm = nn.Conv2d(3, 3, 3, padding=2, dilation=2), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.one(x) + self.norm(self.two(x)) + self.far(x) + x


def page_of(model, name="net:network", inputs=(X,)):
    fused = fxfuse.fuse(model, example_inputs=inputs)
    report = fxfuse.report(fused)
    numbers = summarised(model, inputs), summarised(fused, inputs)
    return page(Subject(name, "its own weights"), report, numbers, drawing(model, fused, report, inputs))


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page, and sees to it that nothing is complained of, asked for or requested."""
    context = browser.new_context(viewport={"width": 1200, "height": 700})
    complaints, requests = [], []

    def opened(text):
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield opened
    context.close()
    assert not complaints
    assert requests == [(tmp_path / "report.html").as_uri()] * len(requests)


def column(tab, number):
    """What a user sees in a column of the table, from top to bottom."""
    cells = tab.locator(f"#table tbody tr:visible td:nth-child({number})")
    return [text.strip() for text in cells.all_inner_texts()]


def row_in_view(tab, selector):
    """Whether the middle of the element is what is seen at that place."""
    return tab.locator(selector).evaluate(
        """element => {
          const frame = element.getBoundingClientRect();
          const [x, y] = [frame.x + frame.width / 2, frame.y + frame.height / 2];
          return 0 <= y && y <= innerHeight && element.contains(document.elementFromPoint(x, y));
        }"""
    )


def test_it_opens_and_says_what_happened(show):
    tab = show(page_of(network()))
    assert tab.title() == "net:network – fxfuse report"
    assert tab.get_by_role("heading", level=1).inner_text() == "net:network"
    verdicts = tab.locator(".verdict").all_inner_texts()
    assert verdicts[0] == "2 of 4 batch norms folded, 2 left" and verdicts[1].startswith("Verified")
    assert "right" in tab.locator(".verdict").nth(1).get_attribute("class")
    numbers = tab.locator(".summary tbody tr").all_inner_texts()
    assert numbers[0].split("\t")[1:] == ["4", "2", "−50.00 %"]
    assert all("not measured" not in line for line in numbers)


def test_the_table_names_every_norm_with_its_outcome(show):
    tab = show(page_of(network()))
    assert column(tab, 2) == ["1", "3", "5", "8"]
    assert column(tab, 3) == ["folded", "left", "left", "folded"]
    assert column(tab, 4) == ["", "FXF102", "FXF102", ""]
    shown = column(tab, 5)
    assert (shown[0], shown[3]) == ("0", "7") and "ReLU" in shown[1]
    assert "put the norm directly after the convolution" in shown[1]


def test_the_branches_are_listed_and_lead_to_the_operator_that_does_it_all(show):
    tab = show(page_of(randomise(nn.Sequential(Branches(), nn.Conv2d(3, 4, 1), nn.ReLU())).float()))
    table = tab.locator("#branches-table")
    merged, apart = [row.split("\t") for row in table.locator("tbody tr").all_inner_texts()]
    assert merged[:4] == ["0.far, 0.two", "merged", "", "0.far"] and "in Branches.forward" in merged[4]
    assert float(merged[5]) < 1e-6
    assert apart[:3] == ["0.far + 0.one", "apart", "FXF701"]
    assert tab.locator(".verdict").nth(1).inner_text() == "1 operator does what several did"
    link = table.get_by_role("link", name="0.far")
    link.click()
    target = link.get_attribute("href")
    assert "0.far" in tab.locator(target).text_content()
    assert "folded" in tab.locator(target).get_attribute("class")
    gone = tab.locator("g.row.gone").all_text_contents()
    assert any("0.two" in each for each in gone) and any("0.norm" in each for each in gone)


def test_the_table_sorts_by_a_column_both_ways_with_empty_cells_last(show):
    tab = show(page_of(network()))
    head = tab.get_by_role("columnheader", name="Outcome")
    head.get_by_role("button").click()
    assert column(tab, 3) == ["folded", "folded", "left", "left"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert column(tab, 3) == ["left", "left", "folded", "folded"]
    tab.get_by_role("columnheader", name="Code").get_by_role("button").click()
    assert column(tab, 4) == ["FXF102", "FXF102", "", ""]
    tab.get_by_role("columnheader", name="Code").get_by_role("button").press("Enter")
    assert column(tab, 4) == ["FXF102", "FXF102", "", ""]
    tab.get_by_role("columnheader", name="#").get_by_role("button").click()
    assert column(tab, 1) == ["1", "2", "3", "4"]


def test_numbers_sort_as_numbers(show):
    errors = (2e-7, 1e-16, None, 3e-12)
    folds = tuple(Fold(f"layer.{9 + n}", ("conv",), "backward", "", e) for n, e in enumerate(errors))
    tab = show(page(Subject("m", "w"), Report("M", folds, ()), (NOTHING, NOTHING), None))
    tab.get_by_role("columnheader", name="Error").get_by_role("button").click()
    assert column(tab, 8) == ["1.0e-16", "3.0e-12", "2.0e-07", ""]
    tab.get_by_role("columnheader", name="Norm").get_by_role("button").click()
    assert column(tab, 2) == ["layer.9", "layer.10", "layer.11", "layer.12"]


def test_the_table_filters_by_text_and_outcome(show):
    tab = show(page_of(network()))
    tab.get_by_label("Filter").fill("sigmoid")
    assert column(tab, 2) == ["5"] and tab.locator("#shown").inner_text() == "1 of 4 shown"
    tab.get_by_label("Filter").fill("")
    tab.get_by_label("Outcome").select_option("folded")
    assert column(tab, 2) == ["1", "8"]
    tab.get_by_label("Outcome").select_option("FXF102")
    assert column(tab, 2) == ["3", "5"]
    tab.get_by_label("Filter").press("Enter")
    assert column(tab, 2) == ["3", "5"]


def test_a_node_leads_to_its_row_and_back_even_to_one_that_is_filtered_out(show):
    tab = show(page_of(network()))
    tab.get_by_label("Filter").fill("relu")
    assert column(tab, 2) == ["3"]
    tab.locator("#node-2 a").first.click()
    tab.wait_for_function("location.hash === '#norm-1'")
    tab.wait_for_timeout(100)
    assert row_in_view(tab, "tr:target") and tab.locator("tr:target td").nth(1).inner_text() == "1"
    background = tab.locator("tr:target").evaluate("e => getComputedStyle(e).backgroundColor")
    assert background != tab.locator("#norm-2").evaluate("e => getComputedStyle(e).backgroundColor")
    tab.locator("tr:target a").press("Enter")
    tab.wait_for_function("location.hash === '#node-2'")
    tab.wait_for_timeout(100)
    node = tab.locator(".row:target")
    assert "BatchNorm2d" in node.inner_html() and row_in_view(tab, ".row:target a")
    frame = node.locator(".frame").evaluate("e => getComputedStyle(e).stroke")
    assert frame != tab.locator("#node-3 .frame").evaluate("e => getComputedStyle(e).stroke")


def test_every_link_leads_somewhere(show):
    tab = show(page_of(network()))
    targets = tab.locator("a").evaluate_all("links => links.map(link => link.getAttribute('href').slice(1))")
    assert len(targets) == 4 + 2 + 2 + 2 * 2  # rows, codes, norms that are gone, norms that are left
    assert all(tab.locator(f'[id="{target}"]').count() == 1 for target in targets)


def test_the_search_marks_nodes_and_goes_through_them(show):
    tab = show(page_of(nn.Sequential(*(network() if n == 0 else nn.Sigmoid() for n in range(80))).eval()))
    field, found = tab.get_by_label("Search"), tab.locator("#found")
    field.fill("batchnorm2d")
    assert found.inner_text() == "1 of 4" and tab.locator(".row.hit").count() == 4
    field.press("Enter")
    assert found.inner_text() == "2 of 4" and tab.locator(".row.current").get_attribute("id") == "node-4"
    field.fill("output")
    assert tab.locator(".row.hit").count() == 1 and row_in_view(tab, ".row.hit text >> nth=0")
    field.fill("no such node")
    assert found.inner_text() == "not found" and tab.locator(".row.hit").count() == 0


def test_the_graph_zooms_by_button_key_and_wheel(show):
    tab = show(page_of(network()))
    canvas = tab.locator("#canvas")
    width = lambda: canvas.locator("svg").bounding_box()["width"]  # noqa: E731
    start = width()
    tab.get_by_role("button", name="Zoom in").click()
    assert width() == pytest.approx(1.25 * start, abs=0.1)
    tab.get_by_role("button", name="Zoom out").click()
    assert width() == pytest.approx(start, abs=0.1)
    canvas.press("-")
    assert width() == pytest.approx(0.8 * start, abs=0.1)
    canvas.hover()
    tab.keyboard.down("Control")
    tab.mouse.wheel(0, -400)
    tab.keyboard.up("Control")
    tab.wait_for_timeout(200)
    assert width() > start
    tab.get_by_role("button", name="Fit to width").click()
    assert width() == pytest.approx(canvas.evaluate("e => e.clientWidth"), abs=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_readable_in_light_and_dark(show, scheme):
    tab = show(page_of(nn.Sequential(*randomise(nn.Sequential(Branches())).float(), *network()).eval()))
    tab.emulate_media(color_scheme=scheme)
    tab.locator("details").evaluate("e => e.open = true")
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
    for where in ("", "#norm-1", "#norm-2", "#why-2"):
        tab.evaluate("hash => location.hash = hash", where)
        found = tab.evaluate(CONTRASTS)
        assert len(found) > 60
        assert [each for each in found if each[0] < 4.5] == []


def test_the_graph_shows_before_and_after_in_the_same_rows(show):
    tab = show(page_of(network()))
    gone, left = tab.locator("#node-2"), tab.locator("#node-4")
    assert gone.locator("circle").count() == 1 and left.locator("circle").count() == 2
    heights = {circle.bounding_box()["y"] for circle in left.locator("circle").all()}
    assert len(heights) == 1
    fills = {
        state: tab.locator(f".band.{state}").first.evaluate("e => getComputedStyle(e).fill")
        for state in ("gone", "folded", "left")
    }
    assert len({*fills.values()}) == 3


@pytest.mark.parametrize("hostile", HOSTILE)
def test_markup_in_names_reasons_and_paths_is_shown_and_not_interpreted(show, hostile):
    fold = Fold(f"{hostile}norm", (f"{hostile}conv",), "backward", hostile)
    refusal = Refusal(f"{hostile}left", hostile, hostile, hostile, hostile)
    nodes = [Node(hostile, f"{hostile}{name}", 0, ()) for name in ("conv", "norm", "left")]
    rows = (
        Row("folded", hostile, hostile, nodes[0], nodes[0]),
        Row("gone", hostile, hostile, nodes[1], None),
        Row("left", hostile, hostile, nodes[2], nodes[2]),
    )
    report = Report(hostile, (fold,), (refusal,), notes=(hostile,))
    tab = show(page(Subject(hostile, hostile), report, (NOTHING, NOTHING), Drawing(rows)))
    assert tab.locator("h1").inner_text() == hostile and hostile in tab.title()
    assert tab.locator(".note").inner_text() == f"Note: {hostile}"
    assert column(tab, 2) == [f"{hostile}norm", f"{hostile}left"]
    assert column(tab, 4)[1] == hostile and column(tab, 7) == [hostile, hostile]
    assert column(tab, 5)[0] == f"{hostile}conv" and hostile in column(tab, 5)[1]
    assert f"{hostile}conv" in tab.locator("#node-0").text_content()
    tab.get_by_label("Filter").fill(f"{hostile}left")
    tab.get_by_label("Outcome").select_option(hostile)
    tab.get_by_label("Search").fill(f"{hostile}conv")
    assert column(tab, 2) == [f"{hostile}left"] and tab.locator(".row.hit").count() == 1
    assert tab.locator("script").count() == 1 and tab.locator("img, b#injected").count() == 0


def test_characters_that_reverse_or_hide_text_are_shown_as_their_escapes(show):
    fold = Fold("conv\u202e1x\x00", ("\u200b\udc80",), "backward", "\x1b[2J")
    tab = show(page(Subject("m\u202e", "w"), Report("M", (fold,), ()), (NOTHING, NOTHING), None))
    assert (column(tab, 2), column(tab, 5)) == (["conv\\u202e1x\\x00"], ["\\u200b\\udc80"])
    assert column(tab, 7) == ["\\x1b[2J"] and tab.locator("h1").inner_text() == "m\\u202e"


def test_a_layer_whose_name_is_markup_is_folded_and_shown(show):
    model = nn.Sequential()
    model.add_module("<b>x</b>", nn.Conv2d(3, 4, 3))
    model.add_module("<script>alert(1)</script>", nn.BatchNorm2d(4))
    tab = show(page_of(randomise(model).float()))
    assert (column(tab, 2), column(tab, 5)) == (["<script>alert(1)</script>"], ["<b>x</b>"])
    assert "<b>x</b>" in tab.locator("#node-1").text_content()


def test_the_policy_forbids_all_scripts_but_the_pages_own(browser, tmp_path):
    text = page_of(network())
    assert "unsafe" not in text and " style=" not in text
    assert not re.search(r"(?:src|href)=(?!\"#)|url\((?!#)", text)
    file = tmp_path / "report.html"
    file.write_text(
        text.replace("<main>", "<main><script>window.ran = true</script><b onclick='ran = 1'>b</b>")
    )
    context = browser.new_context()
    tab = context.new_page()
    refused = []
    tab.on("console", lambda message: refused.append(message.text))
    tab.goto(file.as_uri())
    tab.locator("main > b").click()
    assert tab.evaluate("window.ran") is None
    assert len(refused) == 2 and all("Content Security Policy" in each for each in refused)
    context.close()


def test_without_a_graph_or_an_input_the_page_says_why(show):
    report = Report("M", (), (), notes=("the modules were kept, because M cannot be traced",))
    tab = show(page(Subject("m", "w"), report, (NOTHING, NOTHING), None))
    assert "There is no graph" in tab.locator("main").inner_text()
    assert "because M cannot be traced" in tab.locator(".note").inner_text()
    assert tab.locator(".verdict").nth(1).inner_text().startswith("Not verified")
    assert tab.locator(".summary tbody tr").first.inner_text().count("not measured") == 2
    assert tab.locator(".verdict").first.inner_text() == "The model executes no batch norm"


def test_a_failed_or_inconclusive_verification_is_told(show):
    model = network()
    comparison = fxfuse.verify(model, fxfuse.fuse(model), (X,))
    for changed, said in (({"ok": False}, "Not equal"), ({"conclusive": False}, "Not conclusive")):
        report = Report("M", (), (), verification=replace(comparison, **changed))
        tab = show(page(Subject("m", "w"), report, (NOTHING, NOTHING), None))
        assert tab.locator(".verdict").nth(1).inner_text().startswith(said)
        assert "error against float64" in tab.locator("pre").text_content()


def test_a_norm_that_is_called_twice_has_two_rows_each_linked_with_its_own_node(show):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.b(self.norm(self.a(x))))

    tab = show(page_of(randomise(Twice()).float()))
    links = tab.locator("#table td.name a").evaluate_all("each => each.map(a => a.getAttribute('href'))")
    assert links == ["#node-2", "#node-4"]
    for row, link in enumerate(links, 1):
        assert tab.locator(f"{link} a").get_attribute("href") == f"#norm-{row}"


def test_the_command_writes_the_page_and_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "load", lambda *_, **__: zoo.Loaded(network(), "its own", (X,)))
    html, dot = tmp_path / "r.html", tmp_path / "g.dot"
    for command in ("explain", "fuse"):
        result = CliRunner().invoke(cli.main, (command, "net:work", "--html", str(html), "--dot", str(dot)))
        assert result.exit_code == 0 and result.output.count("written") == 2, result.output
        assert "2 of 4" in html.read_text() and "Verified" in html.read_text()
        assert dot.read_text().startswith("digraph")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["g.dot", "r.html"]
        html.unlink(), dot.unlink()


def test_the_command_says_before_the_work_that_it_cannot_write(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    for option in ("--html", "--dot"):
        missing = Path(tmp_path, "nowhere", "file")
        result = CliRunner().invoke(cli.main, ("explain", "net:work", option, str(missing)))
        assert result.exit_code == 2 and "there is no folder" in result.output


def test_there_is_no_graph_in_dot_of_a_model_that_cannot_be_traced(tmp_path, monkeypatch):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    monkeypatch.setattr(zoo, "load", lambda *_, **__: zoo.Loaded(Branches().eval(), "none", None))
    arguments = ("explain", "net:work", "--dot", str(tmp_path / "g.dot"), "--html", str(tmp_path / "r.html"))
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2 and "there is no graph" in result.output and "Branches" in result.output
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_no_text_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "load", lambda *_, **__: zoo.Loaded(network(), "from \udc80.pt2", (X,)))
    result = CliRunner().invoke(
        cli.main, ("fuse", "net:work", "--html", str(tmp_path / "r.html"), "--json", "-")
    )
    assert result.exit_code == 0, result.output
    assert "from \\udc80.pt2" in (tmp_path / "r.html").read_text()
