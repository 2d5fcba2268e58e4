/**
 * The ZeroMQ Message Transport Protocol 3.0 with the NULL mechanism (rfc.zeromq.org, 23/ZMTP): bytes of one peer ->
 * frames, and frames -> bytes. Frame: flags, length (1 or 8 bytes), body.
 */

const MORE = 1;
const LONG = 2;
const COMMAND = 4;

const GREETING_BYTES = 64;
const MAX_VERSION_3_MINOR = 0;

export interface Frame {
  isCommand: boolean;
  hasMore: boolean;
  body: Buffer;
}

/** Signature, version, mechanism, as-server, filler. */
export function greeting(): Buffer {
  const bytes = Buffer.alloc(GREETING_BYTES);
  bytes[0] = 0xff;
  bytes[8] = 0x01;
  bytes[9] = 0x7f;
  bytes[10] = 3;
  bytes[11] = MAX_VERSION_3_MINOR;
  bytes.write('NULL', 12, 'latin1');
  return bytes;
}

export function frame(body: Buffer, flags: { hasMore?: boolean; isCommand?: boolean } = {}): Buffer {
  const bits = (flags.hasMore ? MORE : 0) | (flags.isCommand ? COMMAND : 0);
  if (body.length < 256) return Buffer.concat([Buffer.of(bits, body.length), body]);
  const head = Buffer.alloc(9);
  head[0] = bits | LONG;
  head.writeBigUInt64BE(BigInt(body.length), 1);
  return Buffer.concat([head, body]);
}

/** A command with its name before its data. */
export function command(name: string, data: Buffer): Buffer {
  const text = Buffer.from(name, 'latin1');
  return frame(Buffer.concat([Buffer.of(text.length), text, data]), { isCommand: true });
}

/** What both sides say after the greeting: their kind of socket. */
export function ready(socketType: string): Buffer {
  const name = Buffer.from('Socket-Type', 'latin1');
  const value = Buffer.from(socketType, 'latin1');
  const size = Buffer.alloc(4);
  size.writeUInt32BE(value.length);
  return command('READY', Buffer.concat([Buffer.of(name.length), name, size, value]));
}

/** Bytes of a peer, as they come, -> its frames. A peer that speaks otherwise, or too long, makes push() throw. */
export class FrameReader {
  readonly #maxBytes: number;
  #rest: Buffer = Buffer.alloc(0);
  #isGreeted = false;

  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
  }

  push(bytes: Buffer): Frame[] {
    this.#rest = Buffer.concat([this.#rest, bytes]);
    if (!this.#isGreeted) {
      if (this.#rest.length < GREETING_BYTES) return [];
      this.#checkGreeting(this.#rest.subarray(0, GREETING_BYTES));
      this.#rest = this.#rest.subarray(GREETING_BYTES);
      this.#isGreeted = true;
    }
    const frames: Frame[] = [];
    for (let next = this.#take(); next !== null; next = this.#take()) frames.push(next);
    return frames;
  }

  #checkGreeting(bytes: Buffer): void {
    if (bytes[0] !== 0xff || bytes[9] !== 0x7f) throw new Error('the peer does not speak ZMTP');
    if (bytes[10]! < 3) throw new Error(`the peer speaks ZMTP ${bytes[10]}, not 3`);
    const mechanism = bytes.toString('latin1', 12, 32).replace(/\0+$/, '');
    if (mechanism !== 'NULL') throw new Error(`the peer wants the mechanism ${mechanism}, not NULL`);
  }

  #take(): Frame | null {
    const flags = this.#rest[0];
    if (flags === undefined) return null;
    const headBytes = flags & LONG ? 9 : 2;
    if (this.#rest.length < headBytes) return null;
    const size = flags & LONG ? Number(this.#rest.readBigUInt64BE(1)) : this.#rest[1]!;
    if (size > this.#maxBytes) throw new Error(`the peer sent a frame of ${size} bytes`);
    if (this.#rest.length < headBytes + size) return null;
    const body = this.#rest.subarray(headBytes, headBytes + size);
    this.#rest = this.#rest.subarray(headBytes + size);
    return { isCommand: (flags & COMMAND) !== 0, hasMore: (flags & MORE) !== 0, body };
  }
}
