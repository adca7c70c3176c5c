// The list of jobs: what each does, how far it is, and stopping it. Running ones are followed live.

import { Problem, jobEvents, post, query, read } from "./service.js";

const { element, number } = bitrank;
const FINISHED = new Set(["done", "failed", "cancelled"]);
// A browser opens about six connections to one host: the rest of the jobs is told by the list alone.
const MOST_FOLLOWED = 3;
const LISTED = 12;
const LIST_EVERY = 10_000;

export class JobList {
  /** `onFinished(job)` is called for every job that ends while the page is open. */
  constructor(root, { onFinished, onProblem }) {
    Object.assign(this, { root, onFinished, onProblem, jobs: new Map(), rows: new Map(), followed: new Map() });
    setInterval(() => document.visibilityState === "visible" && this.refresh(), LIST_EVERY);
  }

  async refresh() {
    try {
      const page = await read(`jobs?${query({ limit: LISTED })}`);
      const jobs = page.jobs ?? page.items;
      for (const job of [...jobs].reverse()) this.show(job);
    } catch (error) {
      this.onProblem(error);
    }
  }

  get running() {
    return [...this.jobs.values()].filter((job) => !FINISHED.has(job.state));
  }

  show(job) {
    const before = this.jobs.get(job.id);
    this.jobs.set(job.id, job);
    const row = this.rows.get(job.id) ?? this.newRow(job);
    row.write(job);
    if (before && !FINISHED.has(before.state) && FINISHED.has(job.state)) this.onFinished(job);
    if (FINISHED.has(job.state)) this.followed.get(job.id)?.abort();
    else if (!this.followed.has(job.id) && this.followed.size < MOST_FOLLOWED) this.follow(job.id);
    this.onCount?.(this.running.length);
  }

  newRow(job) {
    const row = jobRow(job, () => this.cancel(job.id));
    this.rows.set(job.id, row);
    this.root.prepend(row.node);
    return row;
  }

  async follow(id) {
    const stop = new AbortController();
    this.followed.set(id, stop);
    try {
      for await (const event of jobEvents(id, stop.signal)) {
        const job = withEvent(this.jobs.get(id), event);
        this.show(FINISHED.has(job.state) ? await read(`jobs/${encodeURIComponent(id)}`) : job);
      }
    } catch (error) {
      if (!(error instanceof Problem && error.status === 404)) this.onProblem(error);
    } finally {
      this.followed.delete(id);
    }
  }

  async cancel(id) {
    try {
      this.show(await post(`jobs/${encodeURIComponent(id)}/cancel`));
    } catch (error) {
      this.onProblem(error);
    }
  }
}

/** The job after one event of its stream: a new state, or progress {stage, done, total, eta_seconds}. */
function withEvent(job, { kind, data }) {
  if (kind === "progress") return { ...job, state: "running", progress: JSON.parse(data) };
  return kind === "running" || FINISHED.has(kind) ? { ...job, state: kind } : job;
}

function jobRow(job, cancel) {
  const state = element("span", { class: "state" });
  const { plan } = job.request;
  const what = element("span", { class: "what" }, plan ? element("a", { href: `?${query({ plan })}` }, subject(job)) : subject(job));
  const bar = element("progress", { max: 1, "aria-label": `Progress of ${job.kind} ${subject(job)}` });
  const detail = element("span", { class: "muted" });
  const button = element("button", { type: "button", "aria-label": `Cancel ${job.kind} ${subject(job)}` }, "Cancel");
  const error = element("span", { class: "error" });
  button.addEventListener("click", () => ((button.disabled = true), cancel()));
  const node = element("li", { "data-job": job.id, title: job.id }, state, what, bar, detail, button, error);
  return {
    node,
    write({ state: now, progress, result, error: problem }) {
      const ended = FINISHED.has(now);
      node.dataset.state = now;
      state.textContent = now;
      bar.hidden = ended || now === "queued";
      button.hidden = ended;
      bar.value = progress?.total ? progress.done / progress.total : 0;
      detail.textContent = ended ? resultText(result) : progressText(progress);
      error.textContent = problem?.detail ?? "";
      error.hidden = !problem;
    },
  };
}

const VERBS = { profile: "Profile", plan: "Plan", batch: "Batch", compression: "Compress plan", evaluation: "Measure plan" };

function subject({ kind, request }) {
  const { model, plan, budget, jobs } = request ?? {};
  const things = [model, plan?.slice(0, 12), budget, jobs && `${jobs.length} models`].filter(Boolean);
  return `${VERBS[kind] ?? kind} ${things.join(" ")}`;
}

function resultText(result) {
  return result?.kl_nats === undefined ? "" : `KL ${number(result.kl_nats)}, predicted ${number(result.predicted_kl_nats)}`;
}

function progressText({ stage, done, total, eta_seconds: seconds }) {
  if (!total) return "";
  const left = seconds > 0 ? `, ${seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`} left` : "";
  return `${stage} ${done}/${total}${left}`;
}
