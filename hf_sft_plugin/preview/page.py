"""Previewed rows as one page that opens from disk: nothing is fetched, and all data is escaped."""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from hf_sft_plugin.preview.diff import Diff, RowChange
from hf_sft_plugin.preview.preview import Piece, PreviewedExample, PreviewedRow, SpanNote
from hf_sft_plugin.types import visible

MAX_ROWS = 2000

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #22262b; --quiet: #6b7178; --line: #e3e3de;
  --trained: #0b6b4f; --trained-back: #dff3ea; --edge: #3aa981;
  --lost: #8a5a00; --lost-back: #fbf0d9; --bad: #a8323a; --bad-back: #fbe7e7; --focus: #2f6fde;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181b; --card: #1c2024; --ink: #dfe3e6; --quiet: #8e979f; --line: #2c3238;
    --trained: #9be7c8; --trained-back: #16392d; --edge: #2f9b74;
    --lost: #f0c36d; --lost-back: #3a2e14; --bad: #f2a3a8; --bad-back: #3d2023; --focus: #7fb0ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, .bar { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
h1 { font-size: 1.35rem; font-weight: 650; margin: 2rem 0 .15rem; }
h2 { font-size: 1.1rem; font-weight: 650; margin: 2rem 0 .5rem; }
p { margin: 0 0 .75rem; }
.quiet { color: var(--quiet); }
.top { position: sticky; top: 0; z-index: 1; margin-bottom: 1.25rem; background: var(--page);
  border-bottom: 1px solid var(--line); }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; padding-top: .7rem;
  padding-bottom: .7rem; }
input, button { font: inherit; color: inherit; background: var(--card); padding: .35rem .8rem;
  border: 1px solid var(--line); border-radius: 999px; }
input { flex: 1 1 14rem; min-width: 0; }
button { cursor: pointer; }
button:hover { border-color: var(--quiet); }
button[aria-pressed=true] { background: var(--ink); border-color: var(--ink); color: var(--page); }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
button[aria-pressed=true] .quiet { color: inherit; opacity: .7; }
#count { margin-left: auto; font-size: .85rem; color: var(--quiet);
  font-variant-numeric: tabular-nums; }
article { margin: 0 0 1rem; padding: .9rem 1.1rem 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .75rem; scroll-margin-top: 5rem;
  content-visibility: auto; contain-intrinsic-size: auto 14rem; }
[hidden], section:not(:has(article:not([hidden]))) { display: none !important; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .7rem;
  font-size: .85rem; color: var(--quiet); font-variant-numeric: tabular-nums; }
h3 { margin: 0; font-size: .95rem; font-weight: 650; color: var(--ink); }
.tag { padding: 0 .55rem; border-radius: 999px; border: 1px solid var(--line); }
.tag.lost { color: var(--lost); background: var(--lost-back); border-color: transparent; }
.tag.bad, .gone { color: var(--bad); background: var(--bad-back); border-color: transparent; }
.text { margin: .65rem 0; color: var(--quiet); white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext;
  font: 13.5px/1.7 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; }
.text + .text { border-top: 1px dashed var(--line); padding-top: .65rem; }
mark { color: var(--trained); background: var(--trained-back); border-radius: .2rem;
  padding: .1rem 0; border-bottom: 2px solid var(--edge); cursor: help;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
mark.gone { border-bottom-color: currentColor; }
sub { font-size: .65em; opacity: .75; user-select: none; }
.problem { margin: .5rem 0 0; color: var(--bad); }
ul { margin: 0; padding: 0; list-style: none; font-size: .85rem; color: var(--quiet); }
.why li::before { content: ""; display: inline-block; width: .55rem; height: .55rem;
  margin-right: .5rem; border-radius: 2px; background: var(--edge); }
.remarks li { color: var(--lost); }
.remarks li::before { background: currentColor; }
.changes li { white-space: pre-wrap; overflow-wrap: anywhere; margin: .35rem 0;
  font: 13.5px/1.6 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; }
kbd { font: inherit; padding: 0 .35rem; border: 1px solid var(--line); border-radius: .3rem; }
@media (max-width: 40rem) {
  main, .bar { padding-left: .75rem; padding-right: .75rem; }
  article { padding: .75rem .8rem; border-radius: .6rem; }
  .keys { display: none; }
}
@media print { .top { display: none; } article { break-inside: avoid; } }
"""

_SCRIPT = """
// A search box holds one line: line ends are as good as spaces.
const plain = text => text.replaceAll(/\\s+/g, " ").toLowerCase();
const search = document.getElementById("search");
const count = document.getElementById("count");
const buttons = [...document.querySelectorAll("button[data-only]")];
const rows = [...document.querySelectorAll("article")];
// Neither ids nor the marks of line ends are part of what one searches for.
const texts = rows.map(row => {
  let copy = row;
  if (row.querySelector("sub")) {
    copy = row.cloneNode(true);
    copy.querySelectorAll("sub").forEach(id => id.remove());
  }
  return plain(copy.textContent.replaceAll("\\u21b5", ""));
});
let only = "all";

function show() {
  const wanted = plain(search.value);
  let shown = 0;
  rows.forEach((row, number) => {
    const fits = only === "all" || row.dataset.is.split(" ").includes(only);
    row.hidden = !fits || !texts[number].includes(wanted);
    shown += !row.hidden;
  });
  count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} shown`;
  buttons.forEach(button => button.setAttribute("aria-pressed", button.dataset.only === only));
}

function remember() {
  const state = new URLSearchParams();
  if (search.value) state.set("q", search.value);
  if (only !== "all") state.set("only", only);
  history.replaceState(null, "", "#" + state);
  show();
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  search.value = (state.get("q") || "").replaceAll(/\\s+/g, " ");
  only = buttons.some(button => button.dataset.only === state.get("only")) ?
    state.get("only") : "all";
  show();
}

function step(direction) {
  const shown = rows.filter(row => !row.hidden);
  const next = shown[shown.indexOf(document.activeElement) + direction];
  if (next) next.focus();
}

search.addEventListener("input", remember);
buttons.forEach(button => button.addEventListener("click", () => {
  only = button.dataset.only;
  remember();
}));
addEventListener("hashchange", recall);
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && document.activeElement === search) {
    search.value = "";
    remember();
    search.blur();
  } else if (document.activeElement !== search) {
    if (event.key === "/") { event.preventDefault(); search.focus(); }
    if (event.key === "j") step(1);
    if (event.key === "k") step(-1);
  }
});
recall();
"""

_FILTERS = (
    ("all", "All"),
    ("truncated", "Truncated"),
    ("set_aside", "Set aside"),
    ("split", "Split"),
    ("differ", "Differ"),
)


def write_preview_page(
    path: Path,
    rows: Sequence[PreviewedRow],
    *,
    diff: Diff | None = None,
    show_ids: bool = False,
    title: str = "What is trained",
) -> Path:
    """Writes rows as one page: to search, to filter, with the reason of each span on hover.

    `#q=text&only=truncated` behind its address opens it with a search and a filter.

    Args:
        path: Where the page goes.
        rows: See `preview_rows`; those after the first 2,000 are left out, which the page says.
        diff: What another setup trains differently; None without a comparison.
        show_ids: Whether the ids follow each piece of text.
        title: Title of the page.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(rows, diff, show_ids, visible(title)), encoding="utf-8", newline="\n")
    return path


def _page(rows: Sequence[PreviewedRow], diff: Diff | None, show_ids: bool, title: str) -> str:
    # The hashes let this style and this script through, and nothing that data might smuggle in.
    policy = (
        f"default-src 'none'; style-src '{_sha256(_STYLE)}'; script-src '{_sha256(_SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    shown = rows[:MAX_ROWS]
    changes = () if diff is None else diff.rows
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<body>
<main>
<h1>{escape(title)}</h1>
{_summary(rows, shown)}
</main>
<div class="top"><div class="bar" role="search">
<input id="search" type="search" placeholder="Search rows" aria-label="Search rows"
 autocomplete="off" spellcheck="false">
{_buttons(shown, changes)}
<span id="count" role="status"></span>
</div></div>
<main>
{"" if diff is None else _diff(diff)}
<section><h2>Rows</h2>
{"".join(_row(row, show_ids) for row in shown)}
</section>
<p class="quiet keys"><kbd>/</kbd> search &nbsp; <kbd>Esc</kbd> clear &nbsp;
<kbd>j</kbd> <kbd>k</kbd> next and previous row</p>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _buttons(rows: Sequence[PreviewedRow], changes: Sequence[RowChange]) -> str:
    """One button per filter, with how many rows pass it."""
    kinds = Counter(kind for row in rows for kind in _kinds(row))
    kinds.update({"all": len(changes), "differ": len(changes)})
    return "".join(
        f'<button type="button" data-only="{name}" aria-pressed="false">{label} '
        f'<span class="quiet">{kinds[name]:,}</span></button>'
        for name, label in _FILTERS
        if changes or name != "differ"
    )


def _sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _summary(rows: Sequence[PreviewedRow], shown: Sequence[PreviewedRow]) -> str:
    num_trained = sum(row.num_trained for row in shown)
    num_tokens = sum(
        len(piece.ids) for row in shown for example in row.examples for piece in example.pieces
    )
    share = f" ({num_trained / num_tokens:.1%})" if num_tokens else ""
    num_left_out = len(rows) - len(shown)
    capped = f" The first {len(shown):,} of {len(rows):,} rows are shown." if num_left_out else ""
    return (
        f'<p class="quiet">{num_trained:,} of the {num_tokens:,} tokens read are trained{share}: '
        f'the <mark class="sample">marked</mark> ones. Hover over them for the reason.{capped}</p>'
    )


def _kinds(row: PreviewedRow) -> list[str]:
    """The filters that a row passes."""
    kinds = ["all"]
    if row.error is not None:
        kinds.append("set_aside")
    elif row.num_lost:
        kinds.append("truncated")
    if len(row.examples) > 1:
        kinds.append("split")
    return kinds


def _row(row: PreviewedRow, show_ids: bool) -> str:
    tags = [f"<span>{row.num_tokens:,} tokens, {row.num_trained:,} trained</span>"]
    if row.source:
        tags.append(f'<span class="tag">{_text(row.source)}</span>')
    if row.num_lost and row.error is None:
        tags.append(f'<span class="tag lost">{row.num_lost:,} tokens lost</span>')
    if len(row.examples) > 1:
        tags.append(f'<span class="tag">{len(row.examples)} examples</span>')
    body = "".join(_example(example, show_ids) for example in row.examples)
    if row.error is not None:
        tags.append(f'<span class="tag bad">{_text(row.error.reason)}</span>')
        body += f'<p class="problem">{_text(row.error.problem)}</p>'
        body += f'<div class="text">{_text(row.raw)}</div>'
    if row.remarks:
        remarks = "".join(f"<li>{_text(remark)}</li>" for remark in row.remarks)
        body += f'<ul class="why remarks">{remarks}</ul>'
    return (
        f'<article id="row-{row.row}" tabindex="-1" data-is="{" ".join(_kinds(row))}">'
        f"<header><h3>Row {row.row}</h3>{''.join(tags)}</header>{body}</article>\n"
    )


def _example(example: PreviewedExample, show_ids: bool) -> str:
    parts = []
    for trained, note, pieces in example.runs():
        text = "".join(_piece(piece, show_ids) for piece in pieces)
        parts.append(f'<mark title="{_text(_title(note))}">{text}</mark>' if trained else text)
    notes = "".join(f"<li>{_text(_title(note))}</li>" for note in example.notes)
    return f'<div class="text">{"".join(parts)}</div><ul class="why">{notes}</ul>'


def _piece(piece: Piece, show_ids: bool) -> str:
    text = _text(piece.text)
    if not show_ids:
        return text
    # A line that ends keeps the ids of its end.
    line_end = "\n" if text.endswith("\n") else ""
    return f"{text.removesuffix(line_end)}<sub>{' '.join(map(str, piece.ids))}</sub>{line_end}"


def _title(note: SpanNote | None) -> str:
    return "trained" if note is None else f"{note.reason} ({note.num_tokens:,} tokens)"


def _diff(diff: Diff) -> str:
    shown = (
        "" if len(diff.rows) == diff.num_changed else f" The first {len(diff.rows):,} are shown."
    )
    changes = "".join(map(_change, diff.rows))
    return (
        f'<section id="differences"><h2>{diff.num_changed:,} of {diff.num_rows:,} rows differ</h2>'
        '<p class="quiet"><mark class="gone">Red</mark> is trained with these settings only, '
        f"<mark>green</mark> with the other settings only.{shown}</p>{changes}</section>"
    )


def _change(change: RowChange) -> str:
    problems = "".join(
        f'<p class="problem">set aside with {who} settings: {_text(error.problem)}</p>'
        for who, error in (("these", change.here), ("the other", change.there))
        if error is not None
    )
    lines = "".join(
        f"<li>{_text(part.before)}"
        + (
            f'<mark class="gone" title="trained with these settings only">{_text(part.text)}</mark>'
            if part.here
            else f'<mark title="trained with the other settings only">{_text(part.text)}</mark>'
        )
        + f"{_text(part.after)}</li>"
        for part in change.changes
    )
    return (
        '<article tabindex="-1" data-is="all differ">'
        f"<header><h3>Row {change.row}</h3></header>{problems}"
        f'<ul class="changes">{lines}</ul></article>\n'
    )


def _text(text: str) -> str:
    return escape(visible(text), quote=True)
