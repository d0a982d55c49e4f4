"""What the page must do. Usage: check.py CHROMIUM; see `run`."""

import json
import os
import pathlib
import sys
import time
import traceback
import urllib.request

from browser import Browser
from mock import KEY, MARKDOWN, Mock

LAST = "#messages article:last-child"
ANSWER = f"document.querySelector({json.dumps(LAST)}).innerText"
IDLE = "!document.querySelector('#send').hidden"
SCREENSHOTS = os.environ.get("LOWBIT_SCREENSHOTS")


class Page:
    """The page in a browser, and the server behind it."""

    def __init__(self, browser, mock, url):
        self.browser, self.mock, self.url = browser, mock, url

    def fresh(self, hash=""):
        """The page as a new visitor sees it."""
        browser = self.browser
        browser.resize(1200, 800)
        browser.open(self.url)
        browser.run("localStorage.clear(); sessionStorage.clear()")
        browser.open("about:blank")
        browser.open(self.url + hash)

    def ask(self, text):
        self.browser.type("#text", text)
        self.browser.key("Enter")

    def answered(self, text):
        """Asks, and returns the shown answer when it is complete."""
        self.ask(text)
        self.browser.wait(f"{IDLE} && document.querySelector('#messages article:last-child .foot button') !== null")
        return self.browser.run(ANSWER)

    def set(self, name, text):
        self.browser.type(f"#settings [name={name}]", text)

    def show_probabilities(self):
        self.browser.click("#settings [name=logprobs]")

    def picture(self, name):
        if SCREENSHOTS:
            os.makedirs(SCREENSHOTS, exist_ok=True)
            self.browser.screenshot(f"{SCREENSHOTS}/{name}.png")


def names_what_is_served(page):
    page.fresh()
    shown = page.browser.wait("document.querySelector('#server').textContent")
    assert shown == "demo/model-4bit · context 4,096 · 9.8.7", shown
    page.picture("empty")


def streams(page):
    page.fresh()
    page.ask("slow")
    early = page.browser.wait(f"{ANSWER}.includes('word3') && {ANSWER}")
    assert "word300" not in early and page.browser.run("document.querySelector('#send').hidden"), early
    page.browser.wait(f"{ANSWER}.includes('word9')")


def stops(page):
    """By the Escape key and by the button; the server sees the connection end, and what came stays."""
    for stop in (lambda: page.browser.key("Escape"), lambda: page.browser.click("#stop")):
        page.fresh()
        page.mock.aborted.clear()
        page.ask("slow")
        page.browser.wait(f"{ANSWER}.includes('word3')")
        stop()
        page.browser.wait(IDLE)
        assert page.mock.aborted.wait(5), "the server still writes"
        shown = page.browser.run(ANSWER)
        assert "word3" in shown and "stopped" in shown and "≈" in shown, shown
        time.sleep(0.2)
        assert page.browser.run(ANSWER) == shown


def tells_speed(page):
    page.fresh()
    shown = page.answered("hello")
    assert "Hello, wörld 👋." in shown and "prompt 12 (8 cached)" in shown and "4 tokens" in shown, shown
    spoken = page.browser.run("document.querySelector('#announcer[aria-live=polite]').textContent")
    assert spoken == "Hello, wörld 👋.", spoken
    # Ten pieces 0.1 s apart: 10 a second, where a busy machine does not read some late.
    shown = page.answered("paced")
    rate = page.browser.run("parseFloat(/([\\d.]+) tokens\\/s/.exec([...document.querySelectorAll('.stats')].at(-1).textContent)[1])")
    assert 5 < rate < 20 and "10 tokens" in shown, shown


def settings_reach_the_request(page):
    page.fresh()
    page.browser.wait("document.querySelector('#server').textContent.includes('demo')")
    page.answered("hello")
    path, body = page.mock.requests[-1]
    assert path == "/v1/chat/completions", path
    assert body == {"model": "demo/model-4bit", "stream": True, "stream_options": {"include_usage": True},
                    "messages": [{"role": "user", "content": "hello"}]}, body
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 77, "seed": 7}
    for name, value in wanted.items():
        page.set(name, str(value))
    page.set("system", "Be brief.")
    page.set("stop", "END\nUser:\\n")
    page.show_probabilities()
    # Settings outlive the page, and so does the conversation.
    page.browser.open("about:blank")
    page.browser.open(page.url)
    page.answered("again")
    _, body = page.mock.requests[-1]
    assert {name: body.get(name) for name in wanted} == wanted, body
    assert body["stop"] == ["END", "User:\n"] and body["logprobs"] is True and body["top_logprobs"] == 5, body
    roles = [(message["role"], message["content"]) for message in body["messages"]]
    assert roles == [("system", "Be brief."), ("user", "hello"), ("assistant", "Hello, wörld 👋."), ("user", "again")], roles
    page.browser.click("#settings button[type=reset]")
    page.browser.click("#new")
    page.answered("bare")
    _, body = page.mock.requests[-1]
    assert "temperature" not in body and "stop" not in body and "logprobs" not in body and len(body["messages"]) == 1, body
    page.set("tools", "{not json")
    before = len(page.mock.requests)
    page.ask("not sent")
    time.sleep(0.2)
    assert len(page.mock.requests) == before, "sent with tools that are no JSON"


def changes_what_was_said(page):
    page.fresh()
    page.answered("first")
    page.answered("second")
    page.browser.click(".foot button", "Regenerate")
    page.browser.wait(IDLE)
    _, body = page.mock.requests[-1]
    assert [message["content"] for message in body["messages"]] == ["first", "Hello, wörld 👋.", "second"], body
    page.browser.run("[...document.querySelectorAll('.message.user .foot button')].find((b) => b.textContent === 'Edit').click()")
    assert page.browser.run("document.querySelector('#text').value") == "first"
    page.answered("other")
    _, body = page.mock.requests[-1]
    assert [message["content"] for message in body["messages"]] == ["other"], body
    page.browser.click("#new")
    assert page.browser.run("document.querySelectorAll('article').length") == 0
    page.browser.click("#messages button", "Back")
    assert page.browser.run("document.querySelectorAll('article').length") == 2


def keys_write_lines(page):
    page.fresh()
    page.browser.type("#text", "one")
    page.browser.key("Enter", shift=True)
    page.browser.call("Input.insertText", text="two")
    page.browser.key("Enter")
    page.browser.wait(f"{IDLE} && document.querySelectorAll('article').length === 2")
    assert page.mock.requests[-1][1]["messages"][0]["content"] == "one\ntwo", page.mock.requests[-1]


def shows_probabilities(page):
    page.fresh()
    page.show_probabilities()
    page.answered("dogs")
    tokens = page.browser.run("[...document.querySelectorAll('.tokens .token')].map((t) => [t.textContent, t.dataset.p])")
    # 🐕 is of two tokens, which share a span and the lesser probability.
    assert tokens == [["Dogs", "5"], [" <b>chase</b>", "3"], [" cats", "1"], [" 🐕.", "4"]], tokens
    page.browser.hover(".token:nth-of-type(2)")
    tip = page.browser.wait("!document.querySelector('#tip').hidden && document.querySelector('#tip').innerText")
    for part in ('" <b>chase</b>"', "61.0 %", '"Birds"', "2.00 %", '"\\n"'):
        assert part in tip, tip
    page.picture("probabilities")
    page.browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    page.browser.wait("document.querySelector('#tip').hidden")
    # By keyboard: from the box backwards to the tokens, which are one stop, and along them.
    page.browser.run("document.querySelector('#text').focus()")
    for _ in range(4):
        page.browser.key("Tab", shift=True)
    assert '"Dogs"' in page.browser.run("document.querySelector('#tip').innerText"), page.browser.run("document.activeElement.outerHTML")
    page.browser.key("ArrowRight")
    page.browser.key("ArrowRight")
    assert '" cats"' in page.browser.run("document.querySelector('#tip').innerText")
    assert page.browser.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    assert page.browser.run("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1
    page.browser.key("Escape")
    assert page.browser.run("document.querySelector('#tip').hidden")
    page.browser.click(".foot button", "Probabilities")
    assert page.browser.run("document.querySelector('.tokens').hidden && !document.querySelector('.message.assistant .prose:not(details *)').hidden")


def shows_reasoning_and_tools(page):
    page.fresh()
    page.ask("reason")
    page.browser.wait(f"document.querySelector('{LAST} details')?.open && {ANSWER}.includes('Let me')")
    page.browser.wait(IDLE)
    state = page.browser.run(f"(() => {{ const of = document.querySelector('{LAST} details'); return [of.hidden, of.open, of.textContent]; }})()")
    assert state == [False, False, "ReasoningLet me think."], state
    page.set("tools", json.dumps([{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]))
    page.ask("tool")
    page.browser.wait(f"{IDLE} && document.querySelector('.call') !== null")
    shown = page.browser.run("document.querySelector('.call').innerText")
    assert "Tool call: get_weather" in shown and '"city": "Oslo",\n' in shown, shown
    assert page.browser.run("document.querySelector('#text').placeholder") == "Result of get_weather"
    page.answered("sunny")
    _, body = page.mock.requests[-1]
    call, result = body["messages"][-2:]
    assert body["tools"][0]["function"]["name"] == "get_weather" and "reasoning" not in json.dumps(body), body
    assert call["tool_calls"] == [{"id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 2}'}}], call
    assert result == {"role": "tool", "content": "sunny", "tool_call_id": "call-1"}, result
    page.picture("reasoning-and-tools")


def renders_markdown(page):
    page.fresh()
    page.answered("markdown")
    page.picture("markdown")
    structure = page.browser.run("""(() => {
      const prose = [...document.querySelectorAll('.message.assistant .prose')].findLast((p) => !p.hidden);
      const texts = (of) => [...prose.querySelectorAll(of)].map((e) => e.textContent);
      return { tags: [...prose.children].map((e) => e.tagName), strong: texts('strong'), em: texts('em'), code: texts('p > code'),
        items: prose.querySelectorAll('ol > li').length, inner: texts('ol ul li'), pre: texts('ol pre'), cells: texts('td'),
        text: prose.querySelector('p').textContent, scripts: prose.querySelectorAll('script, b').length };
    })()""")
    assert structure == {
        "tags": ["H1", "P", "OL", "DIV", "BLOCKQUOTE"], "strong": ["bold"], "em": ["italic"], "code": ["inline <b>code</b>"],
        "items": 2, "inner": ["inner one", "inner two"], "pre": ['fn main() {\n    println!("1 < 2 && **not bold**");\n}'],
        "cells": ["GPTQ", "4"], "scripts": 0,
        "text": "Some bold, italic and inline <b>code</b> text with <script>alert(1)</script> in it, snake_case_name and 2 * 3 * 4.",
    }, structure
    # What grew piece by piece is what it would be at once.
    same = page.browser.run("""import('/markdown.js').then(({ renderMarkdown }) => {
      const whole = document.createElement('div');
      renderMarkdown(whole, %s);
      return whole.innerHTML === [...document.querySelectorAll('.message.assistant .prose')].findLast((p) => !p.hidden).innerHTML;
    })""" % json.dumps(MARKDOWN))
    assert same, "blocks were not brought up to date"
    # Texts made to take time take little, and code keeps its tabs.
    took = page.browser.run("""import('/markdown.js').then(({ renderMarkdown }) => {
      const node = document.createElement('div'), start = performance.now();
      const texts = ['_a ', '**a', '`a``', '- ', '> ', '[', '#', '|-', '1. - ', '~~a '].map((text) => text.repeat(20000));
      for (const text of texts) renderMarkdown(node, text);
      renderMarkdown(node, '```\\n\\tx\\n```');
      if (node.querySelector('pre').textContent !== '\\tx') throw new Error('tabs are lost');
      return performance.now() - start;
    })""")
    assert took < 3000, took


def tells_errors(page):
    page.fresh()
    problem = "document.querySelector('.problem[role=alert]:not([hidden])')?.innerText ?? ''"
    page.ask("wrong")
    assert "temperature: expected 0 or more, got -1" in page.browser.wait(problem)
    page.mock.refusals = 0
    page.browser.click("#new")
    page.ask("busy")
    shown = page.browser.wait(problem)
    assert "There are too many requests. Try again in 3 s." in shown, shown
    page.picture("error")
    page.browser.click(".problem button", "Try again")
    page.browser.wait(f"{ANSWER}.includes('Hello')")
    page.browser.click("#new")
    page.ask("breaks")
    page.browser.wait(f"{ANSWER}.includes('So far') && {ANSWER}.includes('the model computed what is no number')")
    page.browser.wait(IDLE)
    page.browser.click("#new")
    page.ask("cut")
    page.browser.wait(f"{ANSWER}.includes('Half an ans') && {ANSWER}.includes('The connection ended before the answer did.')")


def asks_for_a_key(page):
    page.mock.needs_key = True
    try:
        page.fresh()
        page.browser.wait("document.querySelector('#key-dialog').open")
        page.picture("key")
        page.browser.type("#key", "wrong-key")
        page.browser.key("Enter")
        # That it is wrong is told, and another is asked for.
        page.browser.wait("document.querySelector('#key-dialog').open && document.querySelector('#key-reason').textContent.includes('Incorrect')")
        page.browser.type("#key", KEY)
        page.browser.key("Enter")
        page.browser.wait("document.querySelector('#server').textContent.includes('demo/model')")
        assert "Hello" in page.answered("hello")
        stored = page.browser.run("[JSON.stringify({ ...localStorage }), sessionStorage.getItem('lowbit.key')]")
        assert KEY not in stored[0] and stored[1] == json.dumps(KEY), stored
    finally:
        page.mock.needs_key = False


def continues_where_there_is_no_template(page):
    page.mock.has_template = False
    try:
        page.fresh()
        page.show_probabilities()
        page.answered("It was a dark ")
        assert page.browser.run("!document.querySelector('#mode-note').hidden")
        path, body = page.mock.requests[-1]
        assert path == "/v1/completions" and body["prompt"] == "It was a dark" and body["logprobs"] == 5 and "messages" not in body, (path, body)
        tokens = page.browser.run("[...document.querySelectorAll('.tokens .token')].map((t) => t.textContent)")
        assert tokens == ["Dogs", " <b>chase</b>", " cats", " 🐕."], tokens
        page.browser.click(".foot button", "Continue")
        page.browser.wait(f"{IDLE} && document.querySelectorAll('article').length === 3")
        assert page.mock.requests[-1][1]["prompt"] == "It was a darkDogs <b>chase</b> cats 🐕.", page.mock.requests[-1]
        page.picture("completion")
        page.answered(" and then ")
        assert page.mock.requests[-1][1]["prompt"].endswith("🐕. and then "), page.mock.requests[-1]
    finally:
        page.mock.has_template = True


def shows_load(page):
    page.fresh("#load")
    page.browser.wait("document.querySelectorAll('.chart').length === 6")
    legends = "[...document.querySelectorAll('.chart')].map((c) => [c.querySelector('h2').textContent, c.querySelector('.legend').innerText])"
    paths = "[...document.querySelectorAll('.chart .line0')].map((p) => p.getAttribute('d').length)"
    page.browser.wait("document.querySelector('.chart:nth-child(5) .legend').innerText.includes('ms')")
    before = page.browser.run(paths)
    time.sleep(2.2)
    after = page.browser.run(paths)
    assert all(late > early for early, late in zip(before, after)), (before, after)
    shown = dict(page.browser.run(legends))
    # Of the scripted histogram: mean 0.25 s a reading over 2, p95 9 tenths up its bucket of 50 to 250 ms.
    assert shown["Time to first token"].split() == ["mean", "125", "ms", "95th", "percentile", "230", "ms"], shown
    assert shown["Prefix cache, hit rate"] == "of prompt tokens 25 %", shown
    rates = shown["Tokens a second"].split()
    generated, prompt = float(rates[1]), float(rates[4])
    # 30 and 100 a reading, which are a second apart or, on a busy machine, more.
    assert 10 < generated < 33 and abs(prompt / generated - 100 / 30) < 0.1, shown
    assert page.mock.polls > 3 and "preemptions 3" in page.browser.run("document.querySelector('#totals').textContent")
    time.sleep(float(os.environ.get("LOWBIT_PAGE_LOAD_S", 0)))
    page.picture("load")
    # Readings of a server that was started anew are no rates of before.
    page.mock.polls = 0
    page.browser.wait("/generated [369]0 /.test(document.querySelector('#totals').textContent)")
    page.browser.wait("parseFloat(document.querySelector('.chart:nth-child(4) .legend b').textContent) > 0")
    heights = page.browser.run("[...document.querySelectorAll('[class^=line]')].flatMap((p) => p.getAttribute('d').match(/ \\S+?(?=[ML]|$)/g) ?? []).map(Number)")
    assert len(heights) > 20 and all(0 <= height <= 100 for height in heights), heights
    # Where the charts are not seen, nothing is asked.
    page.browser.click("#chat-tab")
    time.sleep(0.3)
    polls = page.mock.polls
    time.sleep(2.2)
    assert page.mock.polls == polls, "polled while hidden"
    page.browser.run("document.querySelector('#chat-tab').focus()")
    page.browser.key("ArrowRight")
    page.browser.wait("!document.querySelector('#load').hidden && document.activeElement.id === 'load-tab'")


def fits_narrow_screens(page):
    overflow = "document.documentElement.scrollWidth - innerWidth"
    page.fresh()
    page.browser.resize(360, 640)
    page.browser.open(page.url)
    page.answered("markdown")
    page.picture("narrow")
    assert page.browser.run(overflow) <= 0
    assert page.browser.run("document.querySelector('#messages').scrollWidth - document.querySelector('#messages').clientWidth") <= 0
    page.browser.click("#toggle-settings")
    page.picture("narrow-settings")
    assert page.browser.run(overflow) <= 0
    page.browser.click("#close-settings")
    page.browser.click("#load-tab")
    page.browser.wait("document.querySelectorAll('.chart').length === 6")
    page.picture("narrow-load")
    assert page.browser.run(overflow) <= 0
    assert page.browser.run("document.querySelector('#load').scrollWidth - document.querySelector('#load').clientWidth") <= 0


def is_dark_where_that_is_preferred(page):
    page.browser.scheme("dark")
    page.fresh()
    dark = page.browser.run("getComputedStyle(document.body).backgroundColor")
    page.answered("markdown")
    page.answered("reason")
    page.picture("dark")
    page.browser.click("#load-tab")
    page.browser.wait("document.querySelectorAll('.chart').length === 6")
    page.picture("dark-load")
    page.browser.scheme("light")
    assert page.browser.run("getComputedStyle(document.body).backgroundColor") != dark


def real_server(page):
    """What holds of any server that runs."""
    headers = urllib.request.urlopen(page.url).headers
    policy = headers["content-security-policy"] or ""
    assert "default-src 'self'" in policy, f"content-security-policy: {policy!r}"
    page.fresh()
    browser = page.browser
    browser.wait("document.querySelector('#key-dialog').open || document.querySelector('#server').textContent.includes(' · ')", 60)
    if browser.run("document.querySelector('#key-dialog').open"):
        browser.type("#key", os.environ["LOWBIT_API_KEY"])
        browser.key("Enter")
    served = browser.wait("document.querySelector('#server').textContent.includes(' · ') && document.querySelector('#server').textContent")
    print(f"   {served}")
    page.show_probabilities()
    page.set("max_tokens", "24")
    page.set("temperature", "0")
    page.ask("It was a dark night, and")
    browser.wait(f"{IDLE} && document.querySelector('.stats') !== null", 120)
    shown = browser.run("document.querySelector('.stats').textContent")
    print(f"   {shown}")
    assert "TTFT" in shown and browser.run("document.querySelectorAll('.token[data-p]').length") > 1, browser.run(ANSWER)
    browser.run("document.querySelector('.token[tabindex]').focus()")
    assert browser.run("document.querySelectorAll('#tip tr').length") >= 5
    page.picture("real")
    browser.click("#load-tab")
    browser.wait("document.querySelectorAll('.chart').length === 6")
    browser.wait("/generated [1-9]/.test(document.querySelector('#totals').textContent)")
    # A rate needs two readings.
    browser.wait("/generated [0-9]/.test(document.querySelector('.chart:nth-child(4) .legend').textContent)")
    page.picture("real-load")


SCRIPTED = [
    names_what_is_served, streams, stops, tells_speed, settings_reach_the_request, changes_what_was_said, keys_write_lines,
    shows_probabilities, shows_reasoning_and_tools, renders_markdown, tells_errors, asks_for_a_key,
    continues_where_there_is_no_template, shows_load, fits_narrow_screens, is_dark_where_that_is_preferred,
]


def main():
    url = os.environ.get("LOWBIT_URL")
    mock = None if url else Mock()
    browser = Browser(sys.argv[1])
    page = Page(browser, mock, (url or mock.url).rstrip("/") + "/")
    failed = 0
    if url:
        print(f"skipped: {len(SCRIPTED)} scripted checks (LOWBIT_URL is set)")
    for check in [real_server] if url else SCRIPTED:
        browser.complaints.clear()
        try:
            check(page)
            assert not browser.complaints, f"on the console: {browser.complaints}"
            print(f"ok {check.__name__}")
        except Exception:
            failed += 1
            page.picture(f"failed-{check.__name__}")
            print(f"FAILED {check.__name__}\n{traceback.format_exc()}   on the console: {browser.complaints}")
    browser.close()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
