// Accuracy, loss and speed along the training: every run, or the mean over seeds with its spread.

const AXES = {
  epoch: { title: "epochs" },
  samples: { title: "images seen" },
  hours: { title: "hours of work" },
  flops: { title: "training FLOPs" },
  step: { title: "steps" },
};

function curvesSection() {
  const curves = curveChoices();
  if (!curves.length) return;
  let [chosen, axis, log] = [curves.some(([id]) => id === "evals:" + DATA.metric) ? "evals:" + DATA.metric : curves[0][0], "epoch", false];
  const plot = new Plot("curves", () => {
    const [source, name] = chosen.split(":");
    const metric = curveMetric(source, name);
    const series = state.seeds ? seedCurves(source, name, axis, metric) : runCurves(source, name, axis, metric);
    const wanted = state.seeds ? DATA.groups.flatMap(counted) : shownRuns();
    const lacking = wanted.length - series.flatMap((s) => s.members ?? [s.run]).length;
    note.textContent = lacking ? `${lacking} of ${wanted.length} runs have no such figures and are not drawn` : "";
    const x = AXES[axis];
    return {
      key: `${chosen} ${axis} ${log}`,
      x,
      y: { title: metric.title, log },
      series,
      empty: "no run that is shown has such figures",
      describe: (s, i) => [
        s.label,
        `${metric.title}: ${plain(s.ys[i], 7)}` + (s.sd ? ` ± ${plain(s.sd[i], 3)} (n = ${s.members.length})` : ""),
        `${x.title}: ${axis === "flops" ? compact(s.xs[i], 5) : axis === "samples" || axis === "step" ? Math.round(s.xs[i]).toLocaleString("en") : plain(s.xs[i], 5)}`,
        ...(axis === "step" || s.sd ? [] : [`step ${s.steps[i].toLocaleString("en")}`]),
      ],
    };
  });
  const note = el("p", { class: "note" });
  const key = el("div", { class: "legend" });
  redraws.push(() => legend(key));
  section(
    "curves",
    "Curves",
    "Drag to zoom, double click for all of it. A click on a name hides and shows it, a double click shows it alone.",
    el(
      "div",
      { class: "controls" },
      choice("figure", curves, chosen, (value) => ((chosen = value), changed())),
      choice("against", Object.entries(AXES).map(([id, { title }]) => [id, title]), axis, (value) => ((axis = value), changed())),
      choice("colour", colourChoices(), state.colour, (value) => ((state.colour = value), changed())),
      DATA.groups.some((group) => group.runs.length > 1)
        ? choice("draw", [["runs", "every run"], ["seeds", "mean ± deviation over seeds"]], "runs", (value) => ((state.seeds = value === "seeds"), changed()))
        : null,
      check("log", log, (value) => ((log = value), changed())),
    ),
    plot.node,
    note,
    key,
  );
}

function curveChoices() {
  const trained = [...new Set(RUNS.flatMap((run) => Object.keys(run.train)))].filter((name) => !(name in AXES));
  return [
    ...Object.entries(DATA.metrics).map(([name, { title }]) => ["evals:" + name, title]),
    ...trained.map((name) => ["train:" + name, curveMetric("train", name).title]),
  ];
}

function curveMetric(source, name) {
  if (source === "evals") return DATA.metrics[name];
  const titles = { loss: "training loss", lr: "learning rate", images_per_second: "images/s", memory_gb: "memory, GB", grad_norm: "gradient norm", data_wait: "share of time waiting for data" };
  return { title: titles[name] ?? name, scale: 1, digits: 4 };
}

// x values of a run's lines; null where the axis isn't known.
function positions(run, columns, axis) {
  if (axis !== "flops") return columns[axis] ?? [];
  return columns.samples.map((samples) => (run.macs == null ? null : DATA.flopsPerMac * run.macs * samples));
}

function runCurves(source, name, axis, metric) {
  const colours = colouring();
  const many = RUNS.length > 40;
  return shownRuns().flatMap((i) => {
    const columns = RUNS[i][source];
    const xs = positions(RUNS[i], columns, axis);
    if (!columns[name]?.some((value, k) => value != null && xs[k] != null)) return [];
    const ys = columns[name].map((value) => (value == null ? null : metric.scale * value));
    return [{ kind: "line", run: i, label: RUNS[i].label, xs, ys, steps: columns.step, width: many ? 1 : 1.7, ...colours.of(i) }];
  });
}

// Runs of a group that its mean is made of: as in the table over seeds those that came to their end,
// of each seed the newest; while there are none, all.
function counted(group) {
  const complete = group.complete.filter(shown);
  return complete.length ? complete : group.runs.filter(shown);
}

// One curve per group, at the steps that its runs have in common.
function seedCurves(source, name, axis, metric) {
  const colours = colouring();
  return DATA.groups.flatMap((group) => {
    const members = counted(group).filter((i) => RUNS[i][source][name]);
    if (!members.length) return [];
    const tables = members.map((i) => {
      const columns = RUNS[i][source];
      const xs = positions(RUNS[i], columns, axis);
      return new Map(columns.step.map((step, k) => [step, [xs[k], columns[name][k]]]));
    });
    const steps = [...tables[0].keys()].filter((step) => tables.every((table) => table.get(step)?.every((value) => value != null)));
    if (!steps.length) return [];
    const at = (step, k) => tables.map((table) => table.get(step)[k]);
    const xs = steps.map((step) => mean(at(step, 0)));
    const ys = steps.map((step) => metric.scale * mean(at(step, 1)));
    const sd = members.length > 1 ? steps.map((step) => metric.scale * deviation(at(step, 1))) : null;
    const band = sd ? { sd, low: ys.map((y, k) => y - sd[k]), high: ys.map((y, k) => y + sd[k]) } : {};
    return [{ kind: "line", run: null, members, label: groupLabel(group), xs, ys, steps, width: 2, ...colours.of(members[0]), ...band }];
  });
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

// Sample standard deviation.
function deviation(values) {
  const centre = mean(values);
  return Math.sqrt(values.reduce((sum, value) => sum + (value - centre) ** 2, 0) / (values.length - 1));
}
