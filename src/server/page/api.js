// Requests to the server, API keys, server-sent events, and what the browser keeps.

import { $ } from './dom.js';

/** JSON in a browser's storage. Without storage, which a browser may deny, nothing is kept. */
export const read = (storage, name) => { try { return JSON.parse(window[storage].getItem(name)); } catch { return null; } };
export const write = (storage, name, value) => { try { window[storage].setItem(name, JSON.stringify(value)); } catch { /* not kept */ } };

/** A request that failed, as OpenAI's error object tells it. */
export class ApiError extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    Object.assign(this, { status, param });
  }
}

async function errorOf(response) {
  let error = {};
  try { error = (await response.json()).error ?? {}; } catch { /* no error object: the status must do */ }
  let message = error.message ?? `The server answered ${response.status} ${response.statusText}.`;
  const wait = Number(response.headers.get('retry-after'));
  if (response.status === 429 || response.status === 503) message += ` Try again ${wait ? `in ${wait} s` : 'later'}.`;
  return new ApiError(message, response.status, error.param);
}

let apiKey = read('sessionStorage', 'lowbit.key');

/** A response that is well. Where a key is needed, it is asked for. */
export async function api(path, { body, signal } = {}) {
  for (;;) {
    const key = apiKey;
    const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { 'content-type': 'application/json' }) };
    const options = { method: body ? 'POST' : 'GET', headers, body: body && JSON.stringify(body), signal, cache: 'no-store' };
    const response = await fetch(path, options).catch((error) => {
      throw error.name === 'AbortError' ? error : new ApiError('The server cannot be reached.');
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status !== 401 || !(key !== apiKey || await askForKey(key ? error.message : 'This server asks for an API key.'))) throw error;
  }
}

let asking = null;

/** Asks for a key, once for all who need one; false where none is given. */
function askForKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = $('key-dialog');
    $('key-reason').textContent = reason;
    $('key').value = dialog.returnValue = '';
    dialog.addEventListener('close', () => {
      asking = null;
      if (dialog.returnValue) {
        write('sessionStorage', 'lowbit.key', apiKey = $('key').value);
        document.dispatchEvent(new Event('newkey'));
      }
      resolve(Boolean(dialog.returnValue));
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** Data of the server-sent events of a response. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '', data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      for (const line of lines.map((line) => line.replace(/\r$/, ''))) {
        if (line.startsWith('data:')) data.push(line.slice(5).replace(/^ /, ''));
        if (line === '' && data.length) { yield data.join('\n'); data = []; }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
