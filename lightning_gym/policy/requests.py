"""What a request may ask for. Every field that would change what is sampled is honoured, or refused with its name.

Fields that ask for nothing (nulls, neutral values) pass, and so do fields that nobody knows: Gym merges whatever a
dataset row says into its requests. Booleans are no numbers here, although they are in Python.
"""

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from lightning_gym.errors import PromptTooLongError
from lightning_gym.policy.replies import Refusal
from lightning_gym.rollout import SamplingProfile

_MASKED = "a masked distribution is not the policy that is trained"
_OTHER_DISTRIBUTION = "the profile samples without it"
_ONE_TURN = "a turn ends with the chat template's turn end, and there is one a request"
_NO_ALTERNATIVES = "the engine reports the sampled tokens' log-probabilities, in the order they were sampled"

# field -> (values that ask for nothing, why anything else is refused); 422 where it contradicts the profile, else 400
_CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "min_p": (0, _OTHER_DISTRIBUTION),
    "presence_penalty": (0, _OTHER_DISTRIBUTION),
    "frequency_penalty": (0, _OTHER_DISTRIBUTION),
    "repetition_penalty": (1, _OTHER_DISTRIBUTION),
    "length_penalty": (1, _OTHER_DISTRIBUTION),
    "min_tokens": (0, _OTHER_DISTRIBUTION),
}
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "stream": (False, "answers come whole"),
    "n": (1, "one completion a request"),
    "best_of": (1, "one completion a request"),
    "use_beam_search": (False, "tokens are sampled"),
    "echo": (False, "the prompt's ids come back as `prompt_token_ids`"),
    "suffix": ("", "the model continues the prompt"),
    "prompt_logprobs": (None, _NO_ALTERNATIVES),
    "top_logprobs": (0, _NO_ALTERNATIVES),
    "stop": ([], _ONE_TURN),
    "stop_token_ids": ([], _ONE_TURN),
    "ignore_eos": (False, _ONE_TURN),
    "response_format": ({"type": "text"}, _MASKED),
    "structured_outputs": ({}, _MASKED),
    "guided_json": ({}, _MASKED),
    "guided_regex": ("", _MASKED),
    "guided_choice": ([], _MASKED),
    "guided_grammar": ("", _MASKED),
    "logit_bias": ({}, _MASKED),
    "allowed_token_ids": ([], _MASKED),
    "bad_words": ([], _MASKED),
    "functions": ([], "name them in `tools`"),
    "function_call": ("auto", "use `tools`"),
    "truncate_prompt_tokens": (None, "a prompt is sampled from whole"),
    "chat_template": (None, "the model's own is used"),
    "continue_final_message": (False, "a turn begins with the chat template's generation prompt"),
    "add_generation_prompt": (True, "a turn begins with the chat template's generation prompt"),
}


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Refuse a request that asks for something else than one turn of the policy.

    Raises:
        Refusal: 422 or 400; names the field.

    Example:
        >>> refuse_unsupported({"n": 1, "stream": None, "anything": "else"})
        >>> refuse_unsupported({"n": 2})
        Traceback (most recent call last):
        lightning_gym.policy.replies.Refusal: `n` is 2, and only 1 is supported: one completion a request
    """
    for status, fields in ((422, _CONTRADICTIONS), (400, _UNSUPPORTED)):
        for key in fields.keys() & body.keys():
            neutral, why = fields[key]
            if body[key] is not None and not _same(body[key], neutral):
                raise Refusal(status, f"`{key}` is {short(body[key])}, and only {neutral!r} is supported: {why}")
    choice = body.get("tool_choice")
    if choice not in (None, "auto") and not (choice == "none" and not body.get("tools")):
        raise Refusal(400, "`tool_choice` must be `auto`: the policy decides; leave `tools` out where it must not call")
    if isinstance(template := body.get("chat_template_kwargs"), Mapping) and "chat_template" in template:
        raise Refusal(400, "`chat_template` cannot be given by a request: the model's own is used")


def refuse_contradictions(body: Mapping[str, Any], name: str, profile: SamplingProfile) -> None:
    """Refuse a request that names other sampling parameters than its profile.

    Raises:
        Refusal: 422; names the field and both values.
    """
    for key in ("temperature", "top_p", "top_k"):
        pinned, asked = getattr(profile, key), body.get(key)
        if asked is not None and not _same(asked, pinned):
            raise Refusal(
                422,
                f"`{key}` is {short(asked)} but the {name} profile samples with {pinned}; leave it out or set {pinned}",
            )


def token_limit(body: Mapping[str, Any]) -> int | None:
    """How many tokens the request wants at most.

    Raises:
        Refusal: 422; it is not a positive integer.
    """
    for key in ("max_completion_tokens", "max_tokens"):
        limit = body.get(key)
        if limit is not None:
            if not _is_int(limit) or limit < 1:
                raise Refusal(422, f"the completion's token limit must be a positive integer, got {short(limit)}")
            return limit
    return None


def asked_seed(body: Mapping[str, Any], default: int) -> int:
    """The request's seed.

    Raises:
        Refusal: 422; engines take 63 bits.
    """
    seed = body.get("seed")
    if seed is None:
        return default
    if not _is_int(seed) or not 0 <= seed < 1 << 63:
        raise Refusal(422, f"`seed` must be an integer from 0 to 2**63 - 1, got {short(seed)}")
    return seed


def asked_ids(body: Mapping[str, Any], key: str, num_ids: int) -> list[int]:
    """A list of token ids.

    Raises:
        Refusal: 400; it is something else, is empty, or holds an id that the tokenizer does not have.
    """
    ids = body.get(key)
    if not isinstance(ids, list) or not ids or not all(_is_int(i) and 0 <= i < num_ids for i in ids):
        raise Refusal(400, f"expected `{key}`, a list of one or more token ids from 0 to {num_ids - 1}")
    return ids


def refuse_hopeless(num_characters: int, longest_token: int, max_model_len: int) -> None:
    """Refuse a text of which no tokenization fits the window, before seconds are spent on tokenizing it.

    Raises:
        PromptTooLongError: even in the vocabulary's longest tokens it would not fit.
    """
    if num_characters > longest_token * max_model_len:
        raise PromptTooLongError(
            f"This model's maximum context length is {max_model_len} tokens, and the prompt has {num_characters} "
            f"characters, more than {num_characters // longest_token} tokens can hold."
        )


def with_reasoning_effort(body: dict[str, Any]) -> dict[str, Any]:
    """The request with its ``reasoning_effort`` where templates read it: among their own arguments."""
    effort, template = body.get("reasoning_effort"), body.get("chat_template_kwargs") or {}
    if effort is None or not isinstance(template, dict):
        return body
    return body | {"chat_template_kwargs": {"reasoning_effort": effort} | template}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(asked: Any, neutral: Any) -> bool:
    return asked == neutral and isinstance(asked, bool) == isinstance(neutral, bool)
