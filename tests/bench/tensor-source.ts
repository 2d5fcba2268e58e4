/** Values of tensors as float32: of a checkpoint's files, or random ones. */
import { closeSync, openSync, readSync } from 'node:fs';
import type { Checkpoint, TensorEntry } from '../../server/model/spec.js';
import type { TensorSource } from './deepseek2-gguf.js';

const RANDOM_VALUES = 2 ** 20;

/** Reads each tensor whole when asked; FP8 ones are multiplied by their block scales. */
export class CheckpointSource implements TensorSource {
  readonly #entries: ReadonlyMap<string, TensorEntry>;
  readonly #blockSize: [number, number] | null;

  constructor({ tensors, spec }: Checkpoint) {
    this.#entries = new Map(tensors.map((entry) => [entry.name, entry]));
    this.#blockSize = spec.weightBlockSize;
  }

  *pieces(name: string): Iterable<Float32Array> {
    const values = this.#read(name);
    const entry = this.#entries.get(name)!;
    if (entry.dtype === 'F8_E4M3') this.#scale(values, entry);
    yield values;
  }

  #read(name: string): Float32Array {
    const entry = this.#entries.get(name);
    if (entry === undefined) throw new Error(`The checkpoint has no tensor ${name}.`);
    const bytes = Buffer.alloc(entry.bytes);
    const descriptor = openSync(entry.file, 'r');
    try {
      if (readSync(descriptor, bytes, 0, entry.bytes, entry.offset) !== entry.bytes) {
        throw new Error(`${entry.file} ends before ${name} does.`);
      }
    } finally {
      closeSync(descriptor);
    }
    const { dtype } = entry;
    if (dtype === 'F16') throw new Error(`${name} is F16, which is not converted here.`);
    const count = entry.shape.reduce((product, size) => product * size, 1);
    const values = new Float32Array(count);
    const bits = new Uint32Array(values.buffer);
    for (let i = 0; i < count; i++) {
      if (dtype === 'F8_E4M3') values[i] = E4M3[bytes[i]!]!;
      else bits[i] = dtype === 'BF16' ? bytes.readUInt16LE(2 * i) << 16 : bytes.readUInt32LE(4 * i);
    }
    return values;
  }

  #scale(values: Float32Array, { name, shape }: TensorEntry): void {
    const scales = this.#read(`${name}_scale_inv`); // [ceil(rows / block rows), ceil(columns / block columns)]
    const [blockRows, blockColumns] = this.#blockSize!;
    const [rows, columns] = shape as [number, number];
    const scalesPerRow = Math.ceil(columns / blockColumns);
    for (let row = 0; row < rows; row++) {
      const first = Math.floor(row / blockRows) * scalesPerRow;
      for (let column = 0; column < columns; column++) {
        values[row * columns + column]! *= scales[first + Math.floor(column / blockColumns)]!;
      }
    }
  }
}

const E4M3 = Float32Array.from({ length: 256 }, (_, code) => {
  const exponent = (code >> 3) & 15;
  const mantissa = code & 7;
  const size = exponent === 0 ? mantissa * 2 ** -9 : (1 + mantissa / 8) * 2 ** (exponent - 7);
  return code & 128 ? -size : size;
});

/** Normals of a size that keeps activations finite; norms are 1. The same values come again, at another place. */
export class RandomSource implements TensorSource {
  readonly #pool = new Float32Array(RANDOM_VALUES);
  #state = 1;

  constructor() {
    for (let i = 0; i < RANDOM_VALUES; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - this.#uniform()));
      this.#pool[i] = 0.02 * radius * Math.cos(2 * Math.PI * this.#uniform());
    }
  }

  *pieces(name: string, shape: readonly number[]): Iterable<Float32Array> {
    let rest = shape.reduce((product, size) => product * size, 1);
    if (name.endsWith('norm.weight')) {
      yield new Float32Array(rest).fill(1);
      return;
    }
    while (rest > 0) {
      const first = 32 * Math.floor((this.#uniform() * RANDOM_VALUES) / 64);
      const piece = this.#pool.subarray(first, Math.min(RANDOM_VALUES, first + rest));
      rest -= piece.length;
      yield piece;
    }
  }

  /** Lehmer's generator modulo 2^31 - 1: the same file every time */
  #uniform(): number {
    this.#state = (this.#state * 48271) % 2147483647;
    return this.#state / 2147483647;
  }
}
