"""Habits of chat templates that matter to token alignment, found by rendering small conversations.

Nothing here knows a model by its name: a habit is what the text shows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["exact", "spliced", "new segment", "refused", "impossible"]
"""What becomes of a rollout: nothing to align; sampled ids are carried over; cut in two; a 400; cannot be trained."""

_Message = dict[str, Any]
_ASK: _Message = {"role": "user", "content": "ask-1"}
_ASK_AGAIN: _Message = {"role": "user", "content": "ask-2"}
_ANSWER: _Message = {"role": "assistant", "content": "answer-1"}
_SYSTEM: _Message = {"role": "system", "content": "system-1"}
_CALL = {"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": {"b": 1, "a": [2, "c"]}}}
_CALLING: _Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: _Message = {"role": "tool", "content": "result-1", "tool_call_id": "callprobe", "name": "probe"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "tool-1",
        "parameters": {"type": "object", "properties": {"b": {"type": "integer"}}},
    },
}
_ODD_WORDS = "a  b\n\n\tc <&> é 'd' \"e\" \\n {{ f }}"
_THOUGHT = "thought-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trait:
    """One habit of a template or tokenizer."""

    name: str
    found: str
    outcome: Outcome
    effect: str
    """What it does to alignment."""


def template_traits(tokenizer: Any) -> Iterator[Trait]:
    """The habits of a tokenizer's chat template, whether or not it can be trained on."""
    probe = _Probe(tokenizer)
    tests: tuple[Callable[[_Probe], Trait], ...] = (
        *(_beginning, _generation_prompt, _system, _tools, _tool_calls, _reasoning),
        *(_trimming, _verbatim, _history, _time, _same_role),
    )
    return (test(probe) for test in tests)


class _Probe:
    """A template to be tried; what it refuses renders to ``None``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.refusal = ""
        """Of the last `text` that was ``None``."""

    def text(
        self, *messages: Mapping[str, Any], tools: Any = None, prompt: bool = False, **variables: Any
    ) -> str | None:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=prompt, tokenize=False, **variables
            )
        except Exception as error:  # noqa: BLE001  jinja raises what the template's author chose to raise
            self.refusal = str(error)
            return None

    def is_cut(self, text: str) -> bool:
        """Whether a special token stands in `text`."""
        return any(token in text for token in self.tokenizer.all_special_tokens)

    @property
    def takes_tools(self) -> bool:
        return "tool-1" in (self.text(_ASK, tools=[_TOOL]) or "")


def _beginning(probe: _Probe) -> Trait:
    tokenizer, text = probe.tokenizer, probe.text(_ASK) or ""
    written = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    added = bool(tokenizer.encode("x")) and tokenizer.encode("x")[0] == tokenizer.bos_token_id
    found = f"the template writes {tokenizer.bos_token}" if written else "the template writes none"
    found += "; the tokenizer adds one to every text" if added else ""
    lost = added and not written
    effect = "template text is encoded without the tokenizer's additions, so it begins with "
    effect += "none, unlike other texts of this tokenizer" if lost else "one" if written else "what the template writes"
    return Trait(name="beginning of text", found=found, outcome="exact", effect=effect)


def _generation_prompt(probe: _Probe) -> Trait:
    without, prompt = probe.text(_ASK), probe.text(_ASK, prompt=True)
    if without is None or prompt is None:
        return _refused(probe, "generation prompt")
    found = repr(prompt.removeprefix(without)) if prompt != without else "none: a turn begins where the user's ends"
    effect = "fed, never trained" if prompt != without else "the first sampled token is the first of the turn"
    return Trait(name="generation prompt", found=found, outcome="exact", effect=effect)


def _system(probe: _Probe) -> Trait:
    text = probe.text(_SYSTEM, _ASK)
    if text is None:
        remedy = "a request with a system message is a 400; put instructions into the first user message"
        return _refused(probe, "system message", remedy)
    if "system-1" not in text:
        return Trait(name="system message", found="left out", outcome="exact", effect="the policy never sees it")
    merged = not probe.is_cut(text.partition("system-1")[2].partition("ask-1")[0])
    found = "written into the user's turn" if merged else "a turn of its own"
    return Trait(name="system message", found=found, outcome="exact", effect="fed, never trained")


def _tools(probe: _Probe) -> Trait:
    if probe.text(_ASK, tools=[_TOOL]) is None or probe.text(_ASK, _CALLING, _RESULT, tools=[_TOOL]) is None:
        return _refused(probe, "tools", "a request with tools, calls or results is a 400; use tasks without tools")
    if probe.takes_tools:
        return Trait(name="tools", found="written", outcome="exact", effect="fed, never trained")
    effect = "the policy sees no tool definitions; it has to know its tools or be told in a message"
    return Trait(name="tools", found="definitions are left out", outcome="exact", effect=effect)


def _tool_calls(probe: _Probe) -> Trait:
    text = probe.text(_ASK, _CALLING, _RESULT, tools=[_TOOL])
    if text is None:
        return _refused(probe, "tool calls")
    spellings = {
        '{"b": 1, "a": [2, "c"]}': "JSON as Python writes it, keys in the order of the call",
        '{"b":1,"a":[2,"c"]}': "compact JSON, keys in the order of the call",
        '{"a": [2, "c"], "b": 1}': "JSON as Python writes it, keys sorted",
        '{"a":[2,"c"],"b":1}': "compact JSON, keys sorted",
    }
    spelling = next((words for spelled, words in spellings.items() if spelled in text), None)
    if "probe" not in text.partition("ask-1")[2]:
        effect = "the sampled call is kept; rendered whole, a history lacks its calls"
        return Trait(name="tool calls", found="left out", outcome="spliced", effect=effect)
    call = text.partition("ask-1")[2]
    first = min((call.find(part), part) for part in ("probe", '"a"', '"b"') if part in call)[1]
    order = "the name before the arguments" if first == "probe" else "the arguments before the name"
    found = f"written anew from their parsed arguments: {spelling or 'in a form of its own'}; {order}"
    return Trait(name="tool calls", found=found, outcome="spliced", effect="the sampled spelling of a call is kept")


def _reasoning(probe: _Probe) -> Trait:
    field = _ANSWER | {"reasoning_content": _THOUGHT}
    tagged = _ANSWER | {"content": f"<think>\n{_THOUGHT}\n</think>\n\nanswer-1"}

    def kept(turn: _Message, *after: _Message) -> bool:
        return _THOUGHT in (probe.text(_ASK, turn, *after) or "")

    last = kept(field) or kept(tagged)
    earlier = kept(field, _ASK_AGAIN), kept(tagged, _ASK_AGAIN)
    if any(earlier):
        found = "kept" if all(earlier) else "kept only as a field" if earlier[0] else "kept only inside the content"
        effect = "the sampled reasoning stays in the prompt"
    else:
        found = "left out once the user speaks again" if last else "left out"
        effect = "the sampled reasoning stays in the prompt all the same; rendered whole, a history would lack it"
    return Trait(name="reasoning of earlier turns", found=found, outcome="spliced", effect=effect)


def _trimming(probe: _Probe) -> Trait:
    text = probe.text(_ASK | {"content": "  ask-1  "}, _ANSWER | {"content": "  answer-1  "}, _ASK_AGAIN)
    if text is None:
        return _refused(probe, "white space")
    trimmed = [who for who, words in (("user", "ask-1"), ("assistant", "answer-1")) if f"  {words}  " not in text]
    if not trimmed:
        return Trait(name="white space", found="kept", outcome="exact", effect="nothing to align")
    effect = "sampled white space is kept; the user's is trimmed the same way every time"
    found = f"trimmed at the ends of what is said by: {', '.join(trimmed)}"
    return Trait(name="white space", found=found, outcome="spliced", effect=effect)


def _verbatim(probe: _Probe) -> Trait:
    count = (probe.text(_ASK, _ANSWER | {"content": _ODD_WORDS}) or "").count(_ODD_WORDS)
    if count == 1:
        return Trait(name="the assistant's words", found="written verbatim", outcome="exact", effect="nothing to align")
    found = "changed or left out" if count == 0 else f"written {count} times"
    effect = "the sampled ids are kept where the text after them can be told; see `continuation`"
    return Trait(name="the assistant's words", found=found, outcome="spliced", effect=effect)


def _history(probe: _Probe) -> Trait:
    """Whether a conversation's text begins with the text of its beginning."""
    tools = [_TOOL] if probe.takes_tools else None
    system = [_SYSTEM] if probe.text(_SYSTEM, _ASK) is not None else []
    shorter = probe.text(*system, _ASK, _ANSWER, tools=tools, strftime_now=lambda _format: "then")
    longer = probe.text(*system, _ASK, _ANSWER, _ASK_AGAIN, tools=tools, strftime_now=lambda _format: "then")
    if shorter is None or longer is None:
        return _refused(probe, "earlier turns")
    if longer.startswith(shorter):
        return Trait(
            name="earlier turns", found="stay as they were written", outcome="exact", effect="nothing to align"
        )
    effect = "earlier turns stay as they were fed; rendered whole, the same conversation is another text"
    return Trait(
        name="earlier turns", found="written anew as the conversation goes on", outcome="spliced", effect=effect
    )


def _time(probe: _Probe) -> Trait:
    if "then-1" in (probe.text(_ASK, tools=None, strftime_now=lambda _format: "then-1") or ""):
        effect = "a rollout keeps the date it began with; runs on different days see different prompts"
        return Trait(name="time", found="the date is written", outcome="spliced", effect=effect)
    return Trait(name="time", found="not written", outcome="exact", effect="nothing to align")


def _same_role(probe: _Probe) -> Trait:
    refused: list[str] = []
    for who, messages in (("user", (_ASK, _ASK_AGAIN)), ("assistant", (_ASK, _ANSWER, _ANSWER))):
        if probe.text(*messages) is None:
            refused.append(who)
    if not refused:
        return Trait(name="two turns of one role", found="written", outcome="exact", effect="nothing to align")
    found = f"refused, of: {', '.join(refused)} ({probe.refusal})"
    effect = "such a request is a 400, which ends the rollout; agents must alternate"
    return Trait(name="two turns of one role", found=found, outcome="refused", effect=effect)


def _refused(probe: _Probe, name: str, effect: str = "such a request is a 400, which ends the rollout") -> Trait:
    return Trait(name=name, found=f"refused: {probe.refusal}", outcome="refused", effect=effect)
