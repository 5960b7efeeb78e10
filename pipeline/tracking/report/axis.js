// Axes: values to pixels and back, and ticks at round values.

class Scale {
  // domain: [low, high] of values; range: [from, to] in pixels.
  constructor(domain, range, log = false) {
    this.log = log;
    [this.low, this.high] = domain;
    [this.from, this.to] = range;
    this.a = log ? Math.log10(this.low) : this.low;
    this.span = (log ? Math.log10(this.high) : this.high) - this.a || 1;
  }

  at(value) {
    return this.from + (((this.log ? Math.log10(value) : value) - this.a) / this.span) * (this.to - this.from);
  }

  back(pixel) {
    const value = this.a + ((pixel - this.from) / (this.to - this.from)) * this.span;
    return this.log ? 10 ** value : value;
  }

  // About `count` round values; on a log axis of several decades 1, 2 and 5 of each, or powers of ten.
  ticks(count) {
    if (!this.log || this.span < 0.6) return roundTicks(this.low, this.high, count);
    const steps = this.span <= 3 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil((this.span * steps.length) / (2 * count)));
    const found = [];
    for (let decade = Math.floor(this.a); decade <= Math.ceil(this.a + this.span); decade += every)
      for (const step of steps) found.push(step * 10 ** decade);
    return found.filter((value) => value >= this.low * 0.9999 && value <= this.high * 1.0001);
  }
}

function roundTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = size * ([1, 2, 5].find((factor) => factor * size >= raw) ?? 10);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Lowest and highest of the values with some room; a log axis takes the positive ones.
function extent(values, log, room = 0.04) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value == null || (log && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return log ? [1, 10] : [0, 1];
  if (log) {
    const factor = Math.max((high / low) ** room, 1.05);
    return [low / factor, high * factor];
  }
  const margin = (high - low) * room || Math.abs(high) * 0.1 || 1;
  return [low - margin, high + margin];
}
