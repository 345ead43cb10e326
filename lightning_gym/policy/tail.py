"""TailTemplate: what a chat template writes after a message, without writing the conversation before it again.

A later turn needs only the text after the last sampled words, yet a template writes everything. Most templates end in
a loop over the messages whose body looks at little but the message in hand; there, the bodies of earlier messages can
be passed over. Whether that is so is proved once on the template's syntax tree. A template that does not pass is
rendered whole; the text is the same either way.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

# transformers 5.19, utils/chat_template_utils.py: the sandbox with the filters and extensions of `apply_chat_template`;
# it has no public name.
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,  # pyright: ignore[reportPrivateUsage]
)

_TEST = "an_earlier_message"
_LOOP = "\u2063the messages begin\u2063"
_LAZY_FILTERS = frozenset(("map", "select", "reject", "selectattr", "rejectattr", "batch", "slice", "unique"))
_COUNTERS = frozenset(("cycler", "joiner"))
_LOOP_ATTRIBUTES = frozenset(
    ("index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem")
)
_OF_JINJA = frozenset((LoopContext, Namespace))
_OF_DICTIONARIES = frozenset(dir({}))
_MISSING = object()
_KEEPING: Any = (nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.With, nodes.CallBlock)
_REFUSED: Any = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block, nodes.ExprStmt)


class _Earlier(dict[str, Any]):
    """A message whose body may be passed over; to every other reader the message it is."""


class TailTemplate:
    """A chat template.

    Args:
        source: in Jinja.

    Example:
        >>> template = TailTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}")
        >>> messages = [{"role": "assistant", "content": "<mark>"}, {"role": "user", "content": "more"}]
        >>> template.passes_over, template.after("<mark>", messages, 0)
        (True, ';user: more;')
    """

    def __init__(self, source: str) -> None:
        self._whole: Any = _compile_jinja_template(source)
        environment: Any = self._whole.environment.overlay()
        environment.tests = {**environment.tests, _TEST: lambda value: isinstance(value, _Earlier)}
        environment.getattr = _quick_getattr(environment)
        tree = environment.parse(source)
        writing = [(body, loop) for body, loop in _outermost_loops(tree.body) if loop.find(nodes.Output)]
        self.passes_over = bool(writing) and _carries_nothing(writing[-1][1], tree)
        """Whether bodies of earlier messages are passed over."""
        if self.passes_over:
            _pass_over(tree, *writing[-1])
            self._short: Any = environment.from_string(tree)

    def after(self, mark: str, messages: Sequence[dict[str, Any]], index: int, **variables: Any) -> str | None:
        """The text after `mark`, which is the content of message `index`; ``None`` where it is not written once.

        Where bodies are passed over, what stands before the messages may repeat the mark; the text is that after the
        message itself.
        """
        if self.passes_over:
            short = [*map(_Earlier, messages[:index]), *messages[index:]]
            _, began, text = self._short.render(messages=short, **variables).rpartition(_LOOP)
            if began and text.count(mark) == 1:
                return text.partition(mark)[2]
        _, found, after = self._whole.render(messages=messages, **variables).partition(mark)
        return after if found and mark not in after else None


_DICTIONARIES = frozenset((dict, _Earlier))


def _quick_getattr(environment: Any) -> Callable[[Any, str], Any]:
    """The sandbox's ``message.role`` and ``loop.first``, several times as fast.

    The sandbox asks a dictionary for an attribute, fails, and looks up the key; but what attributes a dictionary has is
    known. Of Jinja's own loops and namespaces, it forbids private attributes.
    """
    slow, undefined = environment.getattr, environment.undefined

    def quick(value: Any, name: str) -> Any:
        kind = value.__class__
        if kind in _DICTIONARIES and name not in _OF_DICTIONARIES:
            found = value.get(name, _MISSING)
            return undefined(obj=value, name=name) if found is _MISSING else found
        if kind in _OF_JINJA and not name.startswith("_"):
            with contextlib.suppress(AttributeError):
                return getattr(value, name)
        return slow(value, name)

    return quick


def _pass_over(tree: nodes.Template, body: list[nodes.Node], loop: nodes.For) -> None:
    """Make what a loop does for earlier messages conditional, write where it begins, and drop what only writes before.

    What may refuse the conversation is kept: a template may look at its last message first.
    """
    holding = next(i for i, node in enumerate(tree.body) if any(found is loop for found in _loops(node)))
    tree.body[:holding] = [node for node in tree.body[:holding] if not _only_writes(node)]
    message: Any = loop.target
    later = nodes.Not(nodes.Test(nodes.Name(message.name, "load"), _TEST, [], [], None, None))
    loop.body = [nodes.If(later, loop.body, [], [])]
    body.insert(body.index(loop), nodes.Output([nodes.TemplateData(_LOOP)]))


def _loops(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.For)


def _only_writes(node: nodes.Node) -> bool:
    writes = isinstance(node, nodes.Output | nodes.If | nodes.For)
    refuses = any(found.name == "raise_exception" for found in node.find_all(nodes.Name))
    return writes and not refuses and node.find(_KEEPING) is None


def _outermost_loops(body: list[nodes.Node]) -> Iterator[tuple[list[nodes.Node], nodes.For]]:
    """Loops whose output goes straight into the text, under nothing but conditions; and where each stands."""
    for node in body:
        if isinstance(node, nodes.For):
            yield body, node
        elif isinstance(node, nodes.If):
            for branch in (node.body, *(other.body for other in node.elif_), node.else_):
                yield from _outermost_loops(branch)


def _carries_nothing(loop: nodes.For, tree: nodes.Template) -> bool:
    """Whether a loop writes the messages in order and brings nothing from one to the next.

    Jinja's variables end with their iteration and the sandbox forbids changing lists and dictionaries; namespaces,
    counters, lazy filters, ``break`` and ``loop.changed`` are what is left, and looked for here. What an earlier body
    would have *refused*, it refused when its message was new.
    """
    in_loop = set(map(id, loop.find_all(nodes.Filter)))
    lazy = any(f.name in _LAZY_FILTERS and id(f) not in in_loop for f in tree.find_all(nodes.Filter))
    counters = any(found.name in _COUNTERS for found in tree.find_all(nodes.Name))
    if tree.find(_REFUSED) or loop.find(nodes.Break) or loop.recursive or lazy or counters:
        return False
    macros_write = any(macro.find(nodes.NSRef) for macro in tree.find_all(nodes.Macro))
    foreign = {found.name for found in loop.find_all(nodes.NSRef)} - _own_namespaces(loop, tree)
    return (
        isinstance(loop.target, nodes.Name)
        and _in_order(loop.iter, tree, frozenset())
        and _asks_only_for_its_place(loop)
        and not macros_write
        and not foreign
    )


def _own_namespaces(loop: nodes.For, tree: nodes.Template) -> set[str]:
    """Names that hold a namespace made anew in every iteration, and nothing else anywhere."""
    made: list[str] = []
    for assign in loop.find_all(nodes.Assign):
        match assign:
            case nodes.Assign(target=nodes.Name(name=name), node=nodes.Call(node=nodes.Name(name="namespace"))):
                made.append(name)
            case _:
                continue
    stored = [found.name for found in tree.find_all(nodes.Name) if found.ctx != "load"]
    return {name for name in made if made.count(name) == stored.count(name)}


def _in_order(expression: nodes.Node | None, tree: nodes.Template, seen: frozenset[str]) -> bool:
    """Whether an expression is the messages, or a run of them, from first to last."""
    match expression:
        case nodes.Name(name=name):
            stores = [found for found in tree.find_all(nodes.Name) if found.name == name and found.ctx != "load"]
            values = [one.node for one in tree.find_all(nodes.Assign) if any(one.target is found for found in stores)]
            known = name == "messages" or bool(values)
            plain = len(stores) == len(values)
            return known and plain and (name in seen or all(_in_order(v, tree, seen | {name}) for v in values))
        case nodes.Getitem(node=inner, arg=nodes.Slice(step=None)):
            return _in_order(inner, tree, seen)
        case nodes.CondExpr(expr1=yes, expr2=no):
            return _in_order(yes, tree, seen) and _in_order(no, tree, seen)
        case _:
            return False


def _asks_only_for_its_place(loop: nodes.For) -> bool:
    asked = sum(found.name == "loop" for found in loop.find_all(nodes.Name))
    places = [
        one for one in loop.find_all(nodes.Getattr) if isinstance(one.node, nodes.Name) and one.node.name == "loop"
    ]
    return asked == len(places) and all(place.attr in _LOOP_ATTRIBUTES for place in places)


@functools.lru_cache(maxsize=16)
def tail_template(source: str) -> TailTemplate:
    """The template of a source; compiling one takes milliseconds."""
    return TailTemplate(source)
