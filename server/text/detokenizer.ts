import type { Tokenizer } from './tokenizer.js';

/** Without a state of its own: it is only ever given whole characters, or ones that will never be whole. */
const DECODER = new TextDecoder('utf-8', { ignoreBOM: true });
const NO_BYTES = new Uint8Array(0); // [0]

/**
 * Token ids -> text of one sequence and phase, as they come. Bytes of an unfinished character wait for the next
 * token; what is still unfinished at the end becomes U+FFFD.
 */
export class Detokenizer {
  readonly #tokenizer: Tokenizer;
  #unfinished: Uint8Array = NO_BYTES; // [0..3]

  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
  }

  push(id: number): string {
    let bytes = this.#tokenizer.bytesOf(id);
    if (this.#unfinished.length > 0) bytes = Buffer.concat([this.#unfinished, bytes]);
    const length = finishedLength(bytes);
    this.#unfinished = length === bytes.length ? NO_BYTES : bytes.subarray(length);
    return length === 0 ? '' : DECODER.decode(length === bytes.length ? bytes : bytes.subarray(0, length));
  }

  end(): string {
    const rest = this.#unfinished;
    this.#unfinished = NO_BYTES;
    return rest.length === 0 ? '' : DECODER.decode(rest);
  }
}

/** Bytes up to a last character that more bytes could still make whole. */
function finishedLength(bytes: Uint8Array): number {
  const { length } = bytes;
  for (let back = 1; back <= 3 && back <= length; back++) {
    const lead = bytes[length - back]!;
    if (lead >= 0x80 && lead < 0xc0) continue;
    const second = back > 1 ? bytes[length - back + 1]! : null;
    return numBytesOf(lead, second) > back ? length - back : length;
  }
  return length;
}

/** Length of a character by its first byte and, where it is there, its second; 1 where it can be no character. */
function numBytesOf(lead: number, second: number | null): number {
  if (lead < 0xc2 || lead > 0xf4) return 1;
  const least = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80;
  const most = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf;
  if (second !== null && (second < least || second > most)) return 1;
  return lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}
