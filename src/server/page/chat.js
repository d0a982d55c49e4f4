// The conversation: what is typed, sent, answered, changed and begun anew.

import { $, el } from './dom.js';
import { read, write } from './api.js';
import { actionButton, messageView } from './message.js';
import { needsPlain, newAnswer, receive } from './answer.js';
import { hideTip } from './tokens.js';
import { settings, settingsAreValid } from './settings.js';

/**
 * `running` is the answer that is being written, and what aborts it. In plain mode texts are continued, for models without a
 * chat template. `before` is the conversation that a new one took the place of.
 */
const chat = { model: null, messages: [], running: null, editing: null, isPlain: false, before: null };
const views = new WeakMap();
const actions = { edit, regenerate, proceed: answer };

function viewOf(message) {
  const state = () => ({ isRunning: chat.running?.message === message, isLast: chat.messages.at(-1) === message });
  if (!views.has(message)) views.set(message, messageView(message, state, actions));
  return views.get(message);
}

/** Shows the conversation from its end on. */
function show() {
  const nodes = chat.messages.map((message) => viewOf(message).root);
  if (!nodes.length) {
    const back = () => {
      Object.assign(chat, chat.before, { before: null });
      show();
    };
    nodes.push(el('div', { className: 'empty' }, 'Ask the model something.', ...(chat.before ? [actionButton('Back to the conversation before', back)] : [])));
  }
  hideTip();
  $('messages').replaceChildren(...nodes);
  refresh();
  $('messages').scrollTop = $('messages').scrollHeight;
}

/** Brings all up to date where it stands, and keeps the conversation for when the page is loaded again. */
function refresh() {
  for (const message of chat.messages) viewOf(message).update();
  $('mode-note').hidden = !chat.isPlain;
  $('editing-note').hidden = !chat.editing;
  $('send').hidden = Boolean(chat.running);
  $('stop').hidden = !chat.running;
  const call = unansweredCall();
  $('text').placeholder = call ? `Result of ${call.name}` : chat.isPlain ? 'Text to continue' : 'Message';
  const messages = chat.messages.map(({ spans, pending, ...message }) => ({ ...message, spans: null, pending: [] }));
  write('sessionStorage', 'lowbit.chat', { messages, isPlain: chat.isPlain });
}

/** Follows the answer that is being written, and scrolls with a reader who is at its end. */
function follow(message) {
  const list = $('messages'), isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
  viewOf(message).update();
  if (isAtEnd) list.scrollTop = list.scrollHeight;
}

/** Tells screen readers what is new since `from`, by whole sentences until the end; returns up to where. */
function announce(text, from, isEnd) {
  const fresh = text.slice(from);
  const end = isEnd ? fresh.length : Math.max(...['. ', '! ', '? ', '\n'].map((mark) => fresh.lastIndexOf(mark) + 1));
  if (end && from === 0) $('announcer').replaceChildren();
  if (end) $('announcer').append(el('p', {}, fresh.slice(0, end)));
  return from + end;
}

/** A tool call of the last answer whose result is still to be typed. */
function unansweredCall() {
  const at = chat.messages.findLastIndex(({ role }) => role === 'assistant'), after = chat.messages.slice(at + 1);
  if (at < 0 || chat.running || after.some(({ role }) => role === 'user')) return undefined;
  return chat.messages[at].calls.find(({ id }) => !after.some(({ callId }) => callId === id));
}

/** Has the model answer the conversation. */
async function answer() {
  if (chat.running || !settingsAreValid()) return;
  const message = newAnswer(chat.isPlain), messages = chat.messages.slice(), abort = new AbortController();
  const running = chat.running = { message, abort };
  let frame = null, announced = 0;
  const changed = () => {
    frame ??= requestAnimationFrame(() => {
      frame = null;
      follow(message);
      announced = announce(message.content, announced, false);
    });
  };
  chat.messages.push(message);
  show();
  if (!document.activeElement?.isConnected || document.activeElement === document.body) $('text').focus();
  try {
    await receive(message, { messages, model: chat.model, settings: settings(), signal: abort.signal, changed });
  } catch (error) {
    if (!needsPlain(error)) throw error;
    chat.isPlain = true;
  }
  cancelAnimationFrame(frame);
  // A conversation begun meanwhile is another's.
  if (chat.running !== running) return;
  chat.running = null;
  if (chat.isPlain && !message.isPlain) {
    chat.messages = messages;
    await answer();
    return;
  }
  follow(message);
  announce(message.content, announced, true);
  refresh();
}

function send() {
  const typed = $('text').value, content = chat.isPlain ? typed : typed.trim();
  if (chat.running || !content || !settingsAreValid()) return;
  if (chat.editing) chat.messages.length = chat.messages.indexOf(chat.editing);
  const call = unansweredCall();
  chat.messages.push(call ? { role: 'tool', content, callId: call.id } : { role: 'user', content });
  type('', null);
  if (unansweredCall()) show();
  else answer();
}

function regenerate() {
  if (chat.running || !settingsAreValid()) return;
  if (chat.messages.at(-1)?.role === 'assistant') chat.messages.pop();
  answer();
}

function edit(message) {
  if (chat.running) return;
  type(message.content, message);
  $('text').focus();
}

/** Puts a text in the box, as a change of message `editing` or as a new one. */
function type(text, editing) {
  chat.editing = editing;
  $('editing-note').hidden = !editing;
  $('text').value = text;
  fitText();
}

/** The box is as high as its text, within limits. */
function fitText() {
  $('text').style.height = 'auto';
  $('text').style.height = `${$('text').scrollHeight + 2}px`;
}

const stop = () => chat.running?.abort.abort();

function begin() {
  stop();
  if (chat.messages.length) chat.before = { messages: chat.messages };
  Object.assign(chat, { messages: [], running: null });
  type('', null);
  show();
  $('text').focus();
}

function onEscape() {
  if (!$('tip').hidden) hideTip();
  else if (chat.running) stop();
  else if (chat.editing) type('', null);
}

/** Names the model in requests. */
export function setModel(name) {
  chat.model = name;
}

/** Shows the conversation that this browser tab had, and takes input. */
export function startChat() {
  const kept = read('sessionStorage', 'lowbit.chat');
  if (kept?.messages.length) Object.assign(chat, kept);
  show();
  fitText();
  $('composer').addEventListener('submit', (event) => {
    event.preventDefault();
    send();
  });
  $('text').addEventListener('input', fitText);
  $('text').addEventListener('keydown', (event) => {
    // Enter that ends an input method's composition chooses a word.
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  $('stop').addEventListener('click', () => {
    stop();
    $('text').focus();
  });
  $('new').addEventListener('click', begin);
  $('cancel-edit').addEventListener('click', () => type('', null));
  document.addEventListener('keydown', ({ key }) => { if (key === 'Escape' && !$('key-dialog').open) onEscape(); });
}
