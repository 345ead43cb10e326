"""A rollout played by hand, without an engine or an endpoint: what prompt does the next request get?"""

from dataclasses import dataclass, field

from lightning_gym.gym import wire
from lightning_gym.policy.chat import ChatFormat
from lightning_gym.policy.conversation import conversation, said_by
from lightning_gym.policy.ledger import Served, shared_ids
from lightning_gym.policy.splice import Splicer
from lightning_gym.rollout import Call

END = 2


@dataclass
class Game:
    """An endpoint's memory of one rollout, without the endpoint."""

    chat: ChatFormat
    served: list[Served] = field(default_factory=list)
    weight_version: int = 0

    def __post_init__(self):
        self.splicer = Splicer(self.chat)

    def read(self, request):
        known = self.served[-1].told if self.served else None
        return conversation(request, self.chat, known)

    def splice(self, messages, **request):
        request = {"messages": messages, **request}
        return self.splicer.splice(request, self.read(request), self.served)

    def play(self, messages, sampled, **request):
        """Serve one call that samples `sampled` (text or ids); the reply as a client gets it."""
        spliced = self.splice(messages, **request)
        ids = self.chat.encode(sampled) if isinstance(sampled, str) else sampled
        parsed = self.chat.parse(ids)
        message = {"role": "assistant", "content": parsed.content}
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
        if parsed.tool_calls:
            message["tool_calls"] = [
                {"id": f"call-{i}", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for i, c in enumerate(parsed.tool_calls)
            ]
        call = Call(
            index=len(self.served),
            prompt_ids=shared_ids(spliced.prompt_ids, spliced.continues),
            token_ids=ids,
            logprobs=[-1.0] * len(ids),
            finish_reason="stop" if ids and ids[-1] in self.chat.stop_ids else "length",
            weight_version=self.weight_version,
        )
        said = self.read({"messages": messages, **request})
        self.served.append(Served(call=call, told=said.answered(said_by(message, self.chat))))
        bundle = {wire.PROMPT_TOKEN_IDS: spliced.prompt_ids, wire.GENERATION_TOKEN_IDS: ids}
        return message | bundle | {wire.GENERATION_LOG_PROBS: call.logprobs}

    def emitted(self, index=-1):
        call = self.served[index].call
        return [*call.prompt_ids, *call.token_ids]

    def whole(self, messages, **request):
        return self.chat.encode(self.chat.render(messages, request.get("tools")))


def user(content):
    return {"role": "user", "content": content}


def tool(content, call_id="call-0"):
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def words(*messages):
    """What ChatML writes after a sampled turn end: these messages and the next turn's start."""
    return (
        "\n"
        + "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        + "<|im_start|>assistant\n"
    )


def spelled(game, text):
    """Ids of a text that the tokenizer would merge, letter by letter: what a policy may sample and no encoder gives."""
    return [token for letter in text for token in game.chat.encode(letter)]


START = [{"role": "system", "content": "Be brief."}, user("Hello")]
