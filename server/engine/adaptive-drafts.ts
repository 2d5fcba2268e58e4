import { CostModel } from './cost-model.js';
import type { DraftPolicy, StepCost } from './draft-policy.js';
import { MAX_DRAFTS } from './step-batch.js';

/** acceptance that is assumed before anything was verified, and how many drafts that is worth */
const PRIOR_ACCEPTANCE = 0.8;
const PRIOR_COUNT = 4;
/** drafts that an average of acceptance reaches back */
const MEMORY = 128;
/** drafts verified before speculation is first given up */
const MIN_VERIFIED = 24;
/** where drafting does not pay, one new sequence in so many tries it again, for so many drafts */
const PROBE_INTERVAL = 32;
const PROBE_DRAFTS = 16;
/** gain at which a sequence starts to run the MTP module, whose prefill is not counted; at which it goes on */
const MIN_GAIN_TO_START = 1.06;
const MIN_GAIN = 1.03;
const MIN_GAIN_OF_MORE = 1.02;
/** steps in a row without gain after which sequences stop running the MTP module */
const MAX_USELESS_STEPS = 16;
/** every so many steps another number of drafts is tried for some steps: in turn none, one more, one fewer */
const EXPLORE_INTERVAL = 192;
const EXPLORE_STEPS = 7;
/** steps that a decision holds while as many sequences run and draft */
const DECISION_STEPS = 16;
/** steps after a change of number that are not counted: caches are still those of the steps before */
const SETTLING_STEPS = 2;

/** The number of drafts that makes most tokens a microsecond, from measured acceptance and measured costs. */
export class AdaptiveDrafts implements DraftPolicy {
  readonly isOn = true;
  readonly #costs: CostModel;
  readonly #acceptance: number[] = new Array<number>(MAX_DRAFTS).fill(PRIOR_ACCEPTANCE); // [MAX_DRAFTS]
  readonly #numVerified: number[] = new Array<number>(MAX_DRAFTS).fill(0); // [MAX_DRAFTS]
  #numSteps = 0;
  #numUselessSteps = 0;
  #numSkipped = 0;
  #probeDrafts = 0;
  #lastDrafts = -1;
  #decision = { numSequences: 0, numDrafting: 0, count: 0, until: 0 };
  #numSettled = 0;

  /** launchesAhead: a step without drafts is launched before the one ahead of it is over, and one with drafts is not */
  constructor(launchesAhead = false) {
    this.#costs = new CostModel(launchesAhead);
  }

  wantsMtp(numSequences: number, numLost = 0): boolean {
    // Cached tokens are given up for a gain that is known, and seldom: so that a prefix that many share gets entries.
    if (numLost > 0 && (!this.#costs.isKnown || this.#isUnsure || !this.#isProbeDue)) return false;
    if (!this.#costs.isKnown) return true;
    if (this.#best(numSequences, numSequences, MIN_GAIN_TO_START) > 0) return true;
    return this.#isUnsure && this.#best(numSequences, numSequences, MIN_GAIN, 1) > 0
      ? true
      : numLost === 0 && this.#isProbeDue;
  }

  admit(runsMtp: boolean): void {
    if (!runsMtp) this.#numSkipped++;
    else if (this.#isProbeDue) {
      this.#numSkipped = 0;
      this.#probeDrafts = PROBE_DRAFTS;
    }
  }

  numDrafts(numSequences: number, numDrafting: number): number | null {
    if (!this.#costs.isKnown) return 1;
    this.#numSteps++;
    const best = this.#decide(numSequences, numDrafting);
    if (best > 0) {
      this.#numUselessSteps = 0;
      return this.#explore(best);
    }
    if (this.#isUnsure || this.#probeDrafts > 0) return 1;
    return ++this.#numUselessSteps > MAX_USELESS_STEPS ? null : 0;
  }

  observeVerify(numDrafted: number, numAccepted: number): void {
    this.#probeDrafts = Math.max(0, this.#probeDrafts - numDrafted);
    for (let depth = 0; depth < Math.min(numDrafted, numAccepted + 1); depth++) {
      const count = Math.min(PRIOR_COUNT + ++this.#numVerified[depth]!, MEMORY);
      const isAccepted = depth < numAccepted ? 1 : 0;
      this.#acceptance[depth]! += (isAccepted - this.#acceptance[depth]!) / count;
    }
  }

  observeStep(cost: StepCost): void {
    this.#numSettled = cost.numDrafts === this.#lastDrafts ? this.#numSettled + 1 : 0;
    this.#lastDrafts = cost.numDrafts;
    if (this.#numSettled >= SETTLING_STEPS) this.#costs.observe(cost);
  }

  /** A step that was timed by itself. */
  calibrate(cost: StepCost): void {
    this.#costs.observe(cost);
  }

  get #isUnsure(): boolean {
    return this.#numVerified[0]! < MIN_VERIFIED;
  }

  get #isProbeDue(): boolean {
    return this.#numSkipped >= PROBE_INTERVAL;
  }

  /** The best number, looked at anew every few steps: that takes as long as some steps' scheduling. */
  #decide(numSequences: number, numDrafting: number): number {
    const { numSequences: before, numDrafting: draftingBefore, until } = this.#decision;
    if (before !== numSequences || draftingBefore !== numDrafting || this.#numSteps >= until) {
      const count = this.#best(numSequences, numDrafting, MIN_GAIN);
      this.#decision = { numSequences, numDrafting, count, until: this.#numSteps + DECISION_STEPS };
    }
    return this.#decision.count;
  }

  /**
   * Drafts with the highest rate, where it is at least `minGain` times the rate without; 0 where there is none. One
   * more draft must gain something too: measured costs are never exact.
   */
  #best(numSequences: number, numDrafting: number, minGain: number, acceptance?: number): number {
    const costs = this.#costs.steps(numSequences, numDrafting, MAX_DRAFTS);
    let best = 0;
    let bestRate = numSequences / costs[0]!;
    let expected = 1; // tokens of a drafting sequence
    let chance = 1; // that all drafts so far are accepted
    for (let count = 1; count <= MAX_DRAFTS; count++) {
      chance *= acceptance ?? this.#acceptanceAt(count - 1);
      expected += chance;
      const rate = (numSequences - numDrafting + numDrafting * expected) / costs[count]!;
      if (rate > (best === 0 ? minGain : MIN_GAIN_OF_MORE) * bestRate) [best, bestRate] = [count, rate];
    }
    return best;
  }

  /** A depth that was never verified is taken to be like the one before. */
  #acceptanceAt(depth: number): number {
    while (depth > 0 && this.#numVerified[depth] === 0) depth--;
    return this.#acceptance[depth]!;
  }

  /** Now and then another number than the best, so that what it would cost stays known. */
  #explore(best: number): number {
    if (this.#numSteps % EXPLORE_INTERVAL >= EXPLORE_STEPS) return best;
    const others = [0, Math.min(best + 1, MAX_DRAFTS), best - 1];
    return others[Math.floor(this.#numSteps / EXPLORE_INTERVAL) % others.length]!;
  }
}
