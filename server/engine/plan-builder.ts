import type { Sequence } from './sequence.js';
import type { PlannedSequence } from './step-plan.js';

/** A step plan in the making, and what is left of its token budget. */
export class PlanBuilder {
  readonly #parts = new Map<Sequence, PlannedSequence>();
  #budget: number;

  constructor(budget: number) {
    this.#budget = budget;
  }

  /** rows that are left */
  get budget(): number {
    return this.#budget;
  }

  parts(): PlannedSequence[] {
    return [...this.#parts.values()];
  }

  add(part: PlannedSequence): void {
    this.#parts.set(part.sequence, part);
    this.#budget -= part.count;
  }

  /** Appends drafts to a part that is sampled. */
  extend(part: PlannedSequence, draftIds: number[]): void {
    part.draftIds = draftIds;
    part.count += draftIds.length;
    part.numSampled += draftIds.length;
    this.#budget -= draftIds.length;
  }

  remove(sequence: Sequence): void {
    const part = this.#parts.get(sequence);
    if (part === undefined) return;
    this.#parts.delete(sequence);
    this.#budget += part.count;
  }
}
