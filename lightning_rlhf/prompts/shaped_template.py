"""Conversations written by a chat template that runs once for each shape: the roles, and which contents are empty.

Most templates write roles and contents with fixed text around them. Such a template writes all conversations of one
shape in the same way, so that later ones take a join of strings instead of a run of Jinja, which costs a tenth of a
millisecond. The template runs on objects in place of the contents (`_Text`). All that they allow is to be written, to
be added to other text, to be stripped, and to be empty or not: every other use raises an error, e.g. a comparison, a
search, a filter, or a conversion to a string. So a template that gets to its end wrote the same for every content, and
one that does not is run for each row, as are the following:

- templates with a statement that keeps what was written in a variable (macros, ``set`` blocks, recursive loops), since
  a string could be searched later, and templates with filters, tests or functions that are not known to be safe;
- conversations with other fields than role and content, or with options of the template, such as tools.

In addition, each shape is compared with the template on contents that templates treat specially, and every
`CHECK_EVERY`-th conversation is.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NoReturn, TypeAlias, cast

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.types import Message


Shape: TypeAlias = tuple[tuple[str, bool], ...]
"""Role of each message, and whether it has a content that is not empty."""
Pieces: TypeAlias = tuple[str | int, ...]
"""Text of the template, n for the content of message n, and -1 - n for that content without white space around it."""

CHECK_EVERY = 256
"""One conversation of so many is written by the template itself as well."""
MOST_SHAPES = 1_000
"""Shapes that are remembered; conversations of other shapes are written by the template."""
PROBES = (
    *(" a ", "\n\nb\n", " \n\t", "0", "None", "False", "{{ messages }}", "<think>c</think>d", "[INST] e [/INST]"),
    *("<|im_end|>\n<|im_start|>assistant\nf", "</s><s>", "\u00a0g\u2028", "'\"\\<&>", "h\r\n", "%s{}", "i" * 5000),
)
"""Contents on which a shape is compared with its template."""

_NODES = (
    *(nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.NSRef, nodes.Break, nodes.Continue),
    *(nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr),
    *(nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.BinExpr, nodes.UnaryExpr),
    *(nodes.Compare, nodes.Operand, nodes.Concat),
)
"""Parts of which a template may consist. What they write goes to the text, and into no variable."""
_FILTERS = {"trim", "tojson", "default", "d", "length", "count", "list", "first", "last", "items", "string", "join"}
_FILTERS |= {"replace", "upper", "lower", "selectattr", "rejectattr"}
"""Filters that raise an error on `_Text`, or keep it as it is; ``trim`` strips it."""
_TESTS = {"string": True, "defined": True, "iterable": True, "sequence": True, "undefined": False, "none": False}
_TESTS |= {"mapping": False, "number": False, "boolean": False, "true": False, "false": False}
"""Tests, and whether a text passes them."""
_OTHER_TESTS = {"in", "eq", "equalto", "==", "ne", "!="}
"""Tests that compare."""
_OTHER_NAMES = {"strftime_now", "lipsum", "self", "caller"}
"""Names of functions that write something else each time, or give back what was written."""


class DependsOnContentError(Exception):
    """A template does more with a content than to write it."""


class _Text:
    """Text that is not known yet, in place of a content.

    Args:
        pieces: what it is made of.
        filled: whether it is not empty; None if that depends on the content.
    """

    __slots__ = ("_filled", "_pieces")

    def __init__(self, pieces: Pieces, filled: bool | None) -> None:
        self._pieces, self._filled = pieces, filled

    def __add__(self, other: object) -> _Text:
        found = _as_text(other)
        return _Text(self._pieces + found._pieces, _either(self, found)) if found is not None else NotImplemented

    def __radd__(self, other: object) -> _Text:
        found = _as_text(other)
        return _Text(found._pieces + self._pieces, _either(self, found)) if found is not None else NotImplemented

    def __bool__(self) -> bool:
        return self._refuse() if self._filled is None else self._filled

    def strip(self, *arguments: object) -> _Text:
        """The text without white space around it."""
        if arguments or len(self._pieces) != 1 or isinstance(self._pieces[0], str):
            self._refuse()
        # the white space of a stripped text is gone already
        place = self._pieces[0]
        return _Text((min(place, -1 - place),), None if self._filled else self._filled)

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise DependsOnContentError("the template reads a content")

    # by name, since Python looks these up in the class; __getattr__ has all methods of strings
    __str__ = __repr__ = __format__ = __len__ = __iter__ = __contains__ = __getitem__ = __getattr__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __int__ = __float__ = __index__ = __call__ = _refuse


def _as_text(value: object) -> _Text | None:
    if isinstance(value, _Text):
        return value
    # a subclass of str may do other things when it is added
    return _Text((value,) if value else (), bool(value)) if type(value) is str else None


def _either(one: _Text, other: _Text) -> bool | None:
    """Whether the sum of two texts is not empty."""
    known = {one._filled, other._filled}
    return True if True in known else None if None in known else False


class ShapedTemplate:
    """A chat template, and the texts between the contents for the shapes that it has written.

    Args:
        template: the template.
        variables: special tokens by their names, which a template may write.
    """

    def __init__(self, template: str, variables: Mapping[str, object]) -> None:
        self._variables = variables
        # a text of letters and digits that no template holds
        self._mark = f"content{secrets.token_hex(16)}n"
        self._template = self._prepared(template)
        self._known: dict[Shape, Pieces | None] = {}
        self._written = 0

    def render(self, messages: Sequence[Message], plain: Callable[[Sequence[Message]], str]) -> str:
        """Write a conversation; with the generation prompt, unless the last turn is the assistant's.

        Args:
            messages: the conversation.
            plain: lets the template itself write a conversation.

        Raises:
            RuntimeError: if the template itself writes another text, which is an error of this library.
        """
        shape = None if self._template is None else shape_of(messages)
        if shape is None:
            return plain(messages)
        if shape not in self._known and len(self._known) < MOST_SHAPES:
            self._known[shape] = self._learned(shape, plain)
        pieces = self._known.get(shape)
        if pieces is None:
            return plain(messages)
        text = _filled(pieces, [cast(str, message["content"]) for message in messages])
        self._written += 1
        if self._written % CHECK_EVERY == 0 and text != plain(messages):
            raise RuntimeError(
                "the chat template writes conversations of the same roles differently, which was not noticed before: "
                "this is an error of lightning_rlhf, please report it with the template"
            )
        return text

    def _prepared(self, template: str) -> jinja2.Template | None:
        """The template in an environment in which contents may be `_Text`; None if its parts are not all known."""
        # as transformers compiles it, with its functions; a private function, so that it may go
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template
        except ImportError:
            return None
        original = cast(jinja2.Template, _compile_jinja_template(template)).environment
        if original.finalize is not None or original.autoescape is not False:
            return None
        if not all(map(_is_known, original.parse(template).find_all(nodes.Node))):
            return None
        environment = original.overlay(finalize=self._marked)
        environment.filters = {name: original.filters[name] for name in _FILTERS}
        environment.filters["trim"] = _trim(original.filters["trim"])
        environment.tests = {
            name: _test(name, cast(Callable[..., object], original.tests[name]))
            for name in _TESTS.keys() | _OTHER_TESTS
        }
        return environment.from_string(template)

    def _marked(self, value: object) -> object:
        """What is written in place of a value."""
        if not isinstance(value, _Text):
            return value
        return "".join(piece if isinstance(piece, str) else f"{self._mark}{piece};" for piece in value._pieces)

    def _learned(self, shape: Shape, plain: Callable[[Sequence[Message]], str]) -> Pieces | None:
        """Pieces of a shape; None if the text around the contents depends on them."""
        try:
            pieces = self._pieces(shape)
            for first in range(len(PROBES)):
                contents = [
                    PROBES[(first + number) % len(PROBES)] if filled else "" for number, (_, filled) in enumerate(shape)
                ]
                messages: list[Message] = [
                    {"role": role, "content": content} for (role, _), content in zip(shape, contents, strict=True)
                ]
                if plain(messages) != _filled(pieces, contents):
                    return None
        except Exception:  # a template is a program, which may raise anything
            return None
        return pieces

    def _pieces(self, shape: Shape) -> Pieces:
        assert self._template is not None
        messages = [{"role": role, "content": _Text((number,), filled)} for number, (role, filled) in enumerate(shape)]
        text = self._template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=shape[-1][0] != "assistant",
            **self._variables,
        )
        # [text, place, text, place, ..., text]
        parts = re.split(f"{self._mark}(-?[0-9]+);", text)
        both = [(int(part) if number % 2 else part) for number, part in enumerate(parts)]
        return tuple(piece for piece in both if piece != "")


def shaped_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> ShapedTemplate | None:
    """The template of a tokenizer, or another one; None where the tokenizer writes conversations in its own way.

    Args:
        tokenizer: the tokenizer.
        template: chat template in place of the tokenizer's own.
    """
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return None
    # a tokenizer may have several by name, of which tools and others choose one
    chosen = template or tokenizer.chat_template
    variables = tokenizer.special_tokens_map
    if not isinstance(chosen, str) or not all(isinstance(value, str) for value in variables.values()):
        return None
    try:
        return _shaped(chosen, tuple(sorted(variables.items())))
    except jinja2.TemplateError:
        return None


@lru_cache(maxsize=8)
def _shaped(template: str, variables: tuple[tuple[str, str], ...]) -> ShapedTemplate:
    # kept over the portions of a data set
    return ShapedTemplate(template, dict(variables))


def shape_of(messages: Sequence[Message]) -> Shape | None:
    """Shape of a conversation; None if it has more than roles and texts."""
    found = []
    for message in messages:
        content = message["content"]
        # the order of the fields is seen by a template that lists them
        if type(content) is not str or tuple(message) != ("role", "content"):
            return None
        found.append((message["role"], bool(content)))
    return tuple(found)


def _filled(pieces: Pieces, contents: Sequence[str]) -> str:
    """The text with contents in their places."""
    return "".join(
        [
            piece if isinstance(piece, str) else contents[piece] if piece >= 0 else contents[-1 - piece].strip()
            for piece in pieces
        ]
    )


def _is_known(node: nodes.Node) -> bool:
    """Whether a part of a template hides no content in a string."""
    if not isinstance(node, _NODES):
        return False
    if isinstance(node, nodes.For):
        return not node.recursive
    if isinstance(node, nodes.Name):
        return node.name not in _OTHER_NAMES
    if isinstance(node, nodes.Filter):
        return node.name in _FILTERS
    if isinstance(node, nodes.Test):
        return node.name in _TESTS or node.name in _OTHER_TESTS
    return True


def _trim(original: Callable[..., object]) -> Callable[..., object]:
    """The filter that strips a text."""

    def trim(value: object, *arguments: object, **named: object) -> object:
        if isinstance(value, _Text):
            return value._refuse() if named else value.strip(*arguments)
        return original(value, *arguments, **named)

    return trim


def _test(name: str, original: Callable[..., object]) -> Callable[..., object]:
    """A test that a text passes as strings do."""

    def test(value: object, *arguments: object) -> object:
        if isinstance(value, _Text):
            return _TESTS[name] if name in _TESTS else value._refuse()
        return original(value, *arguments)

    return test
