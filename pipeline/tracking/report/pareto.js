// What accuracy costs: a point per run against size, operations, speed or price, and the front that no run improves on.

const COSTS = {
  params: { title: "parameters", published: "params", log: true },
  macs: { title: "multiply-adds per image", published: "macs", log: true },
  speed: { title: "training images/s per process", published: "images_per_second", more: true, log: true },
  train_flops: { title: "training FLOPs", log: true },
  gpu_hours: { title: "GPU-hours", log: true },
  cost: { title: "cost", log: true },
  memory_gb: { title: "memory, GB" },
  wall_hours: { title: "hours of work" },
};

function costOf(run, name) {
  if (name !== "speed") return run[name] ?? null;
  return run.images_per_second == null || !run.processes ? null : run.images_per_second / run.processes;
}

function paretoSection() {
  const names = Object.keys(COSTS).filter((name) => RUNS.some((run) => costOf(run, name) != null));
  if (!names.length || !RUNS.some((run) => run.final[DATA.metric] != null)) return;
  // The first one that says something: it has published figures, or tells the runs apart.
  const tells = (name) => (DATA.published.length && COSTS[name].published) || new Set(RUNS.map((run) => costOf(run, name))).size > 1;
  let [name, which, published] = [names.find(tells) ?? names[0], "best", true];
  let log = COSTS[name].log ?? false;
  const logBox = check("log", log, (value) => ((log = value), changed()));
  const plot = new Plot("pareto", () => {
    const { title, more } = COSTS[name];
    const own = state.seeds ? seedPoints(name, which) : runPoints(name, which);
    const printed = published ? publishedPoints(COSTS[name].published) : null;
    const front = frontLine(own, more);
    return {
      key: `${name} ${which} ${log} ${state.seeds} ${published}`,
      x: { title, log, text: (value) => compact(value), room: 0.08 },
      y: { title: `${which} ${METRIC.title}` },
      series: [...(front ? [front] : []), ...(printed ? [printed] : []), ...own],
      empty: "no run that is shown has both figures",
      describe: (s, i) => [
        s.names[i],
        `${METRIC.title}: ${plain(s.ys[i], 6)}` + (s.errors?.[i] ? ` ± ${plain(s.errors[i], 3)}` : ""),
        `${title}: ${compact(s.xs[i], 5)}`,
        ...(s.more?.[i] ?? []),
      ],
    };
  });
  const key = el("div", { class: "legend" });
  redraws.push(() => legend(key));
  section(
    "pareto",
    "What accuracy costs",
    "The line joins the runs that no other run beats in both figures." +
      (DATA.published.length ? " Diamonds are published figures for the same data set." : "") +
      (DATA.published.some((row) => row.recalled) ? " Those between dots are recalled and were not compared with the paper." : ""),
    el(
      "div",
      { class: "controls" },
      choice("against", names.map((id) => [id, COSTS[id].title]), name, (value) => {
        name = value;
        log = COSTS[name].log ?? false;
        logBox.querySelector("input").checked = log;
        changed();
      }),
      choice("accuracy", [["best", "best"], ["final", "final"]], which, (value) => ((which = value), changed())),
      logBox,
      DATA.published.length ? check("published", published, (value) => ((published = value), changed())) : null,
    ),
    plot.node,
    key,
  );
}

// A series per colour, so that the legend's colours are those of the points.
function runPoints(name, which) {
  const colours = colouring();
  const few = shownRuns().length <= 14;
  return shownRuns().flatMap((i) => {
    const [x, y] = [costOf(RUNS[i], name), RUNS[i][which][DATA.metric]];
    if (x == null || y == null) return [];
    const label = RUNS[i].label;
    return [{ kind: "dots", runs: [i], xs: [x], ys: [METRIC.scale * y], names: [label], labels: [few ? label : ""], ...colours.of(i), dash: [] }];
  });
}

function seedPoints(name, which) {
  const colours = colouring();
  return DATA.groups.flatMap((group) => {
    const members = counted(group);
    const costs = members.map((i) => costOf(RUNS[i], name)).filter((value) => value != null);
    const values = members.map((i) => RUNS[i][which][DATA.metric]).filter((value) => value != null);
    if (!costs.length || !values.length) return [];
    const label = groupLabel(group);
    const error = values.length > 1 ? METRIC.scale * deviation(values) : null;
    return [
      {
        kind: "dots",
        xs: [mean(costs)],
        ys: [METRIC.scale * mean(values)],
        errors: [error],
        names: [label],
        more: [[`n = ${values.length}`]],
        labels: [DATA.groups.length <= 14 ? label : ""],
        ...colours.of(members[0]),
        dash: [],
      },
    ];
  });
}

function publishedPoints(field) {
  const rows = DATA.published.filter((row) => field && row[field] != null);
  if (!rows.length) return null;
  const mark = (row) => (row.recalled ? "·" + row.label + "·" : row.label);
  return {
    kind: "dots",
    shape: "diamond",
    hollow: true,
    colour: cssColour("--muted"),
    xs: rows.map((row) => row[field]),
    ys: rows.map((row) => METRIC.scale * row.top1),
    names: rows.map((row) => `${row.label} (published)`),
    labels: rows.map(mark),
    more: rows.map((row) => [
      `${row.paper}, ${row.dataset}, ${row.img_size} px`,
      row.recalled ? "recalled, not compared with the paper" : row.source,
      ...(field === "images_per_second" ? [DATA.speeds] : []),
    ]),
  };
}

// Points that no other one beats in both figures, from cheap to dear.
function frontLine(series, more) {
  const sign = METRIC.lower ? -1 : 1;
  const points = series.map((s) => [s.xs[0], s.ys[0]]).sort((a, b) => (more ? b[0] - a[0] : a[0] - b[0]) || sign * (b[1] - a[1]));
  const front = [];
  for (const point of points) if (!front.length || sign * point[1] > sign * front.at(-1)[1]) front.push(point);
  if (front.length < 2) return null;
  return { kind: "line", quiet: true, colour: cssColour("--accent"), dash: [5, 4], xs: front.map((p) => p[0]), ys: front.map((p) => p[1]) };
}
