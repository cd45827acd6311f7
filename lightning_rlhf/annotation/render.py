"""Texts of models as HTML that can do nothing: no HTML of their own, no images, no links, no attributes."""

from __future__ import annotations

import functools
import html
import re

import nh3
from markdown_it import MarkdownIt


LONGEST = 200_000
"""Characters up to which a text is read as Markdown; a longer one is shown as it stands."""
TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li"),
    *("h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
# control characters but tab and line breaks, and characters that change the direction of what follows
_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_PARSER = (
    MarkdownIt("commonmark", {"html": False, "linkify": False})
    .enable(["table", "strikethrough"])
    # a link or an image would tell somebody else who reads what, and when
    .disable(["link", "image", "autolink", "reference", "html_block", "html_inline"])
)


def visible(text: str) -> str:
    """A text with the replacement character in place of invisible ones that could deceive a reader."""
    return _INVISIBLE.sub("\ufffd", text)


@functools.lru_cache(maxsize=2048)
def to_html(text: str) -> str:
    """Markdown as safe HTML; headings begin at the third level, below those of the page."""
    text = visible(text)
    if len(text) > LONGEST:
        return f"<pre>{html.escape(text)}</pre>"
    tokens = _PARSER.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        # `align` of table cells would need a style
        token.attrs = {}
    # a second opinion: what the parser let through by mistake is removed here
    return nh3.clean(_PARSER.renderer.render(tokens, _PARSER.options, {}), tags=TAGS, attributes={})
