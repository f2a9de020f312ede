// Images with a common zoom; brightness and contrast are CSS filters.
const LIMITS = [0.5, 40]; // smallest and largest zoom, where 1 fits the image into its pane
// Kept from image to image and while the large view is closed. The zoom is in screen pixels for each pixel of the image;
// null fits each image into its pane.
const BAR = 120; // longest scale bar in CSS pixels
const LENGTHS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000]; // arcsec
const BLINK_MS = 300; // shortest time for which a held key shows a stretch
const kept = { zoom: null, brightness: 1, contrast: 1, serial: 0 };

export default {
  template: `
    <div class="am-zoom" data-testid="zoom">
      <div ref="stage" class="am-stage" :class="{ 'am-many': panes.length > 1 }"
           :style="{ '--across': Math.ceil(Math.sqrt(panes.length)) }" data-testid="stage" @wheel.prevent="wheel"
           @pointerdown="down" @pointermove="drag" @pointerup="up" @pointercancel="up" @dblclick="reset">
        <figure v-for="(pane, place) in panes" :key="panes.length > 1 ? pane.name : place" class="am-pane" :data-name="pane.name"
                :class="{ 'am-at': several && pane.name === marked }" :aria-current="several && pane.name === marked"
                :data-label="pane.label" data-testid="pane">
          <div v-if="broken[pane.src]" class="am-broken">{{ broken[pane.src] }}</div>
          <img v-else :src="prefix + pane.src" :alt="pane.alt" draggable="false" :style="look(pane)" data-testid="full"
               :class="{ 'am-pixels': factor(pane) > 4 }" @load="loaded(pane, $event)" @error="fail(pane)">
          <figcaption v-if="panes.length > 1">
            <button class="am-plain" :title="pane.name" @click="$emit('pick', pane.name)">{{ pane.name }}</button>
            <span v-if="pane.text" :class="pane.label ? 'am-' + pane.label : ''">{{ pane.text }}</span></figcaption>
        </figure>
      </div>
      <div v-if="bar" class="am-compass" data-testid="compass" aria-hidden="true">
        <svg viewBox="-32 -32 64 64"><g v-for="(turn, name) in { N: sky.north, E: sky.east }" :key="name"
          :transform="'rotate(' + turn + ')'"><path d="M0 0V-18M-3 -14L0 -18L3 -14"/>
          <text y="-24" :transform="'rotate(' + -turn + ' 0 -24)'">{{ name }}</text></g></svg>
        <div class="am-bar" :style="{ width: bar.width + 'px' }" data-testid="scale-bar">{{ bar.text }}</div>
      </div>
      <output v-if="pixel" class="am-pixel" aria-label="value under the pointer" data-testid="pixel">{{ pixel }}</output>
      <div class="am-lens" role="toolbar" aria-label="Zoom and light" @pointerdown.stop>
        <button class="am-key" aria-label="zoom out (-)" data-testid="zoom-out" @click="by(1 / 1.4)">−</button>
        <button class="am-key am-scale" aria-label="fit (0)" data-testid="zoom-fit" @click="reset">
          {{ scale ? Math.round(scale * 100) + " %" : "–" }}</button>
        <button class="am-key" aria-label="zoom in (+)" data-testid="zoom-in" @click="by(1.4)">+</button>
        <button class="am-key" aria-label="one image pixel for each screen pixel (o)" data-testid="zoom-real"
          :aria-pressed="zoom === 1" @click="real">1:1</button>
        <label><span aria-hidden="true">☀</span><input type="range" min="0.2" max="4" step="0.05" aria-label="brightness"
          data-testid="brightness" v-model.number="brightness" @dblclick="brightness = 1"></label>
        <label><span aria-hidden="true">◐</span><input type="range" min="0.2" max="4" step="0.05" aria-label="contrast"
          data-testid="contrast" v-model.number="contrast" @dblclick="contrast = 1"></label>
        <button class="am-key" :disabled="brightness === 1 && contrast === 1" aria-label="reset brightness and
          contrast" data-testid="light-reset" @click="brightness = contrast = 1">↺</button>
        <span class="am-size">{{ size }}</span>
      </div>
    </div>`,
  props: {
    panes: Array, // name, src and alt of each; several images also have a text and a label, and their ids as names
    chosen: String, // image that the keys concern when the panes open
    ahead: Array,
    light: Object,
    sky: Object, // scale in arcsec for each pixel, width in pixels, directions of north and east; null where unknown
  },
  data() {
    return { ...kept, x: 0, y: 0, sizes: {}, box: [0, 0], ratio: 1, broken: {}, prefix: window.path_prefix || "",
      pixel: "", mark: null };
  },
  computed: {
    several() { return new Set(this.panes.map((pane) => pane.alt)).size > 1; },
    marked() { return this.panes.some((pane) => pane.name === this.mark) ? this.mark : this.chosen; },
    // Screen pixels for each pixel of the (first) image.
    scale() { return this.zoom ?? this.fitted(this.panes[0]); },
    size() {
      const size = this.sizeOf(this.panes[0]);
      return size ? `${size[0]} × ${size[1]} px` : "";
    },
    // Scale bar: the longest round length of at most BAR pixels of the page.
    bar() {
      const size = this.sizeOf(this.panes[0]);
      if (!this.sky || !size || !this.scale || this.panes.length > 1) return null;
      const arcsec = (this.sky.scale * this.sky.width * this.ratio) / (size[0] * this.scale); // of a pixel of the page
      const length = LENGTHS.findLast((length) => length <= BAR * arcsec);
      if (!length) return null;
      const text = length < 60 ? `${length}″` : length < 3600 ? `${length / 60}′` : `${length / 3600}°`;
      return { width: length / arcsec, text };
    },
  },
  watch: {
    panes(now, before) {
      this.pixel = "";
      if (JSON.stringify(now.map((pane) => pane.name)) !== JSON.stringify(before.map((pane) => pane.name))) this.mark = null;
      if (now[0]?.alt !== before[0]?.alt && this.zoom === null) this.reset();
      this.$nextTick(this.measure);
    },
    light: {
      immediate: true,
      handler(now) {
        if (now.serial === this.serial) return;
        [this.brightness, this.contrast, this.serial] = [now.brightness, now.contrast, now.serial];
      },
    },
    ahead: {
      immediate: true,
      handler(addresses) {
        this.kept = (addresses || []).map((address) => Object.assign(new Image(), { src: this.prefix + address }));
      },
    },
  },
  created() {
    this.fingers = new Map(); // not reactive, since it changes with every move
  },
  mounted() {
    document.addEventListener("keydown", this.key);
    document.addEventListener("am-pane", this.choose);
    this.observer = new ResizeObserver(this.measure);
    this.observer.observe(this.$refs.stage);
  },
  unmounted() {
    document.removeEventListener("keydown", this.key);
    document.removeEventListener("am-pane", this.choose);
    this.observer.disconnect();
    Object.assign(kept, { zoom: this.zoom, brightness: this.brightness, contrast: this.contrast, serial: this.serial });
  },
  methods: {
    key(event) {
      if (/^(INPUT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey) return;
      if (event.key === "+" || event.key === "=") this.by(1.4);
      else if (event.key === "-") this.by(1 / 1.4);
      else if (event.key === "0") this.reset();
      else if (event.key === "o") this.real(); // digits label kinds
      else if (/^[bw]$/i.test(event.key)) this.blink(event);
    },
    // The next stretch or channel; a held key goes on at a pace at which a person sees each.
    blink(event) {
      if (event.repeat && performance.now() - this.blinked < BLINK_MS) return;
      this.blinked = performance.now();
      this.$emit("blink", { of: event.key.toLowerCase() === "b" ? "stretch" : "channel", step: event.shiftKey ? -1 : 1 });
    },
    choose(event) { this.mark = event.detail; },
    // The pointer chooses the image that the keys concern, when it moves: an image that opens below it is not chosen.
    point(event) {
      if (document.activeElement?.tagName === "TEXTAREA") return; // a person writes a note on the marked one
      const name = event.target.closest?.(".am-pane")?.dataset.name;
      if (this.several && name && name !== this.marked) document.dispatchEvent(new CustomEvent("am-pane", { detail: name }));
    },
    measure() {
      const pane = this.$refs.stage?.querySelector(".am-pane");
      if (pane) [this.box, this.ratio] = [[pane.clientWidth, pane.clientHeight], window.devicePixelRatio || 1];
    },
    // Screen pixels for each pixel of an image that fits its pane; null before it is loaded.
    fitted(pane) {
      const size = this.sizeOf(pane);
      return size && this.box[0] ? this.ratio * Math.min(this.box[0] / size[0], this.box[1] / size[1]) : null;
    },
    // Another stretch of an image, which is not loaded yet, is as large.
    sizeOf(pane) { return this.sizes[pane?.src] || this.sizes[pane?.alt]; },
    factor(pane) {
      const fitted = this.fitted(pane);
      return this.zoom !== null && fitted ? this.zoom / fitted : 1;
    },
    look(pane) {
      const isReady = this.zoom === null || this.fitted(pane);
      return {
        transform: `translate(${this.x}px, ${this.y}px) scale(${this.factor(pane)})`,
        filter: `brightness(${this.brightness}) contrast(${this.contrast})`,
        visibility: isReady ? "visible" : "hidden", // its scale is unknown before it is loaded
      };
    },
    loaded(pane, { target }) {
      const size = [target.naturalWidth, target.naturalHeight];
      this.sizes = { ...this.sizes, [pane.src]: size, [pane.alt]: size };
    },
    async fail(pane) {
      let reason = "the image cannot be shown";
      try {
        const answer = await fetch(this.prefix + pane.src);
        if (!answer.ok) reason = (await answer.text()).slice(0, 300);
      } catch { reason = "the server does not answer"; }
      this.broken = { ...this.broken, [pane.src]: reason };
    },
    reset() { [this.zoom, this.x, this.y] = [null, 0, 0]; },
    real() { if (this.scale) this.by(1 / this.scale); },
    // Zoom around the point (across, down), measured from the centre of its pane.
    by(factor, across = 0, down = 0) {
      const fitted = this.fitted(this.panes[0]);
      if (!fitted) return;
      const low = Math.min(1, fitted * LIMITS[0]), high = Math.max(1, fitted * LIMITS[1]);
      const zoom = Math.max(low, Math.min(high, this.scale * factor));
      const by = zoom / this.scale;
      this.x = across - (across - this.x) * by;
      this.y = down - (down - this.y) * by;
      this.zoom = Math.abs(zoom - 1) < 1e-9 ? 1 : zoom;
    },
    middle(event) {
      const pane = event.target.closest?.(".am-pane") || this.$refs.stage;
      const box = pane.getBoundingClientRect();
      return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
    },
    wheel(event) {
      this.by(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...this.middle(event));
    },
    down(event) {
      if (event.target.closest("button")) return;
      this.point(event);
      this.$refs.stage.setPointerCapture(event.pointerId);
      this.fingers.set(event.pointerId, event);
      this.at = this.middle(event);
    },
    // Ask for the value under the pointer; while one answer is awaited, only the newest place is remembered.
    async value(event) {
      const image = event.target.closest?.(".am-pane")?.querySelector("img");
      const size = this.sizes[image?.getAttribute("src").slice(this.prefix.length)];
      if (!size) return void (this.pixel = "");
      const box = image.getBoundingClientRect(), fit = Math.min(box.width / size[0], box.height / size[1]);
      const x = (event.clientX - box.left - (box.width - fit * size[0]) / 2) / (fit * size[0]);
      const y = (event.clientY - box.top - (box.height - fit * size[1]) / 2) / (fit * size[1]);
      this.wanted = x >= 0 && x < 1 && y >= 0 && y < 1 ? { id: image.alt, x, y } : null;
      while (this.wanted && !this.isAsking) {
        const wanted = this.wanted;
        [this.wanted, this.isAsking] = [null, true];
        try {
          const answer = await fetch(`${this.prefix}/pixel?${new URLSearchParams(wanted)}`);
          const at = answer.ok ? await answer.json() : null;
          const values = at && Object.entries(at.values).map(([band, value]) => `${band} ${value}`).join("  ");
          this.pixel = at && this.panes.some((pane) => pane.alt === wanted.id) ? `${at.x}, ${at.y}:  ${values} ${at.units}`.trim() : "";
        } catch { this.pixel = ""; } // the server is away
        this.isAsking = false;
      }
    },
    drag(event) {
      const before = this.fingers.get(event.pointerId);
      if (!before && event.pointerType !== "mouse") return;
      if (!before) return this.point(event), void this.value(event);
      if (this.fingers.size === 2) {
        const other = [...this.fingers].find(([id]) => id !== event.pointerId)[1];
        const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
        this.by(apart(event) / Math.max(1, apart(before)), ...this.at);
      } else {
        this.x += event.clientX - before.clientX;
        this.y += event.clientY - before.clientY;
      }
      this.fingers.set(event.pointerId, event);
    },
    up(event) { this.fingers.delete(event.pointerId); },
  },
};
