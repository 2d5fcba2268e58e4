/**
 * Writes GGUF version 3: a header, metadata, tensor descriptions, and data aligned to 32 bytes. Little-endian.
 * The layout is that of ggml's specification (docs/gguf.md of the ggml project).
 */
import { closeSync, openSync, writeSync } from 'node:fs';

const MAGIC = 0x46554747;
const VERSION = 3;
const ALIGNMENT = 32;

const VALUE = { uint32: 4, int32: 5, float32: 6, bool: 7, string: 8, array: 9 } as const;

/** numbers carry their type, since JavaScript's do not */
export type GgufValue =
  | { uint32: number }
  | { float32: number }
  | { bool: boolean }
  | { string: string }
  | { strings: string[] }
  | { int32s: number[] };

export type GgufType = 'F32' | 'BF16' | 'Q8_0';

const TYPE_ID: Record<GgufType, number> = { F32: 0, Q8_0: 8, BF16: 30 };
/** Q8_0: 32 values share an f16 scale */
const BLOCK_VALUES = 32;
const BLOCK_BYTES = 2 + BLOCK_VALUES;

export interface GgufTensor {
  name: string;
  type: GgufType;
  /** outermost first, as in safetensors; GGUF lists them the other way round */
  shape: number[];
  /** all values in order, in pieces of any size that divides by 32 */
  values(): Iterable<Float32Array>;
}

/** Writes the file; throws where a tensor's pieces do not add up to its shape. */
export function writeGguf(
  file: string,
  metadata: ReadonlyMap<string, GgufValue>,
  tensors: readonly GgufTensor[],
): void {
  const head: Buffer[] = [u32(MAGIC), u32(VERSION), u64(tensors.length), u64(metadata.size)];
  for (const [key, value] of metadata) head.push(text(key), encode(value));
  let offset = 0;
  for (const { name, type, shape } of tensors) {
    head.push(text(name), u32(shape.length), ...shape.toReversed().map(u64), u32(TYPE_ID[type]), u64(offset));
    offset += padded(bytesOf(type, countOf(shape)));
  }
  const descriptor = openSync(file, 'w');
  try {
    const header = Buffer.concat(head);
    writeAll(descriptor, header);
    writeAll(descriptor, Buffer.alloc(padded(header.length) - header.length));
    for (const tensor of tensors) writeTensor(descriptor, tensor);
  } finally {
    closeSync(descriptor);
  }
}

function writeTensor(descriptor: number, tensor: GgufTensor): void {
  const { name, type, shape } = tensor;
  let count = 0;
  for (const piece of tensor.values()) {
    count += piece.length;
    writeAll(descriptor, convert(piece, type));
  }
  if (count !== countOf(shape)) throw new Error(`${name} has ${countOf(shape)} values, ${count} came.`);
  const bytes = bytesOf(type, count);
  writeAll(descriptor, Buffer.alloc(padded(bytes) - bytes));
}

function writeAll(descriptor: number, buffer: Buffer): void {
  for (let at = 0; at < buffer.length;) at += writeSync(descriptor, buffer, at);
}

function convert(values: Float32Array, type: GgufType): Buffer {
  if (type === 'F32') return Buffer.from(values.buffer, values.byteOffset, values.byteLength);
  return type === 'BF16' ? toBf16(values) : toQ8(values);
}

/** to the nearest, ties to even; finite values */
function toBf16(values: Float32Array): Buffer {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  const out = new Uint16Array(values.length);
  for (let i = 0; i < out.length; i++) out[i] = (bits[i]! + 0x7fff + ((bits[i]! >>> 16) & 1)) >>> 16;
  return Buffer.from(out.buffer);
}

/** blocks of 32: an f16 scale = largest magnitude / 127, then 32 signed bytes */
export function toQ8(values: Float32Array): Buffer {
  const out = Buffer.alloc(bytesOf('Q8_0', values.length));
  for (let block = 0, at = 0; block < values.length; block += BLOCK_VALUES, at += BLOCK_BYTES) {
    let largest = 0;
    for (let i = block; i < block + BLOCK_VALUES; i++) largest = Math.max(largest, Math.abs(values[i]!));
    const inverse = largest === 0 ? 0 : 127 / largest;
    out.writeUInt16LE(toF16(largest / 127), at);
    for (let i = 0; i < BLOCK_VALUES; i++) out[at + 2 + i] = Math.round(values[block + i]! * inverse);
  }
  return out;
}

/** bits of the nearest f16, for 0 <= value < 65504; ties away from zero, which no scale here depends on */
export function toF16(value: number): number {
  const exponent = value < 2 ** -14 ? -14 : Math.floor(Math.log2(value));
  const steps = Math.round(value / 2 ** (exponent - 10));
  return exponent === -14 ? steps : ((exponent + 14) << 10) + steps;
}

function countOf(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

function bytesOf(type: GgufType, count: number): number {
  if (type === 'Q8_0') return (count / BLOCK_VALUES) * BLOCK_BYTES;
  return count * (type === 'F32' ? 4 : 2);
}

function padded(bytes: number): number {
  return Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;
}

function encode(value: GgufValue): Buffer {
  if ('uint32' in value) return Buffer.concat([u32(VALUE.uint32), u32(value.uint32)]);
  if ('bool' in value) return Buffer.concat([u32(VALUE.bool), Buffer.from([value.bool ? 1 : 0])]);
  if ('string' in value) return Buffer.concat([u32(VALUE.string), text(value.string)]);
  if ('float32' in value) {
    const bytes = Buffer.alloc(4);
    bytes.writeFloatLE(value.float32);
    return Buffer.concat([u32(VALUE.float32), bytes]);
  }
  const head = (type: number, length: number): Buffer[] => [u32(VALUE.array), u32(type), u64(length)];
  if ('strings' in value) {
    return Buffer.concat([...head(VALUE.string, value.strings.length), ...value.strings.map(text)]);
  }
  return Buffer.concat([...head(VALUE.int32, value.int32s.length), ...value.int32s.map(u32)]);
}

function text(value: string): Buffer {
  const bytes = Buffer.from(value);
  return Buffer.concat([u64(bytes.length), bytes]);
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

function u64(value: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}
