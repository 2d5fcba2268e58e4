import { MAX_DRAFTS } from './step-batch.js';

/** Decides which sequences run the MTP module and how many drafts they get. Never changes what is sampled. */
export interface DraftPolicy {
  /** false where no sequence ever drafts */
  readonly isOn: boolean;
  /**
   * Whether a sequence that starts (again), one of numSequences then, runs the MTP module from its first token on.
   * numLost cached tokens have no entries of it, and would have to be computed again.
   */
  wantsMtp(numSequences: number, numLost: number): boolean;
  /** A sequence was admitted with that answer. */
  admit(runsMtp: boolean): void;
  /**
   * Drafts for the next step of each of numDrafting sequences among numSequences; null: the MTP module is not worth
   * its time any more, and they stop running it.
   */
  numDrafts(numSequences: number, numDrafting: number): number | null;
  /** A verified sequence: of its drafts, the first numAccepted were accepted. */
  observeVerify(numDrafted: number, numAccepted: number): void;
  /** A step without prefill. */
  observeStep(cost: StepCost): void;
}

export interface StepCost {
  /** of the decoder layers */
  numRows: number;
  mainMicros: number;
  /** from one step to the next: scheduling, and the way to the engine thread and back; null for one launched ahead */
  otherMicros: number | null;
  /** sequences that drafted, and drafts that each of them got */
  numDrafting: number;
  numDrafts: number;
  draftMicros: number;
}

/** Always the same number of drafts. */
export class FixedDrafts implements DraftPolicy {
  readonly #count: number;

  constructor(count: number) {
    if (!Number.isInteger(count) || count < 0 || count > MAX_DRAFTS) {
      throw new RangeError(`${count} drafts a step are not possible; it must be 0 to ${MAX_DRAFTS}`);
    }
    this.#count = count;
  }

  get isOn(): boolean {
    return this.#count > 0;
  }

  wantsMtp(): boolean {
    return this.isOn;
  }

  numDrafts(): number {
    return this.#count;
  }

  admit(): void {}

  observeVerify(): void {}

  observeStep(): void {}
}
