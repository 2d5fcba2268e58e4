import type { StepCost } from './draft-policy.js';

/** what an estimate is the median of: interrupted steps do not move it, and what is long past is forgotten */
const WINDOW = 15;

/** Estimates by count, each from its latest observations. */
class Estimates {
  readonly #observed = new Map<number, number[]>(); // bucket -> [1 .. WINDOW] latest last
  readonly #medians = new Map<number, number>(); // bucket -> median

  get isEmpty(): boolean {
    return this.#medians.size === 0;
  }

  add(count: number, value: number): void {
    const bucket = bucketOf(count);
    const values = [...(this.#observed.get(bucket) ?? []), value].slice(-WINDOW);
    this.#observed.set(bucket, values);
    this.#medians.set(bucket, [...values].sort((a, b) => a - b)[(values.length - 1) >> 1]!);
  }

  /** The count nearest to this one that was observed, and its estimate. */
  nearest(count: number): { count: number; value: number } | undefined {
    const bucket = bucketOf(count);
    let best: number | undefined;
    for (const known of this.#medians.keys()) {
      if (best === undefined || Math.abs(known - bucket) < Math.abs(best - bucket)) best = known;
    }
    return best === undefined ? undefined : { count: best, value: this.#medians.get(best)! };
  }

  /** Along the line between the neighbours that were observed, or through the last two beyond them. */
  onLine(count: number): number | undefined {
    const exact = this.#medians.get(bucketOf(count));
    if (exact !== undefined) return exact;
    const known = [...this.#medians.keys()].sort((a, b) => a - b);
    if (known.length < 2) return this.nearest(count)?.value;
    const above = known.findIndex((other) => other > count);
    const right = above === -1 ? known.length - 1 : Math.max(1, above);
    const [x0, x1] = [known[right - 1]!, known[right]!];
    const [y0, y1] = [this.#medians.get(x0)!, this.#medians.get(x1)!];
    return Math.max(y0 + ((y1 - y0) * (count - x0)) / (x1 - x0), Math.min(y0, y1) / 2);
  }
}

/** What steps cost, learnt from steps: microseconds of the decoder layers by rows, and of drafting by sequences. */
export class CostModel {
  readonly #main = new Estimates();
  readonly #other = new Estimates(); // of a step, whatever it computes
  readonly #firstDraft = new Estimates();
  readonly #laterDraft = new Estimates();

  get isKnown(): boolean {
    return !this.#main.isEmpty && !this.#firstDraft.isEmpty;
  }

  observe({ numRows, mainMicros, otherMicros, numDrafting, numDrafts, draftMicros }: StepCost): void {
    this.#main.add(numRows, mainMicros);
    this.#other.add(0, otherMicros);
    if (numDrafting === 0 || numDrafts === 0) return;
    if (numDrafts === 1) this.#firstDraft.add(numDrafting, draftMicros);
    else {
      const first = this.#draft(this.#firstDraft, numDrafting) ?? draftMicros / numDrafts;
      this.#laterDraft.add(numDrafting, Math.max(0, draftMicros - first) / (numDrafts - 1));
    }
  }

  /** Microseconds of a step of so many sequences, numDrafting of which verify and draw numDrafts each. */
  step(numSequences: number, numDrafting: number, numDrafts: number): number {
    const other = this.#other.nearest(0)?.value ?? 0;
    const main = other + (this.main(numSequences + numDrafting * numDrafts) ?? 0);
    if (numDrafts === 0) return main;
    const first = this.#draft(this.#firstDraft, numDrafting) ?? 0;
    const later = this.#draft(this.#laterDraft, numDrafting) ?? first;
    return main + first + (numDrafts - 1) * later;
  }

  /** Microseconds of the decoder layers for so many rows. */
  main(numRows: number): number | undefined {
    return this.#main.onLine(numRows);
  }

  /** Of a number of sequences that was not observed: it grows as the decoder layers' time does. */
  #draft(estimates: Estimates, numDrafting: number): number | undefined {
    const nearest = estimates.nearest(numDrafting);
    if (nearest === undefined || nearest.count === bucketOf(numDrafting)) return nearest?.value;
    return (nearest.value * this.main(numDrafting)!) / this.main(nearest.count)!;
  }
}

/** Counts up to 8 are kept apart, larger ones by eighths of a power of two. */
function bucketOf(count: number): number {
  if (count <= 8) return count;
  const unit = 2 ** (Math.floor(Math.log2(count)) - 3);
  return Math.round(count / unit) * unit;
}
