// A plot on a canvas: lines, bands and points; zoom by dragging, all of it by a double click, values on pointing.

const FONT = "12px system-ui, sans-serif";
const NEAR = 40;
const DRAG = 8;

class Plot {
  // content() says what to draw now: {key, x, y, series, empty, describe}. An axis is {title, log, text(value), room}; with
  // another key the zoom ends; describe(series, i) gives the lines of text for a point.
  // A series is {kind: "line" | "dots", xs, ys, colour, dash} and, where it has them: run (its index), width, low and high
  // (a band), quiet (not to be pointed at); of dots: runs, errors, labels (beside the points), shape, hollow.
  constructor(name, content) {
    this.content = content;
    this.base = el("canvas", { role: "img" });
    this.top = el("canvas", { class: "overlay", "aria-hidden": "true" });
    this.tip = el("div", { class: "tip", hidden: true });
    this.reset = el("button", { type: "button", class: "reset", hidden: true, onclick: () => this.zoomTo(null) }, "whole plot");
    this.node = el("div", { class: "plot", "data-name": name }, this.base, this.top, this.tip, this.reset);
    this.zoom = null;
    this.near = null;
    this.drag = null;
    const on = (event, act) => this.top.addEventListener(event, act);
    on("pointerdown", (event) => this.press(event));
    on("pointermove", (event) => this.move(event));
    on("pointerup", (event) => this.release(event));
    on("pointercancel", () => this.leave());
    // A finger that is lifted leaves too; what it showed stays until the next tap.
    on("pointerleave", (event) => event.pointerType === "touch" || this.drag || this.leave());
    on("dblclick", () => this.zoomTo(null));
    new ResizeObserver(() => this.draw()).observe(this.node);
    redraws.push(() => this.draw());
    hovers.push(() => this.overlay());
  }

  draw() {
    this.width = this.node.clientWidth;
    this.height = this.node.clientHeight;
    if (!this.width) return;
    this.now = this.content();
    if (this.now.key !== this.key) this.zoom = null;
    this.key = this.now.key;
    const { x, y, series } = this.now;
    const [xs, ys] = this.zoom ?? [
      extent(series.flatMap((s) => s.xs), x.log, x.room ?? 0.02),
      extent(series.flatMap((s) => (s.low ? [...s.low, ...s.high] : s.ys)), y.log, 0.05),
    ];
    const pen = this.pen(this.base);
    const bottom = this.height - 42;
    const trial = new Scale(ys, [bottom, 26], y.log).ticks(this.height / 55);
    const yText = tickTexts(trial);
    const left = Math.max(34, ...yText.map((text) => pen.measureText(text).width + 12));
    this.sx = new Scale(xs, [left, this.width - 14], x.log);
    this.sy = new Scale(ys, [bottom, 26], y.log);
    this.axes(pen, trial, yText, bottom, left);
    pen.save();
    pen.beginPath();
    pen.rect(left, 26, this.width - 14 - left, bottom - 26);
    pen.clip();
    for (const s of series) if (s.low) this.band(pen, s);
    for (const s of series) s.kind === "line" ? this.line(pen, s, s.width ?? 1.5) : this.dots(pen, s);
    pen.restore();
    this.labels(pen, series, { left, right: this.width - 14, top: 26, bottom });
    if (!series.length) {
      pen.fillStyle = cssColour("--muted");
      pen.textAlign = "center";
      pen.fillText(this.now.empty ?? "nothing to draw", (left + this.width) / 2, this.height / 2);
    }
    this.base.setAttribute("aria-label", `${y.title} against ${x.title}, ${series.length} curves or sets of points`);
    Object.assign(this.node.dataset, { xlow: xs[0], xhigh: xs[1], ylow: ys[0], yhigh: ys[1], series: series.length });
    this.reset.hidden = !this.zoom;
    this.overlay();
  }

  // A canvas in device pixels, emptied, with a pen in CSS pixels.
  pen(canvas) {
    const ratio = devicePixelRatio || 1;
    const [w, h] = [Math.round(this.width * ratio), Math.round(this.height * ratio)];
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    pen.font = FONT;
    pen.lineJoin = "round";
    return pen;
  }

  axes(pen, yTicks, yText, bottom, left) {
    const { x, y } = this.now;
    const right = this.width - 14;
    pen.strokeStyle = cssColour("--grid");
    pen.fillStyle = cssColour("--muted");
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    yTicks.forEach((value, i) => {
      const py = Math.round(this.sy.at(value)) + 0.5;
      stroke(pen, [left, py], [right, py]);
      pen.fillText(yText[i], left - 6, py);
    });
    pen.textAlign = "center";
    pen.textBaseline = "top";
    const xTicks = this.sx.ticks((right - left) / 80);
    let free = 0;
    tickTexts(xTicks, x.text).forEach((text, i) => {
      const px = Math.round(this.sx.at(xTicks[i])) + 0.5;
      const half = pen.measureText(text).width / 2;
      stroke(pen, [px, 26], [px, bottom]);
      const centre = Math.min(px, this.width - half - 2);
      if (centre - half < free) return;
      free = centre + half + 8;
      pen.fillText(text, centre, bottom + 6);
    });
    pen.fillStyle = cssColour("--text");
    pen.textAlign = "right";
    pen.fillText(x.title, right, bottom + 23);
    pen.textAlign = "left";
    pen.fillText(y.title, 4, 6);
  }

  line(pen, s, width) {
    pen.strokeStyle = s.colour;
    pen.lineWidth = width;
    pen.setLineDash(s.dash ?? []);
    pen.beginPath();
    let broken = true;
    for (let i = 0; i < s.xs.length; i++) {
      if (!this.drawable(s, i)) {
        broken = true;
        continue;
      }
      const [px, py] = [this.sx.at(s.xs[i]), this.sy.at(s.ys[i])];
      broken ? pen.moveTo(px, py) : pen.lineTo(px, py);
      broken = false;
    }
    pen.stroke();
    pen.setLineDash([]);
    if (s.xs.length === 1 && !broken) this.mark(pen, s, 0, 3);
  }

  band(pen, s) {
    const points = s.xs.map((_, i) => i).filter((i) => this.drawable(s, i));
    pen.fillStyle = s.colour;
    pen.globalAlpha = 0.18;
    pen.beginPath();
    for (const i of points) pen.lineTo(this.sx.at(s.xs[i]), this.sy.at(s.high[i]));
    for (const i of points.reverse()) pen.lineTo(this.sx.at(s.xs[i]), this.sy.at(s.low[i]));
    pen.fill();
    pen.globalAlpha = 1;
  }

  dots(pen, s) {
    s.xs.forEach((_, i) => {
      if (!this.drawable(s, i)) return;
      if (s.errors?.[i]) {
        pen.strokeStyle = s.colour;
        pen.lineWidth = 1.5;
        const px = this.sx.at(s.xs[i]);
        stroke(pen, [px, this.sy.at(s.ys[i] - s.errors[i])], [px, this.sy.at(s.ys[i] + s.errors[i])]);
      }
      this.mark(pen, s, i, 5);
    });
  }

  mark(pen, s, i, size) {
    const [px, py] = [this.sx.at(s.xs[i]), this.sy.at(s.ys[i])];
    pen.beginPath();
    if (s.shape === "diamond") {
      pen.moveTo(px, py - size);
      pen.lineTo(px + size, py);
      pen.lineTo(px, py + size);
      pen.lineTo(px - size, py);
      pen.closePath();
    } else pen.arc(px, py, size, 0, 7);
    pen.lineWidth = 1.5;
    pen.strokeStyle = s.hollow ? s.colour : cssColour("--card");
    pen.fillStyle = s.hollow ? cssColour("--card") : s.colour;
    pen.fill();
    pen.stroke();
  }

  // Names beside points, each where there is room; those without room are read by pointing.
  labels(pen, series, box) {
    const taken = series.filter((s) => s.kind === "dots").flatMap((s) => s.xs.map((_, i) => {
      const [px, py] = [this.sx.at(s.xs[i]), this.sy.at(s.ys[i])];
      return [px - 5, py - 5, px + 5, py + 5];
    }));
    pen.textBaseline = "middle";
    pen.textAlign = "left";
        for (const s of series)
      (s.labels ?? []).forEach((text, i) => {
        if (!text || !this.drawable(s, i)) return;
        const [px, py] = [this.sx.at(s.xs[i]), this.sy.at(s.ys[i])];
        if (px < box.left || px > box.right || py < box.top || py > box.bottom) return;
        const w = pen.measureText(text).width;
        const places = [[px + 9, py], [px - 9 - w, py], [px - w / 2, py - 14], [px - w / 2, py + 14]];
        for (const [x, y] of places) {
          const rect = [x - 2, y - 7, x + w + 2, y + 7];
          if (rect[0] < box.left || rect[2] > box.right || rect[1] < box.top || rect[3] > box.bottom) continue;
          if (taken.some((other) => rect[0] < other[2] && rect[2] > other[0] && rect[1] < other[3] && rect[3] > other[1])) continue;
          taken.push(rect);
          pen.fillStyle = cssColour(s.hollow ? "--muted" : "--text");
          pen.fillText(text, x, y);
          return;
        }
      });
  }

  drawable(s, i) {
    const { x, y } = this.now;
    return s.xs[i] != null && s.ys[i] != null && (!x.log || s.xs[i] > 0) && (!y.log || s.ys[i] > 0);
  }

  // ------------------------------------------------------------------------------------------------ pointing, zooming

  place(event) {
    const box = this.top.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  press(event) {
    if (event.button !== 0) return;
    this.drag = { from: this.place(event), to: null };
    this.top.setPointerCapture(event.pointerId);
    this.find(this.place(event));
  }

  move(event) {
    const at = this.place(event);
    if (this.drag && Math.hypot(at[0] - this.drag.from[0], at[1] - this.drag.from[1]) > DRAG) this.drag.to = at;
    this.drag?.to ? this.overlay() : this.find(at);
  }

  release(event) {
    const drag = this.drag;
    this.drag = null;
    if (!drag?.to) return;
    const [[x0, y0], [x1, y1]] = [drag.from, this.place(event)];
    const wide = Math.abs(x1 - x0) > 2 * DRAG;
    const high = Math.abs(y1 - y0) > 2 * DRAG;
    const between = (scale, a, b) => [scale.back(a), scale.back(b)].sort((p, q) => p - q);
    const clamp = (scale, pixel) => Math.min(Math.max(pixel, Math.min(scale.from, scale.to)), Math.max(scale.from, scale.to));
    const range = (scale, use, a, b) => (use ? between(scale, clamp(scale, a), clamp(scale, b)) : [scale.low, scale.high]);
    if (wide || high) this.zoomTo([range(this.sx, wide, x0, x1), range(this.sy, high, y0, y1)]);
  }

  zoomTo(zoom) {
    this.zoom = zoom;
    this.near = null;
    this.draw();
  }

  // The nearest point of a series, within reach.
  find([x, y]) {
    let best = NEAR;
    this.near = null;
    for (const s of this.now.series) {
      if (s.quiet) continue;
      for (let i = 0; i < s.xs.length; i++) {
        if (!this.drawable(s, i)) continue;
        const dx = Math.abs(this.sx.at(s.xs[i]) - x);
        if (dx >= best) continue;
        const distance = Math.hypot(dx, this.sy.at(s.ys[i]) - y);
        if (distance < best) [best, this.near] = [distance, { s, i }];
      }
    }
    pointAt(this.near?.s.runs?.[this.near.i] ?? this.near?.s.run ?? null);
    this.overlay();
  }

  leave() {
    this.drag = null;
    this.near = null;
    pointAt(null);
    this.overlay();
  }

  // What lies above the plot: the run that is pointed at, the values, the frame of a zoom.
  overlay() {
    if (!this.now) return;
    const pen = this.pen(this.top);
    this.tip.hidden = true;
    pen.save();
    pen.beginPath();
    pen.rect(this.sx.from, this.sy.to, this.sx.to - this.sx.from, this.sy.from - this.sy.to);
    pen.clip();
    for (const s of this.now.series) {
      const one = s.run === state.hovered && state.hovered !== null;
      if (s.kind === "line" && (one || s === this.near?.s)) this.line(pen, { ...s, dash: [] }, 3.5);
      const i = s.runs?.indexOf(state.hovered) ?? -1;
      if (state.hovered !== null && i >= 0 && this.drawable(s, i)) this.mark(pen, s, i, 8);
    }
    if (this.drag?.to) this.frame(pen);
    pen.restore();
    if (this.near && !this.drag?.to) this.tell(pen);
  }

  frame(pen) {
    const [[x0, y0], [x1, y1]] = [this.drag.from, this.drag.to];
    const wide = Math.abs(x1 - x0) > 2 * DRAG;
    const high = Math.abs(y1 - y0) > 2 * DRAG;
    const [left, w] = wide ? [x0, x1 - x0] : [this.sx.from, this.sx.to - this.sx.from];
    const [up, h] = high ? [y0, y1 - y0] : [this.sy.to, this.sy.from - this.sy.to];
    pen.fillStyle = cssColour("--accent");
    pen.globalAlpha = 0.18;
    pen.fillRect(left, up, w, h);
    pen.globalAlpha = 1;
  }

  tell(pen) {
    const { s, i } = this.near;
    const [px, py] = [this.sx.at(s.xs[i]), this.sy.at(s.ys[i])];
    this.mark(pen, s, i, 6);
    const [head, ...rows] = this.now.describe(s, i);
    this.tip.replaceChildren(el("b", {}, head), ...rows.map((row) => el("div", {}, row)));
    this.tip.hidden = false;
    const [w, h] = [this.tip.offsetWidth, this.tip.offsetHeight];
    const left = px + 14 + w < this.width ? px + 14 : Math.max(0, px - 14 - w);
    this.tip.style.transform = `translate(${left}px, ${Math.max(0, Math.min(py - h / 2, this.height - h))}px)`;
  }
}

function stroke(pen, from, to) {
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
}

// All ticks of an axis with the same number of digits after the point, unless the axis has its own way.
function tickTexts(ticks, text) {
  if (text) return ticks.map(text);
  const size = Math.max(...ticks.map(Math.abs));
  if (size >= 1e4 || (size > 0 && size < 1e-3)) return ticks.map((value) => compact(value));
  const digits = Math.max(0, ...ticks.map((value) => (String(Number(value.toPrecision(8))).split(".")[1] ?? "").length));
  return ticks.map((value) => value.toFixed(Math.min(digits, 6)));
}
