import type { StepCost } from './draft-policy.js';

/** observations that an estimate is made from, and how many steps they are kept */
const WINDOW = 31;
const MAX_AGE = 1024;

/**
 * Estimates by count, each the lower quartile of its latest observations: steps that other programs have interrupted
 * do not move it.
 */
class Estimates {
  readonly #observed = new Map<number, { time: number; value: number }[]>(); // bucket -> [1 .. WINDOW] latest last
  readonly #quartiles = new Map<number, number>(); // bucket -> of what was observed, where it is known already

  get isEmpty(): boolean {
    return this.#observed.size === 0;
  }

  add(count: number, value: number, time: number): void {
    const bucket = bucketOf(count);
    const values = this.#observed.get(bucket);
    this.#quartiles.delete(bucket);
    if (values === undefined) return void this.#observed.set(bucket, [{ time, value }]);
    values.push({ time, value });
    while (values.length > WINDOW || time - values[0]!.time > MAX_AGE) values.shift();
  }

  /** What is known of a count itself. */
  at(count: number): number | undefined {
    const bucket = bucketOf(count);
    const values = this.#observed.get(bucket);
    if (values === undefined) return undefined;
    const quartile = this.#quartiles.get(bucket) ?? quartileOf(values.map(({ value }) => value));
    this.#quartiles.set(bucket, quartile);
    return quartile;
  }

  /** The count nearest to this one that was observed, and its estimate. */
  nearest(count: number): { count: number; value: number } | undefined {
    let best: number | undefined;
    for (const known of this.#observed.keys()) {
      if (best === undefined || Math.abs(known - count) < Math.abs(best - count)) best = known;
    }
    return best === undefined ? undefined : { count: best, value: this.at(best)! };
  }

  /**
   * The straight line closest to what is known of the counts first .. last, or next to them: many observations
   * decide about one slope, so that a count that was seldom met does not look cheap by chance.
   */
  line(first: number, last: number): ((count: number) => number) | undefined {
    const known = [...this.#observed.keys()].sort((a, b) => a - b);
    let within = known.filter((count) => count >= bucketOf(first) && count <= bucketOf(last));
    if (within.length < 2) within = known.sort((a, b) => Math.abs(a - first) - Math.abs(b - first)).slice(0, 2);
    const points = within.map((count) => ({ x: count, y: this.at(count)!, weight: this.#observed.get(count)!.length }));
    if (points.length === 0) return undefined;
    const total = points.reduce((sum, { weight }) => sum + weight, 0);
    const meanX = points.reduce((sum, { x, weight }) => sum + weight * x, 0) / total;
    const meanY = points.reduce((sum, { y, weight }) => sum + weight * y, 0) / total;
    const spread = points.reduce((sum, { x, weight }) => sum + weight * (x - meanX) ** 2, 0);
    const covariance = points.reduce((sum, { x, y, weight }) => sum + weight * (x - meanX) * (y - meanY), 0);
    // More rows never take less time, and never more than in proportion.
    const slope = Math.min(Math.max(spread > 0 ? covariance / spread : meanY / meanX, 0), meanY / meanX);
    return (count) => meanY + slope * (count - meanX);
  }
}

/** What steps cost, learnt from steps: microseconds of the decoder layers by rows, and of drafting by sequences. */
export class CostModel {
  readonly #main = new Estimates();
  readonly #other = new Estimates(); // of a step that was not launched ahead, whatever it computes
  readonly #launchesAhead: boolean;
  readonly #firstDraft = new Estimates();
  readonly #laterDraft = new Estimates();
  #numSteps = 0;

  /** launchesAhead: steps without drafts wait for nothing but the device */
  constructor(launchesAhead = false) {
    this.#launchesAhead = launchesAhead;
  }

  get isKnown(): boolean {
    return !this.#main.isEmpty && !this.#firstDraft.isEmpty;
  }

  observe({ numRows, mainMicros, otherMicros, numDrafting, numDrafts, draftMicros }: StepCost): void {
    const time = ++this.#numSteps;
    this.#main.add(numRows, mainMicros, time);
    if (otherMicros !== null) this.#other.add(0, otherMicros, time);
    if (numDrafting === 0 || numDrafts === 0) return;
    if (numDrafts === 1) this.#firstDraft.add(numDrafting, draftMicros, time);
    else {
      const first = this.#firstDraft.at(numDrafting) ?? draftMicros / numDrafts;
      this.#laterDraft.add(numDrafting, Math.max(0, draftMicros - first) / (numDrafts - 1), time);
    }
  }

  /**
   * Microseconds of a step of so many sequences, numDrafting of which verify and draw count drafts each, for every
   * count 0 .. maxDrafts.
   */
  steps(numSequences: number, numDrafting: number, maxDrafts: number): number[] {
    const main = this.#main.line(numSequences, numSequences + numDrafting * maxDrafts);
    const first = this.#draft(this.#firstDraft, numDrafting) ?? 0;
    const later = this.#draft(this.#laterDraft, numDrafting) ?? first;
    const other = this.#other.at(0) ?? 0;
    return Array.from({ length: maxDrafts + 1 }, (_, count) => {
      const draft = count === 0 ? 0 : first + (count - 1) * later;
      const waiting = count === 0 && this.#launchesAhead ? 0 : other;
      return waiting + (main?.(numSequences + numDrafting * count) ?? 0) + draft;
    });
  }

  /** Of a number of sequences that was not observed: it grows as the decoder layers' time does. */
  #draft(estimates: Estimates, numDrafting: number): number | undefined {
    const nearest = estimates.nearest(numDrafting);
    if (nearest === undefined || nearest.count === bucketOf(numDrafting)) return nearest?.value;
    const main = this.#main.line(Math.min(nearest.count, numDrafting), Math.max(nearest.count, numDrafting))!;
    return (nearest.value * main(numDrafting)) / main(nearest.count);
  }
}

/** Counts up to 8 are kept apart, larger ones by eighths of a power of two. */
function bucketOf(count: number): number {
  if (count <= 8) return count;
  const unit = 2 ** (Math.floor(Math.log2(count)) - 3);
  return Math.round(count / unit) * unit;
}

function quartileOf(values: number[]): number {
  return values.sort((a, b) => a - b)[Math.floor((values.length - 1) / 4)]!;
}
