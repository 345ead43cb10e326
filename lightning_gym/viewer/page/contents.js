// What the file holds (written by contents.py), and the tokens of a segment taken out of their base64 when asked for.

const RUN = JSON.parse(document.getElementById("contents").textContent);

for (const [index, rollout] of RUN.rollouts.entries()) {
  rollout.index = index;
  rollout.misaligned = rollout.breaks.length > 0 || rollout.failure?.kind === "misaligned";
}

/** Attempts of a group share their step, too: a resumed run may deal a group again. */
const GROUPS = new Map();
for (const rollout of RUN.rollouts) {
  rollout.groupKey = `${rollout.step}/${rollout.group}`;
  if (!GROUPS.has(rollout.groupKey)) GROUPS.set(rollout.groupKey, []);
  GROUPS.get(rollout.groupKey).push(rollout);
}

function unpack(text, Kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Kind(bytes.buffer);
}

/**
 * The tokens of a segment: `index` into RUN.tokens, and `turns`, the stretches of equal mask. A turn that trained has
 * `first`, the place of its first token in `engine` and `trainer`, which hold logprobs of trained tokens only.
 */
function unpacked(segment) {
  if (segment.unpacked) return segment.unpacked;
  const turns = [];
  let start = 0;
  let first = 0;
  segment.runs.forEach((length, run) => {
    const trained = run % 2 === 1;
    if (length) turns.push({ start, end: start + length, trained, first });
    start += length;
    if (trained) first += length;
  });
  segment.unpacked = {
    index: unpack(segment.ids, Uint32Array),
    engine: unpack(segment.engine, Float32Array),
    trainer: segment.trainer === null ? null : unpack(segment.trainer, Float32Array),
    turns,
  };
  return segment.unpacked;
}

function turnAt(tokens, position) {
  return tokens.turns.find((turn) => position < turn.end);
}

const SPECIAL = new Set(RUN.tokens.special);
// Characters that hide, or that turn the direction of what follows: shown by number, so that text is what it seems.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

function visible(text) {
  return text.replace(INVISIBLE, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/**
 * The text of tokens `start` to `end`, one string each. Where several tokens make one character, the last of them has
 * it and the others are empty.
 */
function texts(index, start, end) {
  const known = RUN.tokens.texts;
  if (known === null) return Array.from(index.subarray(start, end), (i) => `${RUN.tokens.ids[i]} `);
  let from = start;
  while (from > 0 && Array.isArray(known[index[from]]) && Array.isArray(known[index[from - 1]])) from--;
  let decoder = null;
  const found = [];
  for (let position = from; position < end; position++) {
    const piece = known[index[position]];
    let text = piece;
    if (Array.isArray(piece)) {
      decoder ??= new TextDecoder("utf-8");
      const goesOn = position + 1 < index.length && Array.isArray(known[index[position + 1]]);
      text = decoder.decode(new Uint8Array(piece), { stream: goesOn });
      if (!goesOn) decoder = null;
    }
    if (position >= start) found.push(text);
  }
  return found;
}

/** The messages of a conversation in plain shape: {role, kind, text}; what is unknown is shown as its JSON. */
function messages(rollout) {
  return [...RUN.prompts[rollout.prompt], ...rollout.output].map((item) => {
    if (item === null || typeof item !== "object") return { role: "?", kind: "item", text: String(item) };
    if (item.type === "function_call")
      return { role: "assistant", kind: "call", text: `${item.name}(${pretty(item.arguments)})` };
    if (item.type === "function_call_output") return { role: "tool", kind: "result", text: flat(item.output) };
    if (item.type === "reasoning") return { role: "assistant", kind: "reasoning", text: flat(item.summary ?? item.content) };
    if ("content" in item) return { role: item.role ?? "?", kind: "", text: flat(item.content) };
    return { role: item.role ?? "?", kind: item.type ?? "item", text: JSON.stringify(item, null, 2) };
  });
}

function flat(content) {
  if (typeof content === "string") return content;
  if (Array.isArray(content)) return content.map((part) => part?.text ?? part?.refusal ?? flat(part)).join("\n");
  return content === null || content === undefined ? "" : JSON.stringify(content, null, 2);
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 1).replace(/\n\s*/g, " ");
  } catch {
    return String(json);
  }
}

/** What the search looks through, made when it is first asked for. */
function searchText(rollout) {
  rollout.searchText ??= [rollout.id, rollout.agent, rollout.failure?.message, ...messages(rollout).map((m) => m.text)]
    .join("\n")
    .toLowerCase();
  return rollout.searchText;
}
