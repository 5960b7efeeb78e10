// The tables: runs, seeds, config keys that differ.

const MANY_VALUES = 12;

// A table with sortable columns: {title, read(row) -> value, text(row), numeric}. Rows are any values.
function sortable(columns, rows, rowNode) {
  let [by, down] = [null, false];
  const body = el("tbody");
  const fill = () => {
    const order = [...rows];
    if (by !== null) {
      const read = columns[by].read;
      const known = order.filter((row) => read(row) != null).sort((a, b) => (down ? -1 : 1) * compareValues(read(a), read(b)));
      order.splice(0, order.length, ...known, ...order.filter((row) => read(row) == null));
    }
    body.replaceChildren(...order.map(rowNode));
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== by ? "none" : down ? "descending" : "ascending"));
  };
  const heads = columns.map((column, i) =>
    el(
      "th",
      { scope: "col", class: column.numeric ? "number" : null, title: column.help },
      el(
        "button",
        {
          type: "button",
          onclick: () => {
            [by, down] = by === i ? [i, !down] : [i, Boolean(column.numeric)];
            fill();
          },
        },
        column.title,
      ),
    ),
  );
  fill();
  return el("div", { class: "wide tall" }, el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
}

function runColumns() {
  const column = (title, read, text, numeric = true, help = null) => ({ title, read, text, numeric, help });
  const figure = (title, name, write, help = null) => column(title, (run) => run[name], (run) => write(run[name]), true, help);
  const progress = (done, total, digits) => (done == null ? "–" : plain(done, digits) + (total == null ? "" : " / " + plain(total, digits)));
  const all = [
    ...DATA.keys.map(({ key, title }) => column(title, (run) => run.config[key], (run) => valueText(run.config[key]), typeof RUNS.find((run) => run.config[key] != null)?.config[key] === "number", key)),
    column("final " + METRIC.title, (run) => run.final[DATA.metric], (run) => metricText(run.final[DATA.metric])),
    column("best", (run) => run.best[DATA.metric], (run) => metricText(run.best[DATA.metric])),
    column("epochs", (run) => run.epoch, (run) => progress(run.epoch, run.total_epochs, 4)),
    figure("images", "samples", compact, "seen in training"),
    figure("params", "params", compact),
    figure("MACs", "macs", compact, "multiply-adds of one image's forward pass"),
    figure("FLOPs", "train_flops", compact, "of the training: 3 forward passes x 2 per multiply-add x images seen"),
    figure("train loss", "train_loss", (value) => fixed(value, 4)),
    figure("img/s", "images_per_second", (value) => plain(value, 4), "of all processes together, median"),
    figure("mem GB", "memory_gb", (value) => fixed(value, 2), "highest of the process of rank 0"),
    figure("hours", "wall_hours", (value) => fixed(value, 2), "of work, without pauses"),
    figure("GPU-h", "gpu_hours", (value) => fixed(value, 2), "hours times processes"),
    figure("cost", "cost", (value) => fixed(value, 2), DATA.price == null ? null : `at ${DATA.price} a GPU-hour`),
    column("data", (run) => run.dataset, (run) => run.dataset ?? "–", false),
    column("state", (run) => run.state, (run) => run.state, false),
  ];
  return all.filter((one) => RUNS.some((run) => one.read(run) != null));
}

function runsSection() {
  const columns = runColumns();
  const rated = RUNS.map((run) => run.best[DATA.metric]).filter((value) => value != null);
  const top = rated.length > 1 ? (METRIC.lower ? Math.min(...rated) : Math.max(...rated)) : null;
  const boxes = RUNS.map((run, i) => el("input", { type: "checkbox", "aria-label": "show " + run.label, onchange: () => toggle([i]) }));
  const swatches = RUNS.map(() => el("i", { class: "swatch" }));
  const nodes = RUNS.map((run, i) =>
    el(
      "tr",
      { class: top !== null && run.best[DATA.metric] === top ? "best" : null, onpointerenter: () => pointAt(i), onpointerleave: () => pointAt(null) },
      el("th", { scope: "row", title: run.path }, el("label", {}, boxes[i], swatches[i], run.label)),
      columns.map((column) => el("td", { class: column.numeric ? "number" : null }, column.text(run))),
    ),
  );
  redraws.push(() => {
    const { of } = colouring();
    RUNS.forEach((_, i) => {
      boxes[i].checked = !state.hidden.has(i);
      swatches[i].style.background = of(i).colour;
      nodes[i].classList.toggle("faint", !shown(i));
    });
  });
  hovers.push((run) => nodes.forEach((node, i) => node.classList.toggle("pointed", i === run)));
  const name = { title: "run", read: (i) => RUNS[i].label, numeric: false };
  const table = sortable(
    [name, ...columns.map((column) => ({ ...column, read: (i) => column.read(RUNS[i]) }))],
    RUNS.map((_, i) => i),
    (i) => nodes[i],
  );
  const words = RUNS.map((run) => [run.label, run.state, ...DATA.keys.map(({ key, title }) => `${title}=${valueText(run.config[key])}`)].join(" ").toLowerCase());
  const matches = () => filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const filter = el("input", {
    type: "search",
    placeholder: "find, such as lr=0.1",
    "aria-label": "find runs",
    oninput: () => nodes.forEach((node, i) => (node.hidden = !matches().every((word) => words[i].includes(word)))),
  });
  const only = (keep) => () => {
    RUNS.forEach((_, i) => (keep(i) ? state.hidden.delete(i) : state.hidden.add(i)));
    changed();
  };
  section(
    "runs",
    "Runs",
    "Ticked runs are in the plots. Click a heading to sort.",
    el(
      "div",
      { class: "controls" },
      filter,
      el("button", { type: "button", onclick: only(() => true) }, "show all"),
      el("button", { type: "button", onclick: only(() => false) }, "hide all"),
      el("button", { type: "button", onclick: only((i) => !nodes[i].hidden) }, "only those found"),
    ),
    table,
  );
}

function seedsSection() {
  if (!DATA.groups.some((group) => group.runs.length > 1)) return;
  const references = Object.keys(DATA.tests).map(Number).filter((g) => DATA.groups[g].n > 1);
  let reference = DATA.reference;
  const holder = el("div");
  const draw = () => {
    const tests = new Map((DATA.tests[reference] ?? []).map((test) => [test.group, test]));
    const difference = (g) => {
      const test = tests.get(g);
      if (!test) return g === reference ? "reference" : "–";
      const [by, low, high] = [test.difference, test.low, test.high].map((value) => (value > 0 ? "+" : "") + metricText(value));
      return `${by} [${low}, ${high}]`;
    };
    const p = (g) => (tests.has(g) ? (tests.get(g).p_holm < 0.001 ? "<0.001" : plain(tests.get(g).p_holm, 2)) : "–");
    const column = (title, read, text, numeric = true, help = null) => ({ title, read, text, numeric, help });
    const columns = [
      column("settings", (g) => groupLabel(DATA.groups[g]), (g) => groupLabel(DATA.groups[g]), false),
      column("n", (g) => DATA.groups[g].n, (g) => String(DATA.groups[g].n), true, "runs that came to their end"),
      column("final " + METRIC.title, (g) => DATA.groups[g].final?.mean, (g) => spreadText(DATA.groups[g].final)),
      column("best", (g) => DATA.groups[g].best?.mean, (g) => spreadText(DATA.groups[g].best)),
      column("difference [95 %]", (g) => tests.get(g)?.difference, difference, true, "of the final means, with its confidence interval"),
      column("p", (g) => tests.get(g)?.p_holm, p, true, "Welch's t-test, after Holm's correction"),
    ];
    holder.replaceChildren(
      sortable(columns, DATA.groups.map((_, g) => g), (g) => el("tr", {}, columns.map((one, i) => el(i ? "td" : "th", { class: one.numeric ? "number" : "long" }, one.text(g))))),
    );
  };
  draw();
  section(
    "seeds",
    "Over seeds",
    "Runs equal but for their seed: mean ± sample standard deviation of n runs that came to their end. One run has no spread, and says nothing about significance.",
    references.length > 1
      ? el("div", { class: "controls" }, choice("compared with", references.map((g) => [String(g), groupLabel(DATA.groups[g])]), String(reference), (value) => ((reference = Number(value)), draw())))
      : null,
    holder,
  );
}

function differencesSection() {
  if (!DATA.keys.length) return;
  const named = (runs) => runs.slice(0, 4).map((i) => RUNS[i].label).join(", ") + (runs.length > 4 ? ` and ${runs.length - 4} more` : "");
  const rows = DATA.keys.flatMap(({ key }) => {
    const all = distinct(key).sort(compareValues);
    if (all.length > MANY_VALUES) {
      const range = [all.find((value) => value !== null), all.at(-1)].map(valueText).join(" … ");
      return [el("tr", { class: "first" }, el("th", { scope: "row" }, key), el("td", {}, range), el("td", { class: "number" }, String(RUNS.length)), el("td", { class: "long" }, `${all.length} values`))];
    }
    return all.map((value, i) => {
      const runs = RUNS.flatMap((run, r) => (JSON.stringify(run.config[key] ?? null) === JSON.stringify(value) ? [r] : []));
      return el(
        "tr",
        { class: i ? null : "first" },
        i ? null : el("th", { scope: "rowgroup", rowspan: all.length }, key),
        el("td", {}, value === null ? "not set" : valueText(value)),
        el("td", { class: "number" }, String(runs.length)),
        el("td", { class: "long" }, named(runs)),
      );
    });
  });
  const heads = ["key", "value", "runs", "which"].map((title) => el("th", { scope: "col", class: title === "runs" ? "number" : null }, title));
  section("differences", "Config keys that differ", null, el("div", { class: "wide tall" }, el("table", {}, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, rows))));
}
