/** Texts of the command line -> values; each throws an Error whose message says what the text must be. */
import { resolve } from 'node:path';

export function nonEmpty(text: string): string {
  if (text.trim() === '') throw new Error('must not be empty');
  return text;
}

export function folder(text: string): string {
  return resolve(nonEmpty(text));
}

export function origin(text: string): string {
  if (text !== '*' && !/^https?:\/\/[^/]+$/.test(text))
    throw new Error("must be an origin such as https://example.org, or '*'");
  return text;
}

export function zmqAddress(text: string): string {
  const port = Number(/^tcp:\/\/(?:\*|\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})$/.exec(text)?.[1] ?? NaN);
  if (!(port <= 65535))
    throw new Error('must be an address to listen on, such as tcp://*:5557 or tcp://127.0.0.1:5557');
  return text;
}

export function httpUrl(text: string): string {
  const protocol = URL.canParse(text) ? new URL(text).protocol : '';
  if (protocol !== 'http:' && protocol !== 'https:') throw new Error('must be an http or https address with its path');
  return text;
}

export function device(text: string): string {
  if (!/^(auto|cpu|cuda:\d{1,3})$/.test(text)) throw new Error('must be auto, cpu or cuda:N');
  return text;
}

export function choice(choices: readonly string[]): (text: string) => string {
  return (text) => {
    if (!choices.includes(text)) throw new Error(`must be one of ${choices.join(', ')}`);
    return text;
  };
}

export function integer(min: number, max: number, orElse = ''): (text: string) => number {
  return (text) => {
    const value = /^\d+$/.test(text) ? Number(text) : NaN;
    if (!(value >= min && value <= max)) throw new Error(`must be ${orElse}a whole number from ${min} to ${max}`);
    return value;
  };
}

export function share(text: string): number {
  const value = /^\d*\.?\d+$/.test(text) ? Number(text) : NaN;
  if (!(value > 0 && value <= 1)) throw new Error('must be a number above 0 and at most 1');
  return value;
}

export function boolean(text: string): boolean {
  if (text === 'true' || text === '1') return true;
  if (text === 'false' || text === '0') return false;
  throw new Error('must be true or false');
}

const UNITS: Record<string, number> = {
  '': 1,
  B: 1,
  KIB: 2 ** 10,
  MIB: 2 ** 20,
  GIB: 2 ** 30,
  TIB: 2 ** 40,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
};

export function bytes(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([a-z]*)$/i.exec(text.trim());
  const unit = match && UNITS[match[2]!.toUpperCase()];
  const value = match && unit ? Math.floor(Number(match[1]) * unit) : 0;
  if (!Number.isSafeInteger(value) || value < 1) throw new Error('must be a size such as 512MiB or 8GiB');
  return value;
}
