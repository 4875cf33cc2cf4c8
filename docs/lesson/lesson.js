"use strict";

// The mathematics: pure functions, which the tests hold to reparam's own numbers.
window.lesson = (() => {
  // α, σ and their derivatives at t, between the times of a table.
  function coefficients(schedule, t) {
    const last = schedule.t.length - 1;
    const place = Math.min(Math.max(t, 0), 1) * last;
    const from = Math.min(Math.floor(place), last - 1), share = place - from;
    const between = (list) => (list ? list[from] * (1 - share) + list[from + 1] * share : NaN);
    return {
      alpha: between(schedule.alpha), sigma: between(schedule.sigma),
      alphaDot: between(schedule.alpha_dot), sigmaDot: between(schedule.sigma_dot),
    };
  }

  // The row (p, q) of a target: it is p x0 + q ε.
  function row(target, c) {
    switch (target) {
      case "x0": return [1, 0];
      case "eps": return [0, 1];
      case "v": return [-c.sigma, c.alpha];
      case "velocity": return [c.alphaDot, c.sigmaDot];
      case "score": return [0, -1 / c.sigma];
      default: throw new Error(`there is no target ${target}`);
    }
  }

  const delta = ([p, q], c) => c.alpha * q - c.sigma * p;
  const mix = (a, x, b, y) => x.map((value, i) => a * value + b * y[i]);
  const encode = (target, x0, eps, c) => mix(row(target, c)[0], x0, row(target, c)[1], eps);
  const noisy = (x0, eps, c) => mix(c.alpha, x0, c.sigma, eps);

  // [a, b] such that the other target is a x_t + b y; null where y says nothing of it, or one of the two is infinite.
  function conversion(source, to, c) {
    const [p, q] = row(source, c), [p2, q2] = row(to, c);
    // At the ends x_t alone is one of the two unknowns.
    if (c.sigma === 0 && q2 === 0) return [p2 / c.alpha, 0];
    if (c.alpha === 0 && p2 === 0) return [q2 / c.sigma, 0];
    if (source === to) return [0, 1];
    if (![p, q, p2, q2].every(Number.isFinite)) return null;
    const d = delta([p, q], c);
    return d === 0 ? null : [(p2 * q - q2 * p) / d, delta([p2, q2], c) / d];
  }

  function convert(y, xt, source, to, c) {
    const found = conversion(source, to, c);
    return found && mix(found[0], xt, found[1], y);
  }

  // By what an error of y counts in x0 or in ε.
  function amplification(target, of, c) {
    const r = row(target, c);
    return r.every(Number.isFinite) ? (of === "x0" ? c.sigma : c.alpha) / Math.abs(delta(r, c)) : NaN;
  }

  // Rectified flow: λ = 2 log((1 − t)/t).
  const timeAt = (lambda) => 1 / (1 + Math.exp(lambda / 2));

  // The density of λ, where t is drawn evenly or its logit from a normal distribution.
  function density(times, lambda) {
    const t = timeAt(lambda), speed = t * (1 - t) / 2;
    if (times.name === "uniform") return speed;
    const z = (-lambda / 2 - times.mean) / times.std;
    return Math.exp(-z * z / 2) / (2 * times.std * Math.sqrt(2 * Math.PI));
  }

  // The loss L_x0 + b L_ε as a weight on the error of x0, and of ε.
  const hybridOnX0 = (b, lambda) => 1 + b * Math.exp(lambda);
  const hybridOnEps = (b, lambda) => Math.exp(-lambda) + b;

  const rms = (values) => Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length);

  function correlation(a, b) {
    const mean = (list) => list.reduce((sum, v) => sum + v, 0) / list.length;
    const ma = mean(a), mb = mean(b);
    let ab = 0, aa = 0, bb = 0;
    a.forEach((v, i) => {
      ab += (v - ma) * (b[i] - mb);
      aa += (v - ma) ** 2;
      bb += (b[i] - mb) ** 2;
    });
    return aa * bb > 0 ? ab / Math.sqrt(aa * bb) : 0;
  }

  const throughOne = (values) => values.map((v) => v / values[Math.floor(values.length / 2)]);

  // Three digits.
  function number(value) {
    if (value === null || !Number.isFinite(value)) return "∞";
    const size = Math.abs(value);
    if (size < 1e-12) return "0";
    if (size >= 1e6 || size < 0.001) {
      return value.toExponential(1).replace("e+", "e").replaceAll("-", "−");
    }
    const digits = size >= 99.95 ? 0 : size >= 9.995 ? 1 : size >= 0.9995 ? 2 : 3;
    return value.toFixed(digits).replace("-", "−").replace(/\B(?=(\d{3})+$)/g, ",");
  }

  const level = (value, low, high) => Math.round(255 * Math.min(Math.max((value - low) / (high - low), 0), 1));

  // Where a value is in a chart, and the path of a line through such points; figures.py has the same.
  const box = {left: 46, right: 352, top: 8, bottom: 190};

  function share(value, [low, high], log) {
    return log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  }

  function place(frame, x, y) {
    const down = 1 - share(y, frame.y, frame.logY);
    return [
      box.left + (box.right - box.left) * share(x, frame.x, frame.logX),
      box.top + (box.bottom - box.top) * Math.min(Math.max(down, -0.5), 1.5),
    ];
  }

  function linePath(frame, xs, ys) {
    let path = "", pen = "M";
    xs.forEach((x, i) => {
      const y = ys[i];
      if (y === null || y === undefined || !Number.isFinite(y) || (frame.logY && y <= 0)) { pen = "M"; return; }
      const [px, py] = place(frame, x, y);
      path += `${pen}${px.toFixed(1)} ${py.toFixed(1)}`;
      pen = "L";
    });
    return path;
  }

  return {
    coefficients, row, delta, encode, noisy, conversion, convert, amplification, timeAt, density, hybridOnX0, hybridOnEps,
    rms, correlation, throughOne, number, level, box, share, place, linePath,
  };
})();

// The page.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const targets = ["x0", "eps", "v", "velocity", "score"];
  const names = {x0: "x₀", eps: "ε", v: "v", velocity: "velocity", score: "score"};
  const {lesson} = window, {number} = lesson;
  const byId = (id) => document.getElementById(id);
  const signed = (value) => value.toFixed(2).replace("-", "−");
  const pixelsOf = (levels) => levels.map((v) => v / 127.5 - 1);
  const shade = (v) => `rgb(${v},${v},${v})`;
  const heat = (v) => `rgb(${v},${Math.round(v * 0.753)},${Math.round(v * 0.302)})`;

  // What stands in the page and is drawn into.
  const found = (attribute) => Object.fromEntries(
    [...document.querySelectorAll(`[data-${attribute}]`)].map((e) => [e.dataset[attribute], e]),
  );
  const pictures = found("picture"), outputs = found("out");
  const charts = Object.fromEntries(Object.entries(found("chart")).map(([name, svg]) => [name, {
    frame: JSON.parse(svg.dataset.frame),
    lines: Object.fromEntries([...svg.querySelectorAll("[data-line]")].map((path) => [path.dataset.line, path])),
    mark: svg.querySelector("[data-mark]"),
  }]));

  function paint(name, fills) {
    [...pictures[name].children].forEach((pixel, i) => pixel.setAttribute("fill", fills ? fills[i] : "none"));
    pictures[name].classList.toggle("nothing", !fills);
  }

  function write(name, words) {
    if (outputs[name].textContent !== words) outputs[name].textContent = words;
  }

  function draw(name, lines) {
    for (const [key, [xs, ys]] of Object.entries(lines)) {
      charts[name].lines[key].setAttribute("d", lesson.linePath(charts[name].frame, xs, ys));
    }
  }

  function mark(name, x) {
    const {left, right, top, bottom} = lesson.box, {frame} = charts[name];
    const at = left + (right - left) * lesson.share(x, frame.x, frame.logX);
    charts[name].mark.setAttribute("d", `M${at.toFixed(1)} ${top}V${bottom}`);
  }

  const chosen = (id) => byId(id).selectedOptions[0].textContent;

  // One live region, which speaks when nothing has moved for a while.
  let pending = 0;
  let quiet = true; // but for the figure whose control was moved
  function say(words) {
    if (quiet) return;
    clearTimeout(pending);
    pending = setTimeout(() => { byId("said").textContent = words; }, 900);
  }

  // A slider with its words beside it; screen readers hear the same words.
  function told(slider, words) {
    slider.setAttribute("aria-valuetext", words);
    write(slider.id, words);
  }

  // A figure is drawn anew when any of these moves, and told of when the control is its own.
  function follow(figure, ids, render) {
    ids.forEach((id) => byId(id).addEventListener("input", () => {
      quiet = !byId(figure).contains(byId(id));
      render();
      quiet = true;
    }));
    render();
  }

  // A number of the summary leads to its figure as it is there.
  function links() {
    const {elements} = document.forms[0];
    document.querySelectorAll("a[data-set]").forEach((link) => link.addEventListener("click", () => {
      for (const [name, value] of link.dataset.set.split(" ").map((pair) => pair.split("="))) {
        const control = elements[name];
        control.value = value;
        (control instanceof RadioNodeList ? control[0] : control).dispatchEvent(new Event("input", {bubbles: true}));
      }
    }));
  }

  // The value that is drawn white.
  const spanOf = (target, sigma) => (target === "x0" ? 1 : target === "score" ? 3 / sigma : 3);
  const greys = (values, span) => values.map((v) => shade(lesson.level(v, -span, span)));
  const digit = () => pixelsOf(data.digits[byId("digit").value].pixels);
  const draws = () => data.noise[byId("draw").value];

  // 1
  function noiseFigure() {
    const slider = byId("noise-t"), t = Number(slider.value);
    const c = lesson.coefficients(data.schedules[byId("noise-schedule").value], t);
    const x0 = digit(), eps = draws(), xt = lesson.noisy(x0, eps, c);
    told(slider, `t = ${t.toFixed(2)}`);
    write("noise-mix", `α = ${c.alpha.toFixed(3)}, σ = ${c.sigma.toFixed(3)}`);
    paint("noise-x_t", greys(xt, 2));
    write("noise-x_t", `rms ${number(lesson.rms(xt))}`);
    for (const name of targets) {
      const y = lesson.row(name, c).every(Number.isFinite) && lesson.encode(name, x0, eps, c);
      paint(`noise-${name}`, y ? greys(y, spanOf(name, c.sigma)) : null);
      write(`noise-${name}`, y ? `rms ${number(lesson.rms(y))}` : "infinite here");
    }
    say(`Digit ${chosen("digit")}, ${chosen("draw")}, t = ${t.toFixed(2)}: ${outputs["noise-mix"].textContent}`);
  }

  // 2
  function convertFigure() {
    const source = document.querySelector("[name=source]:checked").value;
    const t = Number(byId("convert-t").value), size = Number(byId("convert-error").value);
    const schedule = data.schedules[byId("convert-schedule").value];
    const c = lesson.coefficients(schedule, t);
    told(byId("convert-t"), `t = ${t.toFixed(2)}`);
    told(byId("convert-error"), `rms ${size.toFixed(2)}`);
    showConverted(source, size, c);
    growCharts(schedule, t);
    const inX0 = lesson.conversion(source, "x0", c);
    const words = !inX0 ? `At t = ${t.toFixed(2)} ${names[source]} says nothing of x₀.`
      : c.sigma === 0 ? `At t = ${t.toFixed(2)} xₜ is x₀, whatever is predicted.`
        : `An error of ${size.toFixed(2)} in ${names[source]} is one of ${number(size * Math.abs(inX0[1]))} in x₀: ×${number(Math.abs(inX0[1]))}.`;
    write("convert-words", words);
    say(words);
  }

  function showConverted(source, size, c) {
    const x0 = digit(), eps = draws(), other = data.noise[(Number(byId("draw").value) + 1) % data.noise.length];
    const xt = lesson.noisy(x0, eps, c), scale = size / lesson.rms(other);
    const y = lesson.encode(source, x0, eps, c).map((v, i) => v + scale * other[i]);
    for (const name of targets) {
      const got = lesson.convert(y, xt, source, name, c);
      const finite = got && got.every(Number.isFinite);
      const truth = finite && lesson.encode(name, x0, eps, c);
      paint(`convert-${name}`, finite ? greys(got, spanOf(name, c.sigma)) : null);
      write(`convert-${name}`, finite ? `error ${number(lesson.rms(got.map((v, i) => v - truth[i])))}` : "not to be had");
      pictures[`convert-${name}`].closest("li").classList.toggle("source", name === source);
    }
  }

  function growCharts(schedule, t) {
    const inner = schedule.t.map((at) => (at > 0 && at < 1 ? lesson.coefficients(schedule, at) : null));
    for (const of of ["x0", "eps"]) {
      draw(`grow-${of}`, Object.fromEntries(targets.map((name) => (
        [name, [schedule.t, inner.map((c) => c && lesson.amplification(name, of, c))]]
      ))));
      mark(`grow-${of}`, t);
    }
  }

  // 3
  function weightFigure() {
    const exponent = Number(byId("hybrid").value), b = 10 ** exponent;
    const chosen = byId("hybrid-times").value, grid = data.lambda;
    const times = chosen === "uniform" ? {name: chosen} : {name: "logit_normal", mean: Number(chosen), std: 0.8};
    told(byId("hybrid"), `b = ${number(b)}`);
    const onX0 = grid.map((at) => lesson.hybridOnX0(b, at));
    const w = grid.map((at) => lesson.density(times, at) * lesson.hybridOnEps(b, at));
    draw("weight-m_x", {mine: [grid, lesson.throughOne(onX0)]});
    draw("weight-w", {mine: [grid, lesson.throughOne(w)]});
    say(`b = ${number(b)}: half of the weight is of ε where the signal-to-noise ratio is ${number(1 / b)}`);
  }

  function weightBoxes() {
    document.querySelectorAll("[data-weighting]").forEach((tick) => {
      const show = () => ["weight-m_x", "weight-w"].forEach((name) => {
        charts[name].lines[tick.dataset.weighting].classList.toggle("hidden", !tick.checked);
      });
      tick.addEventListener("input", show);
      show();
    });
  }

  // 4
  function digitRuns(setting) {
    const {targets: wide, narrow} = data.dynamics.digits;
    if (setting === "wide") return wide;
    return Object.fromEntries(Object.entries(narrow.targets).map(([name, byLoss]) => [name, byLoss[setting]]));
  }

  function trainingFigure() {
    const {levels} = data.dynamics.digits;
    const runs = digitRuns(byId("setting").value), at = Number(byId("level").value);
    told(byId("level"), `t = ${levels[at].toFixed(2)}`);
    for (const [name, run] of Object.entries(runs)) {
      draw("training-error", {[name]: [run.steps, run.error.map((row) => row[at])]});
      draw("training-loss", {[name]: [run.steps, run.loss]});
      write(`frechet-${name}`, `Fréchet ${number(run.frechet)}`);
      for (let i = 0; pictures[`drawn-${name}-${i}`]; i += 1) paint(`drawn-${name}-${i}`, run.samples[i].map(shade));
    }
    const ends = Object.entries(runs).map(([name, run]) => `${names[name]} ${number(run.error.at(-1)[at])}`);
    const words = `Error of x₀ at t = ${levels[at].toFixed(2)}, at the end of training: ${ends.join(", ")}`;
    write("training-words", words);
    say(words);
  }

  const side = 180;
  const scale = 1.4 * Math.max(...data.dynamics.spiral.truth.flat().map(Math.abs));

  function spiralFigure() {
    const {dims, runs} = data.dynamics.spiral;
    const dim = dims[byId("dim").value], words = [];
    told(byId("dim"), `D = ${dim}`);
    for (const [name, run] of Object.entries(runs[dim])) {
      const inside = run.points.filter((p) => p.every((v) => Math.abs(v) <= scale));
      const dots = inside.map(([x, y]) => `M${((x / scale + 1) * side / 2).toFixed(1)} ${((1 - y / scale) * side / 2).toFixed(1)}h0`);
      document.querySelector(`[data-dots="${name}"]`).setAttribute("d", dots.join(""));
      write(`spiral-off-${name}`, number(run.off_manifold));
      write(`spiral-from-${name}`, number(run.manifold_distance));
      write(`spiral-out-${name}`, `${run.points.length - inside.length} of ${run.points.length}`);
      draw("spiral-error", {[name]: [run.steps, run.error]});
      words.push(`${names[name]} ${number(run.off_manifold)}`);
    }
    const steps = Object.values(runs).flatMap((byTarget) => Object.values(byTarget).flatMap((run) => run.steps));
    const least = data.dynamics.spiral.ideal_by_dim[dim][data.dynamics.spiral.levels.indexOf(data.dynamics.spiral.level)];
    draw("spiral-error", {ideal: [[Math.min(...steps), Math.max(...steps)], [least, least]]});
    mark("off-plane", dim);
    say(`D = ${dim}; distance from the plane: ${words.join(", ")}`);
  }

  // 5
  function peekFigure() {
    const {t, runs} = data.sampling;
    const sample = byId("sample").value, at = Number(byId("peek-at").value);
    told(byId("peek-at"), `t = ${t[at].toFixed(2)}`);
    for (const [name, run] of Object.entries(runs)) {
      const final = run.x0[sample].at(-1);
      for (const kind of ["x", "raw", "x0"]) {
        const levels = run[kind][sample][at];
        paint(`peek-${kind}-${name}`, levels.map(shade));
        write(`peek-${kind}-${name}`, signed(lesson.correlation(levels, final)));
      }
    }
    mark("away", t[at]);
    const away = Object.entries(runs).map(([name, run]) => `${names[name]} ${number(run.away[at])}`);
    const words = `Distance of the believed x₀ from the end at t = ${t[at].toFixed(2)}: ${away.join(", ")}`;
    write("peek-words", words);
    say(`Sample ${Number(sample) + 1}. ${words}`);
  }

  // 6
  function confidenceFigure() {
    const example = data.confidence.examples[byId("example").value];
    for (const kind of ["x0", "x_t", "mean", "std", "error"]) {
      const map = kind === "std" || kind === "error";
      paint(`sure-${kind}`, example[kind].map(map ? heat : shade));
      write(`sure-${kind}`, map ? `rms ${number(data.confidence.full_scale / 255 * lesson.rms(example[kind]))}` : {
        x0: `a ${example.label}`, x_t: `t = ${example.t.toFixed(2)}`, mean: "",
      }[kind]);
    }
    const r = signed(lesson.correlation(example.std, example.error));
    write("sure-words", `Over these 64 pixels the two maps correlate by ${r}.`);
    say(outputs["sure-words"].textContent);
  }

  // 8
  function quiz() {
    const questions = [...document.querySelectorAll(".question")], firsts = new Map();
    const forget = (why) => { why.replaceChildren(); why.className = "why"; };
    const tell = () => write("score", `${[...firsts.values()].filter(Boolean).length} right of ${firsts.size} answered; ${questions.length} questions`);
    for (const question of questions) {
      const details = question.querySelector("details"), why = question.querySelector(".why");
      const answers = [...details.querySelectorAll("li")].map((li) => li.innerHTML);
      details.remove();
      // An arrow key moves the choice: only what is checked is an answer.
      const check = () => {
        const chosen = question.querySelector("input:checked");
        if (!chosen) { why.textContent = "Choose an answer first."; return; }
        const right = chosen.hasAttribute("data-right");
        if (!firsts.has(question.id)) firsts.set(question.id, right);
        why.innerHTML = answers[chosen.value];
        why.className = right ? "why right" : "why wrong";
        tell();
      };
      question.querySelector(".check").addEventListener("click", check);
      question.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && event.target.matches("input")) check();
      });
      question.addEventListener("input", () => forget(why));
    }
    byId("again").addEventListener("click", () => {
      firsts.clear();
      for (const question of questions) {
        question.querySelectorAll("input").forEach((input) => { input.checked = false; });
        forget(question.querySelector(".why"));
      }
      tell();
      questions[0].querySelector("input").focus();
    });
    tell();
  }

  // A reload must not keep the controls of one state beside the figures of another.
  document.forms[0].reset();
  document.forms[0].addEventListener("submit", (event) => event.preventDefault());
  document.documentElement.classList.add("live");
  follow("fig-noise", ["digit", "draw", "noise-t", "noise-schedule"], noiseFigure);
  follow("fig-convert", ["digit", "draw", "sources", "convert-t", "convert-error", "convert-schedule"], convertFigure);
  follow("fig-weights", ["hybrid", "hybrid-times"], weightFigure);
  weightBoxes();
  follow("fig-digits", ["setting", "level"], trainingFigure);
  follow("fig-spiral", ["dim"], spiralFigure);
  follow("fig-peek", ["sample", "peek-at"], peekFigure);
  follow("fig-sure", ["example"], confidenceFigure);
  links();
  quiz();
})();
