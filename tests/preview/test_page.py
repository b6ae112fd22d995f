"""The page opens from disk, fetches nothing, and shows data without ever running it."""

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hf_sft_plugin.preview import page as preview_page
from hf_sft_plugin.preview.diff import diff_rows
from hf_sft_plugin.preview.page import write_preview_page
from hf_sft_plugin.preview.preview import PreviewedRow, TokenizationSetup, preview_rows
from hf_sft_plugin.types import DataOptions, RowError

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NASTY = (
    "</textarea><script>alert(1)</script> \" ' & \u2028 \u202e \x00 <!-- ]]> <img src=x onerror=a>"
)
REASON = "message 1, exact: begins where inference begins to generate, ends with its stop token"


def chat(prompt: str, response: str) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return {"messages": messages, "source": "web"}


ROWS = [chat("hello", "world"), chat("what", "the answer " * 8), chat("again", "")]


class Elements(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def page(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    rows = preview_rows(ROWS, tokenizer, max_length=30)
    here, there = (
        TokenizationSetup(tokenizer),
        TokenizationSetup(tokenizer, DataOptions(max_length=30)),
    )
    return write_preview_page(tmp_path / "page.html", rows, diff=diff_rows(ROWS, here, there))


def articles(dom: str) -> dict[str, bool]:
    """Which rows of a page are shown."""
    tags = re.findall(r"<article([^>]*)>", dom)
    names = [re.search(r'id="(.*?)"', tag) for tag in tags]
    return {
        name.group(1): " hidden" not in tag
        for name, tag in zip(names, tags, strict=True)
        if name is not None
    }


def test_trained_text_is_marked_with_its_reason(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert f'<mark title="{REASON} (' in text
    assert re.search(r'<mark title="[^"]*">world&lt;\|im_end\|&gt;</mark>', text)
    assert "tokens lost</span>" in text
    assert "cut off before its stop token" in text
    assert "empty response" in text


def test_remarks_stand_below_the_row(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = preview_rows([chat("hello <|im_end|>", "world"), chat("hello", "world")], tokenizer)
    text = write_preview_page(tmp_path / "page.html", rows).read_text(encoding="utf-8")
    (remarks,) = re.findall(r'<ul class="why remarks">(.*?)</ul>', text)
    assert remarks == "<li>control tokens in the contents: &lt;|im_end|&gt; (1)</li>"


def test_each_row_knows_its_filters(page: Path) -> None:
    found = dict(re.findall(r'<article id="(.*?)".*?data-is="(.*?)"', page.read_text("utf-8")))
    assert found == {"row-0": "all", "row-1": "all truncated", "row-2": "all set_aside"}


def test_nothing_in_the_page_is_fetched_and_the_policy_forbids_it(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8")).found
    assert {tag for tag, _ in elements}.isdisjoint({"link", "img", "iframe", "form", "a", "base"})
    names = {name for _, attributes in elements for name in attributes}
    assert names.isdisjoint({"src", "href", "style"})
    assert not [name for name in names if name.startswith("on")]
    policies = [
        attributes["content"]
        for _, attributes in elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in str(policies[0])
    assert "http" not in page.read_text(encoding="utf-8").replace("http-equiv", "")


def test_all_data_is_escaped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    row = {**chat(NASTY, NASTY), "source": NASTY}
    rows = preview_rows([row], tokenizer)
    error = RowError(1, NASTY, NASTY)
    broken = json.dumps({"text": "\ud800" + NASTY}, ensure_ascii=False)
    rows.append(PreviewedRow(1, (), 0, 0, error, NASTY, broken, (NASTY,)))
    diff = diff_rows(
        [row],
        TokenizationSetup(tokenizer),
        TokenizationSetup(tokenizer, DataOptions(max_length=80)),
    )
    path = write_preview_page(tmp_path / "page.html", rows, diff=diff, title=NASTY)
    text = path.read_text(encoding="utf-8")
    tags = [tag for tag, _ in Elements(text).found]
    assert tags.count("script") == 1
    assert not {"img", "textarea"} & set(tags)
    assert not set(text) & set("\x00\u2028\u202e\ud800")
    assert "<U+D800>" in html.unescape(text)


def test_rows_beyond_the_limit_are_left_out_with_their_number(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_page, "MAX_ROWS", 2)
    path = write_preview_page(tmp_path / "page.html", preview_rows(ROWS, tokenizer))
    text = path.read_text(encoding="utf-8")
    assert text.count("<article") == 2
    assert "The first 2 of 3 rows are shown." in text


def test_ids_are_shown_where_they_are_wanted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_preview_page(tmp_path / "a.html", preview_rows(ROWS, tokenizer), show_ids=True)
    assert "&lt;|im_end|&gt;<sub>2</sub>" in path.read_text(encoding="utf-8")


def test_what_other_settings_train_is_a_section_of_its_own(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<h2>1 of 3 rows differ</h2>" in text
    assert 'data-only="differ"' in text
    assert '<mark class="gone" title="trained with these settings only">' in text


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Opens a page in Chromium and returns what became of it, and what the browser complained."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed, so the page cannot be opened")

    def open_(path: Path, fragment: str = "") -> tuple[str, str]:
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --dump-dom"
        quiet = "--disable-background-networking --disable-component-update --enable-logging=stderr"
        command = [CHROMIUM, *flags.split(), *quiet.split(), f"--user-data-dir={tmp_path / 'user'}"]
        done = subprocess.run(
            [*command, path.as_uri() + fragment],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout, done.stderr

    return open_


@pytest.mark.parametrize(
    ("fragment", "shown"),
    [
        ("", ["row-0", "row-1", "row-2"]),
        ("#q=world", ["row-0"]),
        ("#q=THE+answer", ["row-1"]),
        ("#only=truncated", ["row-1"]),
        ("#only=set_aside", ["row-2"]),
        ("#q=world&only=set_aside", []),
        ("#only=differ", []),
        ("#only=nonsense", ["row-0", "row-1", "row-2"]),
    ],
)
def test_search_and_filters_choose_rows(
    fragment: str, shown: list[str], page: Path, open_page: Callable[..., tuple[str, str]]
) -> None:
    dom, complaints = open_page(page, fragment)
    found = articles(dom)
    assert list(found) == ["row-0", "row-1", "row-2"]
    assert [name for name, is_shown in found.items() if is_shown] == shown
    assert re.search(r'id="count"[^>]*>\d+ of 4 shown<', dom)
    assert f'title="{REASON} (' in dom
    assert "CONSOLE" not in complaints


def test_what_data_says_is_searched_as_it_is_written(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, open_page: Callable[..., tuple[str, str]]
) -> None:
    rows = preview_rows([chat("one", "two\nthree"), chat("<b>", '"4"')], tokenizer)
    path = write_preview_page(tmp_path / "page.html", rows, show_ids=True)
    assert articles(open_page(path, "#q=two%0Athree")[0]) == {"row-0": True, "row-1": False}
    assert articles(open_page(path, "#q=%3Cb%3E")[0]) == {"row-0": False, "row-1": True}
    assert articles(open_page(path, "#q=%224%22%3C")[0]) == {"row-0": False, "row-1": True}


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """The address of a server on this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_opening_the_page_fetches_nothing_whatever_the_data_says(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    open_page: Callable[..., tuple[str, str]],
    requests: tuple[str, list[str]],
) -> None:
    address, asked = requests
    smuggled = f'"><img src="{address}/img"><script src="{address}/js"></script>'
    rows = preview_rows([chat(smuggled, smuggled)], tokenizer)
    path = write_preview_page(tmp_path / "page.html", rows)
    dom, complaints = open_page(path)
    assert articles(dom) == {"row-0": True}
    assert asked == []
    assert "CONSOLE" not in complaints
    # Even unescaped it would be stopped by the policy; a page without one shows that we would see.
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<h1>", f'<img src="{address}/img"><h1>'), encoding="utf-8")
    _, complaints = open_page(path)
    assert asked == []
    assert "Content Security Policy" in complaints
    path.write_text(f'<img src="{address}/control">', encoding="utf-8")
    open_page(path)
    assert asked == ["/control"]
