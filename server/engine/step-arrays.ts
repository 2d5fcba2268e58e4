const BUFFER_BYTES = 4096;

/**
 * New arrays for the batch of one step. They share a buffer as far as it goes: an array with one of its own takes the
 * addon longer to read than all else about it.
 */
export class StepArrays {
  #buffer = new ArrayBuffer(BUFFER_BYTES);
  #used = 0;

  int32(length: number): Int32Array {
    const at = this.#take(4 * length);
    return new Int32Array(this.#buffer, at, length);
  }

  uint32(length: number): Uint32Array {
    const at = this.#take(4 * length);
    return new Uint32Array(this.#buffer, at, length);
  }

  float32(length: number): Float32Array {
    const at = this.#take(4 * length);
    return new Float32Array(this.#buffer, at, length);
  }

  uint8(length: number): Uint8Array {
    const at = this.#take(length);
    return new Uint8Array(this.#buffer, at, length);
  }

  /** Where so many bytes begin in a buffer that has room for them. */
  #take(bytes: number): number {
    if (this.#used + bytes > this.#buffer.byteLength) {
      this.#buffer = new ArrayBuffer(Math.max(BUFFER_BYTES, bytes));
      this.#used = 0;
    }
    const at = this.#used;
    this.#used = at + Math.ceil(bytes / 4) * 4;
    return at;
  }
}
