// The first tab: the run in a few numbers, and its curves. Which metrics stand together is decided here.

const REWARD = "rollout/reward_mean";

function showCurves(openStep) {
  const page = document.getElementById("curves");
  page.append(summaryTiles());
  if (RUN.metrics === null) {
    page.append(el("p", { className: "empty" }, "There are no numbers to draw: no optimizer step was logged."));
    return;
  }
  const used = new Set();
  const { steps, series, width } = RUN.metrics;
  const hint = width > 1 ? `each point is ${width} steps` : "";
  page.append(
    el(
      "p",
      { className: "hint" },
      "Values at ",
      el("b", { id: "cursor-step" }, "the last step"),
      RUN.rollouts.length ? " · click a curve, or press Enter on it, for the rollouts of that step" : "",
      hint && ` · ${hint}`,
    ),
  );
  const draw = (chart) => makeChart({ steps, onStep: RUN.rollouts.length ? openStep : null, ...chart });
  for (const { name, charts: wanted } of sections(series)) {
    const drawn = wanted.map((chart) => filled(chart, series, used)).filter((chart) => chart.series.length);
    if (drawn.length) page.append(el("h2", {}, name), el("div", { className: "charts" }, drawn.map(draw)));
  }
  const others = Object.keys(series).filter((name) => !used.has(name)).sort();
  if (others.length) page.append(everythingElse(others, series, draw));
}

/** A chart's series with their values; those that the run did not log are left out. */
function filled(chart, series, used) {
  const found = chart.series.filter((one) => one.values || one.name in series);
  for (const one of found) if (one.name) used.add(one.name);
  return { ...chart, series: found.map((one) => ({ values: series[one.name], ...one })) };
}

function sections(series) {
  const names = Object.keys(series);
  const byAgent = names.filter((name) => name.startsWith(`${REWARD}/`));
  const reward = series[REWARD];
  const one = (name, label) => ({ name, label: label ?? name.slice(name.indexOf("/") + 1) });
  /** A metric of validation: `val/METRIC` over all tasks, `val/NAME/METRIC` of a part of them. */
  const scored = (metric) =>
    names
      .filter((name) => name.startsWith("val/") && name.endsWith(`/${metric}`))
      .map((name) => one(name, name.slice("val/".length, -metric.length - 1) || "all"));
  const phases = RUN.phases.map((phase) => one(`time/${phase}_s`, phase));
  const failures = names.filter((name) => name.startsWith("rollout/failed_"));
  return [
    {
      name: "Learning",
      charts: [
        {
          title: "Reward",
          about: "Mean reward of the rollouts that are compared, and its mean over the last 10 steps",
          series: reward ? [{ ...one(REWARD, "step"), faint: true, color: 0 }, { values: running(reward, 10), label: "mean of 10", color: 0 }] : [],
        },
        ...(byAgent.length > 1
          ? [{ title: "Reward by environment", series: byAgent.map((name) => one(name, name.slice(REWARD.length + 1))) }]
          : []),
        {
          title: "Length",
          unit: "sampled tokens a rollout",
          series: [one("rollout/sampled_tokens_mean", "mean"), one("rollout/sampled_tokens_max", "largest")],
        },
        {
          title: "Entropy",
          unit: "nats a token",
          about: "Of the policy where it was computed, otherwise estimated from the logprobs of sampled tokens",
          series: [one("train/entropy", "policy"), one("train/entropy_estimate", "trainer, estimated"), one("rollout/entropy", "engine, estimated")],
        },
        {
          title: "KL",
          unit: "nats a token",
          about: "Engine to trainer measures mismatch; policy to reference is what a penalty holds down",
          series: [one("train/generator_kl", "engine to trainer"), one("train/ref_kl", "policy to reference")],
        },
        { title: "Loss", series: [one("train/loss", "loss")] },
        {
          title: "Groups",
          about: "Groups of equal rewards teach nothing",
          series: [one("rollout/zero_variance_frac", "equal rewards"), one("rollout/truncated_frac", "rollouts truncated")],
        },
      ],
    },
    {
      name: "Validation",
      charts: [
        { title: "Reward", about: "Mean over tasks, of all and by dataset or environment", series: scored("reward_mean") },
        {
          title: "Best of k attempts",
          about: "With rewards of 0 and 1 this is pass@k",
          series: names.filter((name) => /^val\/pass_at_\d+$/.test(name)).map((name) => one(name, name.replace("val/pass_at_", "k = "))),
        },
        { title: "Length", unit: "sampled tokens a rollout", series: scored("sampled_tokens_mean") },
      ],
    },
    {
      name: "Engine and trainer agree",
      charts: [
        {
          title: "Logprob gap",
          unit: "nats, log scale",
          about: "Difference of the engine's and the trainer's logprob of the same sampled token",
          log: true,
          series: [one("train/logprob_diff_max", "largest"), one("train/logprob_diff_mean", "mean"), one("sync/canary_diff", "canary after sync")],
        },
        {
          title: "Ratio",
          unit: "trainer / engine probability",
          series: [one("train/ratio_p01", "1 %"), one("train/ratio_p50", "median"), one("train/ratio_p99", "99 %")],
        },
        {
          title: "Rollouts lost",
          unit: "a step",
          series: [one("rollout/dropped", "dropped"), one("rollout/misaligned", "misaligned"), one("rollout/splice_breaks", "splice breaks"), ...failures.map((name) => one(name, name.slice("rollout/failed_".length)))],
        },
      ],
    },
    {
      name: "Time",
      charts: [
        { title: "Step by phase", unit: "seconds", stacked: true, series: phases },
        {
          title: "CPU time by phase",
          unit: "seconds of the trainer's process",
          stacked: true,
          series: RUN.phases.map((phase) => one(`time/${phase}_cpu_s`, phase)),
        },
        { title: "Tokens", unit: "a step", series: [one("batch/tokens", "computed"), one("batch/trained_tokens", "trained")] },
      ],
    },
  ];
}

function everythingElse(names, series, draw) {
  const grid = el("div", { className: "charts small" });
  const box = el("details", { className: "more" }, el("summary", {}, `${plural(names.length, "more metric")}`), grid);
  const fill = () => grid.append(...names.map((name) => draw({ title: name, series: [{ label: "value", values: series[name] }] })));
  box.addEventListener("toggle", () => box.open && !grid.childElementCount && fill());
  return box;
}

function summaryTiles() {
  const summary = RUN.summary ?? {};
  const series = RUN.metrics?.series ?? {};
  const reward = (series[REWARD] ?? []).filter((value) => value !== null);
  const first = summary.reward_first ?? reward[0];
  const last = summary.reward_last10 ?? running(reward, 10).at(-1);
  const total = (name) => series[name]?.reduce((sum, value) => sum + (value ?? 0), 0);
  const largest = (name) => series[name]?.reduce((most, value) => Math.max(most, value ?? 0), 0);
  const predicted = summary.reward_predicted;
  const tile = (label, value, note, warn) =>
    el("div", { className: warn ? "tile warn" : "tile" }, el("dt", {}, label), el("dd", {}, value), note && el("small", {}, note));
  const gap = summary.max_logprob_diff ?? largest("train/logprob_diff_max");
  const misaligned = summary.misaligned ?? total("rollout/misaligned");
  const dropped = summary.dropped ?? total("rollout/dropped");
  const lost = (count) => (count === undefined ? "not logged" : count ? "rollouts, not trained on" : "none");
  const steps = summary.steps ?? (RUN.metrics ? RUN.metrics.steps.length * RUN.metrics.width : 0);
  return el(
    "dl",
    { className: "tiles" },
    tile("Reward", `${short(first)} → ${short(last)}`, predicted === undefined || predicted === null ? "first step → mean of last 10" : `predicted start ${short(predicted)}`),
    tile("Optimizer steps", short(steps), RUN.summary ? "finished" : "no summary"),
    tile("Rollouts", short(summary.rollouts ?? RUN.num_rollouts), `${short(RUN.rollouts.length)} in this file`),
    tile("Logprob gap", short(gap, 3), "largest, in nats", gap > 0.1),
    tile("Misaligned", short(misaligned), lost(misaligned), misaligned > 0),
    tile("Dropped", short(dropped), lost(dropped), dropped > 0),
    summary.train_seconds !== undefined && timeTile(summary),
  );
}

/** Where the seconds went, as one bar. */
function timeTile(summary) {
  const seconds = RUN.phases.map((phase) => [phase, summary.seconds?.[phase] ?? 0]);
  const rest = Math.max(0, summary.train_seconds - seconds.reduce((sum, [, value]) => sum + value, 0));
  const parts = [...seconds, ["rest", rest]].filter(([, value]) => value > 0);
  return el(
    "div",
    { className: "tile wide" },
    el("dt", {}, "Training time"),
    el("dd", {}, `${short(summary.train_seconds)} s`),
    el(
      "div",
      { className: "bar", role: "img", "aria-label": parts.map(([name, value]) => `${name} ${short(value)} s`).join(", ") },
      parts.map(([name, value]) =>
        el("i", { className: `s${name === "rest" ? "-rest" : RUN.phases.indexOf(name)}`, title: `${name} ${short(value)} s`, style: { flexGrow: value } }),
      ),
    ),
    el("small", {}, parts.filter(([, v]) => v / summary.train_seconds > 0.02).map(([name, v]) => `${name} ${Math.round((100 * v) / summary.train_seconds)} %`).join(" · ")),
  );
}
