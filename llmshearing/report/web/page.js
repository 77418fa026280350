// Draws the figures of the page from the JSON in it. Text is only ever set as text.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  const LEVELS = 9; // shades of a map's cells
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");

  function node(parent, name, attributes = {}, text = null) {
    const svg = parent instanceof SVGElement || name === "svg";
    const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }

  function short(value) {
    const size = Math.abs(value);
    for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
      if (size >= unit) return trimmed((value / (letter === "k" ? 1e3 : unit)).toPrecision(4)) + letter;
    return size !== 0 && size < 1e-3 ? value.toExponential(2) : trimmed(value.toPrecision(4));
  }
  const trimmed = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

  function ticks(low, high, number) {
    const raw = (high - low) / number, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
    return found;
  }

  function range(values) {
    let low = Math.min(...values), high = Math.max(...values);
    if (low > 0 && low < 0.3 * high) low = 0;
    const room = (high - low) * 0.06 || Math.abs(high) * 0.06 || 1;
    return [low === 0 ? 0 : low - room, high + room];
  }

  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const left = x + 14 + tip.offsetWidth > document.documentElement.clientWidth ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.left = `${Math.max(4, left) + window.scrollX}px`;
    tip.style.top = `${y + 14 + window.scrollY}px`;
  }
  const hide = () => { tip.hidden = true; };

  // Frame ----------------------------------------------------------------------------------------------------------

  const W = 520, H = 236, LEFT = 52, RIGHT = 112, TOP = 8, BOTTOM = 32;

  function frame(parent, title, unit, xs, ys, xname, said) {
    const figure = node(parent, "figure", { class: "chart" });
    const caption = node(figure, "figcaption", {}, title);
    if (unit) node(caption, "span", {}, `  ${unit}`);
    const svg = node(figure, "svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: "0", "aria-label": `${title}. ${said}` });
    const [x0, x1] = xs, [y0, y1] = range(ys);
    const x = (value) => LEFT + ((value - x0) / (x1 - x0 || 1)) * (W - LEFT - RIGHT);
    const y = (value) => H - BOTTOM - ((value - y0) / (y1 - y0 || 1)) * (H - TOP - BOTTOM);
    for (const value of ticks(y0, y1, 4)) {
      node(svg, "line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(value), y2: y(value) });
      node(svg, "text", { x: LEFT - 7, y: y(value) + 4, "text-anchor": "end" }, short(value));
    }
    node(svg, "line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM });
    const marks = ticks(x0, x1 === x0 ? x0 + 1 : x1, 5).filter((value) => value <= x1);
    for (const value of marks)
      node(svg, "text", { x: x(value), y: H - BOTTOM + 16, "text-anchor": "middle" }, short(value));
    node(svg, "text", { x: W - RIGHT, y: H - 2, "text-anchor": "end" }, xname);
    return { svg, x, y };
  }

  // Lines ----------------------------------------------------------------------------------------------------------

  function chart(parent, figure) {
    const xs = figure.series.flatMap((each) => each.x), ys = figure.series.flatMap((each) => each.y);
    const last = (each) => each.y[each.y.length - 1];
    const said = figure.series.map((each) => `${each.name}: from ${short(each.y[0])} to ${short(last(each))}`).join("; ");
    const end = Math.max(...xs), first = Math.min(...xs) < 0.1 * end ? 0 : Math.min(...xs);
    const { svg, x, y } = frame(parent, figure.title, figure.unit, [first, end], ys, figure.x, said);
    for (const each of figure.series) {
      const path = each.x.map((value, at) => `${at ? "L" : "M"}${x(value).toFixed(1)} ${y(each.y[at]).toFixed(1)}`).join("");
      const color = `stroke: var(--c${each.color % 8})`;
      node(svg, "path", { class: "line", d: path, style: color, "stroke-dasharray": each.dash ? "5 4" : "none" });
      if (each.x.length < 12)
        each.x.forEach((value, at) => node(svg, "circle", { cx: x(value), cy: y(each.y[at]), r: 2.2, style: `fill: var(--c${each.color % 8})` }));
    }
    labels(svg, figure.series.map((each) => ({ text: each.name, y: y(last(each)), color: each.color })));
    const cross = node(svg, "line", { class: "cross", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
    const every = [...new Set(xs)].sort((a, b) => a - b);
    let at = every.length - 1;
    const point = (to) => {
      at = Math.max(0, Math.min(every.length - 1, to));
      cross.setAttribute("visibility", "visible");
      cross.setAttribute("x1", x(every[at]));
      cross.setAttribute("x2", x(every[at]));
      const box = svg.getBoundingClientRect();
      const lines = figure.series.map((each) => `${each.name}  ${short(each.y[nearest(each.x, every[at])])}`);
      show([`${figure.x} ${short(every[at])}`, ...lines].join("\n"), box.left + (x(every[at]) / W) * box.width, box.top + 20);
    };
    const leave = () => { cross.setAttribute("visibility", "hidden"); hide(); };
    svg.addEventListener("mousemove", (event) => {
      const box = svg.getBoundingClientRect();
      const where = ((event.clientX - box.left) / box.width) * W;
      point(nearest(every, first + ((where - LEFT) / (W - LEFT - RIGHT)) * (end - first)));
    });
    svg.addEventListener("mouseleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      point(cross.getAttribute("visibility") === "hidden" ? every.length - 1 : at + move);
    });
  }

  function nearest(sorted, value) {
    let best = 0;
    for (let at = 1; at < sorted.length; at++) if (Math.abs(sorted[at] - value) < Math.abs(sorted[best] - value)) best = at;
    return best;
  }

  // Names at the ends of lines, or beside points (with x), pushed apart.
  function labels(svg, wanted) {
    const gap = 13, lowest = H - BOTTOM + (wanted[0].x === undefined ? 4 : -4);
    const sorted = wanted.map((each) => ({ ...each })).sort((a, b) => a.y - b.y);
    sorted.forEach((each, at) => { if (at) each.y = Math.max(each.y, sorted[at - 1].y + gap); });
    for (let at = sorted.length - 1, limit = lowest; at >= 0; at--, limit -= gap) sorted[at].y = Math.min(sorted[at].y, limit);
    for (const each of sorted) {
      const text = each.text.length > 17 ? `${each.text.slice(0, 16)}…` : each.text;
      const left = each.x === undefined ? W - RIGHT + 7 : each.x + 9;
      const made = node(svg, "text", { x: left, y: each.y + 4, style: `fill: var(--c${each.color % 8})` }, text);
      node(made, "title", {}, each.text);
    }
  }

  // Points ---------------------------------------------------------------------------------------------------------

  function scatter(parent, found) {
    const points = found.points.filter((each) => typeof each.x === "number" && typeof each.y === "number");
    if (!points.length) return;
    const spread = points.flatMap((each) => [each.y - (each.error || 0), each.y + (each.error || 0)]);
    const said = points.map((each) => `${each.name}: ${short(each.x)}, ${short(each.y)}`).join("; ");
    const xs = range(points.map((each) => each.x));
    const { svg, x, y } = frame(parent, found.y, `against ${found.x}`, xs, spread, found.x, said);
    points.forEach((each, at) => {
      const color = `var(--c${at % 8})`;
      if (each.error)
        node(svg, "line", { x1: x(each.x), x2: x(each.x), y1: y(each.y - each.error), y2: y(each.y + each.error), style: `stroke: ${color}` });
      const mark = each.marked
        ? node(svg, "rect", { x: x(each.x) - 4, y: y(each.y) - 4, width: 8, height: 8, style: `fill: ${color}` })
        : node(svg, "circle", { cx: x(each.x), cy: y(each.y), r: 4, style: `fill: ${color}` });
      node(mark, "title", {}, `${each.name}: ${short(each.x)}, ${short(each.y)}${each.error ? ` ± ${short(each.error)}` : ""}`);
    });
    labels(svg, points.map((each, at) => ({ text: each.name, x: x(each.x), y: y(each.y), color: at })));
  }

  // Mask maps ------------------------------------------------------------------------------------------------------

  const values = (row) => [...row].map((letter) => Math.max(0, ALPHABET.indexOf(letter)) / (ALPHABET.length - 1));
  const mean = (row) => (row.length ? row.reduce((sum, value) => sum + value, 0) / row.length : 0);

  function maps(parent, found, run) {
    node(parent, "h3", {}, "Mask maps");
    const controls = node(parent, "div", { class: "controls" });
    const views = Object.keys(found.views);
    let view = views[0], at = found.frames.length - 1;
    if (found.frames.length > 1) {
      const label = node(controls, "label", {}, "evaluation at batch ");
      const output = node(label, "output", {}, found.frames[at].batch);
      label.append(" ");
      const slider = node(label, "input", { type: "range", min: 0, max: found.frames.length - 1, step: 1, value: at });
      const tell = () => {
        at = Number(slider.value);
        output.textContent = found.frames[at].batch;
        slider.setAttribute("aria-valuetext", `batch ${found.frames[at].batch}`);
        draw();
      };
      slider.setAttribute("aria-valuetext", `batch ${found.frames[at].batch}`);
      slider.addEventListener("input", tell);
    } else if (found.step) node(controls, "span", {}, `evaluation at batch ${found.frames[0].batch}`);
    if (views.length > 1) {
      const choice = node(controls, "fieldset");
      node(choice, "legend", {}, "units");
      for (const name of views) {
        const label = node(choice, "label");
        const radio = node(label, "input", { type: "radio", name: `view${run}`, value: name });
        radio.checked = name === view;
        radio.addEventListener("change", () => { view = name; draw(); });
        label.append(` ${found.views[name]}`);
      }
    }
    const kinds = [...new Set(found.frames.flatMap((frame) => views.flatMap((each) => Object.keys(frame.maps[each] || {}))))];
    const panels = node(parent, "div", { class: "panels" });
    const drawers = kinds.map((kind) => panel(panels, kind, found.frames.map((frame) => frame.maps)));
    const draw = () => drawers.forEach((each) => each(found.frames[at].maps[view] || {}, found.views[view]));
    draw();
  }

  function panel(parent, kind, every) {
    const sample = every.flatMap((maps) => Object.values(maps)).map((kinds) => kinds[kind]).find(Boolean);
    const cells = Math.max(1, ...sample.rows.map((row) => row.length)), shared = sample.rows.length === 1;
    const narrow = cells === 1, wide = narrow ? 150 : 520, left = shared ? 0 : 26, right = narrow ? 44 : 42;
    const high = shared ? 26 : Math.max(5, Math.min(18, 420 / sample.rows.length)), total = high * sample.rows.length;
    const figure = node(parent, "figure", { class: `map ${narrow ? "narrow" : "wide"}`, "data-kind": kind });
    const caption = node(figure, "figcaption", {}, kind), detail = node(caption, "span");
    const svg = node(figure, "svg", { viewBox: `0 0 ${wide} ${total + 2}`, role: "img" });
    const across = (wide - left - right) / cells;
    const every_n = high >= 11 ? 1 : Math.ceil(11 / high);
    const ground = node(svg, "g"), drawn = node(svg, "g"), texts = node(svg, "g");
    let now = sample;
    sample.rows.forEach((row, layer) => {
      node(ground, "rect", { class: "ground", x: left, y: layer * high, width: across * row.length, height: high - 1 });
      if (!shared && layer % every_n === 0)
        node(ground, "text", { x: left - 6, y: layer * high + high / 2 + 3.5, "text-anchor": "end" }, layer);
    });
    svg.addEventListener("mousemove", (event) => {
      const box = svg.getBoundingClientRect();
      const layer = Math.floor((((event.clientY - box.top) / box.height) * (total + 2)) / high);
      const row = now.rows[layer], cell = Math.floor((((event.clientX - box.left) / box.width) * wide - left) / across);
      if (!row || cell < 0 || cell >= row.length) return hide();
      const from = Math.floor((cell * now.units) / row.length), to = Math.floor(((cell + 1) * now.units) / row.length) - 1;
      const units = narrow ? "" : from >= to ? `  unit ${from}` : `  units ${from} to ${to}`;
      show(`${shared ? kind : `layer ${layer}`}${units}\n${Math.round(values(row)[cell] * 100)} %`, event.clientX, event.clientY);
    });
    svg.addEventListener("mouseleave", hide);
    return (maps, view) => {
      now = maps[kind] || { units: 0, rows: [] };
      const rows = now.rows.map(values), part = now.rows.map((row, at) => now.sums[at] / (now.units || 1));
      const paths = Array.from({ length: LEVELS }, () => "");
      rows.forEach((row, layer) => {
        for (let from = 0; from < row.length; ) {
          const level = Math.round(row[from] * (LEVELS - 1));
          let to = from + 1;
          while (to < row.length && Math.round(row[to] * (LEVELS - 1)) === level) to++;
          const width = (to - from) * across;
          paths[level] += `M${(left + from * across).toFixed(2)} ${(layer * high).toFixed(2)}h${width.toFixed(2)}v${(high - 1).toFixed(2)}h-${width.toFixed(2)}z`;
          from = to;
        }
      });
      drawn.replaceChildren();
      paths.forEach((path, level) => {
        if (level && path) node(drawn, "path", { class: "cell", d: path, "fill-opacity": level / (LEVELS - 1) });
      });
      texts.replaceChildren();
      rows.forEach((row, layer) => {
        if (layer % every_n === 0)
          node(texts, "text", { x: left + across * row.length + 6, y: layer * high + high / 2 + 3.5 }, `${Math.round(part[layer] * 100)} %`);
      });
      const count = narrow ? rows.length : now.units;
      detail.textContent = `  ${short(mean(part) * count)} of ${count}${shared || narrow ? "" : " a layer, on average"}`;
      svg.setAttribute("aria-label", `${kind}, ${view}: ${rows.map((row, at) => `${shared ? "all layers" : `layer ${at}`} ${Math.round(part[at] * 100)} %`).join(", ")}`);
    };
  }

  // ----------------------------------------------------------------------------------------------------------------

  for (const place of document.querySelectorAll(".figures")) {
    const run = data.runs[Number(place.dataset.run)];
    const figures = place.dataset.compared ? data.compared : run.figures;
    for (const figure of figures) chart(place, figure);
    if (!place.dataset.compared) for (const found of run.points) scatter(place, found);
    if (!place.children.length) place.remove();
  }
  for (const place of document.querySelectorAll(".maps")) {
    const run = data.runs[Number(place.dataset.run)];
    if (run.maps) maps(place, run.maps, place.dataset.run);
  }
  document.documentElement.dataset.drawn = "yes";
})();
