/**
 * What an answer comes down to, in a form in which equal answers are equal texts; null where it says nothing. The first
 * of these that is there counts: the last `\boxed{}`; the last `<answer>`; the whole as JSON, with or without a code
 * fence; the last bold text; what the last line says.
 */
export function finalAnswer(content: string): string | null {
  const text = content.trim();
  const found = lastBoxed(text) ?? lastMatch(text, /<answer>([\s\S]*?)<\/answer>/g);
  if (found !== null) return normalised(found);
  const json = asJson(text.replace(/^```(?:json)?\s*\n([\s\S]*)\n```$/, '$1'));
  if (json !== null) return json;
  return normalised(lastMatch(text, /\*\*([^*\n]+)\*\*/g) ?? lastLine(text));
}

/** JSON with its keys in order and without spaces; null where it is none, or no object and no list. */
export function asJson(text: string): string | null {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === 'object' && value !== null ? JSON.stringify(sorted(value)) : null;
  } catch {
    return null;
  }
}

function sorted(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(sorted);
  if (typeof value !== 'object' || value === null) return value;
  const entries = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));
  return Object.fromEntries(entries.map(([key, item]) => [key, sorted(item)]));
}

/** Braces inside are counted, so that fractions come whole. */
function lastBoxed(text: string): string | null {
  const start = text.lastIndexOf('\\boxed{');
  if (start < 0) return null;
  const from = start + '\\boxed{'.length;
  let depth = 1;
  for (let at = from; at < text.length; at++) {
    if (text[at] === '{') depth++;
    else if (text[at] === '}' && --depth === 0) return text.slice(from, at);
  }
  return null;
}

function lastMatch(text: string, pattern: RegExp): string | null {
  return [...text.matchAll(pattern)].at(-1)?.[1] ?? null;
}

/** Of the last line with something on it: what is behind an equals sign or "answer is", or its only number, or all. */
function lastLine(text: string): string {
  const line = text.split('\n').findLast((candidate) => candidate.trim() !== '') ?? '';
  const behind = /.*(?:=|\banswer(?: is|:))\s*(.+)$/i.exec(line)?.[1];
  if (behind !== undefined) return behind;
  const numbers = line.match(NUMBERS) ?? [];
  return numbers.length === 1 ? numbers[0] : line;
}

const NUMBERS = /-?\d+(?:,\d{3})*(?:\.\d+)?/g;

/** Case, spacing, marks around it and the way in which a number is written do not matter. */
function normalised(found: string): string | null {
  const text = found
    .normalize('NFKC')
    .toLowerCase()
    .replace(/\s+/g, ' ')
    .replace(/^[\s$"'`*_([]+|[\s$"'`*_)\].!?,;:]+$/g, '');
  const number = /^-?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?$/.test(text) ? Number(text.replaceAll(',', '')) : NaN;
  if (Number.isSafeInteger(number) || (Number.isFinite(number) && text.includes('.'))) return String(number);
  return text === '' ? null : text;
}
