// The page of one study: fidelity, spectrum, cliff or a comparison, from the document in #study-data. Needs charts.js before it.
(() => {
  "use strict";

  const { element, figure, draw, logAxis, table, number, percent } = bitrank;
  const at = (id) => document.getElementById(id);
  const colours = ["--rank-0", "--rank-2", "--rank-4", "--plan", "--rank-3", "--rank-5", "--rank-1", "--uniform"];
  const colour = (index) => `var(${colours[index % colours.length]})`;
  const dash = (index) => (index < colours.length ? undefined : "5,3");
  const interval = (d) => `${number(d.mean)} (${number(d.low)} to ${number(d.high)})`;

  function section(title, chart, kind = "") {
    at("charts").append(element("section", { class: kind }, element("h2", {}, title), chart));
  }

  function fact(name, value) {
    at("facts").append(element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
  }

  /** Dots with intervals, one per block, coloured by tier. */
  function measureChart(study, measure, label, log) {
    const tiers = { critical: "var(--uniform)", high: "var(--rank-4)", low: "var(--plan)" };
    const rows = study.blocks.map((block) => ({ ...block[measure], block: block.block, tier: block.tier }));
    const shape = study.shapes.find((d) => d.metric === measure);
    const test = shape.p_value === null ? "too few blocks to test" : `${shape.verdict}, p ${shape.p_value.toFixed(3)}`;
    const y = log && rows.every((d) => d.low > 0) ? logAxis(rows.flatMap((d) => [d.low, d.high]), label) : { label, grid: true, zero: true };
    const stroke = { value: (d) => tiers[d.tier], scale: null };
    const drawDots = (width) =>
      draw({
        width,
        height: 300,
        x: { type: "point", label: "block", padding: 0.5 },
        y,
        marks: [
          Plot.ruleX(rows, { x: "block", y1: "low", y2: "high", stroke, strokeWidth: 2 }),
          Plot.dot(rows, { x: "block", y: "mean", fill: stroke, r: 4 }),
        ],
      });
    return figure(
      () => ({
        draw: drawDots,
        label: `${label} of ${rows.length} blocks with ${100 * study.confidence} % intervals; ${test}.`,
        legend: Object.entries(tiers).map(([tier, shade]) => ["dot", shade, tier]),
        notes: [`${test} (${shape.test})`],
        table: () => table({ block: (d) => String(d.block), tier: (d) => d.tier }, { [label]: interval }, rows),
      }),
      rows,
      {},
    );
  }

  function drawFidelity(study) {
    fact("probe", `${study.option.bits} bits, group ${study.option.group_size}`);
    fact("measured on", `${study.text}, ${study.windows} windows of ${study.window_tokens} tokens`);
    const outliers = study.blocks.flatMap((d) => d.outlier_in.map((name) => `${d.block} (${name.replace("_", " ")})`));
    fact("outliers", outliers.join(", ") || "none");
    section("Probe KL", measureChart(study, "probe_kl", "KL, nats per token", true));
    section("Block influence", measureChart(study, "block_influence", "1 − cosine", true));
    section("Collision margin", measureChart(study, "collision_margin", "‖h̃ − h‖ ÷ distance", true));
    if (study.blocks[0].embedding_recovery !== null) {
      section("Embedding recovery", measureChart(study, "embedding_recovery", "top-1 accuracy", false));
    }
  }

  /** Lines over the share of the rank that is left; `rows` have series, ratio and value. */
  function lines(rows, names, label, y, marks = []) {
    const stroke = { value: (d) => colour(names.indexOf(d.series)), scale: null };
    const drawLines = (width) =>
      draw({
        width,
        height: 340,
        x: { label: "share of the full rank", domain: [d3.min(rows, (d) => d.ratio), 1] },
        y,
        marks: [
          ...marks,
          ...names.map((name, index) =>
            Plot.line(rows.filter((d) => d.series === name && !d.marked), {
              x: "ratio", y: "value", stroke: colour(index), strokeDasharray: dash(index), strokeWidth: 1.6,
            }),
          ),
          Plot.dot(rows.filter((d) => d.marked), { x: "ratio", y: "value", stroke, fill: "var(--paper)", r: 4 }),
        ],
      });
    const cells = { series: (d) => d.series, "rank left": (d) => percent(d.ratio) };
    return figure(
      () => ({
        draw: drawLines,
        label: `${label} against the share of the full rank, for ${names.join(", ")}.`,
        legend: names.map((name, index) => ["line", colour(index), dash(index) ? `${name}, dashed` : name]),
        notes: [],
        table: () => table(cells, { [label]: (d) => number(d.value) }, rows),
      }),
      rows,
      {},
    );
  }

  function drawCliff(study) {
    fact("4 bits cost", `${number(study.threshold_kl)} nats/token`);
    fact("measured on", `${study.text}, ${study.windows} windows of ${study.window_tokens} tokens`);
    const names = study.groups.map((d) => d.group);
    const points = (value) =>
      study.groups.flatMap((group) => {
        const cuts = [...group.cuts, { ...group.energy_cut, marked: true }];
        return d3.sort(cuts.map((d) => ({ ...d, series: group.group, value: value(d) })), (d) => -d.ratio);
      });
    const losses = points((d) => d.kl.mean).filter((d) => d.value > 1e-5);
    const threshold = Plot.ruleY([study.threshold_kl], { stroke: "var(--muted)", strokeDasharray: "3,3" });
    const chart = (value, label, y, marks) => lines(value, names, label, y, marks);
    section(
      `What the cut costs; a ring leaves ${percent(study.energy_share)} of the energy, the dashed line is what 4 bits cost`,
      chart(losses, "KL", logAxis(losses.map((d) => d.value), "KL, nats per token"), [threshold]),
      "wide",
    );
    section("Energy left", chart(points((d) => d.energy), "energy", { label: "share of the energy", grid: true }));
    const repetition = { label: `repeated ${study.ngram}-grams`, grid: true };
    section("Repetition of greedy continuations", chart(points((d) => d.repetition), "repetition", repetition));
  }

  function drawSpectrum(study) {
    const layers = Object.values(study.layers);
    fact("layers", layers.length);
    const curves = (groups) =>
      [...groups].flatMap(([series, spectra]) =>
        spectra[0].energy.map((_, index) => {
          const ratio = Math.ceil(((index + 1) * spectra[0].full_rank) / spectra[0].energy.length) / spectra[0].full_rank;
          return { series, ratio, value: d3.median(spectra, (d) => d.energy[index]) };
        }),
      );
    const y = { label: "share of the energy, the median matrix", grid: true, domain: [0, 1] };
    const whole = d3.rollup(layers, (members) => members.map((d) => d.spectrum), (d) => d.projection.replace(/\.\d+\./, ".*."));
    section("Energy by projection", lines(curves(whole), [...whole.keys()], "energy", y));
    const parts = layers.flatMap((d) => d.heads);
    if (parts.length === 0) return;
    const heads = d3.rollup(parts, (members) => members.map((d) => d.spectrum), (d) => `${d.role} heads`);
    section("Energy by head", lines(curves(heads), [...heads.keys()], "energy", y));
  }

  /** Each strategy above the optimum of the same bytes, joined by what the optimum saves. */
  function drawCompare(study) {
    const rows = study.comparisons.map((d) => ({
      strategy: d.strategy,
      size: d.plan.bits_per_weight,
      kl: d.plan.measured_kl,
      best: d.optimum.measured_kl,
      perplexity: d.plan.perplexity,
      bestPerplexity: d.optimum.perplexity,
      saved: d.saved,
    })).sort((a, b) => a.size - b.size);
    fact("strategies", rows.length);
    const saved = (d) => `${(100 * d.saved).toFixed(1)} % less`;
    const text = { x: "size", fontWeight: 600, stroke: "var(--paper)", strokeWidth: 4 };
    const drawPairs = (width) =>
      draw({
        width,
        height: 420,
        marginRight: 8,
        x: { label: "bits per weight, all overhead included", inset: 72 },
        y: logAxis(rows.flatMap((d) => [d.kl, d.best]), "KL, nats per token"),
        marks: [
          Plot.ruleX(rows, { x: "size", y1: "best", y2: "kl", stroke: "var(--muted)", strokeWidth: 1.5 }),
          Plot.dot(rows, { x: "size", y: "kl", r: 5, fill: "var(--uniform)" }),
          Plot.dot(rows, { x: "size", y: "best", r: 5, fill: "var(--plan)" }),
          ...[0, 1, 2].flatMap((level) => {
            const some = rows.filter((_, index) => index % 3 === level);
            return [
              Plot.text(some, { ...text, y: "kl", text: "strategy", dy: -14 - 20 * level, fill: "var(--uniform)" }),
              Plot.text(some, { ...text, y: "best", text: saved, dy: 16 + 18 * level, fill: "var(--plan)" }),
            ];
          }),
        ],
      });
    const view = () => ({
      draw: drawPairs,
      label: `KL against bits per weight: ${rows.map((d) => `${d.strategy} ${number(d.kl)}, optimum ${number(d.best)}`).join("; ")}.`,
      legend: [
        ["dot", "var(--uniform)", "strategy, measured"],
        ["dot", "var(--plan)", "optimum of at most as many bytes, measured"],
      ],
      notes: [],
      table: () =>
        table(
          { strategy: (d) => d.strategy },
          {
            "bits per weight": (d) => d.size.toFixed(3),
            KL: (d) => number(d.kl),
            perplexity: (d) => d.perplexity.toFixed(3),
            "optimum: KL": (d) => number(d.best),
            "optimum: perplexity": (d) => d.bestPerplexity.toFixed(3),
            saved,
          },
          rows,
        ),
    });
    section("What each strategy loses, and the optimum at its bytes", figure(view, rows, {}), "wide");
  }

  const { kind, study } = JSON.parse(at("study-data").textContent);
  at("study").textContent = `bitrank ${kind}`;
  at("model").textContent = study.model.id;
  ({ fidelity: drawFidelity, cliff: drawCliff, spectrum: drawSpectrum, compare: drawCompare })[kind](study);
})();
