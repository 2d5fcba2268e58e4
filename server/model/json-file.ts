import { readFileSync, statSync } from 'node:fs';
import { StartupError } from '../errors.js';

export type JsonObject = Record<string, unknown>;

/** No metadata file of a checkpoint is larger: caps what a hostile file makes us allocate. */
const MAX_JSON_BYTES = 100_000_000;

/** Parses the text of a JSON object and refuses duplicate keys, which JSON.parse would let the last one win. */
export function parseJsonObject(text: string, what: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new StartupError(`${what} is not valid JSON: ${(error as Error).message}.`);
  }
  if (!isJsonObject(value)) throw new StartupError(`${what} must hold a JSON object.`);
  if (countPairs(text) !== countKeys(value)) {
    const duplicate = findDuplicateKey(text);
    throw new StartupError(`${what} holds the key "${duplicate}" twice in one object.`);
  }
  return value;
}

export function isJsonObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** Reads a JSON object and its bytes; null where the file does not exist. */
export function readJsonFile(path: string): { object: JsonObject; bytes: Buffer } | null {
  let bytes: Buffer;
  try {
    const { size } = statSync(path);
    if (size > MAX_JSON_BYTES) {
      throw new StartupError(`${path} has ${size} bytes; a metadata file may have at most ${MAX_JSON_BYTES}.`);
    }
    bytes = readFileSync(path);
  } catch (error) {
    if (error instanceof StartupError) throw error;
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw new StartupError(`${path} cannot be read: ${(error as Error).message}.`);
  }
  return { object: parseJsonObject(bytes.toString('utf8'), path), bytes };
}

/** Key-value pairs of a valid JSON text: its colons outside strings. */
function countPairs(text: string): number {
  let numPairs = 0;
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    if (code === 0x22) i = endOfString(text, i);
    else if (code === 0x3a) numPairs++;
  }
  return numPairs;
}

/** Keys of a parsed value over all levels: fewer than the text's pairs where a key came twice. */
function countKeys(value: unknown): number {
  if (typeof value !== 'object' || value === null) return 0;
  const values = Object.values(value);
  let numKeys = Array.isArray(value) ? 0 : values.length;
  for (const child of values) if (typeof child === 'object') numKeys += countKeys(child);
  return numKeys;
}

/** First key that one object of a valid JSON text holds twice. One pass; strings are skipped with indexOf. */
function findDuplicateKey(text: string): string | null {
  const scopes: (Set<string> | null)[] = []; // [depth] null is an array
  let isKey = false;
  for (let i = 0; i < text.length; i++) {
    switch (text.charCodeAt(i)) {
      case 0x7b: // {
        scopes.push(new Set());
        isKey = true;
        break;
      case 0x5b: // [
        scopes.push(null);
        isKey = false;
        break;
      case 0x7d: // }
      case 0x5d: // ]
        scopes.pop();
        isKey = false;
        break;
      case 0x2c: // ,
        isKey = (scopes.at(-1) ?? null) !== null;
        break;
      case 0x22: {
        const end = endOfString(text, i);
        if (isKey) {
          const raw = text.slice(i + 1, end);
          const key = raw.includes('\\') ? (JSON.parse(text.slice(i, end + 1)) as string) : raw;
          const keys = scopes.at(-1);
          if (keys?.has(key)) return key;
          keys?.add(key);
          isKey = false;
        }
        i = end;
      }
    }
  }
  return null;
}

/** Index of the quote that closes the string opened at `start`. */
function endOfString(text: string, start: number): number {
  let end = start;
  for (;;) {
    end = text.indexOf('"', end + 1);
    let backslashes = 0;
    while (text.charCodeAt(end - 1 - backslashes) === 0x5c) backslashes++;
    if (backslashes % 2 === 0) return end;
  }
}
