import type { CodeRange } from './grammar.js';

/** first and last byte, both included, of each position */
export type ByteRanges = [first: number, last: number][]; // [num_bytes]

const LAST_OF_LENGTH = [0x7f, 0x7ff, 0xffff, 0x10ffff];

/** The UTF-8 forms of a range of code points; half surrogates have none. */
export function utf8Ranges([first, last]: CodeRange): ByteRanges[] {
  if (first > last) return [];
  if (first < 0xd800 && last > 0xdfff) return [...utf8Ranges([first, 0xd7ff]), ...utf8Ranges([0xe000, last])];
  if (first >= 0xd800 && first <= 0xdfff) return utf8Ranges([0xe000, last]);
  if (last >= 0xd800 && last <= 0xdfff) return utf8Ranges([first, 0xd7ff]);
  for (const limit of LAST_OF_LENGTH) {
    if (first <= limit && last > limit) return [...utf8Ranges([first, limit]), ...utf8Ranges([limit + 1, last])];
  }
  return splitRange(bytesOf(first), bytesOf(last));
}

/** Two forms of the same length -> products of byte ranges that cover exactly what lies between them. */
function splitRange(first: number[], last: number[]): ByteRanges[] {
  if (first.length === 1) return [[[first[0]!, last[0]!]]];
  const [head, lastHead] = [first[0]!, last[0]!];
  const [rest, lastRest] = [first.slice(1), last.slice(1)];
  if (head === lastHead) {
    return splitRange(rest, lastRest).map((ranges): ByteRanges => [[head, head], ...ranges]);
  }
  const lowest = rest.map(() => 0x80);
  const highest = rest.map(() => 0xbf);
  const isFromLowest = rest.every((byte) => byte === 0x80);
  const isToHighest = lastRest.every((byte) => byte === 0xbf);
  const from = isFromLowest ? head : head + 1;
  const to = isToHighest ? lastHead : lastHead - 1;
  const parts: ByteRanges[] = [];
  if (!isFromLowest) parts.push(...splitRange(rest, highest).map((ranges): ByteRanges => [[head, head], ...ranges]));
  if (from <= to) parts.push([[from, to], ...rest.map((): [number, number] => [0x80, 0xbf])]);
  if (!isToHighest) {
    parts.push(...splitRange(lowest, lastRest).map((ranges): ByteRanges => [[lastHead, lastHead], ...ranges]));
  }
  return parts;
}

function bytesOf(codePoint: number): number[] {
  if (codePoint <= 0x7f) return [codePoint];
  const tail = 0x80 | (codePoint & 0x3f);
  if (codePoint <= 0x7ff) return [0xc0 | (codePoint >> 6), tail];
  const middle = 0x80 | ((codePoint >> 6) & 0x3f);
  if (codePoint <= 0xffff) return [0xe0 | (codePoint >> 12), middle, tail];
  return [0xf0 | (codePoint >> 18), 0x80 | ((codePoint >> 12) & 0x3f), middle, tail];
}
