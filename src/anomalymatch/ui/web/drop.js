// Drop zone and file chooser; with `everywhere` the whole page accepts files.
export default {
  template: `
    <div>
      <label class="am-drop" :class="{ 'am-over': over, 'am-busy': busy }" :data-testid="name + '-drop'"
             @dragenter.prevent="over = true" @dragover.prevent="over = true" @dragleave="over = false"
             @drop.prevent.stop="drop">
        <input type="file" :accept="accept" :multiple="multiple" :data-testid="name + '-file'" @change="choose">
        <span>{{ busy ? "Sending…" : text }}</span>
      </label>
      <div v-if="everywhere && above" class="am-veil"><span>{{ text }}</span></div>
    </div>`,
  props: {
    name: String, url: String, text: String, accept: String, multiple: Boolean, everywhere: Boolean, annotator: String,
  },
  data() { return { over: false, above: false, busy: false }; },
  mounted() {
    if (!this.everywhere) return;
    this.on = { dragover: this.enter, dragleave: this.leave, drop: this.drop };
    for (const [type, handler] of Object.entries(this.on)) document.addEventListener(type, handler);
  },
  unmounted() {
    for (const [type, handler] of Object.entries(this.on || {})) document.removeEventListener(type, handler);
  },
  methods: {
    enter(event) {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.above = true;
    },
    leave(event) { if (!event.relatedTarget) this.above = false; },
    drop(event) {
      this.over = this.above = false;
      if (!event.dataTransfer?.files.length) return;
      event.preventDefault();
      this.send([...event.dataTransfer.files].slice(0, this.multiple ? Infinity : 1));
    },
    choose(event) {
      this.send([...event.target.files]);
      event.target.value = "";
    },
    async send(files) {
      const form = new FormData();
      for (const file of files) form.append("files", file, file.name);
      const url = `${window.path_prefix || ""}${this.url}?${new URLSearchParams({ annotator: this.annotator })}`;
      this.busy = true;
      let [isFine, message] = [false, "the server does not answer"];
      try {
        const answer = await fetch(url, { method: "POST", body: form });
        [isFine, message] = [answer.ok, await answer.text()];
      } catch { /* the message above */ }
      this.busy = false;
      this.$emit("sent", { ok: isFine, message: message.slice(0, 4000) });
    },
  },
};
