import type { StepCost } from './draft-policy.js';

/** weight of a new observation */
const WEIGHT = 0.1;
/** one step that was interrupted must not move an average far */
const MAX_CHANGE = 2;

/**
 * What steps cost, learnt from steps: microseconds of the decoder layers by rows, and of drafting as shares of that.
 * Whatever makes one observed step slower (a longer context, another program) is taken to slow the others down alike.
 */
export class CostModel {
  readonly #main = new Map<number, number>(); // rows -> microseconds
  readonly #firstDraft = new Map<number, number>(); // sequences -> share of main(sequences)
  readonly #laterDraft = new Map<number, number>(); // sequences -> share of main(sequences)

  get isKnown(): boolean {
    return this.#main.size > 0 && this.#firstDraft.size > 0;
  }

  observe({ numRows, mainMicros, numDrafting, numDrafts, draftMicros }: StepCost): void {
    const before = this.#main.get(bucketOf(numRows));
    const after = update(this.#main, numRows, mainMicros, before);
    if (before !== undefined) {
      for (const [rows, micros] of this.#main) {
        if (rows !== bucketOf(numRows)) this.#main.set(rows, (micros * after) / before);
      }
    }
    if (numDrafting === 0 || numDrafts === 0) return;
    const share = draftMicros / this.main(numDrafting)!;
    if (numDrafts === 1) update(this.#firstDraft, numDrafting, share, this.#firstDraft.get(bucketOf(numDrafting)));
    else {
      const first = valueAt(this.#firstDraft, numDrafting) ?? share / numDrafts;
      const later = Math.max(0, share - first) / (numDrafts - 1);
      update(this.#laterDraft, numDrafting, later, this.#laterDraft.get(bucketOf(numDrafting)));
    }
  }

  /** Microseconds of a step of so many sequences, numDrafting of which verify and draw numDrafts each. */
  step(numSequences: number, numDrafting: number, numDrafts: number): number {
    const main = this.main(numSequences + numDrafting * numDrafts) ?? 0;
    if (numDrafts === 0) return main;
    const first = valueAt(this.#firstDraft, numDrafting) ?? 0;
    const later = valueAt(this.#laterDraft, numDrafting) ?? first;
    return main + (first + (numDrafts - 1) * later) * (this.main(numDrafting) ?? 0);
  }

  /** Microseconds of the decoder layers for so many rows, between and beyond what was observed along a line. */
  main(numRows: number): number | undefined {
    return valueAt(this.#main, numRows, 'line');
  }
}

/** Counts up to 8 are kept apart, larger ones by eighths of a power of two. */
function bucketOf(count: number): number {
  if (count <= 8) return count;
  const unit = 2 ** (Math.floor(Math.log2(count)) - 3);
  return Math.round(count / unit) * unit;
}

function update(values: Map<number, number>, count: number, observed: number, before: number | undefined): number {
  const limited =
    before === undefined ? observed : Math.min(Math.max(observed, before / MAX_CHANGE), before * MAX_CHANGE);
  const after = before === undefined ? limited : before + WEIGHT * (limited - before);
  values.set(bucketOf(count), after);
  return after;
}

/** The value at a count: observed, between its neighbours, or beyond the last ones (as theirs, or along their line). */
function valueAt(
  values: ReadonlyMap<number, number>,
  count: number,
  beyond: 'as last' | 'line' = 'as last',
): number | undefined {
  const exact = values.get(bucketOf(count));
  if (exact !== undefined) return exact;
  const known = [...values.keys()].sort((a, b) => a - b);
  if (known.length === 0) return undefined;
  const above = known.findIndex((other) => other > count);
  if (beyond === 'as last' && (above === 0 || above === -1)) return values.get(known.at(above)!);
  if (known.length === 1) return values.get(known[0]!)! * (beyond === 'line' ? Math.max(1, count / known[0]!) : 1);
  const right = above === -1 ? known.length - 1 : Math.max(1, above);
  const [x0, x1] = [known[right - 1]!, known[right]!];
  const [y0, y1] = [values.get(x0)!, values.get(x1)!];
  return Math.max(y0 + ((y1 - y0) * (count - x0)) / (x1 - x0), Math.min(y0, y1) / 2);
}
