import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { readSafetensorsHeader } from '../../server/model/safetensors.js';

/** Expected outputs of a fixture: reference.safetensors, whole. */
export class Reference {
  readonly #file: string;
  readonly #header: ReturnType<typeof readSafetensorsHeader>;

  constructor(fixture: string) {
    this.#file = join(fixture, 'reference.safetensors');
    this.#header = readSafetensorsHeader(this.#file);
  }

  /** Token ids of the prompts, by number. */
  prompts(): number[][] {
    const prompts: number[][] = [];
    for (let index = 0; this.#header.tensors.has(`ids.${index}`); index++) prompts.push([...this.ints(`ids.${index}`)]);
    return prompts;
  }

  has(name: string): boolean {
    return this.#header.tensors.has(name);
  }

  ints(name: string): Int32Array {
    return new Int32Array(this.#bytes(name));
  }

  /** Rows of a float matrix. */
  rows(name: string): Float32Array[] {
    const values = new Float32Array(this.#bytes(name)); // [rows, columns]
    const [numRows, width] = this.#header.tensors.get(name)!.shape as [number, number];
    return Array.from({ length: numRows }, (_, row) => values.subarray(row * width, (row + 1) * width));
  }

  #bytes(name: string): ArrayBuffer {
    const tensor = this.#header.tensors.get(name)!;
    const bytes = readFileSync(this.#file).subarray(tensor.offset, tensor.offset + tensor.bytes);
    return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  }
}

export function maxDifference(actual: readonly ArrayLike<number>[], expected: readonly ArrayLike<number>[]): number {
  if (actual.length !== expected.length) return Infinity;
  let max = 0;
  for (const [row, values] of expected.entries()) {
    if (actual[row]!.length !== values.length) return Infinity;
    // A NaN on either side makes the difference infinite.
    for (let index = 0; index < values.length; index++) {
      const difference = Math.abs(actual[row]![index]! - values[index]!);
      if (!(difference <= max)) max = Number.isNaN(difference) ? Infinity : difference;
    }
  }
  return max;
}

/** Mean over rows of KL(softmax(expected) || softmax(actual)). */
export function meanKl(actual: readonly ArrayLike<number>[], expected: readonly ArrayLike<number>[]): number {
  if (actual.length !== expected.length || expected.length === 0) return Infinity;
  let sum = 0;
  for (const [row, values] of expected.entries()) {
    const p = logSoftmax(values);
    const q = logSoftmax(actual[row]!);
    for (let index = 0; index < p.length; index++) sum += Math.exp(p[index]!) * (p[index]! - q[index]!);
  }
  return sum / expected.length;
}

function logSoftmax(values: ArrayLike<number>): number[] {
  const logits = Array.from(values);
  const max = Math.max(...logits);
  const lse = max + Math.log(logits.reduce((total, value) => total + Math.exp(value - max), 0));
  return logits.map((value) => value - lse);
}
