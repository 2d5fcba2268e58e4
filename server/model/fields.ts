import { StartupError } from '../errors.js';
import { isJsonObject, type JsonObject } from './json-file.js';

/**
 * Typed access to the keys of one JSON object. null counts as absent, as in the hub's files. A wrong type or an
 * absent required key is a StartupError that names the file and the key.
 */
export class Fields {
  readonly #object: JsonObject;
  readonly #file: string;
  readonly #prefix: string;

  constructor(object: JsonObject, file: string, prefix = '') {
    this.#object = object;
    this.#file = file;
    this.#prefix = prefix;
  }

  has(key: string): boolean {
    return this.#object[key] !== undefined && this.#object[key] !== null;
  }

  isNull(key: string): boolean {
    return this.#object[key] === null;
  }

  raw(key: string): unknown {
    return this.#object[key] ?? undefined;
  }

  keys(): string[] {
    return Object.keys(this.#object).filter((key) => this.has(key));
  }

  number(key: string, fallback?: number): number {
    const value = this.#get(key, fallback);
    if (typeof value !== 'number' || !Number.isFinite(value)) this.fail(key, 'a finite number');
    return value;
  }

  positive(key: string, fallback?: number): number {
    const value = this.number(key, fallback);
    if (value <= 0) this.fail(key, 'a number above 0');
    return value;
  }

  /** A whole number in [min, 2^31). */
  count(key: string, min: number, fallback?: number): number {
    const value = this.#get(key, fallback);
    if (typeof value !== 'number' || !Number.isInteger(value) || value < min || value >= 2 ** 31) {
      this.fail(key, `a whole number of at least ${min}`);
    }
    return value;
  }

  boolean(key: string, fallback?: boolean): boolean {
    const value = this.#get(key, fallback);
    if (typeof value !== 'boolean') this.fail(key, 'true or false');
    return value;
  }

  oneOf<T extends string>(key: string, supported: readonly T[], fallback?: T): T {
    const value = this.#get(key, fallback);
    if (!(supported as readonly unknown[]).includes(value)) this.unsupported(key, supported);
    return value as T;
  }

  /** The nested object at `key`; null where absent. */
  object(key: string): Fields | null {
    const value = this.raw(key);
    if (value === undefined) return null;
    if (!isJsonObject(value)) this.fail(key, 'an object');
    return new Fields(value, this.#file, `${this.#prefix}${key}.`);
  }

  fail(key: string, wanted: string): never {
    throw new StartupError(
      `${this.#file}: "${this.#prefix}${key}" is ${JSON.stringify(this.raw(key)) ?? 'absent'}; it must be ${wanted}.`,
    );
  }

  unsupported(key: string, supported: readonly unknown[]): never {
    const list = supported.map((value) => JSON.stringify(value)).join(', ');
    throw new StartupError(
      `${this.#file}: "${this.#prefix}${key}" is ${JSON.stringify(this.raw(key)) ?? 'absent'}, which is not supported; supported: ${list}.`,
    );
  }

  #get(key: string, fallback: unknown): unknown {
    return this.has(key) ? this.#object[key] : fallback;
  }
}
