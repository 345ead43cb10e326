// One rollout: what it came to, its group, what went wrong, and the conversation as tokens or as messages.

const view = { as: "tokens", colour: "trained" };
const COLOURS = {
  trained: ["trained", "Tokens that the policy sampled and that train are tinted; context is not"],
  surprise: ["surprise", "The stronger, the less probable the engine held the token: full at −4 nats"],
  gap: ["gap", "The stronger, the further engine and trainer are apart: from 1e−6 to 0.1 nats"],
};
let tokenView = null;

/** Show a rollout in its pane; `choose` selects another, `back` leaves it where list and rollout take turns. */
function showRollout(rollout, choose, back) {
  const pane = document.getElementById("rollout");
  tokenView?.close();
  tokenView = null;
  const body = el("div", { className: "conversation" });
  const draw = () => {
    tokenView?.close();
    tokenView = null;
    if (view.as === "tokens" && rollout.segments.length) {
      tokenView = new TokenView(rollout, pane);
      body.replaceChildren(tokenView.node);
    } else body.replaceChildren(...messageView(rollout));
    body.className = `conversation by-${view.colour}`;
    bar.replaceWith((bar = viewBar(rollout, draw)));
  };
  let bar = viewBar(rollout, draw);
  pane.replaceChildren(
    rolloutHead(rollout, back),
    groupStrip(rollout, choose),
    ...(rollout.failure ? [failureCard(rollout.failure)] : []),
    ...rollout.breaks.map((broke) => breakCard(rollout, broke)),
    bar,
    body,
  );
  draw();
  pane.scrollTop = 0;
  showRollout.redraw = draw;
}

function rolloutHead(rollout, back) {
  const fact = (name, value, title) => el("div", { title }, el("dt", {}, name), el("dd", {}, value));
  const versions = [...new Set(rollout.segments.flatMap((one) => (one.calls.length ? one.calls.map((call) => call[3]) : [one.version])))].join(", ");
  const number = (value) => (typeof value === "number" ? short(value) : JSON.stringify(value));
  const numbers = Object.entries(rollout.metrics ?? {});
  return el(
    "header",
    { className: "head" },
    el("button", { className: "back quiet", onclick: back }, "← List"),
    el(
      "div",
      { className: "verdict" },
      el("div", { className: rollout.reward === null ? "big failed" : "big" }, el("small", {}, "reward"), rollout.reward === null ? "failed" : short(rollout.reward)),
      el("div", { className: "big" }, el("small", {}, "advantage"), rollout.advantage === null ? "none" : signed(rollout.advantage, 3)),
    ),
    el(
      "dl",
      { className: "facts" },
      fact("step", short(rollout.step), "The optimizer step it was collected for"),
      fact("task", short(rollout.task), "Row of the dataset"),
      fact("attempt", `${rollout.attempt} of group ${rollout.group}`),
      fact("environment", rollout.agent || "–"),
      fact("weights", versions === "" ? "–" : `step ${versions}`, "Whose weights sampled it"),
      fact("tokens", `${short(rollout.num_tokens)}, ${short(rollout.sampled)} trained`),
      fact("largest gap", rollout.gap === null ? "not recorded" : `${short(rollout.gap)} nats`, "Between the engine's and the trainer's logprobs"),
      fact("took", `${short(rollout.seconds)} s`),
      rollout.rank > 0 && fact("rank", rollout.rank),
      Object.entries(rollout.components).map(([name, value]) => fact(`reward: ${name}`, number(value), "A part of the reward")),
      numbers.map(([name, value]) => fact(name, number(value), "From the environment")),
      fact("id", el("code", {}, rollout.id)),
    ),
    rollout.remarks.length > 0 && el("ul", { className: "remarks" }, rollout.remarks.map((remark) => el("li", {}, remark))),
  );
}

/** The attempts that share a baseline: reward below, advantage as a bar from the middle. */
function groupStrip(rollout, choose) {
  const group = GROUPS.get(rollout.groupKey);
  const most = Math.max(1e-9, ...group.map((one) => Math.abs(one.advantage ?? 0)));
  const rewards = group.map((one) => one.reward).filter((value) => value !== null);
  const mean = rewards.reduce((a, b) => a + b, 0) / (rewards.length || 1);
  const attempt = (one) => {
    const part = (one.advantage ?? 0) / most;
    const bar = el("i", {
      className: part < 0 ? "down" : "up",
      style: { height: `${Math.abs(part) * 50}%`, [part < 0 ? "top" : "bottom"]: "50%" },
    });
    return el(
      "button",
      {
        className: one.failure ? "attempt failed" : "attempt",
        "aria-current": one === rollout ? "true" : null,
        title: `attempt ${one.attempt}: ${one.failure ? one.failure.kind : `reward ${short(one.reward)}, advantage ${signed(one.advantage, 3)}`}`,
        onclick: () => choose(one),
      },
      el("span", { className: "bars" }, bar),
      el("b", {}, one.failure ? "failed" : short(one.reward)),
      el("small", {}, one.advantage === null ? "–" : signed(one.advantage)),
    );
  };
  return el(
    "section",
    { className: "strip", "aria-label": "The group" },
    el("div", { className: "about" }, el("b", {}, `Group ${rollout.group}`), el("small", {}, rewards.length ? `mean reward ${short(mean)}` : "no rewards"), el("small", {}, plural(group.length, "attempt"))),
    el("div", { className: "attempts" }, group.map(attempt)),
  );
}

function failureCard(failure) {
  return el(
    "section",
    { className: "card bad" },
    el("h3", {}, `Failed: ${failure.kind}${failure.how ? `, ${failure.how}` : ""}`, el("small", {}, "not trained on, and not part of the group's baseline")),
    el("pre", {}, visible(failure.message ?? "")),
  );
}

/** A splice break with both sides, what they share dimmed and what differs marked. */
function breakCard(rollout, broke) {
  const [was, is] = [broke.expected_text ?? "", broke.got_text ?? ""];
  const [same, end] = shared(was, is);
  const side = (label, text) =>
    el(
      "div",
      {},
      el("h4", {}, label),
      el("pre", {}, visible(text.slice(0, same)), el("mark", {}, visible(text.slice(same, text.length - end)) || "∅"), visible(text.slice(text.length - end))),
    );
  const s = segmentOf(rollout, broke);
  const offset = broke.token_offset;
  const known = offset !== null && offset !== undefined;
  const reach = s >= 0 && known && offset < unpacked(rollout.segments[s]).index.length;
  return el(
    "section",
    { className: "card warn" },
    el(
      "h3",
      {},
      `Call ${broke.call_index} opened a new segment`,
      el("span", { className: "flag warn" }, broke.kind.replaceAll("_", " ")),
      broke.likely_rule && el("small", {}, "likely: ", el("b", {}, broke.likely_rule)),
      reach && el("button", { className: "quiet", onclick: () => showToken(s, offset) }, `Token ${offset} of segment ${s}`),
    ),
    el("p", {}, visible(broke.detail ?? "")),
    known && el("div", { className: "sides" }, side(`Served until then, around token ${offset}`, was), side("In this request", is)),
  );
}

function showToken(s, position) {
  if (view.as !== "tokens") {
    view.as = "tokens";
    showRollout.redraw();
  }
  tokenView?.go(s, position);
}

/** How many characters two texts share at the beginning, and then at the end. */
function shared(a, b) {
  let start = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  if (start > 0 && /[\ud800-\udbff]/.test(a[start - 1])) start--; // no half of a character
  let end = 0;
  while (end < Math.min(a.length, b.length) - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  if (end > 0 && /[\udc00-\udfff]/.test(a[a.length - end])) end--;
  return [start, end];
}

function viewBar(rollout, draw) {
  const choice = (name, value, label, title, disabled) =>
    el(
      "button",
      {
        "aria-pressed": String(view[name] === value && !disabled),
        title,
        disabled,
        onclick: () => {
          view[name] = value;
          draw();
        },
      },
      label,
    );
  const none = !rollout.segments.length;
  const noGap = !rollout.segments.some((segment) => segment.trainer !== null);
  const asTokens = view.as === "tokens" && !none;
  return el(
    "div",
    { className: "viewbar" },
    el("div", { className: "choices", role: "group", "aria-label": "Show as" }, choice("as", "tokens", "Tokens", none ? "Nothing of this rollout trains" : "What the engine was fed and sampled", none), choice("as", "messages", "Messages", "What the environment saw")),
    asTokens && el("span", { className: "label" }, "colour"),
    asTokens &&
      el(
        "div",
        { className: "choices", role: "group", "aria-label": "Colour tokens by" },
        Object.entries(COLOURS).map(([value, [label, title]]) => choice("colour", value, label, value === "gap" && noGap ? "The trainer's logprobs were not recorded" : title, value === "gap" && noGap)),
      ),
    asTokens && el("small", { className: "key" }, COLOURS[view.colour][1]),
    none && el("small", { className: "key" }, "Nothing of this rollout trains, so the log has no tokens of it."),
  );
}

const LONG_TEXT = 20000;

function messageView(rollout) {
  const told = messages(rollout);
  if (!told.length) return [el("p", { className: "empty" }, "The log has no messages of this rollout.")];
  return told.map(({ role, kind, text }) => {
    const body = el("pre", {}, visible(text.slice(0, LONG_TEXT)));
    if (text.length > LONG_TEXT) {
      const more = el("button", { className: "fold" }, `… ${short(text.length - LONG_TEXT)} more characters`);
      more.addEventListener("click", () => (body.textContent = visible(text)));
      body.append(more);
    }
    return el("div", { className: `turn message ${role === "assistant" ? "sampled" : "context"}` }, el("div", { className: "gutter" }, el("b", {}, role), kind && el("small", {}, kind)), body);
  });
}
