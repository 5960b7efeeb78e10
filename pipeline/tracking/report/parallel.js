// Parallel coordinates: an axis for every key that differs, and one for the result. A drag along an axis selects runs.

const AXIS_GAP = 118;
const ORDERED = 6;
const PARALLEL = { top: 52, bottom: 300, height: 322, side: 62 };

function parallelSection() {
  const axes = parallelAxes();
  if (axes.length < 2 || RUNS.length < 3) return;
  const room = document.getElementById("sections").clientWidth - 40;
  const gap = Math.max(AXIS_GAP, (room - 2 * PARALLEL.side) / (axes.length - 1));
  const width = 2 * PARALLEL.side + (axes.length - 1) * gap;
  const picture = el("svg", { width, height: PARALLEL.height, role: "img", "aria-label": "parallel coordinates" });
  const lines = el("g");
  const paths = RUNS.map((run, i) => el("path", { fill: "none", onpointerenter: () => pointAt(i), onpointerleave: () => pointAt(null) }, el("title", {}, run.label)));
  lines.append(...paths);
  picture.append(lines);
  axes.forEach((axis, k) => {
    axis.x = PARALLEL.side + k * gap;
    picture.append(axisNode(axis, k, picture, () => select(axes)));
  });
  RUNS.forEach((_, i) => paths[i].setAttribute("d", "M" + axes.map((axis) => `${axis.x},${axis.at(i).toFixed(1)}`).join("L")));
  const told = el("span", { class: "told" });
  const clear = el("button", { type: "button", onclick: () => (axes.forEach((axis) => axis.clear()), select(axes)) }, "clear selection");
  const colours = () => ramp(RUNS.map((run) => run.best[DATA.metric]), "", String);
  redraws.push(() => {
    const { of } = colours();
    paths.forEach((path, i) => {
      path.setAttribute("stroke", of(i).colour);
      path.setAttribute("class", shown(i) ? "on" : "off");
    });
    told.textContent = `${shownRuns().length} of ${RUNS.length} runs shown`;
    clear.hidden = state.brushed === null;
  });
  hovers.push((run) => {
    paths.forEach((path, i) => path.classList.toggle("pointed", i === run));
    if (run !== null) lines.append(paths[run]);
  });
  section(
    "parallel",
    "Settings and results",
    `A line per run, coloured by its best ${METRIC.title}. Drag along an axis to keep the runs that pass there, in all plots; click it to let go.`,
    el("div", { class: "controls" }, told, clear),
    el("div", { class: "wide" }, picture),
  );
}

function parallelAxes() {
  const keys = DATA.keys.filter(({ key }) => key !== "seed");
  const figures = [
    ["params", "params", (run) => run.params, compact],
    ["hours", "hours", (run) => run.wall_hours, (value) => plain(value, 3)],
    ["result", "best " + METRIC.title, (run) => (run.best[DATA.metric] == null ? null : METRIC.scale * run.best[DATA.metric]), (value) => plain(value, 4)],
  ];
  return [
    ...keys.map(({ key, title }) => parallelAxis(key, title, RUNS.map((run) => run.config[key] ?? null), ORDERED, valueText, (value) => plain(value, 3))),
    ...figures.map(([id, title, read, text]) => parallelAxis(id, title, RUNS.map((run) => read(run) ?? null), 1, text, text)),
  ].filter((axis) => axis.distinct > 1);
}

// Figures and keys of many numbers lie on a scale, all else evenly in order; runs without a value pass below the axis.
// ordered: up to how many different numbers lie evenly; exact, text: how they are written there and on a scale.
function parallelAxis(id, title, values, ordered, exact, text) {
  const known = values.filter((value) => value !== null);
  const names = [...new Set(known.map((value) => JSON.stringify(value)))];
  const some = known.length < values.length;
  const bottom = PARALLEL.bottom - (some ? 26 : 0);
  const axis = { id, title, values, some, bottom, brush: null, distinct: names.length + some };
  if (names.length > ordered && known.every((value) => typeof value === "number")) {
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const log = low > 0 && high / low >= 50;
    const scale = new Scale([low, high], [bottom, PARALLEL.top], log);
    const inner = scale.ticks(5).filter((value) => Math.abs(scale.at(value) - bottom) > 14 && Math.abs(scale.at(value) - PARALLEL.top) > 14);
    axis.ticks = [...new Set([low, ...inner, high])].map((value) => [scale.at(value), text(value)]);
    axis.at = (run) => (values[run] === null ? PARALLEL.bottom : scale.at(values[run]));
  } else {
    const sorted = names.map((name) => JSON.parse(name)).sort(compareValues);
    const gap = (bottom - PARALLEL.top) / Math.max(1, sorted.length - 1);
    const place = new Map(sorted.map((value, i) => [JSON.stringify(value), sorted.length > 1 ? bottom - i * gap : (bottom + PARALLEL.top) / 2]));
    const every = Math.ceil(14 / gap);
    axis.ticks = sorted.flatMap((value, i) => (i % every ? [] : [[place.get(JSON.stringify(value)), exact(value)]]));
    axis.at = (run) => (values[run] === null ? PARALLEL.bottom : place.get(JSON.stringify(values[run])));
  }
  if (some) axis.ticks.push([PARALLEL.bottom, "none"]);
  return axis;
}

function axisNode(axis, k, picture, selected) {
  const frame = el("rect", { class: "brush", x: axis.x - 9, width: 18, rx: 3, y: 0, height: 0, visibility: "hidden" });
  const grip = el("rect", { class: "grip", x: axis.x - 20, width: 40, y: PARALLEL.top - 8, height: PARALLEL.bottom - PARALLEL.top + 16, "data-axis": axis.id });
  let from = null;
  const level = (event) => event.clientY - picture.getBoundingClientRect().top;
  const show = () => {
    frame.setAttribute("visibility", axis.brush ? "visible" : "hidden");
    if (axis.brush) {
      frame.setAttribute("y", axis.brush[0]);
      frame.setAttribute("height", axis.brush[1] - axis.brush[0]);
    }
  };
  axis.clear = () => ((axis.brush = null), show());
  grip.addEventListener("pointerdown", (event) => {
    from = level(event);
    grip.setPointerCapture(event.pointerId);
  });
  grip.addEventListener("pointermove", (event) => {
    if (from === null || Math.abs(level(event) - from) < 4) return;
    axis.brush = [Math.min(from, level(event)), Math.max(from, level(event))];
    show();
    selected();
  });
  grip.addEventListener("pointerup", (event) => {
    if (from !== null && Math.abs(level(event) - from) < 4) {
      axis.clear();
      selected();
    }
    from = null;
  });
  const short = axis.title.length > 16 ? "…" + axis.title.slice(-15) : axis.title;
  return el(
    "g",
    { class: "axis" },
    el("line", { x1: axis.x, x2: axis.x, y1: PARALLEL.top, y2: axis.bottom }),
    el("text", { class: "name", x: axis.x, y: k % 2 ? 34 : 16, "text-anchor": "middle" }, short, el("title", {}, axis.title)),
    ...axis.ticks.map(([y, text]) => el("text", { x: axis.x + 6, y: y + 4 }, text.length > 14 ? text.slice(0, 13) + "…" : text, el("title", {}, text))),
    frame,
    grip,
  );
}

// Runs that pass through every frame; null without any frame.
function select(axes) {
  const framed = axes.filter((axis) => axis.brush);
  const passes = (run) => framed.every((axis) => axis.at(run) >= axis.brush[0] && axis.at(run) <= axis.brush[1]);
  state.brushed = framed.length ? new Set(RUNS.map((_, i) => i).filter(passes)) : null;
  changed();
}
