import { chars, choice, DIGIT, repeat, sequence, text, type GrammarBuilder, type GrammarNode } from './grammar.js';
import { MAX_DIGITS } from './json.js';

/** Bounds of a number, both included; null: none. */
export interface Bounds {
  min: Decimal | null;
  max: Decimal | null;
}

/** digits * 10^-scale */
export interface Decimal {
  digits: bigint;
  scale: number;
}

/** Digits behind the point that a bounded number may have, where its bounds have fewer. */
const MIN_SCALE = 2;
const MAX_SCALE = 12;

/** The shortest decimal that is read as this number. */
export function toDecimal(value: number): Decimal {
  const [mantissa, exponent] = value.toExponential().split('e') as [string, string];
  const [whole, fraction = ''] = mantissa.split('.') as [string, string?];
  const scale = fraction.length - Number(exponent);
  const digits = BigInt(whole + fraction);
  return scale >= 0 ? { digits, scale } : { digits: digits * 10n ** BigInt(-scale), scale: 0 };
}

/** Integers between two bounds, of at most MAX_DIGITS digits; null where there is none. */
export function integersBetween(
  { min, max }: Bounds,
  isMinExcluded: boolean,
  isMaxExcluded: boolean,
): GrammarNode | null {
  const range = rangeAt(min, max, 0, isMinExcluded, isMaxExcluded, MAX_DIGITS);
  return range && scaledBetween(...range, 0);
}

/** Numbers between two bounds, without exponent; null where there is none with few enough digits. */
export function numbersBetween(
  { min, max }: Bounds,
  isMinExcluded: boolean,
  isMaxExcluded: boolean,
): GrammarNode | null {
  const mostScale = Math.max(MIN_SCALE, min?.scale ?? 0, max?.scale ?? 0);
  if (mostScale > MAX_SCALE) return null;
  const forms: GrammarNode[] = [];
  for (let scale = 0; scale <= mostScale; scale++) {
    const range = rangeAt(min, max, scale, isMinExcluded, isMaxExcluded, MAX_DIGITS);
    const form = range && scaledBetween(...range, scale);
    if (form) forms.push(form);
  }
  return forms.length === 0 ? null : choice(...forms);
}

/** Whole numbers n with min <= n / 10^scale <= max. */
function rangeAt(
  min: Decimal | null,
  max: Decimal | null,
  scale: number,
  isMinExcluded: boolean,
  isMaxExcluded: boolean,
  numDigits: number,
): [bigint, bigint] | null {
  const largest = 10n ** BigInt(numDigits) - 1n;
  let low = -largest;
  let high = largest;
  if (min) {
    const { digits: at, isExact } = rescale(min, scale, 'up');
    const first = isExact && isMinExcluded ? at + 1n : at;
    if (first > low) low = first;
  }
  if (max) {
    const { digits: at, isExact } = rescale(max, scale, 'down');
    const last = isExact && isMaxExcluded ? at - 1n : at;
    if (last < high) high = last;
  }
  return low <= high ? [low, high] : null;
}

function rescale(
  { digits, scale }: Decimal,
  wanted: number,
  round: 'up' | 'down',
): { digits: bigint; isExact: boolean } {
  if (wanted >= scale) return { digits: digits * 10n ** BigInt(wanted - scale), isExact: true };
  const unit = 10n ** BigInt(scale - wanted);
  const quotient = digits / unit; // towards 0
  const isExact = quotient * unit === digits;
  if (isExact) return { digits: quotient, isExact };
  if (round === 'up') return { digits: digits > 0n ? quotient + 1n : quotient, isExact };
  return { digits: digits < 0n ? quotient - 1n : quotient, isExact };
}

/** n / 10^scale for n from low to high. */
function scaledBetween(low: bigint, high: bigint, scale: number): GrammarNode {
  const parts: GrammarNode[] = [];
  if (high >= 0n) parts.push(nonNegative(low > 0n ? low : 0n, high, scale));
  if (low < 0n) parts.push(sequence('-', nonNegative(high < 0n ? -high : 1n, -low, scale)));
  return choice(...parts);
}

function nonNegative(low: bigint, high: bigint, scale: number): GrammarNode {
  const parts: GrammarNode[] = [];
  const shortest = scale + 1;
  for (let length = shortest; length <= String(high).length || length === shortest; length++) {
    const first = length === shortest ? 0n : 10n ** BigInt(length - 1);
    const last = 10n ** BigInt(length) - 1n;
    const from = low > first ? low : first;
    const to = high < last ? high : last;
    if (from > to) continue;
    parts.push(digitsBetween(String(from).padStart(length, '0'), String(to).padStart(length, '0'), scale));
  }
  return choice(...parts);
}

/** Digit strings of one length from low to high, with a point before the last `scale` digits. */
function digitsBetween(low: string, high: string, scale: number): GrammarNode {
  const [first, last] = [low[0]!, high[0]!];
  const rest = low.length - 1;
  if (rest === 0) return chars(`${first}-${last}`);
  const point = rest === scale ? '.' : '';
  if (first === last) return sequence(first + point, digitsBetween(low.slice(1), high.slice(1), scale));
  const parts: GrammarNode[] = [];
  const isFromZero = /^0*$/.test(low.slice(1));
  const isToNine = /^9*$/.test(high.slice(1));
  const from = Number(first) + (isFromZero ? 0 : 1);
  const to = Number(last) - (isToNine ? 0 : 1);
  if (!isFromZero) parts.push(sequence(first + point, digitsBetween(low.slice(1), '9'.repeat(rest), scale)));
  if (from <= to) parts.push(sequence(chars(`${from}-${to}`), point, anyDigits(rest, scale)));
  if (!isToNine) parts.push(sequence(last + point, digitsBetween('0'.repeat(rest), high.slice(1), scale)));
  return choice(...parts);
}

function anyDigits(length: number, scale: number): GrammarNode {
  if (length <= scale || scale === 0) return repeat(DIGIT, length, length);
  return sequence(repeat(DIGIT, length - scale, length - scale), '.', repeat(DIGIT, scale, scale));
}

/** Integers of up to MAX_DIGITS digits that a divisor divides: an automaton over remainders. */
export function multiplesOf(divisor: number, isSigned: boolean, builder: GrammarBuilder): GrammarNode {
  const made = new Map<string, GrammarNode>();
  /** what may follow digits that leave a remainder, at most `room` digits */
  const after = (remainder: number, room: number): GrammarNode => {
    const key = `${remainder}:${room}`;
    const known = made.get(key);
    if (known) return known;
    const end = remainder === 0 ? [text('')] : [];
    const more =
      room === 0
        ? []
        : Array.from({ length: 10 }, (_, digit) =>
            sequence(String(digit), after((10 * remainder + digit) % divisor, room - 1)),
          );
    const node = builder.rule(choice(...end, ...more));
    made.set(key, node);
    return node;
  };
  const first = Array.from({ length: 9 }, (_, at) =>
    sequence(String(at + 1), after((at + 1) % divisor, MAX_DIGITS - 1)),
  );
  return choice('0', sequence(isSigned ? choice('', '-') : '', choice(...first)));
}
