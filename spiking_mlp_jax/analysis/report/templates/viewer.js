"use strict";
// Steps through the spikes of an example image. Data are in #viewer-data, see viewer.py; nothing is fetched.
(() => {
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const viewer = document.getElementById("viewer");
  if (!viewer || !data) return;
  const at = (id) => document.getElementById(id);
  const pace = 900; // milliseconds a step
  const state = { example: 0, step: 1, layer: 0, channel: -1, timer: 0 };

  function bytes(text) {
    return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  }

  // Unpacked when first looked at: a page can hold millions of spikes.
  const unpacked = new Map();
  function spikesOf(example, layer) {
    const key = example + ":" + layer;
    if (!unpacked.has(key)) unpacked.set(key, bytes(data.examples[example].spikes[layer]));
    return unpacked.get(key);
  }

  function logitsOf(example) {
    const raw = bytes(data.examples[example].logits);
    const view = new DataView(raw.buffer);
    return Array.from({ length: raw.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  }

  // The mean logits of the steps so far, and their softmax.
  function scores(example, step) {
    const logits = logitsOf(example);
    const count = data.classes.length;
    const mean = Array.from({ length: count }, (_, k) => {
      let sum = 0;
      for (let t = 0; t < step; t++) sum += logits[t * count + k];
      return sum / step;
    });
    const most = Math.max(...mean);
    const powers = mean.map((value) => Math.exp(value - most));
    const total = powers.reduce((a, b) => a + b, 0);
    return { mean, share: powers.map((power) => power / total) };
  }

  // How strongly each token is lit, 0 to 1, and the share of neurons that spike.
  function tokens(example, index, step, channel) {
    const { side, channels } = data.layers[index];
    const raw = spikesOf(example, index);
    const area = side * side;
    const values = new Float64Array(area);
    for (let i = 0; i < area; i++) {
      const token = (step - 1) * area + i;
      if (!channels) {
        values[i] = raw[token] / 255;
      } else {
        for (let c = 0; c < channels; c++) {
          if (channel >= 0 && c !== channel) continue;
          const bit = token * channels + c;
          values[i] += (raw[bit >> 3] >> (7 - (bit & 7))) & 1;
        }
        if (channel < 0) values[i] /= channels;
      }
    }
    return values;
  }

  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

  // The strongest token of all steps has full colour, so that steps can be compared.
  const peaks = new Map();
  function peak(example, index) {
    const key = example + ":" + index;
    if (!peaks.has(key)) {
      let most = 0;
      for (let t = 1; t <= data.steps; t++) most = Math.max(most, ...tokens(example, index, t, -1));
      peaks.set(key, most || 1);
    }
    return peaks.get(key);
  }

  function paint(canvas, values, most) {
    const side = Math.round(Math.sqrt(values.length));
    canvas.width = canvas.height = side;
    const colour = getComputedStyle(viewer).getPropertyValue("--lit").trim();
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, side, side);
    context.fillStyle = colour;
    values.forEach((value, i) => {
      if (!value) return;
      context.globalAlpha = Math.sqrt(Math.min(value / most, 1));
      context.fillRect(i % side, Math.floor(i / side), 1, 1);
    });
  }

  function percent(share) {
    const value = 100 * share;
    return (value >= 0.05 || value === 0 ? value.toFixed(1) : "< 0.1") + "\u00a0%";
  }

  function element(tag, parent, content) {
    const made = document.createElement(tag);
    if (content !== undefined) made.textContent = content;
    parent.append(made);
    return made;
  }

  // The maps of all layers, a group a stage; a click shows one large.
  const maps = [];
  function build() {
    const groups = data.stages.map((name) => {
      const group = element("section", at("layers"));
      element("h4", group, name);
      const row = element("div", group);
      row.className = "maps";
      return row;
    });
    data.layers.forEach((layer, index) => {
      const button = element("button", groups[layer.stage]);
      button.type = "button";
      const canvas = element("canvas", button);
      element("span", button, layer.name.replaceAll(".", ".\u200b"));
      const rate = element("span", button);
      rate.className = "quiet";
      button.addEventListener("click", () => {
        state.layer = index;
        state.channel = -1;
        show();
      });
      maps.push({ button, canvas, rate, layer });
    });
    state.layer = data.layers.map((layer) => layer.main).lastIndexOf(true);
  }

  function showScores() {
    const example = data.examples[state.example];
    const found = scores(state.example, state.step);
    const body = at("scores").tBodies[0];
    while (body.rows.length < example.shown.length) {
      const row = body.insertRow();
      const name = element("th", row);
      name.scope = "row";
      const bar = element("span", element("td", row));
      bar.className = "bar";
      element("i", bar);
      element("data", element("td", row));
      element("data", element("td", row));
    }
    while (body.rows.length > example.shown.length) body.deleteRow(-1);
    const best = found.share.indexOf(Math.max(...found.share));
    example.shown.forEach((k, i) => {
      const row = body.rows[i];
      row.cells[0].textContent = data.classes[k] + (k === example.label ? " (true)" : "");
      row.className = (k === best ? "best " : "") + (k === example.label ? "true" : "");
      row.querySelector("i").style.width = 100 * found.share[k] + "%";
      const [share, logit] = row.querySelectorAll("data");
      share.value = found.share[k];
      share.textContent = percent(found.share[k]);
      logit.value = found.mean[k];
      logit.textContent = found.mean[k].toFixed(2);
    });
    const right = best === example.label ? "which is correct" : "but it is " + data.classes[example.label];
    at("verdict").textContent =
      `After step ${state.step} of ${data.steps}: ${data.classes[best]}, ${percent(found.share[best])}, ${right}.`;
  }

  function show() {
    at("step").value = state.step;
    at("at").textContent = `${state.step} of ${data.steps}`;
    at("back").disabled = state.step === 1;
    at("forward").disabled = state.step === data.steps;
    at("play").disabled = data.steps === 1;
    at("play").textContent = state.timer ? "Pause" : "Play";
    document.querySelectorAll("[data-example]").forEach((button) => {
      button.setAttribute("aria-pressed", String(Number(button.dataset.example) === state.example));
    });
    const chosen = document.querySelector(`[data-example="${state.example}"] img`);
    at("shown").src = chosen.src;
    at("shown").alt = chosen.alt;
    showScores();
    const every = at("every").checked;
    maps.forEach(({ button, canvas, rate, layer }, index) => {
      button.hidden = !every && !layer.main;
      button.setAttribute("aria-pressed", String(index === state.layer));
      if (button.hidden) return;
      const values = tokens(state.example, index, state.step, -1);
      paint(canvas, values, peak(state.example, index));
      rate.textContent = percent(mean(values));
    });
    showLarge();
  }

  function showLarge() {
    const layer = data.layers[state.layer];
    const one = state.channel >= 0;
    const values = tokens(state.example, state.layer, state.step, state.channel);
    const canvas = at("large").querySelector("canvas");
    paint(canvas, values, one ? 1 : peak(state.example, state.layer));
    const what = one ? `channel ${state.channel + 1} of ${layer.channels}` : "all channels";
    const share = percent(mean(values));
    at("large").querySelector("p").textContent =
      `Stage ${layer.stage}, ${layer.name}, ${what}: ${share} of the neurons spike at step ${state.step}.`;
    canvas.setAttribute("aria-label", `Map of ${layer.side} by ${layer.side} tokens, ${share} of the neurons spike`);
    const channel = at("channel");
    at("channels").hidden = !layer.channels;
    channel.max = layer.channels - 1;
    channel.value = state.channel;
    at("channels").querySelector("output").textContent = one ? `${state.channel + 1}` : "all";
  }

  function go(step) {
    state.step = Math.min(Math.max(step, 1), data.steps);
    show();
  }

  function pause() {
    clearInterval(state.timer);
    state.timer = 0;
  }

  function play() {
    if (state.timer) {
      pause();
      show();
      return;
    }
    if (data.steps === 1) return;
    if (state.step === data.steps) state.step = 1;
    state.timer = setInterval(() => {
      if (state.step >= data.steps - 1) pause();
      go(state.step + 1);
    }, pace);
    show();
  }

  function choose(example) {
    if (!(example in data.examples)) return;
    state.example = example;
    show();
  }

  build();
  at("back").addEventListener("click", () => { pause(); go(state.step - 1); });
  at("forward").addEventListener("click", () => { pause(); go(state.step + 1); });
  at("play").addEventListener("click", play);
  at("step").addEventListener("input", (event) => { pause(); go(Number(event.target.value)); });
  at("every").addEventListener("change", show);
  at("channel").addEventListener("input", (event) => {
    state.channel = Number(event.target.value);
    showLarge();
  });
  document.querySelectorAll("[data-example]").forEach((button) => {
    button.addEventListener("click", () => choose(Number(button.dataset.example)));
  });
  viewer.addEventListener("keydown", (event) => {
    // Sliders, boxes and buttons have keys of their own.
    const own = event.target.tagName;
    if (own === "INPUT" || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "ArrowRight") { pause(); go(state.step + 1); }
    else if (event.key === "ArrowLeft") { pause(); go(state.step - 1); }
    else if (event.key === "Home") { pause(); go(1); }
    else if (event.key === "End") { pause(); go(data.steps); }
    else if (event.key === " " && own !== "BUTTON") play();
    else if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
    else return;
    event.preventDefault();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  at("needs").hidden = true;
  viewer.hidden = false;
  show();
})();
