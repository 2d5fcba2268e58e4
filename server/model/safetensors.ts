import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { StartupError } from '../errors.js';
import { isJsonObject, parseJsonObject } from './json-file.js';

/** One tensor as a shard's header describes it; the dtype may be one that no checkpoint of ours may use. */
export interface HeaderTensor {
  /** path of the shard */
  file: string;
  dtype: string;
  shape: number[];
  /** absolute byte offset in the file */
  offset: number;
  bytes: number;
}

export interface SafetensorsHeader {
  tensors: Map<string, HeaderTensor>;
  /** the header's own bytes */
  headerBytes: Buffer;
}

const MAX_HEADER_BYTES = 100_000_000;
const MAX_DIMS = 8;

/** bits per element */
const DTYPE_BITS: Record<string, number> = {
  F4: 4,
  F6_E2M3: 6,
  F6_E3M2: 6,
  BOOL: 8,
  U8: 8,
  I8: 8,
  F8_E4M3: 8,
  F8_E5M2: 8,
  F8_E8M0: 8,
  U16: 16,
  I16: 16,
  F16: 16,
  BF16: 16,
  U32: 32,
  I32: 32,
  F32: 32,
  U64: 64,
  I64: 64,
  F64: 64,
  C64: 64,
};

/**
 * Reads and checks the header of one safetensors file without touching its tensors: sizes, duplicate keys, dtype x
 * shape against the byte span, overlaps, and that the file ends where the last tensor ends.
 */
export function readSafetensorsHeader(file: string): SafetensorsHeader {
  const { fileBytes, headerBytes } = readHeaderBytes(file);
  const header = parseJsonObject(headerBytes.toString('utf8'), `The header of ${file}`);
  const dataStart = 8 + headerBytes.length;
  const tensors = new Map<string, HeaderTensor>();
  let dataEnd = dataStart;
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    const tensor = readHeaderTensor(entry, name, file, dataStart);
    tensors.set(name, tensor);
    dataEnd = Math.max(dataEnd, tensor.offset + tensor.bytes);
  }
  if (dataEnd > fileBytes) {
    const cut = [...tensors].find(([, tensor]) => tensor.offset + tensor.bytes > fileBytes)?.[0];
    throw new StartupError(
      `${file} is truncated: it has ${fileBytes} bytes but its header describes ${dataEnd} (tensor "${cut}" is cut off); download the shard again.`,
    );
  }
  if (dataEnd < fileBytes) {
    throw new StartupError(
      `${file} has ${fileBytes - dataEnd} bytes after its last tensor; its header and its data do not belong together, download the shard again.`,
    );
  }
  checkOverlaps(tensors, file);
  return { tensors, headerBytes };
}

function readHeaderBytes(file: string): { fileBytes: number; headerBytes: Buffer } {
  let fd: number;
  try {
    fd = openSync(file, 'r');
  } catch (error) {
    throw new StartupError(`${file} cannot be read: ${(error as Error).message}.`);
  }
  try {
    const fileBytes = fstatSync(fd).size;
    const prefix = Buffer.alloc(8);
    if (fileBytes < 8 || readSync(fd, prefix, 0, 8, 0) !== 8) {
      throw new StartupError(`${file} has ${fileBytes} bytes, too few for a safetensors file; download it again.`);
    }
    const headerLength = prefix.readBigUInt64LE(0);
    if (headerLength > BigInt(MAX_HEADER_BYTES)) {
      throw new StartupError(
        `${file} is no safetensors file: its header would have ${headerLength} bytes; at most ${MAX_HEADER_BYTES} are allowed.`,
      );
    }
    const length = Number(headerLength);
    if (8 + length > fileBytes) {
      throw new StartupError(
        `${file} is truncated: it has ${fileBytes} bytes but its header alone needs ${8 + length}; download the shard again.`,
      );
    }
    const headerBytes = Buffer.alloc(length);
    if (readSync(fd, headerBytes, 0, length, 8) !== length) throw new StartupError(`${file} ended while being read.`);
    return { fileBytes, headerBytes };
  } finally {
    closeSync(fd);
  }
}

function readHeaderTensor(entry: unknown, name: string, file: string, dataStart: number): HeaderTensor {
  const fail = (problem: string): never => {
    throw new StartupError(`${file}: tensor "${name}" ${problem}.`);
  };
  if (!isJsonObject(entry)) return fail('is not described by an object');
  const { dtype, shape, data_offsets: offsets } = entry;
  if (typeof dtype !== 'string' || DTYPE_BITS[dtype] === undefined) {
    return fail(`has the unknown dtype ${JSON.stringify(dtype)}`);
  }
  if (!Array.isArray(shape) || shape.length > MAX_DIMS || !shape.every(isCount)) {
    return fail(`has the invalid shape ${JSON.stringify(shape)}`);
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount)) {
    return fail(`has the invalid data_offsets ${JSON.stringify(offsets)}`);
  }
  const [begin, end] = offsets as [number, number];
  if (end < begin) return fail(`has data_offsets [${begin}, ${end}] that end before they begin`);
  // Zeros are multiplied last, so that a shape cannot hide an overflow behind one.
  let bits = DTYPE_BITS[dtype];
  for (const dim of shape as number[]) bits *= dim === 0 ? 1 : dim;
  if (!Number.isSafeInteger(bits)) return fail(`has the shape ${JSON.stringify(shape)}, whose size overflows`);
  const bytes = shape.includes(0) ? 0 : bits / 8;
  if (bytes !== end - begin) {
    return fail(`of ${dtype} ${JSON.stringify(shape)} needs ${bytes} bytes but has ${end - begin}`);
  }
  if (!Number.isSafeInteger(dataStart + end)) return fail(`has data_offsets that overflow`);
  return { file, dtype, shape: shape as number[], offset: dataStart + begin, bytes };
}

function isCount(value: unknown): boolean {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0;
}

function checkOverlaps(tensors: Map<string, HeaderTensor>, file: string): void {
  const byOffset = [...tensors].filter(([, tensor]) => tensor.bytes > 0).sort((a, b) => a[1].offset - b[1].offset);
  for (let i = 1; i < byOffset.length; i++) {
    const [name, tensor] = byOffset[i]!;
    const [previousName, previous] = byOffset[i - 1]!;
    if (tensor.offset < previous.offset + previous.bytes) {
      throw new StartupError(`${file}: tensors "${previousName}" and "${name}" overlap; the file is damaged.`);
    }
  }
}
