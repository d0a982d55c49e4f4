// One answer of the model: what is asked, and how the message grows as it streams in. Nothing here touches the document.

import { ApiError, api, events } from './api.js';
import { spansOf, tokensOf } from './tokens.js';

/** A message that the model is to write. `spans` holds its tokens where probabilities are asked for. */
export const newAnswer = (isPlain) => ({
  role: 'assistant', content: '', reasoning: '', calls: [], isPlain, spans: null, pending: [], asText: false, finish: null, problem: null, stats: '',
});

/** The body of a request: a conversation, or in plain mode a text to continue. */
function bodyOf(messages, isPlain, model, { system, tools, logprobs, sampling }) {
  const body = { ...(model && { model }), ...sampling, stream: true, stream_options: { include_usage: true } };
  if (isPlain) return { ...body, prompt: messages.map(({ content }) => content).join(''), ...(logprobs && { logprobs: 5 }) };
  body.messages = messages.map(({ role, content, calls, callId }) => ({
    role, content, ...(callId && { tool_call_id: callId }), ...(calls?.length && { tool_calls: calls.map(callOf) }),
  }));
  if (system) body.messages.unshift({ role: 'system', content: system });
  if (tools.length) body.tools = tools;
  return { ...body, ...(logprobs && { logprobs: true, top_logprobs: 5 }) };
}

const callOf = ({ id, name, arguments: text }) => ({ id, type: 'function', function: { name, arguments: text } });

/**
 * Streams the model's answer to `messages` into `message`; `changed` is called as it grows. What goes wrong stands in
 * `message.problem` in the end. Throws only where the model has no chat template, and so needs plain mode.
 */
export async function receive(message, { messages, model, settings, signal, changed }) {
  const timing = { start: performance.now(), first: null, last: null, usage: null, pieces: 0 };
  const body = bodyOf(messages, message.isPlain, model, settings);
  try {
    const response = await api(message.isPlain ? 'v1/completions' : 'v1/chat/completions', { body, signal });
    if (body.logprobs) message.spans = { reasoning: [], content: [] };
    await follow(response, message, timing, changed);
  } catch (error) {
    if (needsPlain(error) && !message.isPlain) throw error;
    if (error.name === 'AbortError') message.finish = 'stopped';
    else message.problem = error.message;
  }
  message.spans?.content.push(...message.pending.map((token) => ({ text: token.token, tokens: [token], isMark: true })));
  message.pending = [];
  message.stats = statsOf(message, timing);
}

/** A model without a chat template says so of `messages`, and names the API that it has. */
export const needsPlain = (error) => error.status === 400 && error.param === 'messages' && error.message.includes('/v1/completions');

async function follow(response, message, timing, changed) {
  for await (const data of events(response)) {
    if (data === '[DONE]') return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    timing.usage = chunk.usage ?? timing.usage;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    message.finish = choice.finish_reason ?? message.finish;
    if (!add(message, choice.delta ?? { content: choice.text }, tokensOf(choice.logprobs))) continue;
    timing.last = performance.now();
    timing.first ??= timing.last;
    timing.pieces++;
    changed();
  }
  throw new ApiError('The connection ended before the answer did.');
}

/** Adds a delta to a message; true where it brought something. */
function add(message, delta, tokens) {
  message.pending.push(...tokens);
  for (const [part, text] of [['reasoning', delta.reasoning_content], ['content', delta.content]]) {
    if (!text) continue;
    message[part] += text;
    message.spans?.[part].push(...spansOf(text, message.pending.splice(0)));
  }
  for (const { index, id, function: of } of delta.tool_calls ?? []) {
    const call = (message.calls[index] ??= { id, name: '', arguments: '' });
    call.name += of?.name ?? '';
    call.arguments += of?.arguments ?? '';
    message.pending = [];
  }
  return Boolean(tokens.length || delta.content || delta.reasoning_content || delta.tool_calls);
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
const FINISHES = { stop: '', length: 'ended at the limit of tokens', tool_calls: '' };

function statsOf(message, { start, first, last, usage, pieces }) {
  const parts = [], tokens = usage?.completion_tokens ?? pieces;
  if (first !== null) {
    parts.push(`TTFT ${duration(first - start)}`);
    const rate = (tokens - 1) / (last - first) * 1000;
    if (last > first && tokens > 1) parts.push(`${rate < 100 ? rate.toFixed(1) : Math.round(rate)} tokens/s`);
    // Without the usage, which comes last, pieces are counted: most are one token.
    parts.push(`${usage ? '' : '≈ '}${tokens} token${tokens === 1 ? '' : 's'}`);
  }
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) parts.push(`prompt ${usage.prompt_tokens}${cached ? ` (${cached} cached)` : ''}`);
  parts.push(FINISHES[message.finish] ?? message.finish ?? '');
  return parts.filter(Boolean).join(' · ');
}
