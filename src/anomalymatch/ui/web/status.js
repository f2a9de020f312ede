// Status line with the last labels, and the offer of a new order.
const SIDE = 64; // one of the thumbnails in the server's cache

export default {
  template: `
    <div class="am-status" data-testid="status-bar">
      <div v-if="recent.length" class="am-recent" role="group" aria-label="Your last labels" data-testid="recent">
        <button v-for="item in recent" :key="item.id" :class="'am-recent-one am-' + item.label" data-testid="recent-one"
                :data-id="item.id" :data-label="item.label" :title="item.id + ': ' + item.label"
                :aria-label="'go back to ' + item.id + ', ' + item.label" @click="$emit('pick', { id: item.id })">
          <img alt="" :src="address(item.id)"></button>
      </div>
      <img v-if="image && !waiting" :class="'am-status-image am-' + (label || 'none')" alt="" :src="address(image)">
      <div role="status" class="am-status-text" :title="said" data-testid="status">{{ said }}</div>
      <div role="alert" class="am-status-text am-status-error" :title="error" data-testid="status-error">{{ error }}</div>
      <button v-if="offered" class="am-offer" data-testid="new-order" @click="$emit('take')">new order<span class="am-word"> ready</span> · r</button>
    </div>`,
  props: { text: String, isError: Boolean, image: String, label: String, recent: Array, offered: Boolean, version: String },
  data() { return { waiting: 0 }; },
  computed: {
    said() {
      if (this.waiting) return `${this.waiting} ${this.waiting === 1 ? "label waits" : "labels wait"} for the server. They are kept.`;
      return this.isError ? "" : this.text;
    },
    error() { return this.isError ? this.text : ""; },
  },
  mounted() { addEventListener("am-waiting", this.wait); },
  unmounted() { removeEventListener("am-waiting", this.wait); },
  methods: {
    wait(event) { this.waiting = event.detail; },
    address(id) {
      return `${window.path_prefix || ""}/thumb?${new URLSearchParams({ id, side: SIDE, v: this.version })}`;
    },
  },
};
