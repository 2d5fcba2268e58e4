/** MessagePack, as much of it as events are made of: floats, whole numbers, text, lists and nil. */

/** A number is written as a whole one; a float is marked as such. */
export type MsgpackValue = null | number | bigint | string | Float | readonly MsgpackValue[] | Int32Array;

/** A number that is written as a float, whole or not. */
export class Float {
  readonly value: number;

  constructor(value: number) {
    this.value = value;
  }
}

export function encodeMsgpack(value: MsgpackValue): Buffer {
  const parts: Buffer[] = [];
  write(value, parts);
  return Buffer.concat(parts);
}

function write(value: MsgpackValue, parts: Buffer[]): void {
  if (value === null) parts.push(Buffer.of(0xc0));
  else if (typeof value === 'string') writeText(value, parts);
  else if (typeof value === 'number') writeInteger(BigInt(value), parts);
  else if (typeof value === 'bigint') writeInteger(value, parts);
  else if (value instanceof Float) {
    const bytes = Buffer.of(0xcb, 0, 0, 0, 0, 0, 0, 0, 0);
    bytes.writeDoubleBE(value.value, 1);
    parts.push(bytes);
  } else {
    parts.push(head(value.length, 0x90, 16, [null, 0xdc, 0xdd]));
    for (const item of value) write(item, parts);
  }
}

/** Not negative, and at most 64 bits: ids, sizes and hashes. */
function writeInteger(value: bigint, parts: Buffer[]): void {
  if (value < 0n || value >= 1n << 64n) throw new RangeError(`${value} is no unsigned number of 64 bits`);
  if (value < 1n << 32n) return void parts.push(head(Number(value), 0x00, 128, [0xcc, 0xcd, 0xce]));
  const bytes = Buffer.of(0xcf, 0, 0, 0, 0, 0, 0, 0, 0);
  bytes.writeBigUInt64BE(value, 1);
  parts.push(bytes);
}

function writeText(text: string, parts: Buffer[]): void {
  const bytes = Buffer.from(text, 'utf8');
  parts.push(head(bytes.length, 0xa0, 32, [0xd9, 0xda, 0xdb]), bytes);
}

/** A number below `limit` within the first byte, or behind the code of 1, 2 or 4 bytes; null: there is no such code. */
function head(value: number, base: number, limit: number, codes: readonly (number | null)[]): Buffer {
  if (value < limit) return Buffer.of(base | value);
  const width = codes[0] !== null && value < 1 << 8 ? 1 : value < 1 << 16 ? 2 : 4;
  const bytes = Buffer.alloc(1 + width);
  bytes[0] = codes[width === 4 ? 2 : width - 1]!;
  bytes.writeUIntBE(value, 1, width);
  return bytes;
}
