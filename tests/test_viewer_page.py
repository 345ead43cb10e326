"""The report in a browser: it opens fast, runs nothing but itself, and can be read and worked by keys in any window."""

import asyncio
import json

import pytest

from lightning_gym.viewer.report import write_report
from tests.chromium import chromium
from tests.viewer_runs import RunWriter

pytestmark = pytest.mark.full

SIZES = [(1440, 900), (800, 1000)]
SCHEMES = ["light", "dark"]
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"

# Every text in view whose contrast to what lies behind it is below WCAG 2.1's 4.5 : 1.
PALE = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (color) =>
    [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
      const part = color[i] / 255;
      return sum + weight * (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    }, 0);
  const behind = (node) => {
    const layers = [];
    for (let one = node; one; one = one.parentElement) layers.push(rgba(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || node.closest("script, noscript, option")) continue;
    if (!node.checkVisibility({ visibilityProperty: true })) continue;
    const back = behind(node);
    const front = over(rgba(getComputedStyle(node).color), back);
    const [high, low] = [light(front), light(back)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${node.className || node.tagName}: ${text.slice(0, 40)}`);
  }
  return [...new Set(found)].slice(0, 20);
})()"""

# Elements that stick out of the window, or out of a box that neither scrolls nor cuts off.
OVERFLOWING = """[...document.querySelectorAll("main *, header *")].filter((node) => {
  const box = node.getBoundingClientRect();
  return box.width && node.checkVisibility() && box.right > innerWidth + 1 && !node.closest(".attempts, svg");
}).map((node) => node.className || node.tagName).slice(0, 10)"""


def browse(script, url, tmp_path, *, size=(1440, 900)):
    """Run `script(tab)` on the report; nothing may go wrong or be fetched meanwhile."""

    async def visit():
        async with chromium(tmp_path / "profile") as tab:
            await tab.size(*size)
            await tab.open(url)
            await tab.settle()
            result = await script(tab)
            assert tab.errors == []
            assert {request.partition("#")[0] for request in tab.requests} == {url.partition("#")[0]}
            return result

    return asyncio.run(visit())


def select(condition):
    return f"list.select(RUN.rollouts.find((r) => {condition}))"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A report of 2,000 rollouts in which everything happens."""
    run = RunWriter(tmp_path_factory.mktemp("viewer") / "<b>run")
    run.steps(32)
    run.close()
    path = write_report(run.path)
    assert 1_000_000 < path.stat().st_size < 8_000_000
    return path.as_uri()


@pytest.fixture(scope="module")
def long_url(tmp_path_factory):
    """A report with one rollout of about 100,000 tokens."""
    run = RunWriter(tmp_path_factory.mktemp("viewer") / "long")
    run.long_rollout(110_000)
    run.close()
    return write_report(run.path).as_uri()


@pytest.mark.parametrize("size", SIZES)
def test_two_thousand_rollouts_are_there_within_two_seconds(url, tmp_path, size):
    async def script(tab):
        taken = []
        for _ in range(3):  # the best of three: the machine may be busy with other things
            await tab.open(url)
            assert await tab.run("RUN.rollouts.length") == 2000
            ready = await tab.run("performance.getEntriesByName('report-ready')[0].startTime")
            loaded = await tab.run("performance.getEntriesByType('navigation')[0].loadEventEnd")
            taken.append(max(ready, loaded))
        return taken

    taken = browse(script, url, tmp_path, size=size)
    print("milliseconds:", taken)
    assert min(taken) < 2000


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_every_text_can_be_read_and_nothing_sticks_out(url, tmp_path, size, scheme):
    async def script(tab):
        await tab.scheme(scheme)
        views = {
            "curves": "showTab('curves')",
            "list": "showTab('rollouts'); enter(false)",
            "tokens": f"{select('r.segments.length > 1')}; enter(true)",
            "surprise": "redraw('colour', 'surprise')",
            "gap": "redraw('colour', 'gap')",
            "messages": "redraw('as', 'messages')",
            "failed": select("r.failure"),
            "help": "showHelp()",
        }
        for name, act in views.items():
            await tab.run(act)
            await tab.settle()
            assert await tab.run(PALE) == [], name
            assert await tab.run(OVERFLOWING) == [], name

    browse(script, url, tmp_path, size=size)


def test_control_the_checks_see_pale_text_and_what_sticks_out(url, tmp_path):
    async def script(tab):
        await tab.run("document.querySelector('.hint').style.color = '#999'")
        await tab.run("document.querySelector('.tiles').style.width = '3000px'")
        assert any("hint" in found for found in await tab.run(PALE))
        assert await tab.run(OVERFLOWING) != []

    browse(script, url, tmp_path)


def test_nothing_that_a_run_wrote_is_executed_or_becomes_an_element(url, tmp_path):
    async def script(tab):
        elements = "document.querySelectorAll('main img, main script, main b > b, h1 b, figure b > *').length"
        hostile = await tab.run("RUN.rollouts.filter((r) => searchText(r).includes('window.ran')).map((r) => r.index)")
        assert len(hostile) > 50
        seen = 0
        for index in hostile[:12]:
            for way in ("tokens", "messages"):
                await tab.run(f"list.select(RUN.rollouts[{index}]); showTab('rollouts'); redraw('as', '{way}')")
                await tab.settle()
                seen += await tab.run("document.getElementById('rollout').textContent.includes('window.ran=')")
                assert await tab.run(elements) == 0
        assert seen >= 12
        await tab.run("showTab('curves'); document.querySelector('.more')?.setAttribute('open', '')")
        await tab.settle()
        assert await tab.run("document.getElementById('run-name').textContent") == "<b>run"
        assert await tab.run("document.title") == "<b>run · run report"
        assert await tab.run(elements) == 0
        assert await tab.run("typeof window.ran") == "undefined"

    browse(script, url, tmp_path)


def test_control_an_inline_script_and_a_handler_are_refused_by_the_policy(url, tmp_path):
    async def script(tab):
        await tab.run(
            """document.body.append(Object.assign(document.createElement("script"), {text: "window.ran = 1"}))"""
        )
        await tab.run("""document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.ran = 2'>")""")
        await tab.run("new Promise((done) => setTimeout(done, 300))")
        assert await tab.run("typeof window.ran") == "undefined"
        assert any("Content Security Policy" in error for error in tab.errors)
        tab.errors.clear()
        tab.requests[:] = tab.requests[:1]

    browse(script, url, tmp_path)


def test_the_page_can_be_worked_by_keys_alone(url, tmp_path):
    async def script(tab):
        selected = "list.selected?.index"
        await tab.press("r")
        assert await tab.run("document.activeElement.id") == "list"
        first = await tab.run(selected)
        await tab.press("j")
        await tab.press("ArrowDown")
        assert await tab.run(selected) == first + 2
        await tab.press("k")
        assert await tab.run(selected) == first + 1
        group = await tab.run("list.selected.group")
        await tab.press("]")
        assert await tab.run("list.selected.group") == group + 1
        await tab.press("[")
        assert await tab.run("[list.selected.group, list.selected.attempt]") == [group, 0]
        await tab.press("End")
        assert await tab.run(selected) == 1999
        assert await tab.run("!!document.getElementById(list.node.getAttribute('aria-activedescendant'))")
        await tab.press("Home")
        # tokens, one by one and turn by turn
        await tab.press("t")
        assert await tab.run("tokenView.here") == {"s": 0, "position": 0}
        await tab.press("ArrowRight")
        assert await tab.run("tokenView.here.position") == 1
        assert "no, context" in await tab.run("document.getElementById('tip').textContent")
        await tab.press("ArrowRight", shift=True)
        facts = await tab.run("document.getElementById('tip').textContent")
        assert all(word in facts for word in ("token id", "engine", "trainer", "gap", "weight version"))
        await tab.press("m")
        assert await tab.run("document.querySelectorAll('.message').length") > 0
        await tab.press("m")
        await tab.press("x")
        assert await tab.run("view.colour") == "surprise"

    browse(script, url, tmp_path)


def test_search_curves_and_help_can_be_worked_by_keys_alone(url, tmp_path):
    async def script(tab):
        await tab.press("/")
        assert await tab.run("document.activeElement.id") == "search"
        for key in "window.ran":
            await tab.press(key)
        await tab.run("new Promise((done) => setTimeout(done, 200))")
        found = await tab.run("list.rollouts.length")
        assert 0 < found < 200
        assert await tab.run("document.getElementById('shown').textContent") == f"{found} of 2,000"
        await tab.press("Escape")
        assert await tab.run("document.activeElement.id") == "list"
        # a curve, and the rollouts of one of its steps
        await tab.press("c")
        await tab.run("document.querySelector('.plot').focus()")
        await tab.press("Home")
        await tab.press("ArrowRight")
        assert await tab.run("document.getElementById('cursor-step').textContent") == "step 1"
        await tab.press("Enter")
        assert await tab.run("[...new Set(list.rollouts.map((r) => r.step))]") == [1]
        await tab.press("?")
        assert await tab.run("document.getElementById('help').open")
        await tab.press("Escape")
        assert not await tab.run("document.getElementById('help').open")

    browse(script, url, tmp_path)


FILTERS = {
    "environment": ({"agent": "counter"}, "r.agent === 'counter'"),
    "step": ({"step": "7"}, "r.step === 7"),
    "lowest reward": ({"min": "0.5"}, "r.reward !== null && r.reward >= 0.5"),
    "highest reward": ({"max": "0.5"}, "r.reward !== null && r.reward <= 0.5"),
    "failed": ({"failure": "any"}, "r.failure !== null"),
    "not failed": ({"failure": "none"}, "r.failure === null"),
    "failure class": ({"failure": "timeout"}, "r.failure?.kind === 'timeout'"),
    "truncated": ({"truncated": True}, "r.truncated"),
    "misaligned": ({"misaligned": True}, "r.breaks.length || r.failure?.kind === 'misaligned'"),
    "two at once": ({"misaligned": True, "agent": "counter"}, "r.misaligned && r.agent === 'counter'"),
}


def test_each_filter_shows_exactly_what_it_says(url, tmp_path):
    async def script(tab):
        await tab.run("showTab('rollouts')")
        for name, (fields, condition) in FILTERS.items():
            for field, value in fields.items():
                kind = "checked" if value is True else "value"
                element = f"document.getElementById('filters').elements['{field}']"
                await tab.run(f"{element}.{kind} = {json.dumps(value)}")
                await tab.run(f"{element}.dispatchEvent(new Event('input', {{bubbles: true}}))")
            await tab.run("new Promise((done) => setTimeout(done, 150))")
            shown = await tab.run("list.rollouts.map((r) => r.index)")
            expected = await tab.run(f"RUN.rollouts.filter((r) => {condition}).map((r) => r.index)")
            assert shown == expected, name
            assert 0 < len(shown) < 2000, name
            await tab.run("document.getElementById('filters').reset()")
            await tab.run("new Promise((done) => setTimeout(done, 50))")
            assert await tab.run("list.rollouts.length") == 2000

    browse(script, url, tmp_path)


def test_orders_are_orders_and_only_rows_in_view_exist(url, tmp_path):
    async def script(tab):
        await tab.run("showTab('rollouts')")
        for order, value in {
            "high": "-r.reward ?? 0",
            "gap": "-(r.gap ?? -1)",
            "long": "-r.num_tokens",
            "slow": "-r.seconds",
        }.items():
            await tab.run(f"filter.sort = '{order}'; showFilter()")
            values = await tab.run(f"list.rollouts.map((r) => {value})")
            assert values == sorted(values), order
        assert await tab.run("document.querySelectorAll('.row').length") < 80
        await tab.run("list.node.scrollTop = 30000")
        await tab.settle()
        assert await tab.run("document.querySelectorAll('.row').length") < 80
        assert await tab.run("list.node.scrollTop") == 30000

    browse(script, url, tmp_path)


@pytest.mark.parametrize("size", SIZES)
def test_a_splice_break_shows_both_sides_and_leads_to_its_token(url, tmp_path, size):
    async def script(tab):
        await tab.run(f"showTab('rollouts'); {select('r.breaks.length')}; enter(true)")
        await tab.settle()
        card = await tab.run("document.querySelector('.card.warn').innerText")
        for said in (
            "edited history",
            "earlier reasoning dropped",
            "token 6",
            "<think>add them up</think>",
            "message 2",
        ):
            assert said in card
        marks = await tab.run("[...document.querySelectorAll('.sides mark')].map((mark) => mark.textContent)")
        assert marks == ["<think>add them up</think>\n", "∅"]
        left, right = await tab.run(
            "[...document.querySelectorAll('.sides pre')].map((box) => box.getBoundingClientRect().x)"
        )
        assert (left < right) == (size[0] > 860)
        await tab.run("document.querySelector('.card.warn button').click()")
        await tab.settle()
        assert await tab.run("tokenView.here") == {"s": 1, "position": 6}
        assert await tab.run("document.querySelector('.t.here').classList.contains('broken')")

    browse(script, url, tmp_path, size=size)


def test_a_group_shows_its_attempts_and_their_advantages(url, tmp_path):
    async def script(tab):
        await tab.run(
            f"showTab('rollouts'); {select('GROUPS.get(r.groupKey).some((one) => one.failure) && !r.failure')}"
        )
        group = await tab.run("GROUPS.get(list.selected.groupKey).map((r) => [r.reward, r.advantage])")
        texts = "(part) => [...document.querySelectorAll(`button.attempt ${part}`)].map((node) => node.innerText)"
        rewards, advantages = await tab.run(f"['b', 'small'].map({texts})")
        assert len(rewards) == len(advantages) == len(group) == 8
        assert rewards == ["failed" if reward is None else f"{reward:g}" for reward, _ in group]
        assert [None if said == NONE else float(said.replace(MINUS, "-")) for said in advantages] == [
            None if advantage is None else pytest.approx(advantage, abs=0.005) for _, advantage in group
        ]
        await tab.run("document.querySelectorAll('button.attempt')[5].click()")
        assert await tab.run("list.selected.attempt") == 5

    browse(script, url, tmp_path)


def test_a_token_that_is_hovered_says_what_the_log_says(url, tmp_path):
    async def script(tab):
        await tab.run(f"showTab('rollouts'); {select('r.segments.length')}")
        await tab.settle()
        await tab.hover(".t.on")
        tip = await tab.run("document.getElementById('tip').innerText")
        token = await tab.run(
            "(segment => ({engine: unpacked(segment).engine[0], trainer: unpacked(segment).trainer[0],"
            " id: RUN.tokens.ids[unpacked(segment).index[segment.runs[0]]], version: segment.version}))"
            "(list.selected.segments[0])"
        )
        lines = dict(zip(tip.split("\n")[1::2], tip.split("\n")[2::2], strict=True))
        assert lines["token id"] == str(token["id"])
        assert lines["engine"].startswith(f"{token['engine']:.6f} nats")
        assert lines["trainer"].startswith(f"{token['trainer']:.6f} nats")
        assert lines["weight version"] == str(token["version"])
        gutters = await tab.run("[...document.querySelectorAll('.sampled .gutter b')].map((b) => b.textContent)")
        assert gutters == [f"call {index}" for index in range(len(gutters))]
        mask = await tab.run("[...document.querySelectorAll('.t')].map((t) => t.classList.contains('on'))")
        runs = await tab.run("list.selected.segments[0].runs")
        assert mask == [index % 2 == 1 for index, run in enumerate(runs) for _ in range(run)]

    browse(script, url, tmp_path)


def test_a_rollout_of_a_hundred_thousand_tokens_opens_at_once_and_scrolls(long_url, tmp_path):
    async def script(tab):
        seconds = await tab.run(
            "(async () => { const start = performance.now(); showTab('rollouts');"
            " await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));"
            " return (performance.now() - start) / 1000; })()"
        )
        print("seconds:", seconds)
        assert await tab.run("list.selected.num_tokens") > 100_000
        assert seconds < 2
        assert await tab.run("document.querySelectorAll('.t').length") < 10_000
        box = "document.querySelector('.t.here').getBoundingClientRect()"
        inside = f"(box => box.top >= 40 && box.bottom <= innerHeight)({box})"
        for position in (90_000, 99_000, 60_000):
            await tab.run(f"tokenView.go(0, {position})")
            await tab.run("new Promise((done) => setTimeout(done, 300))")
            assert await tab.run("document.querySelector('.t.here').dataset.p") == str(position)
            assert await tab.run(inside), position
        await tab.run("document.querySelector('button.fold').click()")
        await tab.settle()
        assert await tab.run("document.querySelectorAll('.t').length") < 40_000, "what was visited, and no more"
        await tab.run("tokenView.go(0, 30_000)")
        await tab.run("new Promise((done) => setTimeout(done, 300))")
        assert await tab.run(inside)

    browse(script, long_url, tmp_path)


def test_nothing_moves_while_the_page_opens_or_a_curve_is_read(url, tmp_path):
    async def script(tab):
        await tab.run(
            "window.moved = 0;"
            "const add = (seen) => seen.getEntries().forEach((one) => (moved += one.hadRecentInput ? 0 : one.value));"
            "new PerformanceObserver(add).observe({ type: 'layout-shift', buffered: true })"
        )
        for step in range(0, 30, 3):
            await tab.run(f"setCursor({step})")
            await tab.settle()
        await tab.run("setCursor(null); showTab('rollouts')")
        for _ in range(5):
            await tab.press("j")
        await tab.run("new Promise((done) => setTimeout(done, 200))")
        return await tab.run("moved")

    assert browse(script, url, tmp_path) < 0.002


def test_a_run_without_anything_says_so(tmp_path):
    run = RunWriter(tmp_path / "empty")
    run.close(metrics=False)

    async def script(tab):
        assert await tab.run("document.getElementById('problems').open")
        assert "ended before its first step" in await tab.run("document.getElementById('problems').innerText")
        assert "no numbers to draw" in await tab.run("document.getElementById('curves').innerText")
        for key in ("r", "j", "]", "t", "m", "x", "c"):
            await tab.press(key)
        await tab.press("r")
        assert "no rollouts in this file" in await tab.run("document.getElementById('list').innerText")

    browse(script, write_report(run.path).as_uri(), tmp_path)
