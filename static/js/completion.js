/* One streamed chat completion: POST /v1/chat/completions, read as it is written, with its own clock. */

import { ApiError, errorFrom, signIn } from "./api.js";
import { readEvents } from "./sse.js";

/** Stream an answer. Calls `onText(delta)` for each piece and resolves to
    {text, finishReason, tokens, promptTokens, cartridgeSlots, seconds, firstTokenSeconds, experienceId, domain, endedBy,
    memory, cartridges, workspace, trace}; what was not asked for is null or empty.
    Rejects with ApiError, or with an AbortError when `signal` was aborted. */
export async function complete(body, { signal, onText }) {
  const begun = performance.now();
  const result = {
    text: "", finishReason: null, tokens: null, promptTokens: null, cartridgeSlots: 0, seconds: 0, firstTokenSeconds: null,
    experienceId: null, domain: null, endedBy: null, memory: null, cartridges: [], workspace: null, trace: null,
  };
  const response = await open(body, signal);
  for await (const message of readEvents(response.body)) {
    if (message.data === null || message.data === undefined) continue;
    if (message.data === "[DONE]") break;
    const chunk = JSON.parse(message.data);
    if (chunk.error) throw new ApiError(chunk.error.message, 200, chunk.error.code, null);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      result.firstTokenSeconds ??= (performance.now() - begun) / 1000;
      result.text += choice.delta.content;
      onText(choice.delta.content);
    }
    if (choice?.finish_reason) result.finishReason = choice.finish_reason;
    if (chunk.usage) takeUsage(result, chunk.usage);
    if (chunk.olympus) {
      result.experienceId = chunk.olympus.experience_id;
      result.domain = chunk.olympus.domain;
      result.endedBy = chunk.olympus.ended_by;
      result.memory = chunk.olympus.memory ?? null;
      result.cartridges = chunk.olympus.cartridges ?? [];
      result.trace = chunk.olympus.trace ?? null;
    }
  }
  if (signal.aborted) throw new DOMException("stopped", "AbortError");
  if (result.finishReason === null) throw new ApiError("the connection ended before the answer did", 0, "cut_off", null);
  result.seconds = (performance.now() - begun) / 1000;
  return result;
}

function takeUsage(result, usage) {
  result.tokens = usage.completion_tokens;
  result.promptTokens = usage.prompt_tokens;
  result.cartridgeSlots = usage.cartridge_slots ?? 0;
  result.workspace = usage.workspace ?? null;
}

async function open(body, signal) {
  let response;
  try {
    response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server cannot be reached; is it still running?", 0, "unreachable", null);
  }
  if (response.status === 401) signIn();
  if (!response.ok) throw await errorFrom(response);
  return response;
}
