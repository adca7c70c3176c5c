// The service as the page sees it: requests, their problems, and a job's event stream.
// Paths are relative to /v1. What the answers mean is for app.js and jobs.js.

const base = new URL("v1/", document.baseURI);
let askForKey = async () => null;

/** What the service refused, from its problem+json: `status`, `type`, and the sentence it gave as the message. */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail ?? document.title ?? `the service answered ${status}`);
    Object.assign(this, { status, type: document.type ?? "about:blank" });
  }
}

/** `ask` is called when the service wants an API key; it resolves to one, or to null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  const key = sessionStorage.getItem("bitrank-key");
  const sent = { Accept: "application/json", ...headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const response = await fetch(new URL(path, base), { method, headers: sent, body: JSON.stringify(body), signal });
  if (response.ok) return response;
  const answer = response.status === 401 ? await askForKey() : null;
  if (answer) {
    sessionStorage.setItem("bitrank-key", answer);
    return request(path, { method, body, headers, signal });
  }
  throw new Problem(response.status, await response.json().catch(() => ({})));
}

export const read = async (path, options) => (await request(path, options)).json();

/** A POST that a retry of the network cannot carry out twice. */
export function post(path, body) {
  const key = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return read(path, { method: "POST", body, headers: { "Idempotency-Key": key } });
}

/** Query string of the parameters that are set. */
export const query = (parameters) =>
  new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined)).toString();

/**
 * Events {id, kind, data} of a job, in order and without end: a lost connection is taken up again after the last event
 * seen, waiting longer each time. Stops when `signal` aborts; throws the Problem when the service refuses.
 */
export async function* jobEvents(jobId, signal) {
  let last = null;
  let wait = 500;
  while (!signal.aborted) {
    try {
      const resume = last === null ? {} : { "Last-Event-ID": last };
      const headers = { Accept: "text/event-stream", ...resume };
      const response = await request(`jobs/${encodeURIComponent(jobId)}/events`, { headers, signal });
      for await (const event of parsedEvents(response.body)) {
        last = event.id ?? last;
        wait = 500;
        yield event;
      }
    } catch (error) {
      if (error instanceof Problem && error.status < 500 && error.status !== 429) throw error;
    }
    await new Promise((resume) => setTimeout(resume, wait));
    wait = Math.min(2 * wait, 10_000);
  }
}

async function* parsedEvents(body) {
  let text = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const blocks = (text + part.value).replaceAll("\r\n", "\n").split("\n\n");
      text = blocks.pop();
      yield* blocks.map(parsedEvent).filter((event) => event.data !== "");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsedEvent(block) {
  const event = { id: null, kind: "message", data: "" };
  for (const line of block.split("\n")) {
    const [, field, value] = /^(\w*): ?(.*)$/.exec(line) ?? [];
    if (field === "id") event.id = value;
    if (field === "event") event.kind = value;
    if (field === "data") event.data += value;
  }
  return event;
}
