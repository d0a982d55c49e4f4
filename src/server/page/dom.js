// Elements, and the clipboard. What models and servers write enters the document as text nodes alone, never as HTML.

/** The element of an id. */
export const $ = (id) => document.getElementById(id);

/** An element: `el('p', { className: 'note' }, 'text', child)`. */
export function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** A button that copies what `text` returns. */
export function copyButton(text, label = 'Copy') {
  const button = el('button', { type: 'button' }, label);
  button.addEventListener('click', async () => {
    const isCopied = await copy(text());
    button.textContent = isCopied ? 'Copied' : 'Not copied';
    setTimeout(() => { button.textContent = label; }, 1500);
  });
  return button;
}

/** Over plain HTTP browsers have no clipboard but the old command. */
async function copy(text) {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* the old way */ }
  const focused = document.activeElement, area = el('textarea', { value: text, className: 'unseen' });
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand('copy');
  area.remove();
  focused?.focus();
  return isCopied;
}
