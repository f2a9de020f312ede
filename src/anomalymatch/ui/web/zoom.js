// Images with a common zoom; brightness and contrast are CSS filters.
const LIMITS = [0.5, 40];

export default {
  template: `
    <div class="am-zoom" data-testid="zoom">
      <div ref="stage" class="am-stage" :class="{ 'am-many': panes.length > 1 }"
           :style="{ '--across': Math.ceil(Math.sqrt(panes.length)) }" data-testid="stage" @wheel.prevent="wheel"
           @pointerdown="down" @pointermove="drag" @pointerup="up" @pointercancel="up" @dblclick="reset">
        <figure v-for="pane in panes" :key="pane.name" class="am-pane">
          <div v-if="broken[pane.src]" class="am-broken">{{ broken[pane.src] }}</div>
          <img v-else :src="prefix + pane.src" :alt="pane.alt" draggable="false" :style="look" data-testid="full"
               :class="{ 'am-pixels': scale > 4 }" @load="loaded" @error="fail(pane)">
          <figcaption v-if="panes.length > 1">
            <button class="am-plain" @click="$emit('pick', pane.name)">{{ pane.name }}</button></figcaption>
        </figure>
      </div>
      <div class="am-lens" role="toolbar" aria-label="Zoom and light" @pointerdown.stop>
        <button class="am-key" aria-label="zoom out (-)" data-testid="zoom-out" @click="by(1 / 1.4)">−</button>
        <button class="am-key am-scale" aria-label="fit (0)" data-testid="zoom-fit" @click="reset">
          {{ Math.round(scale * 100) }} %</button>
        <button class="am-key" aria-label="zoom in (+)" data-testid="zoom-in" @click="by(1.4)">+</button>
        <label><span aria-hidden="true">☀</span><input type="range" min="0.2" max="4" step="0.05" aria-label="brightness"
          data-testid="brightness" v-model.number="brightness" @dblclick="brightness = 1"></label>
        <label><span aria-hidden="true">◐</span><input type="range" min="0.2" max="4" step="0.05" aria-label="contrast"
          data-testid="contrast" v-model.number="contrast" @dblclick="contrast = 1"></label>
        <button class="am-key" :disabled="brightness === 1 && contrast === 1" aria-label="reset brightness and
          contrast" data-testid="light-reset" @click="brightness = contrast = 1">↺</button>
        <span class="am-size">{{ size }}</span>
      </div>
    </div>`,
  props: { panes: Array, ahead: Array },
  data() {
    return { scale: 1, x: 0, y: 0, brightness: 1, contrast: 1, size: "", broken: {}, prefix: window.path_prefix || "" };
  },
  computed: {
    look() {
      return {
        transform: `translate(${this.x}px, ${this.y}px) scale(${this.scale})`,
        filter: `brightness(${this.brightness}) contrast(${this.contrast})`,
      };
    },
  },
  watch: {
    panes(now, before) {
      if (now[0]?.alt !== before[0]?.alt) this.reset();
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
  mounted() { document.addEventListener("keydown", this.key); },
  unmounted() { document.removeEventListener("keydown", this.key); },
  methods: {
    key(event) {
      if (/^(INPUT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey) return;
      if (event.key === "+" || event.key === "=") this.by(1.4);
      else if (event.key === "-") this.by(1 / 1.4);
      else if (event.key === "0") this.reset();
    },
    loaded(event) { this.size = `${event.target.naturalWidth} × ${event.target.naturalHeight} px`; },
    async fail(pane) {
      let reason = "the image cannot be shown";
      try {
        const answer = await fetch(this.prefix + pane.src);
        if (!answer.ok) reason = (await answer.text()).slice(0, 300);
      } catch { reason = "the server does not answer"; }
      this.broken = { ...this.broken, [pane.src]: reason };
    },
    reset() { [this.scale, this.x, this.y] = [1, 0, 0]; },
    // Zoom around the point (across, down), measured from the centre of its pane.
    by(factor, across = 0, down = 0) {
      const scale = Math.max(LIMITS[0], Math.min(LIMITS[1], this.scale * factor));
      const real = scale / this.scale;
      this.x = across - (across - this.x) * real;
      this.y = down - (down - this.y) * real;
      this.scale = scale;
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
      this.$refs.stage.setPointerCapture(event.pointerId);
      this.fingers.set(event.pointerId, event);
      this.at = this.middle(event);
    },
    drag(event) {
      const before = this.fingers.get(event.pointerId);
      if (!before) return;
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
