// The list: rows of one height, of which only those in view exist.

const ROW = 30; // pixels, as in page.css

class RolloutList {
  /** `chosen` is called with a rollout when the selection moves; `entered` when the reader wants to go into it. */
  constructor(chosen, entered) {
    this.node = document.getElementById("list");
    this.inner = el("div", { className: "rows" });
    this.node.append(this.inner);
    this.items = [];
    this.rollouts = [];
    this.selected = null;
    this.chosen = chosen;
    const rewards = RUN.rollouts.map((one) => one.reward).filter((value) => value !== null);
    this.low = Math.min(0, ...rewards);
    this.high = Math.max(this.low + 1e-9, ...rewards);
    let frame = 0;
    const soon = () => (frame ||= requestAnimationFrame(() => ((frame = 0), this.draw())));
    this.node.addEventListener("scroll", soon);
    new ResizeObserver(soon).observe(this.node);
    this.node.addEventListener("click", (event) => {
      const row = event.target.closest("[data-index]");
      if (!row) return;
      this.select(RUN.rollouts[row.dataset.index]);
      entered();
    });
    this.node.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.floor(this.node.clientHeight / ROW) - 1);
      const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
      if (event.key in moves) this.move(moves[event.key]);
      else if (event.key === "Enter") entered();
      else return;
      event.preventDefault();
    });
  }

  /** Show these; where they are in the order of groups, each group has a row of its own before them. */
  show(rollouts, grouped) {
    this.rollouts = rollouts;
    this.items = [];
    let last = null;
    for (const one of rollouts) {
      if (grouped && one.groupKey !== last) this.items.push({ group: GROUPS.get(one.groupKey) });
      last = one.groupKey;
      this.items.push({ rollout: one });
    }
    this.inner.style.height = `${this.items.length * ROW}px`;
    if (this.selected && !rollouts.includes(this.selected)) this.node.scrollTop = 0;
    this.draw();
  }

  select(rollout) {
    if (rollout === this.selected) return;
    this.selected = rollout;
    const place = this.items.findIndex((item) => item.rollout === rollout);
    if (place >= 0) {
      const [top, height] = [place * ROW, this.node.clientHeight];
      const above = this.items[place - 1]?.group ? ROW : 0; // keep the group's row in view
      if (top - above < this.node.scrollTop) this.node.scrollTop = top - above;
      else if (top + ROW > this.node.scrollTop + height) this.node.scrollTop = top + ROW - height;
    }
    this.draw();
    this.chosen(rollout);
  }

  move(by) {
    const at = this.rollouts.indexOf(this.selected);
    const next = this.rollouts[clamp((at < 0 ? -1 : at) + by, 0, this.rollouts.length - 1)];
    if (next) this.select(next);
  }

  /** To the first attempt of the next group, or of the one before. */
  moveGroup(by) {
    const firsts = this.rollouts.filter((one, i) => i === 0 || one.groupKey !== this.rollouts[i - 1].groupKey);
    const at = firsts.findIndex((one) => one.groupKey === this.selected?.groupKey);
    const next = firsts[clamp((at < 0 ? -1 : at) + by, 0, firsts.length - 1)];
    if (next) this.select(next);
  }

  draw() {
    const first = Math.max(0, Math.floor(this.node.scrollTop / ROW) - 5);
    const last = Math.min(this.items.length, Math.ceil((this.node.scrollTop + this.node.clientHeight) / ROW) + 5);
    const rows = [];
    for (let i = first; i < last; i++) {
      const { group, rollout } = this.items[i];
      const row = group ? this.groupRow(group) : this.rolloutRow(rollout);
      row.style.transform = `translateY(${i * ROW}px)`;
      rows.push(row);
    }
    this.inner.replaceChildren(...rows);
    const active = this.inner.querySelector("[aria-selected=true]");
    if (active) this.node.setAttribute("aria-activedescendant", active.id);
    else this.node.removeAttribute("aria-activedescendant");
    if (!this.items.length) this.inner.append(el("p", { className: "empty" }, RUN.rollouts.length ? "No rollout passes these filters." : "There are no rollouts in this file."));
  }

  groupRow(group) {
    const rewards = group.map((one) => one.reward).filter((value) => value !== null);
    const mean = rewards.length ? rewards.reduce((a, b) => a + b) / rewards.length : null;
    const [{ step, group: id, task }] = group;
    return el(
      "div",
      { className: "row group", role: "presentation" },
      el("b", {}, `step ${step}`),
      el("span", { className: "muted grow" }, `group ${id} · task ${task}`),
      el("span", { className: "sparks", "aria-hidden": "true" }, group.map((one) => el("i", { className: one.reward === null ? "failed" : "", style: { height: `${this.height(one.reward)}%` } }))),
      el("span", { className: "num" }, `mean ${short(mean, 2)}`),
    );
  }

  height(reward) {
    return reward === null ? 100 : 12 + (88 * (reward - this.low)) / (this.high - this.low);
  }

  rolloutRow(one) {
    const flags = [
      one.failure && el("span", { className: "flag bad" }, one.failure.kind),
      one.breaks.length > 0 && el("span", { className: "flag warn", title: "splice breaks" }, plural(one.breaks.length, "break")),
      one.truncated && el("span", { className: "flag" }, "truncated"),
    ];
    return el(
      "div",
      {
        className: "row rollout",
        id: `row-${one.index}`,
        role: "option",
        "aria-selected": String(one === this.selected),
        "aria-label": `step ${one.step}, group ${one.group}, attempt ${one.attempt}, reward ${short(one.reward)}, advantage ${signed(one.advantage)}`,
        data: { index: one.index },
      },
      el("span", { className: filter.sort === "step" ? "muted attempt" : "muted attempt full" }, filter.sort === "step" ? `#${one.attempt}` : `${one.step} · ${one.group} #${one.attempt}`),
      el("span", { className: "meter" }, one.reward !== null && el("i", { style: { width: `${this.height(one.reward)}%` } })),
      el("span", { className: "num reward" }, one.reward === null ? "–" : short(one.reward, 3)),
      el("span", { className: "num advantage muted", title: "advantage" }, signed(one.advantage)),
      el("span", { className: "flags grow" }, flags),
      el("span", { className: "num muted", title: "tokens" }, filter.sort === "gap" ? short(one.gap) : filter.sort === "slow" ? `${short(one.seconds, 2)} s` : `${short(one.num_tokens)} tok`),
    );
  }
}
