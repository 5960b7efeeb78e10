// Data, elements, text of numbers, and what all parts of the page share: which runs are shown and which one is pointed at.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const METRIC = DATA.metrics[DATA.metric] ?? { title: "top-1 %", scale: 100, digits: 2, lower: false };
const SVG = new Set(["svg", "g", "line", "path", "rect", "text", "title", "circle"]);

// An element with attributes, listeners (`onclick`) and children. Text is text: it is never read as HTML.
function el(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

// A labelled choice: options are [value, text].
function choice(label, options, value, onchange) {
  const select = el("select", { onchange: () => onchange(select.value) });
  for (const [key, text] of options) select.append(el("option", { value: key, selected: key === value }, text));
  return el("label", { class: "control" }, label, select);
}

function check(label, value, onchange) {
  const box = el("input", { type: "checkbox", checked: value, onchange: () => onchange(box.checked) });
  return el("label", { class: "control" }, box, label);
}

function section(id, title, help, ...children) {
  const node = el("section", { id }, el("h2", {}, title), help ? el("p", { class: "help" }, help) : null, ...children);
  document.getElementById("sections").append(node);
  return node;
}

// ------------------------------------------------------------------------------------------------ text of values

const UNITS = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

// 17057608 -> "17.06M"; small numbers keep four digits.
function compact(value, digits = 4) {
  if (value == null) return "–";
  const [size, unit] = UNITS.find(([size]) => Math.abs(value) >= size * 0.99995) ?? [1, ""];
  return plain(value / size, digits) + unit;
}

function plain(value, digits = 6) {
  if (value == null) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e7) return value.toExponential(Math.max(0, digits - 3)).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

function fixed(value, digits) {
  return value == null ? "–" : value.toFixed(digits);
}

function metricText(value, metric = METRIC) {
  return value == null ? "–" : (metric.scale * value).toFixed(metric.digits);
}

// A config's value as a recipe writes it.
function valueText(value) {
  return value == null ? "–" : typeof value === "string" ? value : typeof value === "number" ? plain(value) : JSON.stringify(value);
}

function spreadText(spread, metric = METRIC) {
  if (!spread) return "–";
  return metricText(spread.mean, metric) + (spread.sd == null ? "" : " ± " + metricText(spread.sd, metric));
}

// ------------------------------------------------------------------------------------------------ what is shown

const state = { hidden: new Set(), brushed: null, hovered: null, colour: null, seeds: false };
const redraws = [];
const hovers = [];
let waiting = false;

function shown(run) {
  return !state.hidden.has(run) && (state.brushed === null || state.brushed.has(run));
}

function shownRuns() {
  return RUNS.map((_, i) => i).filter(shown);
}

// Everything that depends on the state is drawn again, once a frame.
function changed() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    redraws.forEach((redraw) => redraw());
  });
}

// Point at a run (or at none, with null) in every part of the page.
function pointAt(run) {
  if (state.hovered === run) return;
  state.hovered = run;
  hovers.forEach((show) => show(run));
}

// Hide these runs if one of them is shown, else show them.
function toggle(runs) {
  const hide = runs.some((run) => !state.hidden.has(run));
  for (const run of runs) hide ? state.hidden.add(run) : state.hidden.delete(run);
  changed();
}

// ------------------------------------------------------------------------------------------------ colours

const PALETTE = 10;
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const RAMP = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
const dark = matchMedia("(prefers-color-scheme: dark)");

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// The ends of the ramp that can't be seen on the background are left out.
function rampColour(t) {
  const place = (dark.matches ? 0.32 + 0.68 * t : 0.86 * t) * (RAMP.length - 1);
  const i = Math.min(RAMP.length - 2, Math.floor(place));
  const mixed = RAMP[i].map((from, c) => Math.round(from + (RAMP[i + 1][c] - from) * (place - i)));
  return `rgb(${mixed.join(",")})`;
}

function colourChoices() {
  const keys = DATA.keys.filter(({ key }) => distinct(key).length > 1);
  return [
    ["run", "run"],
    ["metric", "best " + METRIC.title],
    ...(DATA.groups.length < RUNS.length ? [["group", "settings"]] : []),
    ...keys.map(({ key, title }) => ["key:" + key, title]),
  ];
}

function distinct(key) {
  return [...new Map(RUNS.map((run) => [JSON.stringify(run.config[key] ?? null), run.config[key] ?? null])).values()];
}

// How runs are coloured: a colour and a dash for each, and a legend of entries {label, colour, dash, runs} or a ramp.
function colouring() {
  const mode = state.colour;
  if (mode === "metric") return ramp(RUNS.map((run) => run.best[DATA.metric]), "best " + METRIC.title, (v) => metricText(v));
  if (mode.startsWith("key:")) {
    const key = mode.slice(4);
    const values = distinct(key);
    if (values.length > 6 && values.every((value) => value === null || typeof value === "number"))
      return ramp(RUNS.map((run) => run.config[key]), titleOf(key), valueText);
    values.sort(compareValues);
    const names = values.map((value) => JSON.stringify(value));
    return entries(values.map(valueText), RUNS.map((run) => names.indexOf(JSON.stringify(run.config[key] ?? null))));
  }
  if (mode === "group") return entries(DATA.groups.map(groupLabel), RUNS.map((_, i) => groupOf(i)));
  return entries(RUNS.map((run) => run.label), RUNS.map((_, i) => i));
}

function entries(labels, entryOf) {
  const legend = labels.map((label, i) => ({
    label,
    colour: cssColour(`--p${i % PALETTE}`),
    dash: DASHES[Math.floor(i / PALETTE) % DASHES.length],
    runs: entryOf.flatMap((entry, run) => (entry === i ? [run] : [])),
  }));
  const colours = legend.map(({ colour, dash }) => ({ colour, dash }));
  return { legend, of: (run) => colours[entryOf[run]] };
}

function ramp(values, title, text) {
  const known = values.filter((value) => value != null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const log = low > 0 && high / low >= 50;
  const place = (value) => (high > low ? (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low)) : 1);
  const none = cssColour("--muted");
  const of = (run) => ({ colour: values[run] == null ? none : rampColour(place(values[run])), dash: [] });
  return { ramp: known.length ? { title, low: text(low), high: text(high) } : null, of };
}

function compareValues(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return valueText(a).localeCompare(valueText(b), undefined, { numeric: true });
}

function titleOf(key) {
  return DATA.keys.find((entry) => entry.key === key)?.title ?? key;
}

function groupOf(run) {
  return DATA.groups.findIndex((group) => group.runs.includes(run));
}

function groupLabel(group) {
  const settings = DATA.groupKeys.map(({ key, title }) => `${title}=${valueText(group.settings[key])}`);
  return settings.join(", ") || RUNS[group.runs[0]].label + (group.runs.length > 1 ? ` and ${group.runs.length - 1} more` : "");
}

// The legend below a plot: entries that hide and show their runs, or the ramp.
function legend(node) {
  const { legend: entries, ramp } = colouring();
  if (!entries) {
    const stops = [0, 0.25, 0.5, 0.75, 1].map(rampColour).join(",");
    node.replaceChildren(...(ramp ? [el("span", {}, `${ramp.title}: ${ramp.low}`), el("i", { class: "ramp", style: `background:linear-gradient(90deg,${stops})` }), ramp.high] : []));
    return;
  }
  node.replaceChildren(
    ...entries.map(({ label, colour, dash, runs }) =>
      el(
        "button",
        {
          type: "button",
          class: "entry",
          "aria-pressed": String(runs.some((run) => !state.hidden.has(run))),
          title: "click: hide or show; double click: show only this",
          onclick: () => toggle(runs),
          ondblclick: () => {
            RUNS.forEach((_, i) => (runs.includes(i) ? state.hidden.delete(i) : state.hidden.add(i)));
            changed();
          },
          onpointerenter: () => runs.length === 1 && pointAt(runs[0]),
          onpointerleave: () => pointAt(null),
        },
        el("i", { class: dash.length ? "line dashed" : "line", style: `border-color:${colour}` }),
        label,
      ),
    ),
  );
}
