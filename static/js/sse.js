/* Server-sent events from a fetch() body: the parser of the HTML standard (section 9.2.6), as an async generator.
   EventSource can neither POST, nor tell a 401 from a 503, nor be given a backoff. */

/** Yields {event, data, id, retry, comment}; `comment` entries are heartbeats. Ends when the body ends. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let fields = blank();
  let told = null; // the newest id that went out: a block that only moves it is an event without data
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      // A lone CR at the very end may be the first half of CRLF: leave it for the next chunk.
      const lines = buffer.split(/\r\n|\n|\r(?!$)/);
      buffer = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (fields.data !== null || fields.retry !== null || fields.id !== told) yield finish(fields);
          told = fields.id;
          fields = { ...blank(), id: fields.id };
        } else if (line.startsWith(":")) {
          yield { comment: line.slice(1).trim() };
        } else {
          take(fields, line);
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be gone already
  }
}

function blank() {
  return { event: "message", data: null, id: null, retry: null };
}

function take(fields, line) {
  const colon = line.indexOf(":");
  const name = colon < 0 ? line : line.slice(0, colon);
  const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
  if (name === "data") fields.data = fields.data === null ? value : `${fields.data}\n${value}`;
  else if (name === "event") fields.event = value || "message";
  else if (name === "id" && !value.includes("\0")) fields.id = value;
  else if (name === "retry" && /^\d+$/.test(value)) fields.retry = Number(value);
}

function finish(fields) {
  return { ...fields };
}
