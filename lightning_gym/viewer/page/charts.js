// Line and area charts over optimizer steps. All charts share one cursor; values stand in the legend, so nothing moves.

const PLOT = 1000; // units of a plot's own coordinates, stretched to whatever size the page gives it
const charts = [];
let cursor = null;

/**
 * A chart. `series` are {label, values, faint}; `stacked` fills them on top of each other; `log` is for what spans
 * orders of magnitude; `onStep` is called with the step that is clicked or entered.
 */
function makeChart({ title, about, steps, series, stacked, log, unit, onStep }) {
  const drawn = stacked ? cumulated(series) : series.map((one) => one.values);
  const scale = makeScale(drawn.flat(), { log, stacked });
  const x = (i) => (steps.length > 1 ? ((steps[i] - steps[0]) / (steps.at(-1) - steps[0])) * PLOT : PLOT / 2);
  const y = (value) => PLOT - scale.place(value) * PLOT;
  const picture = svg("svg", { viewBox: `0 0 ${PLOT} ${PLOT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  for (const tick of scale.ticks) picture.append(svg("path", { d: `M0 ${y(tick)}H${PLOT}`, class: "grid" }));
  const order = series.map((_, s) => s);
  if (stacked) order.reverse(); // the highest first, so that each lower one covers its part
  for (const s of order) {
    const kind = stacked ? "area" : series[s].faint ? "line faint" : "line";
    const d = stacked ? areaPath(drawn[s], drawn[s - 1], x, y) : linePath(drawn[s], x, y);
    picture.append(svg("path", { d, class: `${kind} s${series[s].color ?? s % 6}` }));
  }
  const hair = el("div", { className: "hair", hidden: true });
  const plot = el(
    "div",
    {
      className: "plot",
      tabIndex: 0,
      role: "slider",
      "aria-label": `${title}, optimizer step`,
      "aria-valuemin": steps[0],
      "aria-valuemax": steps.at(-1),
    },
    picture,
    hair,
  );
  const values = series.map(() => el("b"));
  const node = el(
    "figure",
    { className: "chart" },
    el("figcaption", { title: about }, el("span", { className: "title" }, title), unit && el("small", {}, unit)),
    el(
      "div",
      { className: "legend" },
      series.map((one, s) =>
        el("span", {}, el("i", { className: `s${one.color ?? s % 6}${one.faint ? " faint" : ""}` }), one.label, values[s]),
      ),
    ),
    el(
      "div",
      { className: "y" },
      distinct(scale.ticks).map((text, i) => el("span", { style: { top: `${(y(scale.ticks[i]) / PLOT) * 100}%` } }, text)),
    ),
    plot,
    el(
      "div",
      { className: "x" },
      stepTicks(steps).map((i) => el("span", { style: { left: `${(x(i) / PLOT) * 100}%` } }, short(steps[i]))),
    ),
  );
  const chart = {
    node,
    update() {
      const at = cursor ?? steps.length - 1;
      hair.hidden = cursor === null;
      hair.style.left = `${(x(at) / PLOT) * 100}%`;
      values.forEach((value, s) => (value.textContent = short(lastKnown(series[s].values, at))));
      plot.setAttribute("aria-valuenow", steps[at]);
      plot.setAttribute("aria-valuetext", series.map((one) => `${one.label} ${short(lastKnown(one.values, at))}`).join(", "));
    },
  };
  const nearest = (event) => {
    const box = plot.getBoundingClientRect();
    const step = steps[0] + clamp((event.clientX - box.left) / box.width, 0, 1) * (steps.at(-1) - steps[0]);
    return steps.reduce((best, one, i) => (Math.abs(one - step) < Math.abs(steps[best] - step) ? i : best), 0);
  };
  plot.addEventListener("pointermove", (event) => setCursor(nearest(event)));
  plot.addEventListener("pointerleave", () => setCursor(null));
  plot.addEventListener("blur", () => setCursor(null));
  plot.addEventListener("click", (event) => onStep?.(steps[nearest(event)]));
  plot.addEventListener("keydown", (event) => {
    const at = cursor ?? steps.length - 1;
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1, PageUp: at - 10, PageDown: at + 10 };
    if (event.key in moves) setCursor(clamp(moves[event.key], 0, steps.length - 1));
    else if (event.key === "Enter") onStep?.(steps[at]);
    else return;
    event.preventDefault();
  });
  charts.push(chart);
  chart.update();
  return node;
}

function setCursor(index) {
  if (index === cursor) return;
  cursor = index;
  const out = document.getElementById("cursor-step");
  if (out) out.textContent = index === null ? "the last step" : `step ${RUN.metrics.steps[index]}`;
  for (const chart of charts) chart.update();
}

/** Where values lie between bottom (0) and top (1), and the values that get a line. */
function makeScale(all, { log, stacked }) {
  const finite = all.filter((value) => value !== null && Number.isFinite(value) && (!log || value > 0));
  if (!finite.length) return { place: () => 0, ticks: [] };
  let low = finite.reduce((a, b) => Math.min(a, b));
  let high = finite.reduce((a, b) => Math.max(a, b));
  if (log) {
    const [bottom, top] = [Math.floor(Math.log10(low)), Math.max(Math.ceil(Math.log10(high)), Math.floor(Math.log10(low)) + 1)];
    const every = Math.ceil((top - bottom) / 4);
    const ticks = [];
    for (let power = bottom; power <= top; power += every) ticks.push(10 ** power);
    return { place: (value) => (value > 0 ? (Math.log10(value) - bottom) / (top - bottom) : NaN), ticks };
  }
  if (stacked || (low >= 0 && low < 0.5 * high)) low = 0;
  // A constant, or one but for rounding, is a level line and not a magnified tremor.
  if (high - low < 1e-5 * Math.max(Math.abs(high), Math.abs(low)) || high === low) {
    const reach = Math.abs(high) * 0.5 || 1;
    [low, high] = low === 0 ? [0, high || 1] : [low - reach, high + reach];
  }
  const rough = (high - low) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  const [bottom, top] = [Math.floor(low / size + 1e-9) * size, Math.ceil(high / size - 1e-9) * size];
  const ticks = [];
  for (let tick = bottom; tick <= top + size / 2; tick += size) ticks.push(Math.abs(tick) < size / 1e6 ? 0 : tick);
  return { place: (value) => (value - bottom) / (top - bottom), ticks };
}

/** Labels with as many digits as tell the ticks apart. */
function distinct(ticks) {
  for (let digits = 2; ; digits++) {
    const labels = ticks.map((tick) => short(tick, digits));
    if (digits > 6 || new Set(labels).size === labels.length) return labels;
  }
}

/** What a series last had at a step: validation does not run at every one. */
function lastKnown(values, at) {
  while (at > 0 && values[at] === null) at--;
  return values[at];
}

/** Through the values there are; a single one is a dot. */
function linePath(values, x, y) {
  const points = values.map((value, i) => [x(i), value === null ? NaN : y(value)]).filter(([, height]) => Number.isFinite(height));
  return points.map(([left, height], i) => (i ? "L" : "M") + `${left.toFixed(1)} ${height.toFixed(1)}` + (i ? "" : "h.01")).join("");
}

function areaPath(top, below, x, y) {
  const points = top.map((value, i) => `${x(i).toFixed(1)} ${y(value).toFixed(1)}`);
  const back = top.map((_, i) => `${x(i).toFixed(1)} ${y(below ? below[i] : 0).toFixed(1)}`).reverse();
  return `M${[...points, ...back].join("L")}Z`;
}

function cumulated(series) {
  const sums = series[0].values.map(() => 0);
  return series.map((one) => one.values.map((value, i) => (sums[i] += value ?? 0)));
}

function stepTicks(steps) {
  const last = steps.length - 1;
  return [...new Set([0, Math.round(last / 4), Math.round(last / 2), Math.round((3 * last) / 4), last])];
}

/** Mean of the last `width` values up to each. */
function running(values, width) {
  return values.map((value, i) => {
    const some = values.slice(Math.max(0, i - width + 1), i + 1).filter((one) => one !== null);
    return value === null || !some.length ? null : some.reduce((a, b) => a + b) / some.length;
  });
}
