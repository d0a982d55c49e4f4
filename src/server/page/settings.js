// The settings beside a chat, and what they add to a request.

import { $, el } from './dom.js';
import { read, write } from './api.js';

const form = $('settings');
const NUMBERS = ['temperature', 'max_tokens', 'top_p', 'top_k', 'min_p', 'seed'];
const fields = () => [...form.elements].filter(({ name }) => name);
const valueKey = (field) => (field.type === 'checkbox' ? 'checked' : 'value');

/** What was set; fields that are empty are left out of `sampling`. */
export function settings() {
  const value = (name) => form.elements[name].value;
  const set = NUMBERS.filter((name) => value(name) !== '').map((name) => [name, Number(value(name))]);
  const stops = value('stop').split('\n').filter(Boolean).map((text) => text.replaceAll('\\n', '\n'));
  if (stops.length) set.push(['stop', stops]);
  return {
    sampling: Object.fromEntries(set), system: value('system').trim(), tools: toolsOf(value('tools')), logprobs: form.elements.logprobs.checked,
  };
}

/** A list of tools; null for what is none. */
function toolsOf(text) {
  if (!text.trim()) return [];
  try { const tools = JSON.parse(text); return Array.isArray(tools) ? tools : null; } catch { return null; }
}

/** Shows the first setting that is wrong, if one is. */
export function settingsAreValid() {
  form.elements.tools.setCustomValidity(toolsOf(form.elements.tools.value) ? '' : 'This is not a JSON list.');
  if (form.checkValidity()) return true;
  showSettings(true);
  form.reportValidity();
  return false;
}

function showSettings(isShown) {
  form.hidden = !isShown;
  $('toggle-settings').ariaExpanded = String(isShown);
}

function save() {
  write('localStorage', 'lowbit.settings', Object.fromEntries(fields().map((field) => [field.name, field[valueKey(field)]])));
  const count = fields().filter((field) => field[valueKey(field)]).length;
  $('toggle-settings').replaceChildren('Settings', ...(count ? [el('span', { className: 'count', title: `${count} set` }, count)] : []));
}

/** Restores what was set before, and keeps what will be. */
export function startSettings() {
  const kept = read('localStorage', 'lowbit.settings') ?? {};
  for (const field of fields()) if (field.name in kept) field[valueKey(field)] = kept[field.name];
  save();
  showSettings(innerWidth > 1000);
  form.addEventListener('input', save);
  form.addEventListener('reset', () => setTimeout(save));
  form.addEventListener('submit', (event) => event.preventDefault());
  $('toggle-settings').addEventListener('click', () => {
    showSettings(form.hidden);
    if (!form.hidden) $('system').focus();
  });
  $('close-settings').addEventListener('click', () => {
    showSettings(false);
    $('toggle-settings').focus();
  });
}
