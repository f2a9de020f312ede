// Map of the archive: points by WebGL, marks on a second canvas; the lasso is sent to the server as a polygon.
const SCORE_STOPS = [[62, 74, 94], [86, 148, 134], [217, 255, 227]]; // lowest, middle, highest score
const NO_SCORE = 255;
const CELLS = 256; // cells of the search grid along a side
const REACH = 12; // CSS pixels between the pointer and a point under it
const MAX_CORNERS = 100;
const REST_MS = 60; // a moving pointer passes many points
const LIMITS = [0.5, 400];
const DIGITS = 1e4;
const VERTEX = `
  attribute vec2 place; attribute vec4 colour; attribute float size;
  uniform vec2 centre; uniform vec2 scale; uniform float grow;
  varying vec4 fill; varying float bold;
  void main() {
    gl_Position = vec4((place - centre) * scale, 0.0, 1.0);
    gl_PointSize = size * grow; fill = colour; bold = step(1.4, size);
  }`;
const FRAGMENT = `
  precision mediump float; varying vec4 fill; varying float bold;
  void main() {
    float away = 2.0 * length(gl_PointCoord - 0.5);
    float alpha = fill.a * (1.0 - smoothstep(0.8, 1.0, away));
    gl_FragColor = vec4(mix(fill.rgb, vec3(0.04), bold * smoothstep(0.6, 0.7, away)) * alpha, alpha);
  }`;

export default {
  template: `
    <section class="am-map" aria-label="Map of the archive" data-testid="archive-map">
      <div class="am-map-bar" role="toolbar" aria-label="Map">
        <button class="am-key" :aria-pressed="lassoing" aria-label="lasso: draw around points to select them"
                title="Draw around points to select them (or Shift + drag)" data-testid="map-lasso"
                :class="{ 'am-on': lassoing }" @click="lassoing = !lassoing">lasso</button>
        <button class="am-key" aria-label="zoom out" data-testid="map-out" @click="by(1 / 1.6)">−</button>
        <button class="am-key" aria-label="show the whole map" data-testid="map-fit" @click="fit">fit</button>
        <button class="am-key" aria-label="zoom in" data-testid="map-in" @click="by(1.6)">+</button>
        <span class="am-hint am-grow" data-testid="map-state">{{ text }}</span>
        <button v-if="area.length" class="am-key" aria-label="remove the selection" data-testid="map-clear"
                @click="$emit('area', { corners: [] })">✕ selection</button>
        <button class="am-key" aria-label="close the map (m)" data-testid="map-close" @click="$emit('shut')">✕</button>
      </div>
      <div ref="stage" class="am-map-stage" :class="{ 'am-lassoing': lassoing, 'am-over-point': near >= 0 }"
           data-testid="map-stage" @wheel.prevent="wheel" @pointerdown="down" @pointermove="move" @pointerup="up"
           @pointercancel="cancel" @pointerleave="leave">
        <canvas ref="points" role="img" :aria-label="spoken" data-testid="map-points"></canvas>
        <canvas ref="marks" aria-hidden="true"></canvas>
        <div v-if="!count" class="am-empty am-map-message" data-testid="map-message">{{ problem || message }}</div>
        <div v-if="card" class="am-map-card" :style="card.style" data-testid="map-card" :data-id="card.id">
          <img alt="" :src="card.src"><b>{{ card.id }}</b><span>{{ card.text }}</span></div>
        <div v-if="count" class="am-map-legend" aria-hidden="true">
          <span>score 0</span><i class="am-map-scale" :style="{ background: gradient }"></i><span>1</span>
          <span v-for="(shape, label) in shapes" :key="label" :class="'am-' + label"><i class="am-map-dot"></i>{{ label
          }}</span></div>
      </div>
    </section>`,
  props: {
    points: Object, // version and total number of images in the archive; null before the map is ready
    message: String, // shown while there are no points
    serial: Number, // changes when scores or labels have changed
    area: Array, // corners of the selection
    page: Object, // number on the map of the images in the gallery, by id
    shapes: Object,
    veil: String, // words for the server on what is hidden
    thumbs: String, // version of the images, for the browser's cache
  },
  data() {
    return { count: 0, lassoing: false, card: null, near: -1, problem: "", selected: 0 };
  },
  computed: {
    gradient() { return `linear-gradient(to right, ${SCORE_STOPS.map((stop) => `rgb(${stop})`)})`; },
    text() {
      if (!this.count) return "";
      const number = this.count.toLocaleString("en");
      const all = this.points.total === this.count ? `${number} images` :
        `a sample of ${number} of ${this.points.total.toLocaleString("en")} images`;
      return this.area.length ? `${this.selected.toLocaleString("en")} selected of ${number}` : all;
    },
    spoken() { return `Map of ${this.text}: similar images lie close together`; },
  },
  watch: {
    points: { handler: "load", deep: true },
    serial() { this.colour(); },
    veil() { this.colour(); },
    area() { this.count_selected(); this.draw(); },
    page() { this.draw(); },
  },
  created() { // not reactive: they change with every frame
    Object.assign(this, { places: null, looks: null, centre: [0, 0], zoom: 1, fingers: new Map(), path: null });
    this.frame = this.timer = 0;
    this.cursor = { cursor: "", chosen: [] };
  },
  mounted() {
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.$refs.stage);
    document.addEventListener("am-cursor", this.follow);
    this.$refs.points.addEventListener("webglcontextlost", this.lost);
    this.$refs.points.addEventListener("webglcontextrestored", this.restored);
    const tile = document.querySelector(".am-tile.am-cursor");
    if (tile) this.cursor = { cursor: tile.dataset.id, chosen: [] };
    this.load();
  },
  unmounted() {
    this.observer.disconnect();
    document.removeEventListener("am-cursor", this.follow);
    cancelAnimationFrame(this.frame);
    clearTimeout(this.timer);
  },
  methods: {
    async load() {
      if (!this.points || this.version === this.points.version) return;
      const version = this.points.version;
      const places = await this.fetched("/map", Float32Array);
      if (!places || version !== this.points?.version) return;
      [this.version, this.places] = [version, places];
      if (!this.start()) return void (this.problem = "This browser has no WebGL, which the map needs.");
      this.index();
      this.count = places.length / 2;
      this.count_selected();
      this.fit();
      this.resize();
      this.colour();
    },
    async fetched(path, kind) {
      try {
        const answer = await fetch(`${window.path_prefix || ""}${path}`);
        return answer.ok ? new kind(await answer.arrayBuffer()) : null;
      } catch { return null; } // the server is away: the next change tries again
    },
    start() {
      const gl = this.gl = this.$refs.points.getContext("webgl", { antialias: false, premultipliedAlpha: true });
      if (!gl) return false;
      const program = gl.createProgram();
      for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
        const shader = gl.createShader(kind);
        gl.shaderSource(shader, text);
        gl.compileShader(shader);
        gl.attachShader(program, shader);
      }
      gl.linkProgram(program);
      if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return false;
      gl.useProgram(program);
      this.slots = Object.fromEntries(["place", "colour", "size"].map((name) => [name, gl.getAttribLocation(program, name)]));
      this.uniforms = Object.fromEntries(["centre", "scale", "grow"].map((name) => [name, gl.getUniformLocation(program, name)]));
      this.buffers = { place: gl.createBuffer(), colour: gl.createBuffer(), size: gl.createBuffer() };
      gl.enable(gl.BLEND);
      gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
      return true;
    },
    lost(event) { event.preventDefault(); },
    restored() { if (this.start()) this.paint(); },
    // Points by cell of a grid, for the search under the pointer.
    index() {
      const count = this.places.length / 2;
      this.cells = new Uint32Array(CELLS * CELLS + 1);
      const own = new Uint32Array(count);
      for (let i = 0; i < count; i++) {
        own[i] = this.cell(this.places[2 * i + 1]) * CELLS + this.cell(this.places[2 * i]);
        this.cells[own[i] + 1]++;
      }
      for (let c = 0; c < CELLS * CELLS; c++) this.cells[c + 1] += this.cells[c];
      const next = this.cells.slice();
      this.members = new Uint32Array(count);
      for (let i = 0; i < count; i++) this.members[next[own[i]]++] = i;
    },
    cell(value) { return Math.max(0, Math.min(CELLS - 1, Math.floor(((value + 1) / 2) * CELLS))); },
    async colour() {
      if (!this.places || this.isFetching) return void (this.isStale = Boolean(this.places));
      this.isFetching = true;
      const looks = await this.fetched("/map/marks?" + this.veil, Uint8Array);
      this.isFetching = false;
      if (looks?.length === this.places.length) this.looks = looks;
      this.paint();
      if (this.isStale) {
        this.isStale = false;
        this.colour();
      }
    },
    // Fill the buffers: lowest scores first, labelled images last, so that these are on top.
    paint() {
      const [gl, count] = [this.gl, this.places.length / 2];
      if (!gl) return;
      const style = getComputedStyle(this.$el);
      const labels = Object.keys(this.shapes).map((label) => hex(style.getPropertyValue("--" + label)));
      const looks = this.looks || new Uint8Array(2 * count).fill(NO_SCORE, 0, count);
      const order = sorted(count, (i) => (looks[count + i] ? 256 : looks[i] === NO_SCORE ? 0 : looks[i] + 1));
      const places = new Float32Array(2 * count);
      const [colours, sizes] = [new Uint8Array(4 * count), new Float32Array(count)];
      for (let k = 0; k < count; k++) {
        const [i, code] = [order[k], looks[count + order[k]]];
        places[2 * k] = this.places[2 * i];
        places[2 * k + 1] = this.places[2 * i + 1];
        const colour = code ? labels[code - 1] : RAMP[looks[i] === NO_SCORE ? 64 : looks[i]];
        colours.set(colour, 4 * k);
        colours[4 * k + 3] = code ? 255 : 215;
        sizes[k] = code ? 2 : 1 + 0.3 * (looks[i] === NO_SCORE ? 0 : looks[i] / 254);
      }
      for (const [name, data] of [["place", places], ["colour", colours], ["size", sizes]]) {
        gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
        gl.bufferData(gl.ARRAY_BUFFER, data, gl.DYNAMIC_DRAW);
      }
      this.draw();
    },
    resize() {
      const { clientWidth: width, clientHeight: height } = this.$refs.stage;
      const ratio = window.devicePixelRatio || 1;
      for (const canvas of [this.$refs.points, this.$refs.marks]) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
      }
      [this.width, this.height, this.ratio] = [width, height, ratio];
      this.redraw(); // at once: a changed canvas is empty
    },
    draw() {
      if (!this.frame) this.frame = requestAnimationFrame(() => this.redraw());
    },
    redraw() {
      cancelAnimationFrame(this.frame);
      this.frame = 0;
      const gl = this.gl;
      if (!gl || !this.places || !this.width || !this.height) return;
      gl.viewport(0, 0, this.$refs.points.width, this.$refs.points.height);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT);
      const unit = this.unit();
      gl.uniform2f(this.uniforms.centre, ...this.centre);
      gl.uniform2f(this.uniforms.scale, (2 * unit) / this.width, (2 * unit) / this.height);
      gl.uniform1f(this.uniforms.grow, this.side() * this.ratio);
      const kinds = { place: [2, gl.FLOAT, false], colour: [4, gl.UNSIGNED_BYTE, true], size: [1, gl.FLOAT, false] };
      for (const [name, kind] of Object.entries(kinds)) {
        gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
        gl.enableVertexAttribArray(this.slots[name]);
        gl.vertexAttribPointer(this.slots[name], ...kind, 0, 0);
      }
      gl.drawArrays(gl.POINTS, 0, this.places.length / 2);
      this.mark();
    },
    // CSS pixels of a point: small in a crowd, larger as one zooms in.
    side() {
      const base = Math.max(2.2, Math.min(7, (0.5 * Math.min(this.width, this.height)) / Math.sqrt(this.places.length / 2)));
      return base * Math.min(3, Math.sqrt(this.zoom));
    },
    unit() { return 0.46 * Math.min(this.width, this.height) * this.zoom; }, // CSS pixels of one unit of the map
    onScreen([x, y]) {
      return [this.width / 2 + (x - this.centre[0]) * this.unit(), this.height / 2 - (y - this.centre[1]) * this.unit()];
    },
    onMap([across, down]) {
      return [this.centre[0] + (across - this.width / 2) / this.unit(), this.centre[1] - (down - this.height / 2) / this.unit()];
    },
    place(number) { return [this.places[2 * number], this.places[2 * number + 1]]; },
    mark() {
      const pen = this.$refs.marks.getContext("2d");
      pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
      pen.clearRect(0, 0, this.width, this.height);
      const radius = this.side() / 2 + 2.5;
      const ring = (number, size, colour, width) => {
        if (number === undefined) return;
        pen.beginPath();
        pen.arc(...this.onScreen(this.place(number)), size, 0, 2 * Math.PI);
        [pen.lineWidth, pen.strokeStyle] = [width, colour];
        pen.stroke();
      };
      for (const number of Object.values(this.page)) ring(number, radius, "#ffffff73", 1);
      for (const id of this.cursor.chosen) ring(this.page[id], radius + 1, "#7aa5f7", 2.5);
      ring(this.page[this.cursor.cursor], radius + 4, "#0b0d10", 6);
      ring(this.page[this.cursor.cursor], radius + 4, "#ffffff", 2.5);
      if (this.near >= 0) ring(this.near, radius + 1, "#ffffff", 2);
      for (const corners of [this.area.map((corner) => this.onScreen(corner)), this.path || []]) {
        if (corners.length < 2) continue;
        pen.beginPath();
        corners.forEach((corner) => pen.lineTo(...corner));
        pen.closePath();
        [pen.lineWidth, pen.strokeStyle, pen.fillStyle] = [1.5, "#7aa5f7", "#7aa5f722"];
        pen.fill();
        pen.stroke();
      }
    },
    follow(event) {
      this.cursor = event.detail;
      this.draw();
    },
    fit() {
      [this.centre, this.zoom] = [[0, 0], 1];
      this.draw();
    },
    // Zoom around a point of the screen, by default the middle.
    by(factor, at = [this.width / 2, this.height / 2]) {
      const before = this.onMap(at);
      this.zoom = Math.max(LIMITS[0], Math.min(LIMITS[1], this.zoom * factor));
      const after = this.onMap(at);
      this.centre = this.centre.map((value, axis) => value + before[axis] - after[axis]);
      this.draw();
    },
    at(event) {
      const box = this.$refs.stage.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    },
    wheel(event) {
      this.by(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), this.at(event));
    },
    down(event) {
      if (!this.count || event.button > 0) return;
      this.$refs.stage.setPointerCapture(event.pointerId);
      this.fingers.set(event.pointerId, this.at(event));
      this.moved = 0;
      this.path = (this.lassoing || event.shiftKey) && this.fingers.size === 1 ? [this.at(event)] : null;
      if (this.fingers.size > 1) this.moved = Infinity; // two fingers never open an image
    },
    move(event) {
      const [now, before] = [this.at(event), this.fingers.get(event.pointerId)];
      if (!before) return this.hover(now);
      const step = [now[0] - before[0], now[1] - before[1]];
      this.moved += Math.hypot(...step);
      if (this.moved > 4) this.forget();
      if (this.fingers.size === 2) {
        const other = [...this.fingers].find(([id]) => id !== event.pointerId)[1];
        const apart = (one) => Math.max(1, Math.hypot(one[0] - other[0], one[1] - other[1]));
        this.by(apart(now) / apart(before), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
      } else if (this.path) {
        const last = this.path.at(-1);
        if (Math.hypot(now[0] - last[0], now[1] - last[1]) > 3) this.path.push(now);
      } else if (this.moved > 4) {
        this.centre = [this.centre[0] - step[0] / this.unit(), this.centre[1] + step[1] / this.unit()];
      }
      this.fingers.set(event.pointerId, now);
      this.draw();
    },
    up(event) {
      if (!this.fingers.delete(event.pointerId)) return;
      const path = this.path;
      this.path = null;
      if (path && this.moved > 12 && path.length > 2) {
        const round = (value) => Math.round(value * DIGITS) / DIGITS;
        this.$emit("area", { corners: thinned(path).map((corner) => this.onMap(corner).map(round)) });
      } else if (this.moved <= 4) {
        const number = this.under(this.at(event));
        if (number >= 0) this.look(number);
      }
      this.draw();
    },
    cancel(event) {
      this.fingers.delete(event.pointerId);
      this.path = null;
      this.draw();
    },
    leave() { if (!this.fingers.size) this.forget(); },
    forget() {
      clearTimeout(this.timer);
      if (this.near >= 0) this.draw();
      [this.near, this.card] = [-1, null];
    },
    // The point nearest to a point of the screen, within reach; -1 if there is none.
    under(at) {
      const [[left, top], [right, bottom]] = [this.onMap([at[0] - REACH, at[1] - REACH]), this.onMap([at[0] + REACH, at[1] + REACH])];
      let [best, least] = [-1, REACH * REACH];
      for (let row = this.cell(bottom); row <= this.cell(top); row++) {
        for (let k = this.cells[row * CELLS + this.cell(left)]; k < this.cells[row * CELLS + this.cell(right) + 1]; k++) {
          const [across, down] = this.onScreen(this.place(this.members[k]));
          const square = (across - at[0]) ** 2 + (down - at[1]) ** 2;
          if (square < least) [best, least] = [this.members[k], square];
        }
      }
      return best;
    },
    hover(at) {
      if (!this.count) return;
      const number = this.under(at);
      if (number === this.near) return;
      this.forget();
      this.near = number;
      this.draw();
      if (number >= 0) this.timer = setTimeout(() => this.show(number, at), REST_MS);
    },
    async tile(number) {
      try {
        const query = new URLSearchParams({ number, version: this.version });
        const answer = await fetch(`${window.path_prefix || ""}/map/tile?${query}&${this.veil}`);
        return answer.ok ? await answer.json() : null;
      } catch { return null; }
    },
    async look(number) {
      const tile = await this.tile(number);
      if (tile) this.$emit("look", { id: tile.id });
    },
    async show(number, at) {
      const tile = await this.tile(number);
      if (!tile || number !== this.near) return;
      const words = tile.rank ? [`rank ${tile.rank.toLocaleString("en")}`] : [];
      if (tile.score !== null) words.push(`score ${tile.score.toFixed(3)}`);
      words.push(tile.label || "no label");
      const style = { [at[0] > this.width / 2 ? "right" : "left"]: `${(at[0] > this.width / 2 ? this.width - at[0] : at[0]) + 14}px` };
      style[at[1] > this.height / 2 ? "bottom" : "top"] = `${(at[1] > this.height / 2 ? this.height - at[1] : at[1]) + 8}px`;
      const query = new URLSearchParams({ id: tile.id, side: 192, v: this.thumbs });
      this.card = { id: tile.id, text: words.join(" · "), src: `${window.path_prefix || ""}/thumb?${query}`, style };
    },
    // Even-odd rule, as on the server.
    count_selected() {
      const corners = this.area;
      this.selected = 0;
      if (!this.places || !corners.length) return;
      for (let i = 0; i < this.places.length / 2; i++) {
        const [x, y] = this.place(i);
        let isInside = false;
        for (let k = 0; k < corners.length; k++) {
          const [[x1, y1], [x2, y2]] = [corners[k], corners[(k + 1) % corners.length]];
          if (y1 > y !== y2 > y && x < x1 + ((y - y1) * (x2 - x1)) / (y2 - y1)) isInside = !isInside;
        }
        this.selected += isInside;
      }
    },
  },
};

const RAMP = Array.from({ length: 255 }, (_, score) => {
  const at = (score / 254) * (SCORE_STOPS.length - 1);
  const k = Math.min(Math.floor(at), SCORE_STOPS.length - 2);
  return [0, 1, 2].map((c) => SCORE_STOPS[k][c] + (at - k) * (SCORE_STOPS[k + 1][c] - SCORE_STOPS[k][c]));
});

function hex(text) {
  const number = parseInt(text.trim().slice(1), 16);
  return [number >> 16, (number >> 8) & 255, number & 255];
}

// The numbers 0 to count - 1, by keys from 0 to 256.
function sorted(count, key) {
  const starts = new Uint32Array(258);
  for (let i = 0; i < count; i++) starts[key(i) + 1]++;
  for (let k = 0; k < 257; k++) starts[k + 1] += starts[k];
  const order = new Uint32Array(count);
  for (let i = 0; i < count; i++) order[starts[key(i)]++] = i;
  return order;
}

function thinned(path) {
  const step = Math.ceil(path.length / MAX_CORNERS);
  return path.filter((_, k) => k % step === 0);
}
