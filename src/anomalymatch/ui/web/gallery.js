// Gallery of tiles; keyboard, mouse and touch work without a round trip to the server.
const LABELS = { a: "anomaly", n: "normal", u: "unsure", x: "artefact" };
const COMMANDS = {
  z: "undo", r: "rerank", t: "train", g: "group", m: "map", h: "heat", v: "survey", q: "review", "?": "help",
  ":": "goto",
};
const SIDES = [64, 96, 128, 192, 256, 384, 512]; // sides of the thumbnails in the server's cache
const CAPTION = 17; // height of a tile's caption in CSS pixels
const SMALLEST = [112, 64]; // smallest side of a comfortable and of a dense tile in CSS pixels
const LONG_PRESS_MS = 450;
const DOUBLE_TAP_MS = 350;
const REACTION_MS = 250; // nobody judges a new image faster
const LATE_MS = 1000; // a label that is not acknowledged for so long waits for the server
const RECORD_MS = 150; // browsers limit how often the address may change
const LONGEST_SELECTION = 4000; // characters of the address
const CLOSING_MS = 400; // a closing menu or dialog takes the focus for this long

export default {
  template: `
    <section class="am-gallery" @dragover.prevent>
      <div v-if="hasNote" ref="note" class="am-note" role="note" aria-live="polite" :style="{ height: noteHeight }"
           :title="note" data-testid="note">{{ note }}</div>
      <div ref="well" class="am-well" tabindex="-1">
        <div v-if="page.tiles === null" class="am-empty">Loading…</div>
        <div v-else-if="!tiles.length" class="am-empty" data-testid="empty">
          <p>{{ page.empty }}</p>
          <button v-if="page.filtered" class="am-plain" data-testid="clear-filters" @click="$emit('clear')">
            Clear the filters</button>
        </div>
        <div ref="grid" class="am-grid" role="listbox" aria-multiselectable="true" aria-label="Images"
             :class="{ 'am-dense': dense }" :style="grid" data-testid="grid">
          <div v-for="(item, place) in tiles" :key="item.id" role="option" class="am-tile"
               :class="[item.label ? 'am-' + item.label : '', { 'am-done': item.label && (item.label !== item.before || isUnlabelled || (item.split && !item.conflict)), 'am-cursor': place === cursor,
                        'am-chosen': chosen.has(item.id), 'am-pending': pending.has(item.id) }]"
               :tabindex="place === cursor ? 0 : -1" :aria-selected="chosen.size ? chosen.has(item.id) : place === cursor"
               :aria-label="spoken(item, place)" :title="item.id + (broken[item.id] ? ': ' + broken[item.id] : '')" data-testid="tile" :data-id="item.id"
               :data-label="item.label || ''" :data-place="place"
               @click="click($event, place)" @dblclick="open(place)" @contextmenu="held($event)"
               @pointerdown="press($event, place)" @pointerup="release" @pointermove="drag" @pointercancel="release">
            <div class="am-picture">
              <div v-if="broken[item.id]" class="am-broken" data-testid="broken"><b>unreadable</b>
                {{ broken[item.id] }}</div>
              <img v-else loading="lazy" decoding="async" alt="" draggable="false" :src="address(item)"
                   @error="fail(item, $event)">
              <span v-if="item.label" class="am-badge" aria-hidden="true">{{ shapes[item.label] }}</span>
              <span v-if="item.group !== null && item.group < 9" class="am-kind" :class="'am-kind-' + item.group"
                    aria-hidden="true" data-testid="kind">{{ item.group + 1 }}</span>
              <span v-if="item.star || item.note" class="am-star" aria-hidden="true" :title="item.note" data-testid="star">
                {{ (item.star ? "★" : "") + (item.note ? "✎" : "") }}</span>
              <span v-if="item.conflict" class="am-conflict" title="annotators disagree" aria-hidden="true">≠</span>
            </div>
            <div class="am-caption" aria-hidden="true">
              <span>{{ item.rank || page.values ? (page.start + place + 1).toLocaleString("en") : "" }}</span>
              <span :class="{ 'am-value': page.values }">{{ caption(item) }}</span>
            </div>
          </div>
        </div>
      </div>
      <slot></slot>
      <div class="am-actions" role="toolbar" aria-label="Label the selection" data-testid="actions">
        <button v-for="(label, key) in labels" :key="key" :class="'am-key am-' + label"
                :aria-label="label + ' (' + key + ')'" :data-testid="'action-' + label" @click="give(label)">
          <span class="am-shape">{{ shapes[label] }}</span><span class="am-word">{{ label }}</span></button>
        <button class="am-key" aria-label="remove the label (Backspace)" data-testid="action-clear"
                @click="give(null)"><span class="am-shape">⌫</span></button>
        <button class="am-key am-touch" aria-label="large view (Space)" data-testid="action-open"
                @click="open(cursor)"><span class="am-shape">⤢</span></button>
        <button class="am-key am-touch" aria-label="undo (z)" data-testid="action-undo"
                @click="revert(false, false)"><span class="am-shape">↶</span></button>
        <span class="am-count" aria-live="polite" data-testid="selection">{{ chosen.size > 1
          ? chosen.size + ' selected' : '' }}</span>
        <button v-if="chosen.size > 1" class="am-key" aria-label="compare the selected images (c)" data-testid="action-compare"
                @click="compare"><span class="am-shape">◫</span><span class="am-word">compare</span></button>
        <span class="am-paging">
          <button class="am-key" aria-label="previous page" data-testid="page-previous" :disabled="page.page === 0"
                  @click="turn(-1, 'first')"><span class="am-shape">‹</span></button>
          <button class="am-key am-where" title="go to a page, a rank or an id (:)" data-testid="page-number" @click="$emit('goto')">
            {{ (page.page + 1).toLocaleString("en") }} / {{ page.pages.toLocaleString("en") }}</button>
          <button class="am-key" aria-label="next page" data-testid="page-next"
                  :disabled="page.page + 1 >= page.pages" @click="turn(1, 'first')">
            <span class="am-shape">›</span></button>
        </span>
      </div>
    </section>`,
  props: {
    page: Object, // tiles, total, page, pages, note, values, empty, filtered, serial, keep, at, address, push, selected
    count: Number, // tiles of a full page
    dense: Boolean, // tiles without captions and with smaller gaps
    light: Object, // parameters of the addresses, brightness and contrast
    advance: Boolean,
    viewing: String, // id in the large view; empty while it is closed
    panes: Object, // ids of several images in the large view, and whether the first is pinned beside the others
    grouped: Boolean, // true if the tiles are those of one group
    groups: Number, // number of groups, which have the keys 1, 2, 3, …
    kinds: Object, // numbers of groups from 0, by their own keys
    search: String, // name of the search, for the keys that wait for its server
    version: String, // version of the images, for the browser's cache
    shapes: Object,
  },
  data() {
    return {
      labels: LABELS, tiles: [], cursor: 0, anchor: 0, chosen: new Set(), pending: new Set(), broken: {}, side: 128, serial: -1,
      note: "", hasNote: false, noteHeight: "", ended: false,
      pane: null, // chosen one of several images in the large view
      grid: {},
    };
  },
  computed: {
    isUnlabelled() { return !/(^|&)show=/.test(this.page.address); },
  },
  watch: {
    page: { handler: "arrive", immediate: true },
    count() { this.measure(); },
    dense() { this.measure(); },
    light: {
      immediate: true,
      handler(now) {
        for (const name of ["brightness", "contrast"]) {
          document.documentElement.style.setProperty("--" + name, now[name] ?? 1);
        }
        this.broken = {};
      },
    },
    cursor: "moved",
    chosen: "moved",
    panes(now, before) { if (JSON.stringify(now.ids) !== JSON.stringify(before.ids)) this.pane = null; },
    viewing(now, before) {
      if (!now) setTimeout(this.regain, CLOSING_MS);
      if (!now === !before) this.recordSoon();
      else this.record(true);
    },
  },
  mounted() {
    document.addEventListener("keydown", this.key);
    document.addEventListener("am-pane", this.choose);
    this.observer = new ResizeObserver(this.measure);
    this.observer.observe(this.$refs.well);
    const kept = {};
    for (const key of Object.keys(localStorage)) {
      if (key.startsWith("anomalymatch.")) kept[key.slice(13)] = localStorage.getItem(key);
    }
    window.addEventListener("popstate", this.travel);
    window.addEventListener("pagehide", this.recordNow);
    this.restoring = true; // until the server shows the view of the address
    this.prefix = `anomalymatch-waiting.${this.search}.`;
    this.queue = this.stored(); // oldest first
    this.pending = new Set(this.queue.flatMap((item) => item.words.ids || []));
    this.$emit("hello", { ...kept, address: location.search, ids: history.state?.ids || [] });
  },
  unmounted() {
    document.removeEventListener("keydown", this.key);
    document.removeEventListener("am-pane", this.choose);
    window.removeEventListener("popstate", this.travel);
    window.removeEventListener("pagehide", this.recordNow);
    clearTimeout(this.recording);
    clearTimeout(this.late);
    this.observer?.disconnect();
    clearTimeout(this.timer);
  },
  methods: {
    arrive(page) {
      if (page.serial === this.serial || page.tiles === null) return;
      this.serial = page.serial;
      const [before, seen] = [this.tiles, this.tiles[this.cursor]];
      this.tiles = page.tiles.map((tile) => ({ ...tile, before: tile.label, split: tile.conflict }));
      this.ended = false;
      this.note = page.note;
      this.hasNote = !!page.note;
      this.noteHeight = "";
      this.pending = new Set((this.queue || []).flatMap((item) => item.words.ids || []));
      const here = new Set(this.tiles.map((tile) => tile.id));
      this.chosen = new Set((page.keep ? [...this.chosen] : page.selected).filter((id) => here.has(id)));
      const named = this.tiles.findIndex((tile) => tile.id === page.at);
      let place = page.at === "last" ? this.tiles.length - 1 : Math.max(0, named);
      if (page.keep) {
        // Labelled tiles have left the page: the cursor stays on the next image to judge.
        const gone = before.slice(0, this.cursor).filter((tile) => tile.label && !here.has(tile.id)).length;
        const viewed = this.tiles.findIndex((tile) => tile.id === this.viewing);
        place = this.viewing && viewed >= 0 ? viewed : this.cursor - gone;
      }
      this.cursor = this.anchor = Math.max(0, Math.min(place, this.tiles.length - 1));
      // A key pressed right after the order changed is for the image that was under the cursor before.
      const isSwapped = page.keep && seen && !seen.label && this.tiles[this.cursor]?.id !== seen.id;
      this.before = isSwapped ? { id: seen.id, until: performance.now() + REACTION_MS } : null;
      this.$nextTick(() => {
        this.measure();
        this.record(page.push);
        if (!page.keep && page.at === "first") this.$refs.well.scrollTop = 0;
        this.tell();
        this.regain();
        if (!page.keep) setTimeout(this.regain, CLOSING_MS);
      });
    },
    patch(tiles) {
      const fresh = new Map(tiles.map((tile) => [tile.id, tile]));
      for (const tile of this.tiles) if (fresh.has(tile.id)) Object.assign(tile, fresh.get(tile.id));
      for (const id of fresh.keys()) this.pending.delete(id);
    },
    // Labels wait in the browser's storage until the server has them. They are sent one after the other, so that they
    // arrive in order, and again after a lost connection: by their key, the server takes each once.
    send(event, words) {
      this.sent = (this.sent || 0) + 1;
      const key = `${Date.now()}-${String(this.sent).padStart(6, "0")}-${Math.random().toString(36).slice(2, 10)}`;
      const item = { key, event, words };
      this.queue.push(item);
      try { localStorage.setItem(this.prefix + key, JSON.stringify(item)); } catch { /* full: a reload would lose it */ }
      this.flush();
    },
    stored() {
      const keys = Object.keys(localStorage).filter((key) => key.startsWith(this.prefix)).sort();
      return keys.map((key) => JSON.parse(localStorage.getItem(key)));
    },
    flush() {
      const next = this.queue[0];
      if (next && this.connected && this.asked !== next.key) {
        this.asked = next.key;
        this.$emit(next.event, { ...next.words, key: next.key });
      }
      this.showWaiting();
    },
    acknowledge(key) {
      localStorage.removeItem(this.prefix + key);
      this.queue = this.queue.filter((item) => item.key !== key);
      clearTimeout(this.late);
      this.late = null;
      this.flush();
    },
    resume() {
      this.connected = true;
      this.asked = null;
      this.flush();
    },
    showWaiting() {
      const show = () => dispatchEvent(new CustomEvent("am-waiting", { detail: this.isLate ? this.queue.length : 0 }));
      this.isLate &&= this.queue.length > 0;
      if (this.queue.length && !this.isLate) this.late ||= setTimeout(() => { this.isLate = true; show(); }, LATE_MS);
      show();
    },
    renote(note) {
      this.noteHeight = this.$refs.note ? this.$refs.note.offsetHeight + "px" : ""; // or a shorter text would move the tiles
      this.note = note;
    },
    // The address is that of the view: a reload, a link and the browser's history show it again.
    record(isNew) {
      clearTimeout(this.recording);
      this.recording = null;
      if (this.restoring || this.serial < 0) return;
      const words = new URLSearchParams(this.page.address);
      const image = this.viewing || (this.cursor ? this.tiles[this.cursor]?.id : "");
      if (image) words.set("image", image);
      if (this.viewing) words.set("view", this.isComparing() ? "compare" : "large");
      const selected = new URLSearchParams([...this.chosen].map((id) => ["select", id])).toString();
      const search = [words.toString(), selected.length < LONGEST_SELECTION ? selected : ""].filter(Boolean).join("&");
      const url = location.pathname + (search && "?" + search);
      const isPushed = isNew && url !== location.pathname + location.search;
      // The images stay in their order, too, also if there is a new one meanwhile.
      history[isPushed ? "pushState" : "replaceState"]({ ids: this.tiles.map((tile) => tile.id) }, "", url);
    },
    recordSoon() { this.recording ||= setTimeout(this.record, RECORD_MS); },
    recordNow() { if (this.recording) this.record(); },
    travel() {
      this.restoring = true;
      this.$emit("address", { address: location.search, ids: history.state?.ids || [] });
    },
    restored() {
      this.$nextTick(() => {
        this.restoring = false;
        this.record();
      });
    },
    point(id, selected) {
      const place = this.tiles.findIndex((tile) => tile.id === id);
      if (place < 0) return;
      const chosen = this.viewing && this.isComparing() ? this.chosen : new Set(selected);
      [this.cursor, this.anchor, this.chosen, this.before, this.ended] = [place, place, chosen, null, false];
      this.$nextTick(this.focus);
    },
    // The map marks what is under the cursor and selected.
    moved() {
      this.tell();
      this.recordSoon();
    },
    tell() {
      const detail = { cursor: this.tiles[this.cursor]?.id, chosen: [...this.chosen] };
      document.dispatchEvent(new CustomEvent("am-cursor", { detail }));
    },
    remember(key, value) { localStorage.setItem("anomalymatch." + key, value); },
    measure() {
      if (!this.$refs.well) return;
      const gap = this.dense ? 2 : 4;
      const [across, tile] = this.fill(gap, this.dense ? 0 : CAPTION);
      this.grid = { "--across": across, "--tile": tile + "px", "--gap": gap + "px" };
      this.side = SIDES.find((side) => side >= (tile - 4) * (window.devicePixelRatio || 1) - 1) || SIDES.at(-1);
    },
    // Columns and side of the largest tiles with which a full page fits; tiles that would be too small scroll instead.
    fill(gap, caption) {
      const { clientWidth, clientHeight } = this.$refs.well;
      const [width, height] = [clientWidth - 12, clientHeight - 12]; // its padding
      const wide = (across) => (width - gap * (across - 1)) / across;
      let best = [1, 0];
      for (let across = 1; across <= this.count; across++) {
        const down = Math.ceil(this.count / across);
        const side = Math.min(wide(across), (height - gap * (down - 1)) / down - caption);
        if (side > best[1]) best = [across, side];
      }
      const least = Math.min(SMALLEST[+this.dense], 0.3 * width);
      const across = best[1] >= least ? best[0] : Math.max(1, Math.floor((width + gap) / (least + gap)));
      return [across, Math.floor(best[1] >= least ? best[1] : wide(across))];
    },
    columns() { return getComputedStyle(this.$refs.grid).gridTemplateColumns.split(" ").length; },
    rows() {
      const height = this.$refs.grid.firstElementChild?.offsetHeight || 128;
      return Math.max(1, Math.floor(this.$refs.well.clientHeight / height));
    },
    address(item) {
      return `${window.path_prefix || ""}/thumb?${new URLSearchParams(
        { id: item.id, side: this.side, v: this.version, ...this.light.parameters })}`;
    },
    async fail(item, event) {
      let reason = "";
      try {
        const answer = await fetch(event.target.src);
        if (!answer.ok) reason = (await answer.text()).slice(0, 160);
      } catch { reason = "the server does not answer"; }
      this.broken = { ...this.broken, [item.id]: reason || "the image cannot be shown" };
    },
    shortScore(score) { return score > 0.9995 ? "1.000" : score.toFixed(3).replace(/^0/, ""); },
    caption(item) {
      if (this.page.values) return this.page.values[item.id] || "–";
      return item.score === null ? "–" : this.shortScore(item.score);
    },
    spoken(item, place) {
      const words = ["place " + (this.page.start + place + 1)];
      if (this.page.values) words.push("value " + (this.page.values[item.id] || "missing"));
      if (item.score !== null) words.push("score " + item.score.toFixed(2));
      words.push(item.label || "no label");
      if (item.group !== null) words.push("group " + (item.group + 1));
      if (item.star) words.push("starred");
      if (item.note) words.push("note: " + item.note);
      if (item.conflict) words.push("annotators disagree");
      return words.join(", ");
    },
    isTyping(element) {
      if (!element) return false;
      if (element.isContentEditable || element.tagName === "TEXTAREA") return true;
      if (element.tagName !== "INPUT" || element.readOnly || element.role === "combobox") return false;
      return !["checkbox", "radio", "range", "file", "button"].includes(element.type);
    },
    ids() {
      if (this.viewing) return [this.shown()];
      if (this.chosen.size) return this.tiles.filter((tile) => this.chosen.has(tile.id)).map((tile) => tile.id);
      return this.tiles.length ? [this.tiles[this.cursor].id] : [];
    },
    // The image that the keys concern in the large view. The server may know of it later.
    shown() { return this.panes.ids.includes(this.pane) ? this.pane : this.viewing; },
    isComparing() { return this.panes.ids.length > 1 && !this.panes.pinned; },
    choose({ detail }) {
      if (!this.panes.ids.includes(detail) || detail === this.shown()) return;
      this.pane = detail;
      this.$emit("pane", { id: detail });
    },
    mark(id) { document.dispatchEvent(new CustomEvent("am-pane", { detail: id })); },
    compare() {
      const ids = this.tiles.filter((tile) => this.chosen.has(tile.id)).map((tile) => tile.id);
      if (!this.viewing) this.$emit("compare", { ids, at: this.tiles[this.cursor]?.id || "" });
    },
    give(label, group) {
      const meant = !this.viewing && !this.chosen.size && performance.now() < this.before?.until;
      const ids = meant ? [this.before.id] : this.ids();
      this.before = null;
      if (!ids.length) return;
      // The image under the cursor has got its label, and there is no next one on this page.
      if (this.ended && label && !this.chosen.size) return void this.$emit("end");
      for (const id of ids) this.pending.add(id);
      this.send("label", { ids, label, group });
      const isPinned = this.panes.pinned && this.shown() === this.panes.ids[0];
      if (meant || (this.viewing && (this.isComparing() || isPinned))) return;
      const last = this.tiles.reduce((at, tile, place) => (ids.includes(tile.id) ? place : at), -1);
      this.chosen = new Set();
      if (!label || !this.advance || last < 0) return;
      const isLast = last === this.tiles.length - 1;
      this.move(isLast ? last : last + 1, false);
      this.ended = isLast;
    },
    move(place, extend) {
      const last = this.tiles.length - 1;
      if (last < 0) return;
      this.cursor = Math.max(0, Math.min(place, last));
      this.before = null;
      this.ended = false;
      if (extend && !this.viewing) {
        const [low, high] = [Math.min(this.anchor, this.cursor), Math.max(this.anchor, this.cursor)];
        this.chosen = new Set(this.tiles.slice(low, high + 1).map((tile) => tile.id));
      } else {
        this.anchor = this.cursor;
        this.chosen = new Set();
      }
      if (this.viewing) this.$emit("look", { id: this.tiles[this.cursor].id });
      else this.$nextTick(this.focus);
    },
    regain() { if (!this.isTyping(document.activeElement)) this.focus(); },
    focus() {
      const tile = this.$refs.grid?.children[this.cursor];
      if (!tile || this.viewing || document.querySelector(".q-dialog, .q-menu")) return;
      tile.focus({ preventScroll: true });
      tile.scrollIntoView({ block: "nearest" });
    },
    turn(step, at) {
      const to = this.page.page + step;
      if (to >= 0 && to < this.page.pages) this.$emit("turn", { to, at });
    },
    open(place) {
      if (!this.tiles[place]) return;
      this.cursor = this.anchor = place;
      this.ended = false;
      this.$emit("look", { id: this.tiles[place].id });
    },
    toggle(place) {
      const chosen = new Set(this.chosen);
      const id = this.tiles[place].id;
      if (!chosen.delete(id)) chosen.add(id);
      this.chosen = chosen;
      this.cursor = this.anchor = place;
      this.ended = false;
      this.focus();
    },
    click(event, place) {
      if (this.wasHeld) return void (this.wasHeld = false);
      if (event.shiftKey) return this.move(place, true);
      if (event.ctrlKey || event.metaKey) return this.toggle(place);
      const tapped = this.touched && this.tap?.place === place && event.timeStamp - this.tap.at < DOUBLE_TAP_MS;
      this.tap = { place, at: event.timeStamp };
      this.move(place, false);
      if (tapped) this.open(place);
    },
    press(event, place) {
      this.touched = event.pointerType === "touch";
      this.wasHeld = false;
      if (!this.touched) return;
      this.from = [event.clientX, event.clientY];
      this.timer = setTimeout(() => { this.wasHeld = true; this.toggle(place); }, LONG_PRESS_MS);
    },
    drag(event) {
      if (this.from && Math.hypot(event.clientX - this.from[0], event.clientY - this.from[1]) > 10) this.release();
    },
    release() { clearTimeout(this.timer); this.from = null; },
    held(event) { if (this.touched) event.preventDefault(); },
    key(event) {
      const target = event.target;
      if (this.isTyping(target)) {
        if (event.key !== "Escape" && (event.key !== "Enter" || target.tagName !== "INPUT")) return;
        target.blur();
        return this.focus();
      }
      if (event.altKey || target.closest?.("[role=combobox], [role=menu], .q-menu")) return;
      if (document.querySelector(this.viewing ? ".am-ask" : ".q-dialog")) return;
      const isTaken = target.closest?.("[role=slider], [type=range]") || ((event.key === " " || event.key === "Enter") &&
        target.closest?.("button, a, [role=switch], [role=button], .q-item"));
      if (this.command(event) || (!isTaken && this.navigate(event))) event.preventDefault();
    },
    command(event) {
      const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
      if (event.ctrlKey || event.metaKey) {
        if (key === "z" || key === "y") return this.revert(key === "y" || event.shiftKey, event.repeat);
        if (key === "g") return this.$emit("goto"), true;
        if (key !== "a" || this.viewing) return false;
        this.chosen = new Set(this.tiles.map((tile) => tile.id));
        return true;
      }
      const group = /^[1-9]$/.test(key) ? Number(key) - 1 : event.shiftKey ? null : (this.kinds[key] ?? null);
      if (group !== null && group >= this.groups) return false;
      // Holding a key down labels one image only.
      if (event.repeat && (LABELS[key] || COMMANDS[key] || key === "s" || key === "c" || group !== null)) return true;
      if (LABELS[key] && event.shiftKey && this.grouped && !this.viewing) this.send("whole", { label: LABELS[key] });
      else if (LABELS[key]) this.give(LABELS[key]);
      else if (group !== null) this.give("anomaly", group);
      else if (key === "Backspace" || key === "Delete") this.give(null);
      else if (key === "z") this.revert(event.shiftKey, false);
      else if (key === "s") this.$emit("star", { ids: this.ids() });
      else if (key === "c") this.compare();
      else if (COMMANDS[key]) this.$emit(COMMANDS[key]);
      else if (key === "/" && !this.viewing) document.querySelector("[data-testid=filter-text]")?.focus();
      else return false;
      return true;
    },
    revert(again, isHeld) {
      if (!isHeld) this.send(again ? "redo" : "undo", {});
      return true;
    },
    navigate(event) {
      const across = this.viewing ? 1 : this.columns();
      const screen = this.viewing ? 10 : across * this.rows();
      const steps = {
        ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across, PageUp: -screen, PageDown: screen,
        Home: -Infinity, End: Infinity,
      };
      if (event.key === " ") this.viewing ? this.$emit("shut") : this.open(this.cursor);
      else if (event.key === "Escape" && !this.viewing) this.move(this.cursor, false);
      else if (event.key === "Enter" && !this.viewing) this.open(this.cursor);
      else if (event.key in steps) this.step(event.key, steps[event.key], event.shiftKey);
      else return false;
      return true;
    },
    step(key, step, extend) {
      if (this.viewing && this.isComparing()) {
        const to = this.panes.ids.indexOf(this.shown()) + (/Up|Down/.test(key) ? 2 * Math.sign(step) : step);
        const id = this.panes.ids[Math.abs(step) === Infinity ? (step < 0 ? 0 : this.panes.ids.length - 1) : to];
        return void (id && this.mark(id));
      }
      const [to, last] = [this.cursor + step, this.tiles.length - 1];
      const forth = (key === "ArrowRight" || key === "PageDown") && this.cursor === last;
      const back = (key === "ArrowLeft" || key === "PageUp") && this.cursor === 0;
      if (!extend && !this.viewing && forth) this.turn(1, "first");
      else if (!extend && !this.viewing && back) this.turn(-1, "last");
      else if ((key === "ArrowUp" && to < 0) || (key === "ArrowDown" && this.cursor === last)) return;
      else this.move(to, extend);
    },
  },
};
