"""The dashboard's own modules, run where they live: in the browser, imported from the server."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.model]


def _run(watched, module: str, body: str):
    page = watched.open("/kernels")
    return page.evaluate(f"async () => {{ const m = await import('/static/js/{module}'); {body} }}")


def test_events_are_parsed_as_the_standard_says(watched):
    events = _run(
        watched,
        "sse.js",
        r"""
        const parts = ['id: 7\r\nevent: a\r\nda', 'ta: {"x":1}\r\n\r', '\n: beat\n\ndata: one\ndata: two\n\n',
                       ':\nid: 9\n\n:\nid: 9\n\n', 'data: unfinished'];
        const body = new ReadableStream({start(c) {
          for (const part of parts) c.enqueue(new TextEncoder().encode(part));
          c.close();
        }});
        const found = [];
        for await (const event of m.readEvents(body)) found.push(event);
        return found;""",
    )
    assert [event.get("comment") for event in events] == [None, "beat", None, "", None, ""]
    assert (events[0]["id"], events[0]["event"], events[0]["data"]) == ("7", "a", '{"x":1}')
    assert (events[2]["event"], events[2]["data"]) == ("message", "one\ntwo")
    assert (events[4]["id"], events[4]["data"]) == ("9", None), "nothing was missed up to here; told once"


def test_what_a_model_says_never_becomes_an_element(watched):
    html = _run(
        watched,
        "markdown.js",
        r"""
        const box = document.createElement('div');
        const said = 'Hi <img src=x onerror=alert(1)> **bold**\n\n```py\n<b>x</b>\n```\n1. one\n2. two\n\n- a\n- `b`';
        m.renderText(box, said);
        const count = (selector) => box.querySelectorAll(selector).length;
        return [count('img, b, script'), box.querySelector('pre').textContent, count('ol li'), count('ul code'),
                box.querySelector('strong').textContent];""",
    )
    assert html == [0, "<b>x</b>", 2, 1, "bold"]


def test_streamed_text_equals_text_given_at_once(watched):
    same = _run(
        watched,
        "markdown.js",
        r"""
        const text = '# Title\nA line\nand more\n\n```\ncode\n\nmore code\n```\nafter\n\n1. a\n\n2. b\n';
        const whole = document.createElement('div'), grown = document.createElement('div');
        m.renderText(whole, text);
        for (let i = 1; i <= text.length; i += 1) m.renderText(grown, text.slice(0, i));
        return [whole.innerHTML === grown.innerHTML, whole.children.length];""",
    )
    assert same == [True, 5]


def test_pasted_pairs(watched):
    parsed = _run(watched, "pairs.js", r"return m.parsePairs('a => b\n\n c=>d => e \nno arrow\n => x');")
    assert parsed["pairs"] == [{"observation": "a", "action": "b"}, {"observation": "c", "action": "d => e"}]
    assert parsed["problems"] == ["line 4 has no =>", "line 5 needs text on both sides of =>"]


def test_backoff_grows_with_jitter_and_has_a_ceiling(watched):
    low, high, middle = _run(
        watched,
        "stream.js",
        "return [m.backoff(1, () => 0), m.backoff(99, () => 0.999999), m.backoff(3, () => 0.5)];",
    )
    assert low == 500
    assert 29_000 < high <= 30_000
    assert middle == 2000


def test_a_number_that_is_not_there_is_not_zero(watched):
    texts = _run(
        watched,
        "format.js",
        "return [m.measured(null, m.decimal, 'no step yet').textContent, m.measured(0).textContent,"
        " m.measured(NaN, m.decimal).textContent];",
    )
    assert texts == ["not measured yet: no step yet", "0.000", "not measured yet"]


def test_the_stream_resumes_where_it_was_cut(watched):
    seen: list[str | None] = []

    def answer(route):
        seen.append(route.request.headers.get("last-event-id"))
        if len(seen) > 1:
            route.continue_()
            return
        body = "id: 41\nevent: chat\ndata: {}\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    watched.page.route("**/olympus/stream*", answer)
    page = watched.open("/kernels")
    watched.until_live()
    for _ in range(300):
        if len(seen) > 1:
            break
        page.wait_for_timeout(100)
    assert seen[:2] == [None, "41"]


def test_without_a_stream_the_page_polls(watched):
    watched.page.route("**/olympus/stream*", lambda route: route.fulfill(status=503, body="busy"))
    watched.expected.append("503")  # the browser itself logs each; that is the point here
    page = watched.open("/kernels")
    watched.until("document.getElementById('live-badge').dataset.state === 'polling'")
    with page.expect_request("**/olympus/kernels", timeout=30_000):
        pass


def test_older_neighbours_are_merged_into_their_mean(watched):
    merged = _run(
        watched,
        "metrics.js",
        "return m.merged({step: [1, 2, 3, 4, 5], loss: [1, 3, null, 5, 7], phi: [null, null, 1, null, 2]}, 4);",
    )
    assert merged == {"step": [2, 4, 5], "loss": [2, 5, 7], "phi": [None, 1, 2]}


def test_curves_with_steps_of_their_own_share_an_axis(watched):
    columns = _run(
        watched,
        "compare.js",
        "return m.aligned([{step: [1, 3], values: [10, 30]}, {step: [2, 3, 9], values: [20, null, 90]}])"
        ".map((column) => [...column]);",
    )
    assert columns == [[1, 2, 3, 9], [10, None, 30, None], [None, 20, None, 90]]


def test_only_the_nearest_neighbour_of_a_domain_is_told(watched):
    told = _run(
        watched,
        "sky.js",
        """
        const node = (id, domain) => ({kernel_id: id, domain});
        return m.relationsOf({
          nodes: [node('a', 'x'), node('b', 'y'), node('c', 'z')],
          edges: [{parent: 'a', child: 'b', parent_exists: true, inherited: true, basin_distance: 0.5},
                  {parent: 'gone', child: 'c', parent_exists: false, inherited: false, basin_distance: null}],
          domain_distances: [{domains: ['x', 'y'], distance: 1}, {domains: ['x', 'z'], distance: 2},
                             {domains: ['y', 'z'], distance: 3}],
        });""",
    )
    assert [(line["from"], line["to"], line["kind"], line["distance"]) for line in told] == [
        ("a", "b", "parent", 0.5),
        ("a", "b", "near", 1),
        ("a", "c", "near", 2),
    ]
