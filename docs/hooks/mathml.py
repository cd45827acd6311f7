"""Formulas of the manual as MathML, made while the site is built: browsers show it without any script.

Pages have LaTeX between dollar signs, as GitHub shows it. The extension ``pymdownx.arithmatex`` finds it, and this hook
of mkdocs converts it.
"""

from __future__ import annotations

import re
from html import unescape

from latex2mathml.converter import convert


FORMULA = re.compile(
    r'<span class="arithmatex">\\\((.*?)\\\)</span>|<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL
)
PRIME = re.compile(r"<msup><mi>([^<]*)</mi><mi>&#x02032;</mi></msup>")
SIGN = re.compile(r"(<mo[^>]*>(?:&#x00028;|&#x0003D;)</mo>)<mo>(&#x02212;|&#x0002B;)</mo>")
LETTERS = re.compile(r'(?:<mi mathvariant="normal">\w</mi>){2,}')
OPERATOR = re.compile(r"<mo>([A-Za-z]{2,})</mo>")
NAME = "<mi>[A-Za-z]{2,}</mi>"
BESIDE_A_NAME = re.compile(rf"({NAME})(?=<m(?:i|sub|sup|subsup)>)|(</(?:mi|mn|msub|msup|msubsup)>)(?={NAME})")


def on_page_content(html: str, **_: object) -> str:
    """Convert the formulas of a page."""
    return FORMULA.sub(_as_mathml, html)


def _as_mathml(found: re.Match[str]) -> str:
    inline, block = found.groups()
    latex = unescape(inline or block).strip().replace("{aligned}", "{align*}")  # the same inside a formula
    mathml = convert(latex, display="inline" if block is None else "block")
    # the converter has identifiers for the relation "is distributed as" and for each letter of an upright word, and
    # operators for names of functions; it raises the prime, which is raised already, and takes signs for operators
    mathml = re.sub("<mi>(?:&#x0007E;|~)</mi>", "<mo>&#x223C;</mo>", mathml)
    mathml = PRIME.sub(r'<mi>\1</mi><mo lspace="0" rspace="0">&#x2032;</mo>', mathml)
    mathml = SIGN.sub(r'\1<mo form="prefix">\2</mo>', mathml)
    mathml = LETTERS.sub(lambda letters: f"<mi>{re.sub('<[^>]*>', '', letters[0])}</mi>", mathml)
    mathml = OPERATOR.sub(r"<mi>\1</mi>", mathml)
    mathml = BESIDE_A_NAME.sub(r'\1\2<mspace width="0.167em" />', mathml)
    if "\\" in mathml:
        raise ValueError(f"a formula has a command that is not known: {inline or block}")
    return mathml if block is None else f'<div class="formula">{mathml}</div>'
