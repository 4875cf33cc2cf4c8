"use strict";
(() => {
  const store = JSON.parse(document.getElementById("samples-data").textContent);
  const slider = document.getElementById("step");
  const play = document.getElementById("play");
  const readout = document.getElementById("readout");
  const sure = document.getElementById("sure"); // there where a model told how sure it was
  if (!slider) return;
  const about = document.getElementById("sure-about");

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  // A picture of the page, or one the page carries. Drawn again once it is read.
  function sheetOf(panel, address) {
    const sheet = new Image();
    sheet.addEventListener("load", () => draw(panel));
    sheet.src = address;
    return sheet;
  }

  // A panel: its frames, and where on the way from 0 (noise) to 1 (samples) each of them is.
  function panelOf(canvas) {
    const strip = store.strips[canvas.dataset.strip];
    const real = canvas.dataset.series === "real";
    const source = strip.panels.find((p) => String(p.series) === canvas.dataset.series) || strip.real || {};
    const panel = {
      canvas, strip, real,
      pictures: strip.kind === "pictures",
      places: real ? [1] : source.kept.map((k) => k / source.steps),
      kept: source.kept, times: source.t, steps: source.steps,
      colour: real ? "--muted" : `--c${source.series % 8}`,
      words: canvas.closest("figure").querySelector(".out"),
    };
    if (panel.pictures) {
      const final = canvas.parentNode.querySelector("image").getAttribute("href");
      panel.columns = Number(canvas.dataset.columns);
      panel.count = Number(canvas.dataset.count);
      panel.sheets = [...(source.frames || []).map((link) => `data:${link}`), final].map((a) => sheetOf(panel, a));
      panel.mapTimes = source.sure ? source.sure.t : [];
      panel.maps = source.sure ? source.sure.frames.map((link) => sheetOf(panel, `data:${link}`)) : [];
    } else {
      panel.shape = source.shape;
      panel.values = new Int16Array(bytes(source.data).buffer);
      panel.ellipses = source.sure ? source.sure.count : 0;
      if (source.sure) panel.roots = new Int16Array(bytes(source.sure.data).buffer);
    }
    return panel;
  }

  function nearest(places, at) {
    let best = 0;
    places.forEach((p, i) => { if (Math.abs(p - at) < Math.abs(places[best] - at)) best = i; });
    return best;
  }

  const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function dots(g, values, from, count, span, size, radius) {
    const unit = span / 32767;
    let outside = 0;
    g.beginPath();
    for (let i = from; i < from + 2 * count; i += 2) {
      const x = values[i] * unit, y = values[i + 1] * unit;
      if (Math.abs(x) > 1 || Math.abs(y) > 1) { outside += 1; continue; }
      const px = (x + 1) / 2 * size, py = (1 - y) / 2 * size;
      g.moveTo(px + radius, py);
      g.arc(px, py, radius, 0, 2 * Math.PI);
    }
    g.fill();
    return outside;
  }

  // An ellipse is the unit circle under the triangular root of its covariance. Outlines only: filled, they hide
  // each other.
  function ellipses(g, panel, frame, size, ratio) {
    const unit = panel.strip.span / 32767, count = panel.shape[1], none = -32768;
    g.lineWidth = 0.8 * ratio;
    g.strokeStyle = colourOf(panel.colour);
    g.globalAlpha = 0.8;
    for (let n = 0; n < Math.min(panel.ellipses, about.dataset.ellipses); n += 1) {
      const at = 2 * (count * frame + n), from = 3 * (panel.ellipses * frame + n);
      const x = panel.values[at] * unit, y = panel.values[at + 1] * unit;
      const [xx, xy, yy] = panel.roots.subarray(from, from + 3);
      if (xx === none || Math.abs(x) > 1 || Math.abs(y) > 1 || (!xx && !yy)) continue;
      const scale = unit * size / 2;
      g.save();
      g.transform(xx * scale, -xy * scale, 0, -yy * scale, (x + 1) / 2 * size, (1 - y) / 2 * size);
      g.beginPath();
      g.arc(0, 0, 1, 0, 2 * Math.PI);
      g.restore();
      g.stroke();
    }
    g.globalAlpha = 1;
  }

  function drawPoints(panel, frame, g, size, ratio) {
    const count = panel.shape[1], span = panel.strip.span;
    g.fillStyle = colourOf("--panel");
    g.fillRect(0, 0, size, size);
    if (!panel.real) {
      const behind = realOf(panel.strip);
      g.fillStyle = colourOf("--faint");
      dots(g, behind.values, 0, behind.shape[1], span, size, 1.2 * ratio);
    }
    g.fillStyle = colourOf(panel.colour);
    const last = frame === panel.places.length - 1; // samples leave no doubt
    const doubt = Boolean(sure && sure.checked && panel.ellipses && !last);
    g.globalAlpha = doubt ? 0.45 : 0.8;
    const outside = dots(g, panel.values, 2 * count * frame, count, span, size, 1.6 * ratio);
    g.globalAlpha = 1;
    if (doubt) ellipses(g, panel, frame, size, ratio);
    g.lineWidth = ratio;
    g.strokeStyle = colourOf("--rule");
    g.strokeRect(ratio / 2, ratio / 2, size - ratio, size - ratio);
    panel.words.textContent = outside ? `${outside} of ${count} points outside the frame` : "";
  }

  const realOf = (strip) => panels.find((p) => p.real && p.strip === strip);

  function drawPictures(panel, frame, g, width, height) {
    const mapped = Boolean(sure && sure.checked && panel.maps.length), {columns, count} = panel;
    const sheet = mapped ? panel.maps[nearest(panel.mapTimes, panel.times[frame])] : panel.sheets[frame];
    if (!sheet.complete || !sheet.naturalWidth) return; // what is seen stays until it is read
    const rows = Math.ceil(count / columns);
    const wide = sheet.naturalWidth / columns, high = sheet.naturalHeight / rows;
    // Each picture by itself, on whole pixels with a gap between: no edge is blurred.
    const cell = width / columns, tall = height / rows, gap = Math.max(1, Math.round(cell / 16));
    g.clearRect(0, 0, width, height);
    g.imageSmoothingEnabled = cell - gap < wide;
    g.imageSmoothingQuality = "high";
    for (let n = 0; n < count; n += 1) {
      const i = n % columns, j = Math.floor(n / columns);
      const x = Math.round(i * cell), y = Math.round(j * tall);
      const w = Math.round((i + 1) * cell) - x - (i + 1 < columns ? gap : 0);
      const h = Math.round((j + 1) * tall) - y - (j + 1 < rows ? gap : 0);
      g.drawImage(sheet, i * wide, j * high, wide, high, x, y, w, h);
      if (mapped) {
        g.globalCompositeOperation = "multiply";
        g.fillStyle = "#ffc04d";
        g.fillRect(x, y, w, h);
        g.globalCompositeOperation = "source-over";
      }
    }
    panel.canvas.parentNode.classList.add("live");
  }

  function draw(panel) {
    const box = panel.canvas.getBoundingClientRect();
    const ratio = Math.max(1, window.devicePixelRatio || 1);
    const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
    if (!width || !height) return;
    if (panel.canvas.width !== width || panel.canvas.height !== height) {
      panel.canvas.width = width;
      panel.canvas.height = height;
    }
    const g = panel.canvas.getContext("2d");
    if (panel.pictures) {
      drawPictures(panel, frameOf(panel), g, width, height);
      return;
    }
    g.clearRect(0, 0, width, height);
    drawPoints(panel, frameOf(panel), g, width, ratio);
  }

  // Runs may sample on different grids: the slider goes by the steps of the longest, and all others
  // show their frame at the time nearest to it.
  function frameOf(panel) {
    if (place === 1 || panel.real) return panel.places.length - 1;
    const at = nearest(longest.places, place);
    return panel === longest ? at : nearest(panel.times, longest.times[at]);
  }

  function words() {
    if (place === 1 || !moving.length) return "final samples";
    const step = longest.kept[frameOf(longest)];
    const times = moving.map((p) => p.times[frameOf(p)]);
    const low = Math.min(...times).toFixed(2), high = Math.max(...times).toFixed(2);
    return `step ${step} of ${longest.steps}, t = ${low === high ? low : `${low}–${high}`}`;
  }

  let place = 1;
  const panels = Array.from(document.querySelectorAll("canvas[data-strip]"), panelOf);
  const moving = panels.filter((p) => !p.real);
  const longest = moving.reduce((a, b) => (b.steps > a.steps ? b : a), moving[0]);

  function show(to) {
    place = Math.min(1, Math.max(0, to));
    slider.value = String(Math.round(place * store.steps));
    readout.textContent = words();
    slider.setAttribute("aria-valuetext", readout.textContent);
    panels.forEach(draw);
  }

  // Playing: the whole way in about six seconds; in few, slow steps where motion is not wanted.
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  let timer = 0;
  function stop() {
    window.clearInterval(timer);
    timer = 0;
    play.classList.remove("playing");
    play.setAttribute("aria-label", "Play");
  }
  function start() {
    const stride = calm.matches ? Math.max(1, Math.ceil(store.steps / 8)) : Math.max(1, Math.ceil(store.steps / 80));
    const pause = calm.matches ? 900 : Math.max(40, Math.min(400, 6000 * stride / store.steps));
    let step = place === 1 ? -stride : Math.round(place * store.steps);
    const next = () => {
      step = Math.min(store.steps, step + stride);
      show(step / store.steps);
      if (step >= store.steps) stop();
    };
    play.classList.add("playing");
    play.setAttribute("aria-label", "Pause");
    timer = window.setInterval(next, pause);
    next();
  }

  function fromAddress() {
    const found = /[#&]step=([0-9.]+)/.exec(window.location.hash);
    if (found && Number.isFinite(Number(found[1]))) { stop(); show(Number(found[1])); }
  }

  function doubts() {
    about.hidden = !sure.checked;
    if (sure.checked && place === 1) show(Math.floor(store.steps / 2) / store.steps);
    else panels.forEach(draw);
  }

  play.addEventListener("click", () => (timer ? stop() : start()));
  slider.addEventListener("input", () => { stop(); show(Number(slider.value) / store.steps); });
  if (sure) sure.addEventListener("change", doubts);
  window.addEventListener("hashchange", fromAddress);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panels.forEach(draw));
  const resized = new ResizeObserver((entries) => {
    entries.forEach((e) => draw(panels.find((p) => p.canvas === e.target)));
  });
  panels.forEach((p) => resized.observe(p.canvas));
  show(1);
  fromAddress();
})();
