// Tokens and their probabilities.

import { $, el } from './dom.js';

/** Tokens of a choice, in the one shape that both APIs' log-probabilities are brought to. */
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) return logprobs.content.map(({ token, logprob, top_logprobs }) => ({ token, logprob, top: top_logprobs ?? [] }));
  return (logprobs.tokens ?? []).map((token, index) => {
    const top = Object.entries(logprobs.top_logprobs?.[index] ?? {}).map(([token, logprob]) => ({ token, logprob }));
    return { token, logprob: logprobs.token_logprobs[index], top: top.sort((a, b) => b.logprob - a.logprob) };
  });
}

/**
 * Which tokens made a text: one span each, or one for all where they do not line up with it, as parts of a character.
 * Tokens before those that make the text, such as the end of a reasoning block, are left out.
 */
export function spansOf(text, tokens) {
  for (let from = 0, joined; from < tokens.length; from++) {
    joined = tokens.slice(from).map(({ token }) => token).join('');
    if (joined === text) return tokens.slice(from).map((token) => ({ text: token.token, tokens: [token] }));
  }
  return [{ text, tokens }];
}

const details = new WeakMap();

export function tokenNode({ text, tokens, isMark }) {
  const node = el('span', { className: isMark ? 'token mark' : 'token' }, text);
  if (!tokens.length) return node;
  node.tabIndex = -1;
  node.dataset.p = Math.min(5, Math.floor(Math.exp(Math.min(...tokens.map(({ logprob }) => logprob))) * 5.26));
  details.set(node, tokens);
  return node;
}

const percent = (logprob) => `${(Math.exp(logprob) * 100).toPrecision(3)} %`;

function showTip(node) {
  const tip = $('tip'), row = (of, chosen) => el('tr', { className: of.token === chosen ? 'chosen' : '' },
    el('td', {}, JSON.stringify(of.token)), el('td', {}, percent(of.logprob)), el('td', {}, of.logprob.toFixed(2)));
  tip.replaceChildren(...details.get(node).map((token) => {
    const isListed = token.top.some((other) => other.token === token.token);
    return el('table', {}, ...(isListed ? token.top : [token, ...token.top]).map((other) => row(other, token.token)));
  }));
  tip.hidden = false;
  const at = node.getClientRects()[0], below = at.bottom + 6;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : Math.max(8, at.top - tip.offsetHeight - 6)}px`;
  node.setAttribute('aria-describedby', 'tip');
}

export function hideTip() {
  $('tip').hidden = true;
}

/** A block of tokens is one stop of the Tab key; arrow keys move within. */
function moveInTokens(event) {
  const step = { ArrowRight: 'nextElementSibling', ArrowLeft: 'previousElementSibling' }[event.key];
  if (!step || !details.has(event.target)) return;
  event.preventDefault();
  let to = event.target[step];
  while (to && !details.has(to)) to = to[step];
  if (!to) return;
  event.target.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

for (const [enter, leave] of [['mouseover', 'mouseout'], ['focusin', 'focusout']]) {
  document.addEventListener(enter, ({ target }) => { if (details.has(target)) showTip(target); });
  document.addEventListener(leave, ({ target }) => { if (details.has(target)) hideTip(); });
}
document.addEventListener('keydown', moveInTokens);
