// Markdown as models write it: blocks, made again only where the text has grown.

import { copyButton, el } from './dom.js';

const FENCE = /^ *(`{3,}|~{3,}) *([^`]*)$/, ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(?=\S)/, HEADING = /^(#{1,6}) +(.+)$/;
const RULE = /^ *([-*_])( *\1){2,} *$/, QUOTE = /^ *> ?/, TABLE_RULE = /^ *\|?( *:?-+:? *\|)+ *:?-* *$/;
const INLINE = /(`+)(.*?[^`])\1(?!`)|(\*\*|__)(?=\S)(.*?\S)\3|(?<![\w*])([*_])(?=[^\s*_])(.*?[^\s*_])\5(?![\w*])|~~(?=\S)(.*?\S)~~/s;
/** Deeper than this, and in paragraphs longer than this, text is shown as it is. */
const MAX_DEPTH = 12, MAX_PARAGRAPH = 8000;

/** Cuts a text into blocks `{ kind, lines }`; the last may be unfinished. */
function blocksOf(text) {
  const blocks = [];
  const lines = withoutTabs(text.split('\n'));
  for (let at = 0; at < lines.length;) {
    const start = at, line = lines[at], fence = FENCE.exec(line);
    const takeWhile = (test) => { do at++; while (at < lines.length && test(lines[at])); };
    let kind;
    if (line.trim() === '') { at++; continue; }
    if (fence) {
      kind = 'code';
      takeWhile((next) => !isEndOf(fence[1], next));
      at++;
    } else if (HEADING.test(line)) { kind = 'heading'; at++; }
    else if (RULE.test(line)) { kind = 'rule'; at++; }
    else if (QUOTE.test(line)) { kind = 'quote'; takeWhile((next) => QUOTE.test(next)); }
    else if (ITEM.test(line)) { kind = 'list'; at = endOfList(lines, at); }
    else if (line.includes('|') && TABLE_RULE.test(lines[at + 1] ?? '')) { kind = 'table'; takeWhile((next) => next.includes('|')); }
    else { kind = 'paragraph'; takeWhile((next) => next.trim() !== '' && ![FENCE, HEADING, RULE, QUOTE, ITEM].some((of) => of.test(next))); }
    blocks.push({ kind, lines: lines.slice(start, at) });
  }
  return blocks;
}

/** Lines indented by spaces alone, but for code, where tabs mean something. */
function withoutTabs(lines) {
  let fence = null;
  return lines.map((line) => {
    if (fence) {
      if (isEndOf(fence, line)) fence = null;
      return line;
    }
    const spaced = line.replace(/^\s+/, (indent) => indent.replaceAll('\t', '    '));
    fence = FENCE.exec(spaced)?.[1] ?? null;
    return spaced;
  });
}

const isEndOf = (fence, line) => { const text = line.trim(); return text.length >= fence.length && text.replaceAll(fence[0], '') === ''; };
const indentOf = (line) => line.length - line.trimStart().length;
const isOrdered = (line) => /^ *\d/.test(line);

/** A list goes on over items of its kind, whatever is indented, and code; other text after it ends it. */
function endOfList(lines, at) {
  const indent = indentOf(lines[at]), ordered = isOrdered(lines[at]);
  let end = at + 1, fence = null;
  for (let next = end; next < lines.length; next++) {
    const line = lines[next];
    if (fence) { if (isEndOf(fence, line)) fence = null; end = next + 1; continue; }
    if (line.trim() === '') continue;
    const isItem = ITEM.test(line) && indentOf(line) <= indent + 1;
    if (indentOf(line) <= indent && (!isItem || isOrdered(line) !== ordered || RULE.test(line))) break;
    fence = FENCE.exec(line)?.[1] ?? null;
    end = next + 1;
  }
  return end;
}

function listNode(lines, depth) {
  const indent = indentOf(lines[0]), items = [];
  let fence = null;
  for (const line of lines) {
    const item = fence || indentOf(line) > indent + 1 ? null : ITEM.exec(line);
    if (item) items.push({ width: item[0].length, lines: [line.slice(item[0].length)] });
    // What is indented less than the item's text, as many write it, belongs to it too.
    else items.at(-1).lines.push(line.slice(Math.min(indentOf(line), items.at(-1).width)));
    if (fence) { if (isEndOf(fence, line)) fence = null; } else fence = FENCE.exec(items.at(-1).lines.at(-1))?.[1] ?? null;
  }
  const node = el(isOrdered(lines[0]) ? 'ol' : 'ul');
  if (isOrdered(lines[0])) node.start = parseInt(lines[0], 10);
  for (const item of items) {
    const blocks = blocksOf(item.lines.join('\n'));
    const content = (block) => (block.kind === 'paragraph' ? el('span', {}, ...inline(block.lines.join('\n'))) : blockNode(block, depth + 1));
    node.append(el('li', {}, ...blocks.map((block, index) => (index ? blockNode(block, depth + 1) : content(block)))));
  }
  return node;
}

function codeNode(lines) {
  const [first, ...rest] = lines, [, fence, language] = FENCE.exec(first), indent = indentOf(first);
  if (rest.length && isEndOf(fence, rest.at(-1))) rest.pop();
  const code = rest.map((line) => line.slice(Math.min(indent, indentOf(line)))).join('\n');
  const pre = el('pre', { tabIndex: 0 }, el('code', {}, code));
  return el('figure', {}, el('figcaption', {}, language.trim() || 'text', copyButton(() => code)), pre);
}

function tableNode(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, '').split('|').map((cell) => cell.trim());
  const row = (line, tag) => el('tr', {}, ...cells(line).map((cell) => el(tag, {}, ...inline(cell))));
  const body = el('tbody', {}, ...lines.slice(2).map((line) => row(line, 'td')));
  return el('div', { className: 'scroll', tabIndex: 0 }, el('table', {}, el('thead', {}, row(lines[0], 'th')), body));
}

function blockNode({ kind, lines }, depth = 0) {
  const text = lines.join('\n');
  if (depth > MAX_DEPTH) return el('p', {}, text);
  switch (kind) {
    case 'code': return codeNode(lines);
    case 'rule': return el('hr');
    case 'table': return tableNode(lines);
    case 'list': return listNode(lines, depth);
    case 'heading': { const [, marks, title] = HEADING.exec(text); return el(`h${marks.length}`, {}, ...inline(title.trim())); }
    case 'quote': {
      const inner = lines.map((line) => line.replace(QUOTE, '')).join('\n');
      return el('blockquote', {}, ...blocksOf(inner).map((block) => blockNode(block, depth + 1)));
    }
    default: return el('p', {}, ...inline(text));
  }
}

/** Code, bold, italics and struck text of a paragraph. */
function inline(text, depth = 0) {
  const nodes = [];
  if (text.length > MAX_PARAGRAPH || depth > MAX_DEPTH) return [text];
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    if (match.index) nodes.push(text.slice(0, match.index));
    const [, , code, , bold, , italic, struck] = match;
    if (code !== undefined) nodes.push(el('code', {}, code.replace(/^ (.*\S.*) $/, '$1')));
    else if (bold !== undefined) nodes.push(el('strong', {}, ...inline(bold, depth + 1)));
    else if (italic !== undefined) nodes.push(el('em', {}, ...inline(italic, depth + 1)));
    else nodes.push(el('del', {}, ...inline(struck, depth + 1)));
  }
  if (text) nodes.push(text);
  return nodes;
}

/** Shows a text that grows: only blocks that differ from those shown are made again. */
export function renderMarkdown(node, text) {
  const shown = (node.sources ??= []);
  const blocks = blocksOf(text), sources = blocks.map(({ kind, lines }) => `${kind}\n${lines.join('\n')}`);
  let same = 0;
  while (same < sources.length && sources[same] === shown[same]) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  node.append(...blocks.slice(same).map((block) => blockNode(block)));
  node.sources = sources;
}
