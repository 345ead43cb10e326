"""The starting reward, measured with nothing but the model, the tokenizer and the environment in one process.

No engine, no endpoint, no Gym: what this measures is the number that all of those together have to reproduce.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from lightning_gym.policy.parsers import ParsedMessage, parse_hermes
from lightning_gym.tiny_policy.demonstrations import Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Means over rollouts."""

    reward: float
    rollouts: int
    well_formed_frac: float
    """Rollouts in which every turn ended by itself and every call in it could be parsed."""
    prompt_tokens: float
    """Of the first call."""
    generated_tokens: float
    """Sampled in all calls of a rollout, turn ends included."""
    total_tokens: float
    """Of the whole conversation, up to the last sampled token."""
    calls: float
    """Model calls a rollout."""


@dataclass(slots=True)
class _Episode:
    environment: Any
    token_ids: list[int]
    num_prompt_tokens: int
    output: list[dict[str, Any]] = field(default_factory=list)
    num_generated_tokens: int = 0
    num_calls: int = 0
    well_formed: bool = True
    done: bool = False


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    environment: type,
    rows: Sequence[Mapping[str, Any]],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    max_turns: int = 6,
    max_new_tokens: int = 48,
) -> Measurement:
    """Play one rollout of every row, all of them in step.

    Args:
        temperature: 0 takes the likeliest token.
        seed: of the sampling; the global generator is left as it was.
    """
    encoder = Encoder(tokenizer)
    episodes = [_start(environment, row, encoder) for row in rows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(max_turns):
            playing = [episode for episode in episodes if not episode.done]
            if not playing:
                break
            turns = _generate(model, tokenizer, [e.token_ids for e in playing], temperature, max_new_tokens)
            for episode, token_ids in zip(playing, turns, strict=True):
                _take_turn(episode, token_ids, tokenizer, encoder)
    rewards = [episode.environment.verify({"output": episode.output}) for episode in episodes]
    return Measurement(
        reward=_mean(rewards),
        rollouts=len(episodes),
        well_formed_frac=_mean([episode.well_formed and episode.done for episode in episodes]),
        prompt_tokens=_mean([episode.num_prompt_tokens for episode in episodes]),
        generated_tokens=_mean([episode.num_generated_tokens for episode in episodes]),
        total_tokens=_mean([len(episode.token_ids) for episode in episodes]),
        calls=_mean([episode.num_calls for episode in episodes]),
    )


def _start(environment: type, row: Mapping[str, Any], encoder: Encoder) -> _Episode:
    prompt_ids = encoder.prompt(row["responses_create_params"]["input"])
    return _Episode(environment(row), prompt_ids, len(prompt_ids))


def _take_turn(episode: _Episode, token_ids: list[int], tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
    """Append what was sampled, let the environment answer its calls, and say whether the episode goes on."""
    episode.token_ids += token_ids
    episode.num_generated_tokens += len(token_ids)
    episode.num_calls += 1
    ended = token_ids[-1:] == [tokenizer.eos_token_id]
    message = parse_hermes(_text(token_ids[:-1] if ended else token_ids, tokenizer))
    episode.well_formed &= ended and "<tool_call>" not in (message.content or "")
    if message.content is not None or not message.tool_calls:
        text = {"type": "output_text", "text": message.content or ""}
        episode.output.append({"type": "message", "role": "assistant", "content": [text]})
    if not message.tool_calls or not ended:
        episode.done = True
        return
    results = _answer_calls(episode, message)
    episode.token_ids += encoder.continuation([{"role": "tool", "content": result} for result in results])


def _text(token_ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    text: Any = tokenizer.decode(token_ids)
    return text


def _answer_calls(episode: _Episode, message: ParsedMessage) -> list[str]:
    results = []
    for call in message.tool_calls:
        try:
            result = episode.environment.call_tool(call.name, json.loads(call.arguments))
        except ValueError as error:
            result = json.dumps({"error": f"Invalid tool call arguments: {error}"})
        episode.output.append({"type": "function_call", "name": call.name, "arguments": call.arguments})
        episode.output.append({"type": "function_call_output", "output": result})
        results.append(result)
    return results


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    temperature: float,
    max_new_tokens: int,
) -> list[list[int]]:
    """Sample one turn for every prompt; each ends with its turn end, or after `max_new_tokens` without one."""
    width = max(map(len, prompts))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # `generate` fills what is left out from the checkpoint's own generation config, which samples: leave nothing out.
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    config = GenerationConfig(
        do_sample=temperature > 0, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=end, **sampling
    )
    sampler: Any = model
    generated = sampler.generate(input_ids, attention_mask=attention_mask, generation_config=config)
    turns = generated[:, width:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in turns]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
