/* The JSON API: one function that fetches, and one error whose message is fit for people. */

/** What the server refused, in its own words, from either of its two error dialects. */
export class ApiError extends Error {
  constructor(message, status, code, retryAfter) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** Read `response`'s error body: OpenAI's shape under /v1, problem+json elsewhere. */
export async function errorFrom(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // A proxy answers in HTML; the status line still says something.
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  const problem = body?.error ?? body ?? {};
  const fields = (body?.errors ?? []).map((item) => [item.field ?? item.loc ?? item.pointer, item.message ?? item.msg ?? item.detail].filter(Boolean).join(": "));
  const said = problem.message ?? problem.detail ?? problem.title;
  const message = [said ?? `the server answered ${response.status} ${response.statusText}`, ...fields].join("; ");
  return new ApiError(message, response.status, problem.code ?? problem.type ?? null, retryAfter);
}

/** To the sign-in page and back again afterwards. */
export function signIn() {
  location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
}

async function call(method, path, body, signal) {
  return send(method, path, body === undefined ? undefined : JSON.stringify(body), "application/json", signal);
}

async function send(method, path, content, type, signal) {
  const headers = { Accept: "application/json" };
  if (content !== undefined) headers["Content-Type"] = type;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, cache: "no-store", body: content });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server cannot be reached; is it still running?", 0, "unreachable", null);
  }
  if (response.status === 401) signIn();
  if (!response.ok) throw await errorFrom(response);
  return response.status === 204 ? null : response.json();
}

export const api = {
  get: (path, signal) => call("GET", path, undefined, signal),
  post: (path, body = {}) => call("POST", path, body),
  delete: (path) => call("DELETE", path),
  upload: (path, file, type) => send("POST", path, file, type),
};
