// The page from top to bottom.

function facts() {
  const sum = (name) => RUNS.reduce((total, run) => total + (run[name] ?? 0), 0);
  const sign = METRIC.lower ? -1 : 1;
  const rated = RUNS.filter((run) => run.best[DATA.metric] != null);
  const best = rated.reduce((a, b) => (a && sign * a.best[DATA.metric] >= sign * b.best[DATA.metric] ? a : b), null);
  const states = new Map();
  for (const run of RUNS) states.set(run.state, (states.get(run.state) ?? 0) + 1);
  const tile = (title, value, more) => el("div", { class: "tile" }, el("span", {}, title), el("b", {}, value), el("small", {}, more));
  return [
    best ? tile("best " + METRIC.title, metricText(best.best[DATA.metric]), best.label) : null,
    tile("runs", String(RUNS.length), [...states].map(([name, n]) => `${n} ${name}`).join(", ")),
    DATA.groups.length < RUNS.length ? tile("settings", String(DATA.groups.length), `${DATA.groups.filter((g) => g.n > 1).length} with several seeds`) : null,
    tile("trained on", [...new Set(RUNS.map((run) => run.dataset ?? "unknown data"))].slice(0, 3).join(", "), `${compact(sum("samples"))} images seen`),
    sum("gpu_hours") ? tile("GPU-hours", compact(sum("gpu_hours")), DATA.price == null ? (sum("train_flops") ? compact(sum("train_flops")).replace(/[A-Z]$/i, " $&") + "FLOP of training" : "") : `cost ${fixed(sum("cost"), 2)} at ${DATA.price} each`) : null,
  ].filter(Boolean);
}

function notes() {
  const found = [...DATA.leftOut.map((reason) => "Left out: " + reason), ...DATA.notes];
  return found.length ? [el("ul", { class: "notes" }, found.map((text) => el("li", {}, text)))] : [];
}

function how() {
  return [
    `Written ${DATA.written} by rookery compare. `,
    "Training FLOPs are 3 forward passes of 2 operations per multiply-add for every image seen. ",
    "Images/s is the median over the training lines, of all processes together. ",
    "Memory is the highest of the process of rank 0: of the GPU's allocator, or of the process on a CPU. ",
    "GPU-hours are hours of work, over all sessions and without pauses, times processes (one per GPU; without GPUs they are hours of processes). ",
    "Curves of more than 600 points are thinned, their lowest and highest points kept.",
  ];
}

state.colour = RUNS.length <= PALETTE ? "run" : DATA.groups.length < RUNS.length && DATA.groups.length <= PALETTE ? "group" : "metric";
document.getElementById("facts").append(...facts());
document.getElementById("notes").append(...notes());
document.getElementById("how").append(...how());
curvesSection();
paretoSection();
runsSection();
seedsSection();
parallelSection();
differencesSection();
dark.addEventListener("change", changed);
redraws.forEach((redraw) => redraw());
requestAnimationFrame(() => (document.documentElement.dataset.drawn = String(Math.round(performance.now()))));
