import assert from 'node:assert/strict';
import { test } from 'node:test';
import { AdaptiveDrafts } from '../../server/engine/adaptive-drafts.js';
import { CostModel } from '../../server/engine/cost-model.js';
import { MAX_DRAFTS } from '../../server/engine/step-batch.js';

/** A made-up machine: what its steps cost, and how likely a draft at each depth is accepted. */
interface Machine {
  main: (numRows: number) => number;
  draft: (numDrafting: number, numDrafts: number) => number;
  /** between steps that are not launched ahead */
  other?: number;
  acceptance: number[]; // [MAX_DRAFTS] given that the drafts before were accepted
}

/** Sequences that all run for `length` tokens, `width` at a time. */
class Simulation {
  readonly policy: AdaptiveDrafts;
  readonly machine: Machine;
  readonly launchesAhead: boolean;
  micros = 0;
  numTokens = 0;
  #random = 12345;

  constructor(machine: Machine, warmUp = true, launchesAhead = false) {
    this.machine = machine;
    this.launchesAhead = launchesAhead;
    this.policy = new AdaptiveDrafts(launchesAhead);
    if (!warmUp) return;
    for (const numRows of [1, 2, 3, 4, 5, 8, 16, 32]) {
      for (const numDrafts of numRows === 1 ? [1, 2] : [0])
        this.#observe(numRows, numDrafts === 0 ? 0 : 1, numDrafts, true);
    }
  }

  /** Runs `count` sequences and returns the time of each token. */
  run(count: number, width: number, length: number): number {
    const [micros, numTokens] = [this.micros, this.numTokens];
    for (let done = 0; done < count; done += width) {
      const sequences = Array.from({ length: width }, () => {
        const runsMtp = this.policy.wantsMtp(width);
        this.policy.admit(runsMtp);
        return { runsMtp, numDrafts: 0, left: length };
      });
      while (sequences.some(({ left }) => left > 0)) this.#step(sequences.filter(({ left }) => left > 0));
    }
    return (this.micros - micros) / (this.numTokens - numTokens);
  }

  #step(sequences: { runsMtp: boolean; numDrafts: number; left: number }[]): void {
    const numRows = sequences.reduce((sum, { numDrafts }) => sum + 1 + numDrafts, 0);
    for (const sequence of sequences) {
      let numAccepted = 0;
      while (numAccepted < sequence.numDrafts && this.#isAccepted(numAccepted)) numAccepted++;
      if (sequence.numDrafts > 0) this.policy.observeVerify(sequence.numDrafts, numAccepted);
      const numTokens = Math.min(sequence.left, 1 + numAccepted);
      sequence.left -= numTokens;
      this.numTokens += numTokens;
      sequence.numDrafts = 0;
    }
    const drafting = sequences.filter(({ runsMtp }) => runsMtp);
    const numDrafts = drafting.length > 0 ? this.policy.numDrafts(sequences.length, drafting.length) : 0;
    for (const sequence of drafting) {
      if (numDrafts === null) sequence.runsMtp = false;
      else sequence.numDrafts = numDrafts;
    }
    const numDrafting = numDrafts === null ? 0 : drafting.length;
    this.micros += this.#observe(numRows, numDrafting, numDrafts ?? 0);
  }

  #observe(numRows: number, numDrafting: number, numDrafts: number, isCalibration = false): number {
    const noise = 0.9 + 0.2 * this.#uniform();
    const mainMicros = noise * this.machine.main(numRows);
    const draftMicros = numDrafting === 0 ? 0 : noise * this.machine.draft(numDrafting, Math.max(1, numDrafts));
    const isAhead = this.launchesAhead && numDrafting === 0;
    const otherMicros = isAhead ? null : (this.machine.other ?? 0);
    const cost = {
      numRows,
      mainMicros,
      otherMicros,
      numDrafting: numDrafts > 0 ? numDrafting : 0,
      numDrafts,
      draftMicros,
    };
    if (isCalibration) this.policy.calibrate(cost);
    else this.policy.observeStep(cost);
    return mainMicros + draftMicros + (otherMicros ?? 0);
  }

  #isAccepted(depth: number): boolean {
    return this.#uniform() < this.machine.acceptance[depth]!;
  }

  #uniform(): number {
    this.#random = (Math.imul(this.#random, 1664525) + 1013904223) >>> 0;
    return this.#random / 2 ** 32;
  }
}

/** A machine that reads weights once a step, whatever the rows; and one whose time goes with the rows. */
const BOUND_BY_BYTES = {
  main: (numRows: number) => 1000 + 20 * numRows,
  draft: (numDrafting: number, numDrafts: number) => (60 + numDrafting) * numDrafts,
};
const BOUND_BY_ROWS = {
  main: (numRows: number) => 100 + 300 * numRows,
  draft: (numDrafting: number, numDrafts: number) => (10 + 50 * numDrafting) * numDrafts,
};

/** Tokens of a step with so many drafts, all of them equally likely. */
function tokensOf(numDrafts: number, acceptance: number): number {
  return (1 - acceptance ** (numDrafts + 1)) / (1 - acceptance);
}

test('all drafts accepted, and rows almost free: as many drafts as there may be', () => {
  const simulation = new Simulation({ ...BOUND_BY_BYTES, acceptance: new Array<number>(MAX_DRAFTS).fill(0.98) });
  const perToken = simulation.run(20, 1, 300);
  const micros = BOUND_BY_BYTES.main(1 + MAX_DRAFTS) + BOUND_BY_BYTES.draft(1, MAX_DRAFTS);
  const best = micros / tokensOf(MAX_DRAFTS, 0.98);
  assert.ok(perToken < 1.1 * best, `${perToken} against ${best}`);
});

test('good drafts of which each costs half a step: nearly the best number, soon', () => {
  // pocket-r1 on two cores
  const machine = {
    main: (rows: number) => 85 + 53 * rows,
    draft: (_: number, count: number) => 35 * count,
    other: 50,
  };
  const simulation = new Simulation({ ...machine, acceptance: new Array<number>(MAX_DRAFTS).fill(0.98) });
  const perToken = simulation.run(12, 1, 200);
  const best = Math.min(
    ...Array.from({ length: MAX_DRAFTS + 1 }, (_, count) => {
      return (machine.main(1 + count) + machine.draft(1, count) + machine.other) / tokensOf(count, 0.98);
    }),
  );
  assert.ok(perToken < 1.08 * best, `${perToken} against ${best}`);
});

test('a first draft that is good and a second that is not: one draft', () => {
  const simulation = new Simulation({
    ...BOUND_BY_BYTES,
    main: (rows) => 800 + 150 * rows,
    acceptance: [0.98, 0.1, 0.1, 0.1],
  });
  const perToken = simulation.run(20, 1, 300);
  const best = (800 + 300 + BOUND_BY_BYTES.draft(1, 1)) / 1.98;
  assert.ok(perToken < 1.05 * best, `${perToken} against ${best}`);
});

for (const [name, costs] of Object.entries({ BOUND_BY_BYTES, BOUND_BY_ROWS })) {
  test(`${name}: no draft accepted costs at most 3 %, at any width`, () => {
    for (const width of [1, 4, 32]) {
      const simulation = new Simulation({ ...costs, acceptance: [0.005, 0, 0, 0] });
      const perToken = simulation.run(20 * width, width, 200);
      const without = costs.main(width) / width;
      assert.ok(perToken < 1.03 * without, `width ${width}: ${perToken} against ${without}`);
    }
  });
}

test('rows that cost what tokens cost: no drafts, however good they are', () => {
  const simulation = new Simulation({ ...BOUND_BY_ROWS, acceptance: [0.9, 0.9, 0.9, 0.9] });
  const perToken = simulation.run(20 * 32, 32, 100);
  const without = BOUND_BY_ROWS.main(32) / 32;
  assert.ok(perToken < 1.03 * without, `${perToken} against ${without}`);
});

test('what becomes acceptable is found again', () => {
  const simulation = new Simulation({ ...BOUND_BY_BYTES, acceptance: [0, 0, 0, 0] });
  simulation.run(100, 1, 100);
  simulation.machine.acceptance = [0.95, 0.95, 0.95, 0.95];
  simulation.run(300, 1, 100);
  assert.ok(simulation.run(20, 1, 100) < 500, 'half the time of a step for each token');
});

test('drafts that would pay if steps without them waited for the host do not where those are launched ahead', () => {
  // 1.2 tokens for 1480 microseconds against one for 1320 without drafts, or for 1020 launched ahead.
  const machine = { ...BOUND_BY_BYTES, other: 300, acceptance: [0.2, 0.2, 0.2, 0.2] };
  const waiting = new Simulation(machine);
  const ahead = new Simulation(machine, true, true);
  for (const simulation of [waiting, ahead]) simulation.run(30, 1, 200);
  assert.ok(waiting.run(20, 1, 200) < 1300, 'they pay');
  assert.ok(ahead.run(20, 1, 200) < 1.03 * 1020, 'they do not');
});

test('costs: a line through what was observed, which interrupted steps do not move', () => {
  const costs = new CostModel();
  assert.equal(costs.isKnown, false);
  const observe = (numRows: number, mainMicros: number, numDrafts = 0, draftMicros = 0) =>
    costs.observe({
      numRows,
      mainMicros,
      otherMicros: 10,
      numDrafting: numDrafts === 0 ? 0 : 1,
      numDrafts,
      draftMicros,
    });
  observe(3, 140);
  observe(1, 100, 1, 20);
  observe(1, 100, 2, 30);
  assert.equal(costs.isKnown, true);
  assert.deepEqual(costs.steps(1, 1, 4).map(Math.round), [110, 150, 180, 210, 240]);
  for (let repeat = 0; repeat < 12; repeat++) observe(3, repeat % 2 === 0 ? 140 : 100_000);
  assert.deepEqual(costs.steps(1, 1, 2).map(Math.round), [110, 150, 180]);
  for (let repeat = 0; repeat < 40; repeat++) observe(1, 200);
  assert.ok(costs.steps(1, 1, 0)[0]! > 150, 'what is past is forgotten');
  assert.ok(costs.steps(1, 1, 1)[1]! >= costs.steps(1, 1, 0)[0]!, 'more rows never take less');
});
