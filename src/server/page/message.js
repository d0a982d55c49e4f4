// How a message looks while it is written and after.

import { copyButton, el } from './dom.js';
import { renderMarkdown } from './markdown.js';
import { tokenNode } from './tokens.js';

const NAMES = { user: 'You', assistant: 'Model', tool: 'Tool result' };

/** A button that does `act`. */
export function actionButton(label, act, properties = {}) {
  const button = el('button', { type: 'button', ...properties }, label);
  button.addEventListener('click', act);
  return button;
}

/** Reasoning or content of a message: prose, or its tokens. */
function partView(message, part) {
  const prose = el('div', { className: 'prose' });
  const tokens = el('div', { className: 'tokens', role: 'group', ariaLabel: 'Tokens and their probabilities; arrow keys move between them' });
  const isText = message.role !== 'assistant' || message.isPlain;
  prose.classList.toggle('plain', isText);
  const update = () => {
    const spans = message.spans?.[part] ?? [], isTokens = spans.length > 0 && !message.asText;
    prose.hidden = isTokens || !message[part];
    tokens.hidden = !isTokens;
    if (isTokens) {
      for (const span of spans.slice(tokens.childElementCount)) tokens.append(tokenNode(span));
      if (!tokens.querySelector('[tabindex="0"]')) tokens.querySelector('[tabindex]')?.setAttribute('tabindex', '0');
    } else if (isText) prose.textContent = message[part];
    else renderMarkdown(prose, message[part]);
  };
  return { nodes: [prose, tokens], update };
}

function callNode({ name, arguments: text }) {
  let shown = text;
  try { shown = JSON.stringify(JSON.parse(text), null, 2); } catch { /* unfinished, or no JSON: as it is */ }
  const pre = el('pre', { tabIndex: 0 }, el('code', {}, shown));
  return el('figure', { className: 'call' }, el('figcaption', {}, `Tool call: ${name}`, copyButton(() => shown)), pre);
}

/**
 * What shows `message`: its element, and `update`, which follows it. `state()` says `isRunning` and `isLast`;
 * `actions` are what a reader can do: `edit`, `regenerate`, `proceed`.
 */
export function messageView(message, state, actions) {
  const reasoning = partView(message, 'reasoning'), content = partView(message, 'content');
  const summary = el('summary'), thoughts = el('details', { open: true }, summary, ...reasoning.nodes);
  const calls = el('div'), problem = el('div', { className: 'problem', role: 'alert' }), foot = el('div', { className: 'foot' });
  const name = message.isPlain ? 'Continued' : NAMES[message.role];
  const root = el('article', { className: `message ${message.role}`, ariaLabel: name },
    el('h2', {}, name), thoughts, ...content.nodes, calls, problem, foot);
  // The reasoning is folded when the answer begins, unless the reader has a will of their own.
  let isFolded = false;
  summary.addEventListener('click', () => { isFolded = true; });

  const updateParts = () => {
    reasoning.update();
    content.update();
  };
  const footNodes = ({ isRunning, isLast }) => {
    if (isRunning) return [];
    const nodes = [];
    if (message.stats) nodes.push(el('span', { className: 'hint stats', title: 'TTFT: time to the first token' }, message.stats));
    if (message.content) nodes.push(copyButton(() => message.content));
    if (message.role === 'user') nodes.push(actionButton('Edit', () => actions.edit(message)));
    if (message.spans) {
      const toggle = ({ target }) => {
        message.asText = !message.asText;
        target.ariaPressed = String(!message.asText);
        updateParts();
      };
      nodes.push(actionButton('Probabilities', toggle, { ariaPressed: String(!message.asText) }));
    }
    if (message.role === 'assistant' && isLast && !message.problem) nodes.push(actionButton('Regenerate', actions.regenerate));
    if (message.isPlain && isLast && message.finish === 'length') nodes.push(actionButton('Continue', actions.proceed));
    return nodes;
  };
  const update = () => {
    const now = state();
    root.classList.toggle('busy', now.isRunning);
    thoughts.hidden = !message.reasoning;
    summary.textContent = now.isRunning && !message.content ? 'Reasoning…' : 'Reasoning';
    if (message.content && !isFolded) {
      thoughts.open = false;
      isFolded = true;
    }
    updateParts();
    calls.replaceChildren(...(message.calls ?? []).map(callNode));
    problem.hidden = !message.problem;
    if (message.problem) problem.replaceChildren(message.problem, ...(now.isLast ? [actionButton('Try again', actions.regenerate)] : []));
    foot.replaceChildren(...footNodes(now));
  };
  return { root, update };
}
