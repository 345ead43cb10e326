"""Chat templates that behave like those of the model families, each on a tokenizer of toy size with its tokens.

For tests and benchmarks of alignment: what one template keeps, another drops, moves, trims or writes anew. The
templates are in ``chat_templates/``; they copy no model's text, only what its template does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gym.testing import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEMPLATES = Path(__file__).parent / "chat_templates"
_CHATML = ("<|im_start|>", "<|im_end|>")
# DeepSeek writes its tokens with fullwidth bars, U+FF5C.
_DEEPSEEK_TOOLS = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
_DEEPSEEK_OUTPUTS = ("outputs▁begin", "outputs▁end", "output▁begin", "output▁end")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A chat template and the tokens it needs."""

    name: str
    """Of the file in ``chat_templates/``."""
    special: tuple[str, ...]
    """Special tokens besides `bos` and `eos`."""
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""
    bos: str | None = None
    """What the tokenizer puts in front of a text unless told not to; the template writes it too."""
    eos: str = "<|im_end|>"
    turn_end: str = "<|im_end|>"
    """What ends the assistant's turns."""
    system: bool = True
    """Whether the template takes a system message."""
    tools: bool = True
    """Whether it takes tools, calls and results."""

    @property
    def template(self) -> str:
        """The Jinja text."""
        return (_TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(name="qwen3", special=_CHATML, plain=("<think>", "</think>", "<tool_response>", "</tool_response>")),
        Family(
            name="llama3",
            special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
            bos="<|begin_of_text|>",
            eos="<|end_of_text|>",
            turn_end="<|eot_id|>",
        ),
        Family(
            name="gemma",
            special=("<start_of_turn>", "<end_of_turn>"),
            bos="<bos>",
            eos="<eos>",
            turn_end="<end_of_turn>",
            system=False,
            tools=False,
        ),
        Family(
            name="mistral",
            special=(
                *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
                *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
            ),
            bos="<s>",
            eos="</s>",
            turn_end="</s>",
        ),
        Family(
            name="deepseek_r1",
            special=(
                *("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
                *(f"<\uff5ctool▁{name}\uff5c>" for name in (*_DEEPSEEK_TOOLS, *_DEEPSEEK_OUTPUTS)),
            ),
            plain=("<think>", "</think>"),
            bos="<\uff5cbegin▁of▁sentence\uff5c>",
            eos="<\uff5cend▁of▁sentence\uff5c>",
            turn_end="<\uff5cend▁of▁sentence\uff5c>",
        ),
        Family(name="rewritten_calls", special=_CHATML),
        Family(name="trimmed", special=_CHATML),
    )
}
"""By name."""


def family_tokenizer(family: Family) -> "PreTrainedTokenizerFast":
    r"""The tiny tokenizer with the family's tokens and template.

    Like the real ones of families that have a beginning-of-text token, it adds that token to every text it encodes
    unless told not to: a template's text encoded the default way would begin with two.

    Example:
        >>> tokenizer = family_tokenizer(FAMILIES["gemma"])
        >>> tokenizer.apply_chat_template([{"role": "user", "content": " Hi "}], tokenize=False)
        '<bos><start_of_turn>user\nHi<end_of_turn>\n'
    """
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(family.special)}, replace_extra_special_tokens=False
    )
    plain: Any = [AddedToken(token, special=False, normalized=False) for token in family.plain]
    tokenizer.add_tokens(plain)
    tokenizer.add_special_tokens({"eos_token": family.eos})
    if family.bos is not None:
        tokenizer.add_special_tokens({"bos_token": family.bos})
        begin = [(family.bos, tokenizer.convert_tokens_to_ids(family.bos))]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{family.bos} $A", special_tokens=begin)
    tokenizer.chat_template = family.template
    return tokenizer


def save_family(family: Family, directory: Path) -> Path:
    """Write the family's tokenizer and template as a model directory holds them; returns `directory`."""
    family_tokenizer(family).save_pretrained(directory)
    return directory


def save_quietly(model: Any, directory: Path) -> None:
    """Write a model as a checkpoint, without a progress bar."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        if bars:
            logging.enable_progress_bar()


def tiny_checkpoint(path: str | Path, *, family: str = "qwen3", max_position_embeddings: int = 32768) -> str:
    """A whole model directory: a random tiny model with a family's tokens and template, for a try of any recipe.

    Args:
        path: where it is written, unless it is there already.
        family: a name in `FAMILIES`; ``"qwen3"`` shows the model its tools, which can be thousands of tokens.
        max_position_embeddings: tokens of context.

    Returns:
        `path` as text.
    """
    directory = Path(path)
    if not (directory / "model.safetensors").is_file():
        tokenizer = family_tokenizer(FAMILIES[family])
        model = tiny_model(tokenizer, max_position_embeddings=max_position_embeddings)
        tokenizer.save_pretrained(directory)
        save_quietly(model, directory)
    return str(path)
