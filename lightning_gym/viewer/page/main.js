// Puts the page together: tabs, keys, and what the address says (#curves, #rollouts/ID).

const narrow = matchMedia("(max-width: 860px)");
const tabs = ["curves", "rollouts"];
const KEYS = [
  ["c  r", "curves, rollouts"],
  ["/", "search"],
  ["j  k", "next rollout, the one before"],
  ["[  ]", "group before, next group"],
  ["m", "tokens or messages"],
  ["x", "next way to colour tokens"],
  ["t", "into the tokens; then ← → by token, shift ← → by turn"],
  ["← → Enter", "on a curve: move over steps, open the step's rollouts"],
  ["Esc", "back to the list"],
];

function showTab(name) {
  hideTip();
  for (const tab of tabs) {
    document.getElementById(tab).hidden = tab !== name;
    document.getElementById(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
  }
  if (name === "rollouts") {
    list.draw();
    if (!list.selected && list.rollouts.length && !narrow.matches) list.select(list.rollouts[0]);
  }
  remember(name);
}

function remember(name) {
  const place = name === "rollouts" && list.selected ? `#rollouts/${encodeURIComponent(list.selected.id)}` : `#${name}`;
  if (location.hash !== place) history.replaceState(null, "", place);
}

function openStep(step) {
  Object.assign(filter, NO_FILTER, { step: String(step) });
  showFilter();
  showTab("rollouts");
  if (list.rollouts.length) list.select(list.rollouts[0]);
  document.getElementById("list").focus();
}

/** On a narrow page list and rollout take turns. */
function enter(into) {
  document.getElementById("rollouts").classList.toggle("entered", into);
  if (!into) document.getElementById("list").focus();
}

const list = new RolloutList(
  (rollout) => {
    showRollout(rollout, (one) => list.select(one), () => enter(false));
    remember("rollouts");
  },
  () => {
    enter(true);
    if (narrow.matches) document.getElementById("rollout").focus();
  },
);
const showFilter = makeFilters(() => {
  list.show(matching(), filter.sort === "step");
  return list.rollouts.length;
});

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "Escape") {
    if (typing || !document.getElementById("rollouts").hidden) enter(false);
    return;
  }
  if (typing) return;
  const browsing = (act) => () => {
    if (document.getElementById("rollouts").hidden) showTab("rollouts");
    act();
  };
  const acts = {
    c: () => showTab("curves"),
    r: () => (showTab("rollouts"), document.getElementById("list").focus()),
    j: browsing(() => list.move(1)),
    k: browsing(() => list.move(-1)),
    "]": browsing(() => list.moveGroup(1)),
    "[": browsing(() => list.moveGroup(-1)),
    "/": browsing(() => (enter(false), document.getElementById("search").focus())),
    m: () => redraw("as", view.as === "tokens" ? "messages" : "tokens"),
    x: () => redraw("colour", next(Object.keys(COLOURS), view.colour)),
    t: () => (enter(true), tokenView?.step(1)),
    "?": showHelp,
  };
  const act = acts[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function redraw(name, value) {
  view[name] = value;
  showRollout.redraw?.();
}

function next(names, current) {
  return names[(names.indexOf(current) + 1) % names.length];
}

function showHelp() {
  document.getElementById("help").showModal();
}

function start() {
  document.getElementById("run-name").textContent = RUN.name;
  document.getElementById("run-path").textContent = RUN.path;
  document.getElementById("num-rollouts").textContent = short(RUN.rollouts.length);
  const told = [...RUN.problems, ...(RUN.note ? [RUN.note] : [])];
  if (told.length) {
    const box = document.getElementById("problems");
    box.hidden = false;
    box.open = RUN.rollouts.length === 0;
    box.querySelector("summary").textContent = told.length === 1 ? told[0] : `${told.length} things to know: ${told[0]}`;
    box.querySelector("ul").append(...told.map((one) => el("li", {}, one)));
  }
  document.getElementById("help").append(
    el("h2", {}, "Keys"),
    el("dl", {}, KEYS.flatMap(([keys, what]) => [el("dt", {}, keys.split("  ").map((key) => el("kbd", {}, key))), el("dd", {}, what)])),
    el("form", { method: "dialog" }, el("button", {}, "Close")),
  );
  document.getElementById("help-button").addEventListener("click", showHelp);
  for (const tab of tabs) document.getElementById(`tab-${tab}`).addEventListener("click", () => showTab(tab));
  document.addEventListener("keydown", onKey);
  document.getElementById("rollout").addEventListener("scroll", hideTip);
  addEventListener("resize", hideTip);
  showCurves(openStep);
  showFilter();
  const [name, id] = location.hash.slice(1).split("/");
  const asked = id && RUN.rollouts.find((one) => one.id === decodeURIComponent(id));
  if (asked) list.select(asked);
  showTab(tabs.includes(name) ? name : RUN.metrics === null && RUN.rollouts.length ? "rollouts" : "curves");
  if (asked) enter(true);
  document.body.classList.add("ready");
  performance.mark("report-ready");
}

start();
