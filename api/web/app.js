// The page: which model and budget are looked at, the plan for them, and the charts around it.
//
// The address says it all: ?profile=…&budget=…&embeddings=…&layer=…, or &plan=… for a plan that was kept. Charts are
// charts.js, requests service.js, jobs jobs.js, files download.js.

import { download, downloadCsv, downloadSvg } from "./download.js";
import { JobList } from "./jobs.js";
import { Problem, onKeyNeeded, post, query, read, request } from "./service.js";

const { element, number, percent, mebibytes } = bitrank;
const at = (id) => document.getElementById(id);
const CURVE_BITS = d3.range(2, 8.01, 0.25).map((bits) => `bits=${bits}`);
// Browsers let a page rewrite its address some 200 times in 30 seconds.
const ADDRESS_EVERY = 250;

const page = {
  profiles: [],
  profile: null, // the profile looked at, as the service describes it, with its frontier
  budget: "", // as written: 3.25bpw, 25% or 700MiB
  embeddings: false, // whether embedding and output head are decided on too
  layer: null,
  plan: null, // the plan shown
  kept: null, // its id, once kept
  charts: {},
};

// Budgets

/** What bits per weight count: with the tables, they count them too. */
const offered = () => (page.embeddings ? page.profile.tables : page.profile);
const bitsPerWeight = (bytes) => (8 * (bytes - offered().kept_bytes)) / offered().compressible_weights;
const bytesAt = (bits) => offered().kept_bytes + (bits * offered().compressible_weights) / 8;

/** A budget of so many bits per weight, written in the unit that the present one is written in. */
function budgetText(bits) {
  const [, unit] = /([a-z%]+)\s*$/i.exec(page.budget) ?? [];
  const scale = { "%": page.profile.original_bytes / 100, MiB: 2 ** 20, GiB: 2 ** 30, MB: 1e6, GB: 1e9 }[unit];
  return scale ? `${roundedUp(bytesAt(bits) / scale)}${unit}` : `${roundedUp(bits)}bpw`;
}

const roundedUp = (value) => (Math.ceil(100 * value - 1e-6) / 100).toFixed(2);

/** The dial spans the frontier up to the largest uniform setting; a budget above can be typed. */
function dialRange({ frontier }) {
  const sizes = frontier.optimal.map((d) => d.bits_per_weight);
  return [Number(roundedUp(sizes[0])), d3.max(frontier.uniform, (d) => d.bits_per_weight) ?? sizes.at(-1)];
}

function firstBudget({ frontier }) {
  const middle = frontier.uniform.find((d) => d.label.startsWith("3")) ?? frontier.uniform[0];
  return `${roundedUp(middle?.bits_per_weight ?? d3.mean(dialRange({ frontier })))}bpw`;
}

// The address

function address() {
  const { profile, budget, layer, kept, embeddings } = page;
  return `?${query({ profile: profile?.id.slice(0, 12), budget, embeddings: embeddings || null, layer, plan: kept })}`;
}

let addressTimer = null;

/** While dragging the address follows now and then; a release makes a place to come back to. */
function rewriteAddress() {
  addressTimer ??= setTimeout(() => {
    addressTimer = null;
    history.replaceState(null, "", address());
  }, ADDRESS_EVERY);
}

let left = location.search;

function keepAddress() {
  clearTimeout(addressTimer);
  addressTimer = null;
  if (address() === left) return history.replaceState(null, "", address());
  history.replaceState(null, "", left || location.pathname);
  left = address();
  history.pushState(null, "", left);
}

async function followAddress() {
  left = location.search;
  const asked = new URLSearchParams(location.search);
  const kept = asked.get("plan");
  const plan = kept && JSON.parse(await (await request(`plans/${encodeURIComponent(kept)}`)).text());
  const id = plan?.profile_sha256 ?? asked.get("profile");
  const known = id ? page.profiles.find((d) => d.id.startsWith(id)) : page.profiles[0];
  if (!known && !id) return showWelcome();
  await showProfile(known?.id ?? id, plan ? Object.keys(plan.tables ?? {}).length > 0 : asked.get("embeddings") === "true");
  page.layer = asked.get("layer");
  page.kept = kept;
  await setBudget(plan?.budget.text ?? asked.get("budget") ?? firstBudget(page.profile));
  history.replaceState(null, "", address());
  left = address();
}

// Profiles

async function listProfiles() {
  const { profiles } = await read(`profiles?${query({ limit: 100 })}`);
  page.profiles = profiles;
  const name = (d) => `${d.model} · ${d.layer_count} layers · ${mebibytes(d.original_bytes)}`;
  at("profile").replaceChildren(...profiles.map((d) => element("option", { value: d.id }, name(d))));
  at("profile").closest("label").hidden = profiles.length === 0;
  if (page.profile) at("profile").value = page.profile.id;
}

function showWelcome() {
  at("welcome").hidden = false;
  at("planning").hidden = true;
}

async function showProfile(id, embeddings = page.embeddings) {
  if (page.profile?.id === id && page.embeddings === embeddings) return;
  at("planning").setAttribute("aria-busy", "true");
  const path = `profiles/${encodeURIComponent(id)}`;
  const parts = ["", "/fidelity", "/measured"].map((part) => read(path + part));
  const [profile, fidelity, { measured }] = await Promise.all(parts);
  Object.assign(page, { profile, measured, plan: null, kept: null, layer: null });
  await offerTables(embeddings && profile.tables !== null);
  at("welcome").hidden = true;
  at("planning").hidden = false;
  at("profile").value = id;
  document.title = `${profile.model} · bitrank`;
  drawProfile(fidelity);
  at("planning").removeAttribute("aria-busy");
}

/** Whether embedding and output head are decided on too: bits per weight, the frontier and the dial follow. */
async function offerTables(embeddings) {
  page.embeddings = embeddings;
  const { id, tables } = page.profile;
  const frontier = await read(`profiles/${id}/frontier?${query({ embeddings: embeddings || null })}`);
  frontier.uniform = frontier.uniform.map((d) => ({ ...d, label: uniformName(d.label) }));
  page.profile.frontier = frontier;
  at("embeddings").checked = embeddings;
  at("embeddings").closest("label").hidden = tables === null;
  const [least, most] = dialRange(page.profile);
  Object.assign(at("slider"), { min: least, max: most.toFixed(2) });
}

/** uniform:3 and uniform:3:r64:g128 as people say them. */
function uniformName(strategy) {
  const [, bits, ...rest] = strategy.split(":");
  return [`${bits} bits`, ...rest].join(", ");
}

// Charts

function place(id, chart, rows) {
  const file = () => `${page.profile.model.replaceAll("/", "-")}-${id}`;
  const named = { curves: "error curves", map: "plan map", measured: "predicted against measured" }[id] ?? id;
  const button = (label, action) => {
    const node = element("button", { type: "button", "aria-label": `Download ${named} as ${label}` }, label);
    node.addEventListener("click", action);
    return node;
  };
  chart.append(element("div", { class: "save" }, button("SVG", () => downloadSvg(file(), chart)), button("CSV", () => downloadCsv(file(), rows()))));
  at(id).querySelector("figure")?.remove();
  at(id).append(chart);
  page.charts[id] = chart;
}

function drawProfile(fidelity) {
  const { frontier } = page.profile;
  for (const id of ["map", "curves"]) (at(id).querySelector("figure")?.remove(), delete page.charts[id]);
  const blocks = fidelity.blocks.map(({ interval, ...d }) => ({ ...d, kl_low: interval.low, kl_high: interval.high }));
  const bars = bitrank.fidelityBars(blocks, {
    setting: fidelity.setting, source: fidelity.source,
    caption: "Each bar is the KL the model would lose if that block alone were compressed; a tall bar deserves more bits.",
  });
  place("fidelity", bars, () => blocks);
  drawLayerPicker();
  drawMeasured();
}

/** The charts that show measurements: they grow when a plan is evaluated. */
function drawMeasured() {
  const { frontier, interval_factors: factors } = page.profile;
  const points = page.measured.map((d) => ({
    ...d,
    kind: d.plan ? "plan" : "uniform",
    source: d.text,
    bits_per_weight: bitsPerWeight(d.total_bytes),
  }));
  const chart = bitrank.frontier({ ...frontier, measured: points }, {
    until: dialRange(page.profile)[1],
    caption: "Lower is better: the line is the best plan at every size. Drag along it to choose a budget.",
  });
  place("frontier", chart, () => [
    ...frontier.optimal.map((d) => ({ setting: "optimal", ...d })),
    ...frontier.uniform.map(({ label, ...d }) => ({ setting: label, ...d })),
  ]);
  chart.querySelector(".plot").addEventListener("pointerdown", startFrontierDrag, { capture: true });
  at("measured").hidden = points.length === 0;
  if (points.length === 0) return;
  const caption = "Each dot is a compressed model: what was predicted before any weight was touched, and what was then measured.";
  place("measured", bitrank.predictedMeasured(points, { factors, caption }), () => page.measured);
}

async function refreshMeasured() {
  page.measured = (await read(`profiles/${page.profile.id}/measured`)).measured;
  drawMeasured();
  markPlan();
}


// The plan

let [wanted, planning] = [null, false];

/** Plan a budget and show it. While one is planned, only the latest of those asked for waits. */
async function setBudget(text) {
  page.budget = text;
  wanted = { profile: page.profile, text, since: performance.now() };
  if (document.activeElement !== at("budget") || at("budget").value !== text) at("budget").value = text;
  if (planning) return;
  planning = true;
  try {
    while (wanted) {
      const task = wanted;
      wanted = null;
      await planAndShow(task);
    }
  } finally {
    planning = false;
  }
}

async function planAndShow({ profile, text, since }) {
  try {
    const path = page.kept ? `plans/${page.kept}` : `profiles/${profile.id}/preview?${query({ budget: text, embeddings: page.embeddings || null })}`;
    const document = await (await request(path)).text();
    if (profile !== page.profile) return;
    await showPlan(JSON.parse(document), document);
    requestAnimationFrame(() => hint(`Planned and drawn in ${Math.ceil(performance.now() - since)} ms.`));
  } catch (error) {
    if (!(error instanceof Problem) || error.status !== 422) return showProblem(error);
    hint(error.message, true);
  }
}

function hint(text, wrong = false) {
  at("budget-hint").textContent = text;
  at("budget-hint").classList.toggle("wrong", wrong);
  at("budget").setAttribute("aria-invalid", String(wrong));
}

async function showPlan(plan, document) {
  page.plan = { ...plan, document };
  const bits = bitsPerWeight(plan.total_bytes);
  const dial = Math.min(Math.max(bitsPerWeight(plan.budget.bytes), at("slider").min), at("slider").max);
  // An answer to an earlier move must not pull the dial back.
  if (!dragging && plan.budget.text === page.budget) at("slider").value = dial;
  at("slider").setAttribute("aria-valuetext", `${bits.toFixed(2)} bits per weight, KL ${number(plan.predicted_kl)}`);
  writeCards(plan);
  at("keep").textContent = page.kept ? `Kept as ${page.kept.slice(0, 8)}` : "Keep this plan";
  at("keep").disabled = Boolean(page.kept);
  const summary = planSummary(plan);
  if (page.charts.map) page.charts.map.update([summary]);
  else drawMap(summary);
  markPlan();
  const layer = plan.layers[page.layer] ? page.layer : d3.greatest(summary.layers, (d) => d.cost).name;
  if (layer !== page.layer || !page.charts.curves) await showLayer(layer);
  markLayer();
}

const markPlan = () => page.charts.frontier.mark({ x: bitsPerWeight(page.plan.total_bytes), y: page.plan.predicted_kl });

function planSummary(plan) {
  return {
    label: plan.budget.text,
    budget_text: plan.budget.text,
    total_bytes: plan.total_bytes,
    bits_per_weight: bitsPerWeight(plan.total_bytes),
    predicted_kl: plan.predicted_kl,
    lower_bound: plan.lower_bound,
    gap: plan.predicted_kl > 0 ? plan.gap / plan.predicted_kl : 0,
    shadow_price_nats_per_mib: plan.shadow_price,
    warnings: plan.warnings ?? [],
    checked: plan.checked ?? "",
    layers: page.profile.layers.map(({ name, block, projection }) => {
      const { bytes, ...chosen } = plan.layers[name];
      return { name, block, projection, total_bytes: bytes, ...chosen };
    }),
  };
}

function drawMap(summary) {
  const chart = bitrank.planMap([summary], {
    caption:
      "Each cell is one weight matrix and the bits it was given, stronger in colour for more; +r is the rank of its " +
      "low-rank correction. Choose a cell to see its error curve.",
  });
  place("map", chart, () => planSummary(page.plan).layers);
  chart.querySelector(".plot").addEventListener("pointerdown", (event) => event.stopPropagation(), { capture: true });
  chart.querySelector(".plot").addEventListener("click", (event) => {
    const { x, y } = chart.locate(event);
    const layer = page.profile.layers.find((d) => d.block === x && d.projection === y);
    if (layer) chooseLayer(layer.name);
  });
}

function writeCards(plan) {
  const { original_bytes: original } = page.profile;
  const [low, high] = plan.predicted_kl_interval;
  const uniform = uniformKl(plan.total_bytes);
  const change = uniform === null ? null : plan.predicted_kl / uniform - 1;
  const gap = plan.predicted_kl > 0 ? plan.gap / plan.predicted_kl : 0;
  const bits = bitsPerWeight(plan.total_bytes).toFixed(2);
  const cards = [
    ["predicted KL, nats/token", number(plan.predicted_kl), `90 % interval ${number(low)} to ${number(high)}`],
    ["on disk", mebibytes(plan.total_bytes), `${(original / plan.total_bytes).toFixed(2)}× smaller, ${bits} bits per weight${tableBits(plan)}`],
    change === null
      ? ["against uniform", "–", "no uniform setting on either side of this size"]
      : [change <= 0 ? "less loss than uniform" : "more loss than uniform", percent(Math.abs(change)), `predicted; uniform at these bytes ${number(uniform)}`],
    ["from the best possible", percent(gap), `proven: no plan is predicted below ${number(plan.lower_bound)}`],
    ["saved by one more MiB", number(plan.shadow_price), "nats/token, the price of memory here"],
  ];
  const card = ([name, figure, detail]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, figure), element("dd", {}, detail));
  at("cards").replaceChildren(...cards.map(card));
}

/** What a plan gives embedding and output head, where it decides on them. */
function tableBits({ tables = {}, layers }) {
  const name = { embedding: "embedding", head: "head", tied: "embedding and head" };
  return Object.entries(tables).map(([table, kind]) => `, ${name[kind]} at ${layers[table].bits}`).join("");
}

/** Predicted KL of uniform settings at so many bytes, log-linear between two of them; null outside. */
function uniformKl(bytes) {
  const points = d3.sort(page.profile.frontier.uniform.filter((d) => d.kl_nats > 0), (d) => d.total_bytes);
  const above = d3.bisector((d) => d.total_bytes).left(points, bytes);
  if (points[above]?.total_bytes === bytes) return points[above].kl_nats;
  const [small, large] = [points[above - 1], points[above]];
  if (!small || !large) return null;
  const share = (bytes - small.total_bytes) / (large.total_bytes - small.total_bytes);
  return Math.exp((1 - share) * Math.log(small.kl_nats) + share * Math.log(large.kl_nats));
}

// A layer and its curve

function drawLayerPicker() {
  const items = page.profile.layers.map(({ name, block }) => ({ text: name, group: `block ${block}` }));
  const picker = bitrank.selectBox("Layer", items, 0, (index) => chooseLayer(page.profile.layers[index].name));
  at("curves").querySelector(".picker")?.remove();
  at("curves").querySelector("h2").after(picker);
}

async function showLayer(name) {
  page.layer = name;
  const { id, layers } = page.profile;
  at("curves").querySelector("select").value = layers.findIndex((d) => d.name === name);
  const answer = await read(`profiles/${id}/curves?${[query({ layer: name }), ...CURVE_BITS].join("&")}`);
  if (page.layer !== name) return;
  const { predicted, ...curve } = answer.curves[0];
  const [least, most] = d3.extent(curve.measured, (d) => d.bits);
  curve.fitted = predicted.filter((d) => d.bits >= least && d.bits <= most);
  const caption = "Each dot is a measured compression of this layer, each line the fitted error model at one rank; lower is better.";
  if (page.charts.curves) page.charts.curves.update([curve]);
  else place("curves", bitrank.errorCurves([curve], { caption }), () => page.curve.measured);
  page.curve = curve;
  markLayer();
}

function markLayer() {
  const chosen = page.plan?.layers[page.layer];
  const layer = page.profile.layers.find((d) => d.name === page.layer);
  page.charts.map?.mark(layer ? { x: layer.block, y: layer.projection } : null);
  page.charts.curves?.mark(chosen?.error > 0 ? { x: chosen.bits, y: chosen.error } : null);
}

// Hands on the page

let dragging = false;

function drag(bits) {
  dragging = true;
  page.kept = null;
  const [least, most] = [Number(at("slider").min), Number(at("slider").max)];
  at("slider").value = Math.min(Math.max(bits, least), most);
  rewriteAddress();
  return setBudget(budgetText(Number(at("slider").value)));
}

async function release() {
  dragging = false;
  keepAddress();
  while (planning) await new Promise(requestAnimationFrame);
  announce();
}

function startFrontierDrag(event) {
  event.stopPropagation();
  const chart = page.charts.frontier;
  const follow = (moved) => drag(chart.locate(moved).x);
  const stop = () => (removeEventListener("pointermove", follow), release());
  addEventListener("pointermove", follow);
  addEventListener("pointerup", stop, { once: true });
  follow(event);
}

function announce() {
  const { plan } = page;
  if (!plan) return;
  at("announcement").textContent =
    `Planned ${plan.budget.text}: ${mebibytes(plan.total_bytes)}, predicted KL ${number(plan.predicted_kl)} nats per token. ` +
    page.charts.map.querySelector("svg").getAttribute("aria-label");
}

function showProblem(error) {
  at("problem").textContent = error instanceof Problem ? error.message : `The service does not answer (${error.message}).`;
  at("problem").hidden = false;
}

const guarded = (action) => async (...given) => {
  at("problem").hidden = true;
  try {
    await action(...given);
  } catch (error) {
    showProblem(error);
  }
};

const chooseLayer = guarded(async (name) => {
  await showLayer(name);
  keepAddress();
});

async function keepPlan() {
  const answer = await request("plans", { method: "POST", body: { model: page.profile.model, budget: page.budget, embeddings: page.embeddings } });
  const document = await answer.text();
  const plan = JSON.parse(document);
  page.kept = answer.headers.get("Location").split("/").at(-1);
  // The service plans from the newest profile of the model, which may not be the one looked at.
  if (plan.profile_sha256 === page.profile.id) await showPlan(plan, document);
  keepAddress();
  if (plan.profile_sha256 !== page.profile.id) await followAddress();
}

async function measurePlan() {
  if (!page.kept) await keepPlan();
  jobs.show(await post("evaluations", { plan: page.kept }));
  showJobs();
}

async function measureModel(model) {
  jobs.show(await post("profiles", { model }));
  showJobs();
}

const showJobs = () => at("jobs").scrollIntoView({ behavior: "smooth", block: "end" });

const jobs = new JobList(at("job-list"), {
  onProblem: showProblem,
  onFinished: guarded(async (job) => {
    if (job.state !== "done") return;
    await listProfiles();
    if (!page.profile) return followAddress();
    if (job.kind === "evaluation") await refreshMeasured();
  }),
});
jobs.onCount = (running) => {
  at("running-jobs").textContent = running > 0 ? `(${running})` : "";
  at("no-jobs").hidden = true;
};

function askInDialog(dialog, field) {
  dialog.showModal();
  const closed = new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return closed.then(() => (["use", "start"].includes(dialog.returnValue) ? at(field).value.trim() || null : null));
}

let asking = null;
onKeyNeeded(() => (asking ??= askInDialog(at("key-dialog"), "key").finally(() => (asking = null))));

function setTheme(theme) {
  document.documentElement.style.colorScheme = theme ?? "";
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  at("theme").setAttribute("aria-pressed", String(dark));
}

function listen() {
  at("slider").addEventListener("input", () => drag(at("slider").valueAsNumber));
  at("slider").addEventListener("change", release);
  at("budget-form").addEventListener("submit", (event) => event.preventDefault());
  at("budget").addEventListener("change", guarded(async () => {
    page.kept = null;
    await setBudget(at("budget").value.trim());
    await release();
  }));
  at("profile").addEventListener("change", guarded(async () => {
    await showProfile(at("profile").value);
    await setBudget(firstBudget(page.profile));
    keepAddress();
  }));
  at("embeddings").addEventListener("change", guarded(async () => {
    const { bytes } = page.plan.budget;
    page.kept = null;
    await offerTables(at("embeddings").checked);
    drawMeasured();
    await setBudget(budgetText(Math.max(bitsPerWeight(bytes), at("slider").min)));
    await release();
  }));
  at("keep").addEventListener("click", guarded(keepPlan));
  at("measure-plan").addEventListener("click", guarded(measurePlan));
  at("download-json").addEventListener("click", () => download("plan.json", page.plan.document, "application/json"));
  at("download-csv").addEventListener("click", () => downloadCsv("plan", planSummary(page.plan).layers));
  at("measure-demo").addEventListener("click", guarded(() => measureModel("demo")));
  at("measure").addEventListener("click", guarded(async () => {
    const model = await askInDialog(at("measure-dialog"), "measure-model");
    if (model) await measureModel(model);
  }));
  at("theme").addEventListener("click", () => {
    const theme = at("theme").getAttribute("aria-pressed") === "true" ? "light" : "dark";
    localStorage.setItem("bitrank-theme", theme);
    setTheme(theme);
  });
  addEventListener("popstate", guarded(followAddress));
}

setTheme(localStorage.getItem("bitrank-theme"));
listen();
at("colophon").textContent = `Charts by Observable Plot ${Plot.version} and d3 ${d3.version}. Nothing on this page leaves this server.`;
await guarded(async () => {
  await listProfiles();
  await followAddress();
})();
jobs.refresh();
