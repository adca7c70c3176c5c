// The charts of bitrank: each function takes data and options and returns a <figure>.
//
// Needs `d3` and `Plot` (vendor/) loaded before it; works from file:// and from a server. The data have the shapes of
// api/report.py and reach the page as text nodes only. Colours are the custom properties of charts.css.
// Every chart takes the options caption (string) and width (pixels, until the figure is laid out). Its <figure> has
//   mark({x, y}) to point at a place in data coordinates without drawing again (null takes the mark away),
//   locate(event) to tell the data coordinates {x, y} under a pointer,
//   update(data) to show other data of the same kind.
window.bitrank = (() => {
  "use strict";

  const mebibytes = (bytes) => `${d3.format(",.2f")(bytes / 2 ** 20)} MiB`;
  const nats = (value) => `${number(value)} nats/token`;
  const bitsColour = (bits) => `var(--bits-${bits}, var(--bits-8))`;
  const bitsInk = (bits) => `var(--on-bits-${bits}, var(--on-bits-8))`;
  const literal = (value) => ({ value, scale: null });
  const value = (key) => (d) => (Number.isInteger(d[key]) ? String(d[key]) : number(d[key]));
  const factorBits = (d) => (d.rank > 0 ? String(d.factor_bits) : "–");
  const rankOf = (d) => (d.heads > 1 ? `${d.rank} × ${d.heads} heads` : String(d.rank));
  const grid = { bits: value("bits"), rank: rankOf, group: value("group_size"), "factor bits": factorBits };

  /** Three significant digits, in powers of ten where very small; a dash for what is not known. */
  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1000) return d3.format(",.0f")(value);
    return d3.format(size > 0 && size < 1e-4 ? ".2e" : ".3r")(value);
  }

  /** A share as per cent; a share that is rounding noise is said to be below what anyone can use. */
  function percent(share) {
    if (share > 0 && share < 1e-6) return "< 0.0001 %";
    return `${d3.format(".3~r")(100 * share)} %`;
  }

  function element(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  /** A table; `texts` and `numbers` map a column's label to row => cell, numbers right-aligned after the texts. */
  function table(texts, numbers, rows) {
    const columns = [
      ...Object.entries(texts).map(([label, cell]) => ({ label, cell, kind: {} })),
      ...Object.entries(numbers).map(([label, cell]) => ({ label, cell, kind: { class: "numeric" } })),
    ];
    const head = columns.map(({ label, kind }) => element("th", { scope: "col", ...kind }, label));
    const cells = (row) => columns.map(({ cell, kind }) => element("td", kind, cell(row)));
    const body = rows.map((row) => element("tr", {}, ...cells(row)));
    return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  }

  /** A legend; `items` are [shape, colour, label], the shape one of line, dot, ring, square. */
  function legend(items) {
    const swatch = (shape, colour) => element("i", { class: `swatch ${shape}`, style: `--colour: ${colour}` });
    const entries = items.map(([shape, colour, label]) => element("li", {}, swatch(shape, colour), label));
    return element("ul", { class: "legend", "aria-hidden": "true" }, ...entries);
  }

  /** A drop-down list; `items` are {text, group}, `choose` is called with the index of the one chosen. */
  function selectBox(label, items, chosen, choose) {
    const option = (index) => element("option", { value: index }, items[index].text);
    const groups = d3.group(d3.range(items.length), (index) => items[index].group);
    const list = [...groups].map(([group, members]) => element("optgroup", { label: group }, ...members.map(option)));
    const select = element("select", {}, ...list);
    select.value = chosen;
    select.addEventListener("change", () => choose(Number(select.value)));
    return element("label", { class: "picker" }, label, select);
  }

  /** A row of buttons of which one is pressed; the arguments of selectBox. */
  function buttonRow(label, items, chosen, choose) {
    const buttons = items.map(({ text }) => element("button", { type: "button" }, text));
    const press = (index) => buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(i === index)));
    buttons.forEach((button, index) => button.addEventListener("click", () => (press(index), choose(index))));
    press(chosen);
    return element("div", { class: "picker segmented", role: "group", "aria-label": label }, ...buttons);
  }

  /**
   * The figure around every chart. `view(data, index)` says what to show for one choice of the picker: {label, draw,
   * legend, notes, warnings, table}, where draw(width) returns an <svg> and warnings may be left out. It is drawn
   * again whenever the data, the choice or the width changes; a table that is out of sight is left until it is opened.
   */
  function figure(view, data, { caption = "", width = 960, picker = null }) {
    const [key, plot, note] = [element("div"), element("div", { class: "plot" }), element("p", { class: "note" })];
    const values = element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Numbers" });
    const numbers = element("details", {}, element("summary", {}, "Show the numbers"), values);
    let [shown, svg, marked] = [null, null, null];
    let chosen = picker?.chosen ?? 0;
    let drawnWidth = width;

    function redraw() {
      svg = shown.draw(drawnWidth);
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", shown.label);
      plot.replaceChildren(svg);
      mark(marked);
    }
    function show() {
      shown = view(data, chosen);
      key.replaceChildren(legend(shown.legend));
      const warnings = (shown.warnings ?? []).map((line) => element("span", { class: "warning" }, line));
      note.replaceChildren(...warnings, ...shown.notes.map((line) => element("span", {}, line)));
      if (numbers.open || values.childElementCount === 0) fill();
      redraw();
    }
    function mark(point) {
      marked = point;
      drawMark(svg, point);
    }
    const fill = () => values.replaceChildren(shown.table());
    const update = (next) => ((data = next), show());
    const locate = (event) => ({ x: invert(svg, "x", event), y: invert(svg, "y", event) });
    numbers.addEventListener("toggle", () => numbers.open && fill());
    show();
    new ResizeObserver(([entry]) => {
      const measured = Math.floor(entry.contentRect.width);
      if (measured < 1 || measured === drawnWidth) return;
      drawnWidth = measured;
      requestAnimationFrame(redraw);
    }).observe(plot);

    const choose = (index) => ((chosen = index), show(), picker.onSelect?.(index));
    const controls = picker?.items.length > 1 ? [picker.build(picker.label, picker.items, picker.chosen, choose)] : [];
    const heading = element("figcaption", {}, caption);
    const node = element("figure", { class: "chart" }, heading, ...controls, key, plot, note, numbers);
    return Object.assign(node, { mark, locate, update });
  }

  /** A ring with a line down to the axis, or a frame around a cell, at data coordinates; outside the axes, nothing. */
  function drawMark(svg, point) {
    const [x, y] = [svg.scale("x"), svg.scale("y")];
    const [left, top] = [point ? x.apply(point.x) : NaN, point ? y.apply(point.y) : NaN];
    const inside = (scale, value) => value >= d3.min(scale.range) && value <= d3.max(scale.range);
    const places = inside(x, left) && inside(y, top) ? [point] : [];
    const layer = d3.select(svg).selectAll("g.chosen").data(places).join("g").attr("class", "chosen");
    if (x.bandwidth) {
      const frame = layer.selectAll("rect").data(places).join("rect").attr("rx", 4);
      return void frame.attr("x", left).attr("y", top).attr("width", x.bandwidth).attr("height", y.bandwidth);
    }
    const line = layer.selectAll("line").data(places).join("line");
    line.attr("x1", left).attr("x2", left).attr("y1", top).attr("y2", d3.max(y.range));
    layer.selectAll("circle").data(places).join("circle").attr("r", 6).attr("cx", left).attr("cy", top);
  }

  function invert(svg, axis, event) {
    const [scale, box] = [svg.scale(axis), svg.getBoundingClientRect()];
    const pixel = axis === "x" ? event.clientX - box.left : event.clientY - box.top;
    if (scale.invert) return scale.invert(pixel);
    return scale.domain[Math.floor((pixel - scale.apply(scale.domain[0])) / scale.step)];
  }

  function draw(options) {
    const style = { fontFamily: "inherit", fontSize: "12px", color: "inherit" };
    return Plot.plot({ marginTop: 34, marginBottom: 42, marginLeft: 54, style, ...options });
  }

  /** A log axis with ticks that a reader can name: 1, 2, 5 per decade where few decades show, else powers of ten. */
  function logAxis(values, label) {
    const domain = [d3.min(values) / 1.3, d3.max(values) * 1.3];
    const steps = domain[1] / domain[0] < 200 ? [1, 2, 5] : [1];
    const exponents = d3.range(Math.floor(Math.log10(domain[0])), Math.ceil(Math.log10(domain[1])) + 1);
    const ticks = exponents.flatMap((exponent) => steps.map((step) => Number(`${step}e${exponent}`)));
    const visible = ticks.filter((tick) => tick >= domain[0] && tick <= domain[1]);
    const tickFormat = (tick) => (tick < 1e-4 ? d3.format(".0e")(tick) : String(tick));
    return { type: "log", domain, ticks: visible, tickFormat, label, grid: true };
  }

  const halo = { fill: "var(--ink)", stroke: "var(--paper)", strokeWidth: 4 };
  const tipStyle = { fill: "var(--paper)", stroke: "var(--rule)", textPadding: 10, lineHeight: 1.35, maxRadius: 60 };
  const tip = (data, options, pointer = Plot.pointer) => Plot.tip(data, pointer({ ...tipStyle, ...options }));
  const everyFew = (values, width) => values.filter((_, i) => i % Math.ceil((values.length * 26) / width) === 0);

  /** Bars of KL per block with intervals; `blocks` is report.fidelity, `setting` how compressed, `source` how known. */
  function fidelityBars(blocks, { setting = "the probe setting", source = "predicted", ...options } = {}) {
    const order = d3.sort(blocks, (d) => d.block);
    const median = d3.median(order, (d) => d.kl_nats);
    const worst = d3.greatest(order, (d) => d.kl_nats);
    const top = d3.max(order, (d) => Math.max(d.kl_nats, d.kl_high ?? 0));
    const bounded = order.filter((d) => d.kl_low !== null && d.kl_high !== null);
    const interval = (d) => (bounded.includes(d) ? `\n${number(d.kl_low)} to ${number(d.kl_high)}` : "");
    const title = (d) => `block ${d.block}\n${nats(d.kl_nats)}${interval(d)}`;
    const [side, textAnchor] = order.indexOf(worst) < order.length / 2 ? [-10, "start"] : [10, "end"];
    const medianText = (value) => `median\n${number(value)}`;
    const timesMedian = (d) => `${(d.kl_nats / median).toFixed(1)}× the median`;
    const drawBars = (width) =>
      draw({
        width,
        height: 396,
        marginRight: 60,
        x: { type: "band", label: "block", padding: 0.28, ticks: everyFew(order.map((d) => d.block), width - 114) },
        y: { label: "KL, nats per token", grid: true, domain: [0, top * 1.1], ticks: 5 },
        marks: [
          Plot.barY(order, { x: "block", y: "kl_nats", fill: "var(--plan)", ry1: 2 }),
          Plot.ruleX(bounded, { x: "block", y1: (d) => Math.max(0, d.kl_low), y2: "kl_high", strokeWidth: 1.5 }),
          Plot.ruleY([median], { stroke: "var(--muted)", strokeDasharray: "3,3" }),
          Plot.text([median], { y: median, text: medianText, frameAnchor: "right", textAnchor: "start", dx: 8 }),
          Plot.text([worst], { x: "block", y: top, dy: -11, dx: side, textAnchor, text: timesMedian, ...halo }),
          Plot.ruleY([0], { stroke: "var(--muted)" }),
          tip(order, { x: "block", y: "kl_nats", title }, Plot.pointerX),
        ],
      });
    const view = () => ({
      draw: drawBars,
      label:
        `Bar chart of ${source} KL when one block alone is compressed to ${setting}, for ${order.length} blocks. ` +
        `Block ${worst.block} loses most, ${nats(worst.kl_nats)}; the median block loses ${number(median)}.`,
      legend: [
        ["square", "var(--plan)", `only this block at ${setting}, ${source}`],
        ...(bounded.length ? [["line", "var(--ink)", "interval"]] : []),
      ],
      notes: [],
      table: () =>
        table({ block: value("block") }, { KL: value("kl_nats"), low: value("kl_low"), high: value("kl_high") }, order),
    });
    return figure(view, blocks, options);
  }

  /** Error against bits, one line per rank; `curves` is report.curves, `selected` a layer's name. */
  function errorCurves(curves, { selected, onSelect, ...options } = {}) {
    const at = { x: "bits", y: "error" };
    function view(data, index) {
      const { layer, fit, ...points } = data[index];
      const groupSizes = points.measured.map((d) => d.group_size);
      const groupSize = groupSizes.includes(64) ? 64 : d3.mode(groupSizes);
      const visible = (d) => d.group_size === groupSize && d.error > 0 && !d.rotated;
      const [fitted, measured] = [points.fitted.filter(visible), points.measured.filter(visible)];
      const all = [...fitted, ...measured];
      const ranks = d3.sort(new Set(all.map((d) => d.rank)));
      const colour = (rank) => `var(--rank-${Math.min(ranks.indexOf(rank), 5)})`;
      const stroke = literal((d) => colour(d.rank));
      const widths = d3.sort(new Set(measured.filter((d) => d.rank > 0).map((d) => d.factor_bits)));
      const dotFill = (d) => (d.rank > 0 && d.factor_bits !== widths[0] ? "var(--paper)" : colour(d.rank));
      const title = (d) =>
        `${d.bits} bits, rank ${d.rank}, group ${d.group_size}\n` +
        `${d.rank > 0 ? `${d.factor_bits}-bit factors\n` : ""}error ${number(d.error)}`;
      const bitTicks = d3.sort(new Set(measured.map((d) => d.bits)));
      const drawCurves = (width) =>
        draw({
          width,
          height: 330,
          marginRight: 18,
          x: { label: "bits", domain: d3.extent(all, (d) => d.bits), ticks: bitTicks, tickFormat: "d", inset: 10 },
          y: logAxis(all.map((d) => d.error), "relative squared output error"),
          marks: [
            Plot.line(fitted, { ...at, z: "rank", stroke, strokeWidth: 1.75 }),
            Plot.dot(measured, { ...at, r: 3.6, stroke, strokeWidth: 1.5, fill: literal(dotFill) }),
            tip(measured, { ...at, title }),
          ],
        });
      const parameters = { c: fit.c, β: fit.beta, "r₀": fit.r0, δ: fit.delta, η: fit.eta };
      const values = Object.entries(parameters).map(([name, parameter]) => `${name} = ${number(parameter)}`);
      return {
        draw: drawCurves,
        label:
          `Line chart of the relative squared output error of ${layer} against bits at group size ${groupSize}, ` +
          `for ranks ${ranks.join(", ")}. R squared of the fit is ${fit.r_squared.toFixed(4)}.`,
        legend: [
          ...ranks.map((rank, i) => ["line", colour(rank), i === 0 ? `rank ${rank}` : String(rank)]),
          ["dot", "var(--muted)", "measured"],
          ...widths.slice(1).map((bits) => ["ring", "var(--muted)", `${bits}-bit factors`]),
        ],
        notes: [
          "Lines: E(b, r) = c · 2^(−βb) · (1 + r/r₀)^(−δ) · (1 − r/n)^η",
          `${values.join(", ")}, n = ${fit.n}; R² = ${fit.r_squared.toFixed(4)}`,
        ],
        table: () => table({}, { ...grid, error: value("error") }, points.measured),
      };
    }
    const items = curves.map(({ block, layer }) => ({ text: layer, group: `block ${block}` }));
    const chosen = Math.max(0, curves.findIndex((curve) => curve.layer === selected));
    return figure(view, curves, { ...options, picker: { build: selectBox, label: "Layer", items, chosen, onSelect } });
  }

  /** KL against size: plans as a line, uniform and measured as dots; `data` is report.frontier, `until` the largest size. */
  function frontier(data, { until, ...options } = {}) {
    const size = (d) => d.bits_per_weight;
    // The axis ends one uniform setting beyond what was measured: further down the log axis would flatten the gap.
    const reach = d3.max(data.measured, size) ?? d3.max(data.uniform, size) ?? Infinity;
    const limit = until ?? d3.min(data.uniform.filter((d) => size(d) > reach), size) ?? reach;
    const drawable = (points) => d3.sort(points.filter((d) => d.kl_nats > 0 && size(d) <= limit), size);
    const [optimal, uniform, measured] = [drawable(data.optimal), drawable(data.uniform), drawable(data.measured)];
    const [plans, baselines] = ["plan", "uniform"].map((kind) => measured.filter((d) => d.kind === kind));
    const labelled = [...baselines, ...uniform.filter((u) => !baselines.some((b) => Math.abs(size(b) - size(u)) < 0.05))];
    const named = (points, source) => points.map((d) => ({ ...d, name: d.label ?? "optimal plan", source }));
    const points = [...named(measured, "measured"), ...named(uniform, "predicted"), ...named(optimal, "predicted")];
    const at = { x: "bits_per_weight", y: "kl_nats" };
    const label = { ...at, ...halo, text: "label" };
    const title = (d) =>
      `${d.name}, ${d.source}\n${nats(d.kl_nats)}\n${size(d).toFixed(2)} bits per weight\n${mebibytes(d.total_bytes)}`;
    const drawFrontier = (width) =>
      draw({
        width,
        height: 460,
        marginRight: 8,
        x: { label: "bits per weight, all overhead included", domain: d3.extent(points, size), inset: 64 },
        y: logAxis(points.map((d) => d.kl_nats), "KL, nats per token"),
        marks: [
          Plot.line(uniform, { ...at, stroke: "var(--uniform)", strokeDasharray: "4,4", strokeOpacity: 0.75 }),
          Plot.line(baselines, { ...at, stroke: "var(--uniform)", strokeOpacity: 0.75 }),
          Plot.line(optimal, { ...at, stroke: "var(--plan)", strokeWidth: 2.25 }),
          Plot.dot(uniform, { ...at, r: 4, stroke: "var(--uniform)", strokeWidth: 1.75, fill: "var(--paper)" }),
          Plot.dot(baselines, { ...at, r: 5, fill: "var(--uniform)", stroke: "var(--paper)" }),
          Plot.dot(plans, { ...at, r: 5.5, fill: "var(--plan)", stroke: "var(--paper)" }),
          Plot.text(labelled, { ...label, dx: 9, dy: -9, textAnchor: "start", fill: "var(--uniform)" }),
          Plot.text(plans, { ...label, dx: -7, dy: 21, textAnchor: "end", fill: "var(--plan)", fontWeight: 600 }),
          tip(points, { ...at, title }),
        ],
      });
    const describe = (d) => `${d.label} ${number(d.kl_nats)} at ${size(d).toFixed(2)}`;
    const few = optimal.filter((_, i) => i % Math.ceil(optimal.length / 24) === 0);
    const view = () => ({
      draw: drawFrontier,
      label:
        "Line chart of KL in nats per token, on a log scale, against bits per weight, for every optimal plan and for " +
        `uniform settings. Measured: ${measured.map(describe).join("; ") || "nothing yet"}.`,
      legend: [
        ["line", "var(--plan)", "optimal plans, predicted"],
        ["dot", "var(--plan)", "plan, measured"],
        ["ring", "var(--uniform)", "uniform, predicted"],
        ["dot", "var(--uniform)", "uniform, measured"],
      ],
      notes: [],
      table: () =>
        table(
          { setting: (d) => d.name, "KL is": (d) => d.source },
          { "bits per weight": (d) => size(d).toFixed(3), size: (d) => mebibytes(d.total_bytes), KL: value("kl_nats") },
          [...named(data.measured, "measured"), ...named(data.uniform, "predicted"), ...named(few, "predicted")],
        ),
    });
    return figure(view, data, options);
  }

  /** Projection by block, coloured by bits, with the rank where one is bought; `plans` is report.plans. */
  function planMap(plans, { selected = 0, onSelect, ...options } = {}) {
    const at = { x: "block", y: "projection" };
    function view(data, index) {
      const plan = data[index];
      const blocks = d3.sort(new Set(plan.layers.map((d) => d.block)));
      const projections = [...new Set(plan.layers.map((d) => d.projection))];
      const [ranked, plain] = [plan.layers.filter((d) => d.rank > 0), plan.layers.filter((d) => d.rank === 0)];
      const counts = d3.sort(d3.rollups(plan.layers, (layers) => layers.length, (d) => d.bits), ([bits]) => bits);
      const marginLeft = 16 + 7 * d3.max(projections, (name) => name.length);
      const band = { type: "band", padding: 0, tickSize: 0 };
      const inCell = { ...at, fill: literal((d) => bitsInk(d.bits)), fontWeight: 600, fontSize: 13 };
      const cellText = [
        Plot.text(plain, { ...inCell, text: "bits" }),
        Plot.text(ranked, { ...inCell, text: "bits", dy: -6 }),
        Plot.text(ranked, { ...inCell, text: (d) => `+r${d.rank}`, dy: 9, fontWeight: 400, fontSize: 11 }),
      ];
      const bytes = (d) => d3.format(",")(d.total_bytes);
      const title = (d) =>
        `${d.name}\n${d.bits} bits, group ${d.group_size}${d.rotated ? ", rotated" : ""}\n` +
        `${d.rank > 0 ? `rank ${rankOf(d)}, ${d.factor_bits}-bit factors\n` : ""}` +
        `error ${number(d.error)}\ncost ${nats(d.cost)}\n${bytes(d)} bytes`;
      const drawMap = (width) =>
        draw({
          width,
          height: 52 + 42 * projections.length,
          marginTop: 10,
          marginLeft,
          marginRight: 0,
          x: { ...band, domain: blocks, label: "block", ticks: everyFew(blocks, width - marginLeft) },
          y: { ...band, domain: projections, label: null },
          marks: [
            Plot.cell(plan.layers, { ...at, fill: literal((d) => bitsColour(d.bits)), inset: 1.5, rx: 3 }),
            ...((width - marginLeft) / blocks.length > 34 ? cellText : []),
            tip(plan.layers, { ...at, title }),
          ],
        });
      return {
        draw: drawMap,
        label:
          `Heat map of plan ${plan.label}, ${projections.length} projections by ${blocks.length} blocks: ` +
          `${counts.map(([bits, count]) => `${count} at ${bits} bits`).join(", ")}; ${ranked.length} with a rank.`,
        legend: counts.map(([bits]) => ["square", bitsColour(bits), bits === 0 ? "rank only" : `${bits} bits`]),
        notes: [
          `Budget ${plan.budget_text}: ${mebibytes(plan.total_bytes)}, ${number(plan.bits_per_weight)} bits per weight.`,
          `Predicted KL ${nats(plan.predicted_kl)}; proven lower bound ${number(plan.lower_bound)}, gap ${percent(plan.gap)}. ` +
            `One more MiB would save ${nats(plan.shadow_price_nats_per_mib)}.`,
          ...(plan.checked ? [`${plan.checked[0].toUpperCase()}${plan.checked.slice(1)}.`] : []),
        ],
        warnings: plan.warnings,
        table: () => table({ layer: (d) => d.name }, { ...grid, bytes, error: value("error"), cost: value("cost") }, plan.layers),
      };
    }
    const items = plans.map(({ label }) => ({ text: label, group: "plans" }));
    return figure(view, plans, { ...options, picker: { build: buttonRow, label: "Plan", items, chosen: selected, onSelect } });
  }

  /**
   * Measured against predicted KL, one dot per compressed model, on the diagonal where the two agree. `points` are
   * {label, kind, source, predicted_kl, kl_nats}; `factors` are the ends of the prediction interval as multiples.
   */
  function predictedMeasured(points, { factors = null, ...options } = {}) {
    const at = { x: "predicted_kl", y: "kl_nats" };
    const order = d3.sort(points.filter((d) => d.predicted_kl > 0 && d.kl_nats > 0), (d) => d.predicted_kl);
    const ends = d3.extent(order.flatMap((d) => [d.predicted_kl, d.kl_nats]));
    const ratio = (d) => d.predicted_kl / d.kl_nats;
    const title = (d) =>
      `${d.label}\n${nats(d.kl_nats)} measured, ${d.source}\n${number(d.predicted_kl)} predicted, ` +
      `${ratio(d).toFixed(2)} of the measured`;
    const colour = (d) => (d.kind === "plan" ? "var(--plan)" : "var(--uniform)");
    const isLow = (d) => Math.sqrt(ends[0] * ends[1]) > d.predicted_kl;
    const names = (textAnchor) => {
      const points = order.filter((d) => isLow(d) === (textAnchor === "start"));
      const [dx, dy] = textAnchor === "start" ? [9, 9] : [-9, -9];
      return Plot.text(points, { ...at, ...halo, text: "label", dx, dy, textAnchor, fill: literal(colour) });
    };
    const drawDots = (width) => {
      const axis = (label) => logAxis(ends, label);
      const line = axis("").domain.map((x) => ({ x, low: x * (factors?.[0] ?? 1), high: x * (factors?.[1] ?? 1) }));
      return draw({
        width,
        height: 330,
        marginRight: 18,
        x: axis("predicted KL, nats per token"),
        y: axis("measured KL, nats per token"),
        marks: [
          Plot.areaY(line, { x: "x", y1: "low", y2: "high", fill: "var(--plan)", fillOpacity: 0.12, clip: true }),
          Plot.line(line, { x: "x", y: "x", stroke: "var(--muted)", strokeDasharray: "3,3" }),
          Plot.dot(order, { ...at, r: 5, fill: literal(colour), stroke: "var(--paper)" }),
          names("start"),
          names("end"),
          tip(order, { ...at, title }),
        ],
      });
    };
    const view = () => ({
      draw: drawDots,
      label:
        "Scatter plot of measured against predicted KL on log scales. " +
        `${order.map((d) => `${d.label}: predicted ${number(d.predicted_kl)}, measured ${number(d.kl_nats)}`).join("; ")}.`,
      legend: [
        ["dot", "var(--plan)", "plan"],
        ["dot", "var(--uniform)", "uniform"],
        ["line", "var(--muted)", "measured as predicted"],
      ],
      notes: factors ? [`Shaded: 90 % prediction interval, ${factors.map((f) => `${f.toFixed(2)}×`).join(" to ")}.`] : [],
      table: () =>
        table(
          { model: (d) => d.label, text: (d) => d.source },
          { "predicted KL": value("predicted_kl"), "measured KL": value("kl_nats"), ratio: (d) => ratio(d).toFixed(3) },
          order,
        ),
    });
    return figure(view, points, options);
  }

  return Object.freeze({
    fidelityBars, errorCurves, frontier, planMap, predictedMeasured, figure, draw, logAxis, selectBox, table, element,
    number, percent, mebibytes,
  });
})();
