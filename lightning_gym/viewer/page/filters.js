// Which rollouts the list shows, and in which order.

const NO_FILTER = { text: "", agent: "", step: "", failure: "", min: "", max: "", truncated: false, misaligned: false, sort: "step" };
const filter = { ...NO_FILTER };

const SORTS = {
  step: ["step and group", null],
  low: ["lowest reward", (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity)],
  high: ["highest reward", (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity)],
  advantage: ["largest advantage", (a, b) => Math.abs(b.advantage ?? 0) - Math.abs(a.advantage ?? 0)],
  gap: ["largest logprob gap", (a, b) => (b.gap ?? -1) - (a.gap ?? -1)],
  long: ["most tokens", (a, b) => b.num_tokens - a.num_tokens],
  slow: ["slowest", (a, b) => b.seconds - a.seconds],
};

/** The rollouts that pass, in the chosen order. */
function matching() {
  const text = filter.text.trim().toLowerCase();
  const [min, max] = [filter.min, filter.max].map((value) => (value === "" ? null : Number(value)));
  const found = RUN.rollouts.filter(
    (one) =>
      (filter.agent === "" || one.agent === filter.agent) &&
      (filter.step === "" || one.step === Number(filter.step)) &&
      passesFailure(one) &&
      (!filter.truncated || one.truncated) &&
      (!filter.misaligned || one.misaligned) &&
      (min === null || (one.reward !== null && one.reward >= min)) &&
      (max === null || (one.reward !== null && one.reward <= max)) &&
      (text === "" || searchText(one).includes(text)),
  );
  const [, compare] = SORTS[filter.sort];
  return compare ? found.sort(compare) : found;
}

function passesFailure(one) {
  if (filter.failure === "") return true;
  if (filter.failure === "none") return one.failure === null;
  if (filter.failure === "any") return one.failure !== null;
  return one.failure?.kind === filter.failure;
}

/** Fills the form; `changed` is called after every change. Returns a function that shows a filter set elsewhere. */
function makeFilters(changed) {
  const form = document.getElementById("filters");
  const agents = [...new Set(RUN.rollouts.map((one) => one.agent))].sort();
  const kinds = [...new Set(RUN.rollouts.map((one) => one.failure?.kind).filter(Boolean))].sort();
  const rewards = RUN.rollouts.map((one) => one.reward).filter((value) => value !== null);
  const [low, high] = [Math.min(...rewards), Math.max(...rewards)].map((value) => (Number.isFinite(value) ? short(value) : ""));
  const count = (passes) => RUN.rollouts.filter(passes).length;
  const select = (name, label, options) =>
    el("label", { className: "wide" }, label, el("select", { name }, options.map(([value, text]) => el("option", { value }, text))));
  const number = (name, label, placeholder) =>
    el("input", { name, type: "number", step: "any", placeholder, "aria-label": label });
  const toggle = (name, label, passes) =>
    el("label", { className: "toggle" }, el("input", { name, type: "checkbox", disabled: !count(passes) }), `${label} `, el("span", { className: "count" }, short(count(passes))));
  const total = el("output", { id: "shown", "aria-live": "polite" });
  const clear = el("button", { type: "reset", className: "quiet" }, "Clear");
  form.append(
    el("div", { className: "line" }, el("input", { name: "text", type: "search", id: "search", placeholder: "Search messages and ids  ( / )", "aria-label": "Search messages and ids" }), el("label", { className: "narrow" }, "step", number("step", "Optimizer step", "any"))),
    el(
      "div",
      { className: "line" },
      agents.length > 1 && select("agent", "environment", [["", "all"], ...agents.map((agent) => [agent, agent])]),
      select("failure", "outcome", [
        ["", "all"],
        ["none", "not failed"],
        ["any", `failed (${count((one) => one.failure)})`],
        ...kinds.map((kind) => [kind, `failed: ${kind} (${count((one) => one.failure?.kind === kind)})`]),
      ]),
    ),
    el(
      "div",
      { className: "line" },
      el("span", { className: "range" }, "reward", number("min", "Lowest reward", low), "to", number("max", "Highest reward", high)),
      select("sort", "order", Object.entries(SORTS).map(([value, [label]]) => [value, label])),
    ),
    el(
      "div",
      { className: "line foot" },
      toggle("truncated", "truncated", (one) => one.truncated),
      toggle("misaligned", "misaligned", (one) => one.misaligned),
      total,
      clear,
    ),
  );
  const read = () => {
    for (const field of form.elements) if (field.name in filter) filter[field.name] = field.type === "checkbox" ? field.checked : field.value;
    apply();
  };
  const apply = () => {
    const shown = changed();
    total.textContent = `${short(shown)} of ${short(RUN.rollouts.length)}`;
    clear.disabled = Object.keys(NO_FILTER).every((name) => filter[name] === NO_FILTER[name]);
  };
  let pending = 0;
  form.addEventListener("input", () => {
    clearTimeout(pending); // typing fast filters once
    pending = setTimeout(read, 80);
  });
  form.addEventListener("reset", () => setTimeout(read));
  form.addEventListener("submit", (event) => event.preventDefault());
  return () => {
    for (const field of form.elements)
      if (field.name in filter) field.type === "checkbox" ? (field.checked = filter[field.name]) : (field.value = filter[field.name]);
    apply();
  };
}
