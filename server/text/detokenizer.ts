import type { Tokenizer } from './tokenizer.js';

/**
 * Token ids -> text of one sequence and phase, as they come. Bytes of an unfinished character wait for the next
 * token; what is still unfinished at the end becomes U+FFFD.
 */
export class Detokenizer {
  readonly #tokenizer: Tokenizer;
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });

  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
  }

  push(id: number): string {
    return this.#decoder.decode(this.#tokenizer.bytesOf(id), { stream: true });
  }

  end(): string {
    return this.#decoder.decode();
  }
}
