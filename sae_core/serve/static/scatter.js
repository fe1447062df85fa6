// A scatter plot of up to some millions of points in WebGL 2, without dependencies.
//
// Points lie in a fixed shuffled order on the graphics card, so that any first part of them is a fair sample. A frame
// draws as many as it has time for, and the next frames go on from there: moving stays smooth with any number.

const VERTEX = `#version 300 es
in vec2 place;
in vec4 color;
uniform vec2 center, scale;
uniform float size, alpha;
out vec4 tint;
void main() {
  gl_Position = vec4((place - center) * scale, 0.0, 1.0);
  gl_PointSize = size;
  tint = vec4(color.rgb, 1.0) * color.a * alpha;
}`;

const FRAGMENT = `#version 300 es
precision mediump float;
in vec4 tint;
out vec4 color;
void main() {
  float away = length(gl_PointCoord - 0.5) * 2.0;
  color = tint * (1.0 - smoothstep(0.75, 1.0, away));
  if (color.a == 0.0) discard;
}`;

const SLOW = 40, FAST = 20; // milliseconds a frame
const LEAST = 20_000; // points a frame

export class Scatter {
  /** Points at x, y (Float32Arrays), on a canvas. `onDraw` is called after each new view is drawn for the first time. */
  constructor(canvas, x, y, onDraw) {
    Object.assign(this, { canvas, x, y, onDraw, n: x.length });
    this.gl = canvas.getContext("webgl2", { antialias: false, preserveDrawingBuffer: true, premultipliedAlpha: true });
    if (!this.gl) throw new Error("this browser has no WebGL 2");
    this.bounds = bounds(x, y);
    this.front = new Uint32Array(); // rows drawn last and larger
    this.drawn = 0;
    this.part = 100_000;
    this.grid = makeGrid(x, y, this.bounds);
    this.#upload();
    this.home();
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => { this.#upload(); this.colors(this.tints); });
  }

  /** The whole of the points, with a margin. */
  home() {
    const { left, right, bottom, top } = this.bounds;
    this.whole = { x: (left + right) / 2, y: (bottom + top) / 2, zoom: 1 };
    this.view = { ...this.whole };
  }

  get isHome() {
    return Object.keys(this.whole).every((key) => this.view[key] === this.whole[key]);
  }

  /** Pixels (of the style sheet) a unit of the data. */
  get scale() {
    const { left, right, bottom, top } = this.bounds;
    const { clientWidth: w, clientHeight: h } = this.canvas;
    return 0.92 * this.view.zoom * Math.min(w / (right - left), h / (top - bottom));
  }

  toScreen(x, y) {
    const s = this.scale;
    return [this.canvas.clientWidth / 2 + (x - this.view.x) * s, this.canvas.clientHeight / 2 - (y - this.view.y) * s];
  }

  toData(left, top) {
    const s = this.scale;
    return [this.view.x + (left - this.canvas.clientWidth / 2) / s, this.view.y - (top - this.canvas.clientHeight / 2) / s];
  }

  /** Move by pixels. */
  pan(right, down) {
    const s = this.scale;
    this.view.x -= right / s;
    this.view.y += down / s;
    this.redraw();
  }

  /** Zoom by a factor; what lies under the pixel stays there. */
  zoom(factor, left = this.canvas.clientWidth / 2, top = this.canvas.clientHeight / 2) {
    const [x, y] = this.toData(left, top);
    this.view.zoom = Math.min(Math.max(this.view.zoom * factor, 0.5), 5000);
    const [nowX, nowY] = this.toData(left, top);
    this.view.x += x - nowX;
    this.view.y += y - nowY;
    this.redraw();
  }

  /** Colors: one RGBA in a Uint32 (little-endian) for each row. */
  colors(tints) {
    this.tints = tints;
    const slots = new Uint32Array(this.n);
    for (let k = 0; k < this.n; k++) slots[k] = tints[this.#row(k)];
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.tintBuffer);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, slots, this.gl.STATIC_DRAW);
    this.redraw();
  }

  /** Draw these rows last and larger. */
  highlight(rows) {
    const places = new Float32Array(rows.length * 2), tints = new Uint32Array(rows.length);
    rows.forEach((row, i) => { places.set([this.x[row], this.y[row]], 2 * i); tints[i] = this.tints[row] | 0xff000000; });
    const gl = this.gl;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.frontPlaces);
    gl.bufferData(gl.ARRAY_BUFFER, places, gl.STATIC_DRAW);
    gl.bindBuffer(gl.ARRAY_BUFFER, this.frontTints);
    gl.bufferData(gl.ARRAY_BUFFER, tints, gl.STATIC_DRAW);
    this.front = Uint32Array.from(rows);
    this.redraw();
  }

  /** Begin again with this view at the next frame. */
  redraw() {
    this.drawn = 0;
    this.fresh = true;
    this.frame ??= requestAnimationFrame((now) => this.#step(now));
  }

  /** The row nearest to a pixel, or -1 when none is within `reach` pixels. */
  pick(left, top, reach = 12) {
    const [x, y] = this.toData(left, top), far = reach / this.scale;
    let best = -1, least = far * far;
    this.each(x - far, x + far, y - far, y + far, (row) => {
      const d = (this.x[row] - x) ** 2 + (this.y[row] - y) ** 2;
      if (d <= least) { best = row; least = d; }
    });
    return best;
  }

  /** Rows inside a polygon of [x, y] in data units (even-odd rule). */
  inside(polygon) {
    const found = [], xs = polygon.map((p) => p[0]), ys = polygon.map((p) => p[1]);
    const reduce = (f, list) => list.reduce((a, b) => f(a, b));
    this.each(reduce(Math.min, xs), reduce(Math.max, xs), reduce(Math.min, ys), reduce(Math.max, ys), (row) => {
      let odd = false;
      for (let i = 0, j = xs.length - 1; i < xs.length; j = i++) {
        const crosses = ys[i] > this.y[row] !== ys[j] > this.y[row];
        if (crosses && this.x[row] < ((xs[j] - xs[i]) * (this.y[row] - ys[i])) / (ys[j] - ys[i]) + xs[i]) odd = !odd;
      }
      if (odd) found.push(row);
    });
    return found;
  }

  /** Rows in view; null when there are more than `most`. */
  inView(most) {
    const [left, top] = this.toData(0, 0), [right, bottom] = this.toData(this.canvas.clientWidth, this.canvas.clientHeight);
    const found = [];
    const whole = this.each(left, right, bottom, top, (row) => found.push(row) <= most);
    return whole ? found : null;
  }

  /** Call `visit` with each row in a rectangle, until it answers false; says whether all were visited. */
  each(left, right, bottom, top, visit) {
    const { cells, starts, rows, column, line } = this.grid;
    const first = column(left), last = column(right);
    for (let b = line(bottom), stop = line(top); b <= stop; b++) {
      for (let i = starts[b * cells + first], end = starts[b * cells + last + 1]; i < end; i++) {
        const row = rows[i], x = this.x[row], y = this.y[row];
        if (x >= left && x <= right && y >= bottom && y <= top && visit(row) === false) return false;
      }
    }
    return true;
  }

  #row(slot) {
    return (slot * this.stride) % this.n;
  }

  #upload() {
    const gl = this.gl;
    this.stride = coprime(this.n);
    this.uniforms = program(gl);
    const places = new Float32Array(this.n * 2);
    for (let k = 0; k < this.n; k++) {
      places[2 * k] = this.x[this.#row(k)];
      places[2 * k + 1] = this.y[this.#row(k)];
    }
    this.placeBuffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, this.placeBuffer);
    gl.bufferData(gl.ARRAY_BUFFER, places, gl.STATIC_DRAW);
    [this.tintBuffer, this.frontPlaces, this.frontTints] = [gl.createBuffer(), gl.createBuffer(), gl.createBuffer()];
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  #step(now) {
    this.frame = null;
    const gap = now - (this.lastStep ?? 0);
    if (gap < 1000) this.part = Math.min(Math.max(gap > SLOW ? this.part / 2 : gap < FAST ? this.part * 1.3 : this.part, LEAST), this.n);
    this.lastStep = now;
    if (this.fresh) this.#clear();
    const end = Math.min(Math.round(this.drawn + this.part), this.n);
    this.#points(this.placeBuffer, this.tintBuffer, this.drawn, end - this.drawn, 1);
    this.drawn = end;
    if (end < this.n) this.frame = requestAnimationFrame((next) => this.#step(next));
    if (this.front.length) this.#points(this.frontPlaces, this.frontTints, 0, this.front.length, 1.8);
    if (this.fresh) { this.fresh = false; this.onDraw(); }
  }

  #clear() {
    const gl = this.gl, ratio = devicePixelRatio || 1;
    const width = Math.round(this.canvas.clientWidth * ratio), height = Math.round(this.canvas.clientHeight * ratio);
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
  }

  #points(places, tints, first, count, larger) {
    const gl = this.gl, { clientWidth: w, clientHeight: h } = this.canvas, s = this.scale;
    const size = Math.min(Math.max(0.62 * Math.sqrt((w * h) / this.n) * this.view.zoom ** 0.4, 1.6), 9) * larger;
    gl.uniform2f(this.uniforms.center, this.view.x, this.view.y);
    gl.uniform2f(this.uniforms.scale, (2 * s) / w, (2 * s) / h);
    gl.uniform1f(this.uniforms.size, Math.max(size, larger > 1 ? 6 : 0) * (devicePixelRatio || 1));
    gl.uniform1f(this.uniforms.alpha, larger > 1 ? 1 : size < 2.5 ? 0.6 : 0.85);
    attribute(gl, 0, places, 2, gl.FLOAT, false);
    attribute(gl, 1, tints, 4, gl.UNSIGNED_BYTE, true);
    gl.drawArrays(gl.POINTS, first, count);
  }
}

function bounds(x, y) {
  const found = { left: Infinity, right: -Infinity, bottom: Infinity, top: -Infinity };
  for (let i = 0; i < x.length; i++) {
    if (x[i] < found.left) found.left = x[i];
    if (x[i] > found.right) found.right = x[i];
    if (y[i] < found.bottom) found.bottom = y[i];
    if (y[i] > found.top) found.top = y[i];
  }
  if (!(found.right > found.left)) { found.left -= 1; found.right += 1; }
  if (!(found.top > found.bottom)) { found.bottom -= 1; found.top += 1; }
  return found;
}

/** Rows by square of a grid over the bounds (counting sort): what is near is found without looking at the rest. */
function makeGrid(x, y, { left, right, bottom, top }) {
  const cells = Math.min(Math.max(Math.ceil(Math.sqrt(x.length / 4)), 1), 512);
  const clamp = (i) => Math.min(Math.max(Math.floor(i), 0), cells - 1);
  const column = (at) => clamp(((at - left) / (right - left)) * cells), line = (at) => clamp(((at - bottom) / (top - bottom)) * cells);
  const starts = new Uint32Array(cells * cells + 1), rows = new Uint32Array(x.length), cell = new Uint32Array(x.length);
  for (let i = 0; i < x.length; i++) starts[(cell[i] = line(y[i]) * cells + column(x[i])) + 1]++;
  for (let i = 1; i < starts.length; i++) starts[i] += starts[i - 1];
  const next = starts.slice();
  for (let i = 0; i < x.length; i++) rows[next[cell[i]]++] = i;
  return { cells, starts, rows, column, line };
}

/** A stride near the golden part of n without a common divisor: steps of it visit every row once, evenly spread. */
function coprime(n) {
  const divisor = (a, b) => (b ? divisor(b, a % b) : a);
  let stride = Math.max(Math.round(n * 0.618), 1);
  while (divisor(stride, n) !== 1) stride++;
  return stride;
}

function program(gl) {
  const made = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  gl.bindAttribLocation(made, 0, "place");
  gl.bindAttribLocation(made, 1, "color");
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS) && !gl.isContextLost()) throw new Error(gl.getProgramInfoLog(made));
  gl.useProgram(made);
  return Object.fromEntries(["center", "scale", "size", "alpha"].map((name) => [name, gl.getUniformLocation(made, name)]));
}

function attribute(gl, at, buffer, size, kind, normalized) {
  gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
  gl.enableVertexAttribArray(at);
  gl.vertexAttribPointer(at, size, kind, normalized, 0, 0);
}
