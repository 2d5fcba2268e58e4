import type { WriteStream } from 'node:tty';

const WIDTH = 30;
const LOG_INTERVAL_MS = 5000;

/** Shows how much of the weights is loaded: a bar on a terminal, a line now and then elsewhere. */
export class LoadingProgress {
  readonly #out: Pick<WriteStream, 'write'> & { isTTY?: boolean };
  readonly #log: (line: string) => void;
  #lastLog = performance.now();
  #isShown = false;

  constructor(out: Pick<WriteStream, 'write'> & { isTTY?: boolean }, log: (line: string) => void) {
    this.#out = out;
    this.#log = log;
  }

  update(loadedBytes: number, totalBytes: number): void {
    if (totalBytes === 0) return;
    const share = Math.min(1, loadedBytes / totalBytes);
    const text = `${Math.floor(share * 100)} % of ${sizeText(totalBytes)}`;
    if (this.#out.isTTY) {
      const full = Math.round(share * WIDTH);
      this.#out.write(`\r\x1b[2Kloading [${'#'.repeat(full)}${'.'.repeat(WIDTH - full)}] ${text}`);
      this.#isShown = true;
    } else if (performance.now() - this.#lastLog >= LOG_INTERVAL_MS) {
      this.#lastLog = performance.now();
      this.#log(`loading weights: ${text}`);
    }
  }

  end(): void {
    if (this.#isShown) this.#out.write('\r\x1b[2K');
    this.#isShown = false;
  }
}

export function sizeText(bytes: number): string {
  const units = ['bytes', 'KiB', 'MiB', 'GiB', 'TiB'];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, bytes)) / 10));
  const value = bytes / 2 ** (10 * power);
  return `${power === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[power]}`;
}
