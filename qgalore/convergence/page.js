// What the pointer is on, a cursor at the same step in all figures, and lines that a click on their name switches.
"use strict";
(() => {
  const short = (value) => {
    if (value && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2);
    return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
  };
  const place = (axis, value) => (axis.base === 1 ? value : Math.log(Math.max(value, 1e-12)) / Math.log(axis.base));
  const toPixel = (axis, value) => {
    const [low, high, at] = [axis.low, axis.high, value].map((one) => place(axis, one));
    return axis.start + (high === low ? 0.5 : (at - low) / (high - low)) * (axis.end - axis.start);
  };
  const toValue = (axis, pixel) => axis.low + ((pixel - axis.start) / (axis.end - axis.start)) * (axis.high - axis.low);

  // The index of a series' point at x: the nearest, or the last one before x if its value holds; -1 outside of them.
  function at(series, x, axis) {
    const points = series.points, room = (axis.high - axis.low) / 50;
    if (x < points[0][0] - room || x > points[points.length - 1][0] + room) return -1;
    let best = 0;
    points.forEach(([a], i) => {
      if (series.holds ? a <= x : Math.abs(a - x) < Math.abs(points[best][0] - x)) best = i;
    });
    return best;
  }

  const reading = (series, i) => short(series.points[i][1]) + (series.upper ? ` to ${short(series.upper[i])}` : "");
  const off = (figure, key) => figure.buttons[key].getAttribute("aria-pressed") === "false";

  // Values at x beside the names of a figure's lines.
  function showValues(figure, x) {
    const found = figure.buttons.map(() => []);
    for (const series of figure.data.series || []) {
      const i = x === null ? -1 : at(series, x, figure.data.x);
      if (i >= 0) found[series.key][series.upper ? "push" : "unshift"](reading(series, i));
    }
    figure.buttons.forEach((button, key) => {
      const [value = "", band] = found[key];
      button.querySelector("em").textContent = value + (band ? ` (${band})` : "");
    });
  }

  // In words: the cell of a heat map under the pointer, or the point of a line that is nearest to it.
  function words(figure, x, y) {
    const data = figure.data;
    if (data.rows) {
      const row = data.rows[Math.floor(((y - data.top) / (data.bottom - data.top)) * data.rows.length)];
      const cell = row && row[1].findLast(([start, end]) => start <= x && x <= end);
      if (!cell) return row ? `${row[0]}, ${data.x.label} ${short(Math.round(x))}: nothing recorded` : "";
      return `${row[0]}, ${data.x.label} ${short(cell[0])} to ${short(cell[1])}: ${data.what} ${short(cell[2])}`;
    }
    let nearest = null;
    for (const series of data.series.filter((one) => !off(figure, one.key))) {
      const i = at(series, x, data.x);
      const away = i < 0 ? Infinity : Math.abs(toPixel(data.y, series.points[i][1]) - y);
      if (!series.upper && (!nearest || away < nearest.away)) nearest = { series, i, away };
    }
    if (!nearest || nearest.i < 0) return "";
    const { series, i } = nearest;
    const where = `${data.x.label} ${short(series.holds ? Math.round(x) : series.points[i][0])}`;
    return `${data.names[series.key]}, ${where}: ${reading(series, i)}`;
  }

  // The cursors of all figures with this x axis at x; none if x is null.
  function point(from, x, y) {
    for (const figure of figures.filter((one) => one.data.x.label === from.data.x.label)) {
      const inside = x !== null && x >= figure.data.x.low && x <= figure.data.x.high;
      const pixel = inside ? toPixel(figure.data.x, x) : 0;
      figure.cursor.setAttribute("x1", pixel);
      figure.cursor.setAttribute("x2", pixel);
      figure.cursor.classList.toggle("off", !inside);
      showValues(figure, inside ? x : null);
      const own = figure === from ? words(figure, x, y) : `${from.data.x.label} ${short(Math.round(x))}`;
      figure.output.textContent = inside ? own : "";
    }
  }

  // A browser that reads the page again, because the run goes on, keeps what was switched off.
  let memory = { getItem() {}, setItem() {}, removeItem() {} };
  try { memory = window.sessionStorage; } catch { /* a page in a frame without rights forgets */ }
  const name = (figure, key) => `off ${figure.place} ${figure.data.names[key]}`;
  function set(figure, key, on, keep = true) {
    figure.buttons[key].setAttribute("aria-pressed", String(on));
    figure.svg.querySelectorAll(`[data-key="${key}"]`).forEach((part) => part.classList.toggle("off", !on));
    if (keep) memory[on ? "removeItem" : "setItem"](name(figure, key), "1");
  }

  function prepare(element, number) {
    const svg = element.querySelector("svg"), data = JSON.parse(element.querySelector("script").textContent);
    const cursor = document.createElementNS(svg.namespaceURI, "line"), frame = svg.querySelector(".frame");
    const top = +frame.getAttribute("y");
    cursor.setAttribute("class", "cursor off");
    cursor.setAttribute("y1", top);
    cursor.setAttribute("y2", top + +frame.getAttribute("height"));
    svg.append(cursor);
    svg.querySelectorAll("[data-key] > title, g > title").forEach((title) => title.remove());
    const buttons = [...element.querySelectorAll("button.key")], output = element.querySelector("output");
    const figure = { svg, data, cursor, buttons, output, place: `${number} ${element.querySelector("h3").textContent}` };
    buttons.forEach((button, key) => {
      button.addEventListener("click", () => set(figure, key, off(figure, key)));
      button.addEventListener("dblclick", () => {
        const alone = buttons.every((_, other) => off(figure, other) !== (other === key));
        buttons.forEach((_, other) => set(figure, other, alone || other === key));
      });
      if (memory.getItem(name(figure, key))) set(figure, key, false, false);
    });
    const move = (event) => {
      const pointer = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const inside = pointer.x >= data.x.start && pointer.x <= data.x.end;
      point(figure, inside ? toValue(data.x, pointer.x) : null, pointer.y);
    };
    svg.addEventListener("pointermove", (event) => held || move(event));
    svg.addEventListener("pointerleave", () => held || point(figure, null, 0));
    svg.addEventListener("click", (event) => ((held = !held), move(event)));
    return figure;
  }

  let held = false;
  const figures = [...document.querySelectorAll("figure")].map(prepare);
})();
